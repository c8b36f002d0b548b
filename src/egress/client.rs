//! A POST that is bounded in time and size.

use std::{sync::Arc, time::Duration};

use http::{
    HeaderMap, Method, StatusCode,
    header::{CONNECTION, RETRY_AFTER},
};
use reqwest::{Request, redirect, retry};
use rustls::ClientConfig;
use tower::util::MapFutureLayer;
use url::Url;

use super::{
    Failure, Policy, RetryAfter, UrlError,
    connector::{self, Permitted},
    kept::{Kept, MAX_IDLE, POOLS},
    names::Names,
};
use crate::clock::Seldom;

/// This much of an answer is read; then the connection is dropped.
pub const MAX_ANSWER_BYTES: usize = 16 * 1024;
/// A connection that takes longer to be made, from the look-up to the end of the handshake, counts as a failure.
const MAX_CONNECT: Duration = Duration::from_secs(5);
/// Connecting ends so much before the request must, so that the failure names what was not reached.
const TO_NAME: Duration = Duration::from_millis(100);
/// Registering a webhook waits this long for its name to be looked up, and then leaves the judgement to each attempt.
const MAX_LOOKUP: Duration = Duration::from_secs(2);

/// That files are short is said once in this time, however many requests it stops.
const SAY_AGAIN: Duration = Duration::from_secs(10);

/// Sends requests through the policy. Cheap to clone.
#[derive(Clone)]
pub struct Client {
    policy: Arc<Policy>,
    names: Arc<Names>,
    kept: Arc<Kept>,
    short_of_files: Arc<Seldom>,
    pools: [reqwest::Client; POOLS.len()],
}

/// What an operator can set.
#[derive(Debug, Clone)]
pub struct Settings {
    /// How long a request may take, from the look-up of the name to the last byte of the answer.
    pub request_timeout: Duration,
    /// Product and version.
    pub user_agent: String,
    /// PEM files of certificate authorities to trust beside the system's.
    pub extra_roots: Vec<Vec<u8>>,
    /// How many files this process may have open, of which each connection is one.
    pub open_files: usize,
}

/// Why there is no client.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// A file of authorities holds none.
    #[error("the certificate authorities cannot be read: {0}")]
    Certificates(String),
    /// TLS cannot be set up, for example because the system knows no authority.
    #[error("TLS cannot be set up: {0}")]
    Tls(#[from] rustls::Error),
    /// Names cannot be looked up.
    #[error("names cannot be looked up: {0}")]
    Names(String),
    /// The client cannot be made, for example because the product's name is no value of a header.
    #[error("the HTTP client cannot be made: {0:?}")]
    Client(#[from] reqwest::Error),
}

/// How a request ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// With an answer, whatever its status.
    Answered(Answer),
    /// Without one.
    Failed(Failure),
}

/// What a receiver said.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// HTTP status.
    pub status: u16,
    /// When it wants to be asked again; only with a 429 or a 503.
    pub retry_after: Option<RetryAfter>,
    /// At most [`MAX_ANSWER_BYTES`] of the body.
    pub body: Vec<u8>,
}

impl Client {
    /// A client that goes only where `policy` says.
    pub fn new(policy: Policy, settings: &Settings) -> Result<Self, StartError> {
        let policy = Arc::new(policy);
        let names = Arc::new(Names::system(settings.open_files).map_err(|error| StartError::Names(error.to_string()))?);
        let permitted = Permitted { names: Arc::clone(&names), policy: Arc::clone(&policy) };
        let pools = pools(&permitted, &policy, settings)?;
        let kept = Arc::new(Kept::new(settings.open_files));
        Ok(Self { policy, names, kept, short_of_files: Arc::new(Seldom::new(SAY_AGAIN)), pools })
    }

    /// Judges a URL as it will be used: its text, and every address that its name has now. A name that cannot be looked
    /// up yet is accepted, since every attempt judges again.
    pub async fn check(&self, text: &str) -> Result<Url, UrlError> {
        let url = self.policy.parse(text)?;
        if let Some(host) = url.domain() {
            let found = tokio::time::timeout(MAX_LOOKUP, self.names.addresses(host)).await;
            if let Ok(Ok(found)) = found
                && !found.into_iter().all(|address| self.policy.permits(address))
            {
                return Err(UrlError::Blocked);
            }
        }
        Ok(url)
    }

    /// Sends `body` and reads the answer. A refusal, a block and a timeout are outcomes like any other.
    pub async fn post(&self, url: &Url, headers: HeaderMap, body: Vec<u8>) -> Outcome {
        match self.policy.judge(url) {
            Ok(()) => {}
            Err(UrlError::Blocked) => return Outcome::Failed(Failure::BlockedAddress),
            Err(_) => return Outcome::Failed(Failure::InvalidUrl),
        }
        match self.exchange(url, headers, body).await {
            Ok(answer) => Outcome::Answered(answer),
            Err(error) => {
                let failure = Failure::exchanging(&error);
                if failure == Failure::NoSocket && self.short_of_files.is_time() {
                    tracing::warn!(
                        "requests cannot go out: this process, or the system, has too many open files; raise their limit (ulimit -n)"
                    );
                }
                Outcome::Failed(failure)
            }
        }
    }

    async fn exchange(&self, url: &Url, headers: HeaderMap, body: Vec<u8>) -> reqwest::Result<Answer> {
        let mut request = Request::new(Method::POST, url.clone());
        *request.headers_mut() = headers;
        *request.body_mut() = Some(body.into());
        let mut place = self.kept.place(url);
        let answered = self.pools[place.pool()].execute(request).await;
        let mut response = answered.inspect_err(|error| {
            if error.is_connect() {
                place.is_unconnected();
            }
        })?;
        let status = response.status();
        let closes =
            response.headers().get(CONNECTION).is_some_and(|value| value.as_bytes().eq_ignore_ascii_case(b"close"));
        let asks = matches!(status, StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE);
        let retry_after = response.headers().get(RETRY_AFTER).filter(|_| asks);
        let retry_after = retry_after.and_then(|value| RetryAfter::parse(value.to_str().ok()?));
        let mut kept = Vec::new();
        while kept.len() < MAX_ANSWER_BYTES {
            let Some(chunk) = response.chunk().await? else {
                if !closes {
                    place.stays_open();
                }
                break;
            };
            let room = MAX_ANSWER_BYTES - kept.len();
            kept.extend_from_slice(&chunk[..chunk.len().min(room)]);
        }
        Ok(Answer { status: status.as_u16(), retry_after, body: kept })
    }
}

/// The clients that all requests share, one for each of [`POOLS`].
fn pools(
    permitted: &Permitted,
    policy: &Arc<Policy>,
    settings: &Settings,
) -> Result<[reqwest::Client; POOLS.len()], StartError> {
    let tls = connector::tls(&settings.extra_roots)?;
    let [none, one, few, more, many, most] = POOLS.map(|keep| http(permitted, policy, &tls, settings, keep));
    Ok([none?, one?, few?, more?, many?, most?])
}

/// A client that keeps so many connections to each host. It asks `permitted` whom to dial, and `policy` whom it has
/// reached.
fn http(
    permitted: &Permitted,
    policy: &Arc<Policy>,
    tls: &ClientConfig,
    settings: &Settings,
    keep: usize,
) -> reqwest::Result<reqwest::Client> {
    let connect = MAX_CONNECT.min(settings.request_timeout.saturating_sub(TO_NAME));
    let policy = Arc::clone(policy);
    reqwest::Client::builder()
        .dns_resolver(permitted.clone())
        .tls_backend_preconfigured(tls.clone())
        .connector_layer(MapFutureLayer::new(move |connecting| {
            connector::watch(connecting, Arc::clone(&policy), connect)
        }))
        // Divided between the addresses of a name, so that one that is dead does not hide one that lives.
        .connect_timeout(connect)
        .timeout(settings.request_timeout)
        // Nobody but the receiver hears of a request, wherever the environment or an answer points.
        .no_proxy()
        .redirect(redirect::Policy::none())
        .referer(false)
        // An attempt is one request, of which no copy is kept: what may follow it is for the schedule to say.
        .retry(retry::never().max_retries_per_request(0))
        .user_agent(&settings.user_agent)
        .pool_idle_timeout(MAX_IDLE)
        .pool_max_idle_per_host(keep)
        // The limits above end what hangs; the system's own would end it with another reason.
        .tcp_keepalive(None)
        .tcp_user_timeout(None)
        // As [`connector::tls`] offers.
        .http1_only()
        .build()
}

#[cfg(test)]
mod tests {
    use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
    use rustls::{ServerConfig, pki_types::PrivateKeyDer};
    use tokio::{
        io::{AsyncRead, AsyncReadExt, AsyncWriteExt},
        net::TcpListener,
        sync::watch,
    };
    use tokio_rustls::TlsAcceptor;

    use super::{super::kept, *};

    fn settings() -> Settings {
        Settings {
            request_timeout: Duration::from_secs(30),
            user_agent: "test/1".to_owned(),
            extra_roots: Vec::new(),
            open_files: usize::MAX,
        }
    }

    fn policy(allow_loopback: bool) -> Policy {
        Policy { allow_loopback, allow_http: true, ..Policy::default() }
    }

    async fn post(client: &Client, url: String) -> Outcome {
        client.post(&url.parse().unwrap(), HeaderMap::new(), b"{}".to_vec()).await
    }

    #[tokio::test]
    async fn what_is_blocked_is_not_dialled() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        for host in ["127.0.0.1", "localhost", "[::ffff:127.0.0.1]"] {
            let url = format!("http://{host}:{port}/");
            let blocked = Client::new(policy(false), &settings()).unwrap();
            assert_eq!(post(&blocked, url.clone()).await, Outcome::Failed(Failure::BlockedAddress), "{host}");
            // Connections are accepted in their order: the first one is the one that may be made.
            let allowed = Client::new(policy(true), &settings()).unwrap();
            let (outcome, heard) = tokio::join!(post(&allowed, url), async {
                let (mut stream, _) = listener.accept().await.unwrap();
                heard(&mut stream).await
            });
            assert_eq!((outcome, heard > 0), (Outcome::Failed(Failure::ConnectionReset), true), "{host}");
        }
    }

    /// Should a look-up ever let something through: the address at the other end is asked for, and told nothing of the
    /// request.
    #[tokio::test]
    async fn what_was_dialled_is_judged_once_more() {
        let (acceptor, root) = certified();
        let settings = Settings { extra_roots: vec![root], ..settings() };
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let mut client = Client::new(policy(true), &settings).unwrap();
        let leaky = Permitted { names: Arc::clone(&client.names), policy: Arc::clone(&client.policy) };
        client.pools = pools(&leaky, &Arc::new(policy(false)), &settings).unwrap();
        for scheme in ["http", "https"] {
            let (outcome, heard) = tokio::join!(post(&client, format!("{scheme}://localhost:{port}/")), async {
                let (mut stream, _) = listener.accept().await.unwrap();
                match scheme {
                    "http" => heard(&mut stream).await,
                    _ => heard(&mut acceptor.accept(stream).await.unwrap()).await,
                }
            });
            assert_eq!((outcome, heard), (Outcome::Failed(Failure::BlockedAddress), 0), "{scheme}");
        }
    }

    /// Each of many hosts is reached, also several at a time, and no more connections stay open than may.
    #[tokio::test]
    async fn many_hosts_do_not_keep_as_many_connections() {
        const MOST: usize = 8;
        let settings = Settings { open_files: MOST * kept::FILES_PER_KEPT, ..settings() };
        let client = Client::new(policy(true), &settings).unwrap();
        let open = Arc::new(watch::Sender::new(0));
        let mut urls = Vec::new();
        for _ in 0..3 * MOST {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            urls.push(format!("http://{}/", listener.local_addr().unwrap()));
            tokio::spawn(answer(listener, Arc::clone(&open)));
        }
        for together in [1, 1, 10] {
            for url in &urls {
                for outcome in futures_util::future::join_all((0..together).map(|_| post(&client, url.clone()))).await {
                    assert!(matches!(outcome, Outcome::Answered(Answer { status: 200, .. })), "{outcome:?}");
                }
            }
        }
        // Those that are closed are heard of a moment later.
        let mut seen = open.subscribe();
        let closed = seen.wait_for(|open| *open <= MOST);
        let left = *tokio::time::timeout(MAX_IDLE / 2, closed).await.expect("the others are closed").unwrap();
        assert!(left >= MOST / 2, "{left} are used again");
    }

    /// Answers all requests, and counts connections that are open.
    async fn answer(listener: TcpListener, open: Arc<watch::Sender<usize>>) {
        while let Ok((mut stream, _)) = listener.accept().await {
            open.send_modify(|open| *open += 1);
            let open = Arc::clone(&open);
            tokio::spawn(async move {
                // Both the head and the body of a request are there at once, or in two parts.
                let mut request = Vec::new();
                while let Ok(1..) = stream.read_buf(&mut request).await {
                    if request.ends_with(b"{}") {
                        request.clear();
                        stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").await.unwrap();
                    }
                }
                open.send_modify(|open| *open -= 1);
            });
        }
    }

    /// How much is said first; none when the other side just leaves.
    async fn heard(stream: &mut (impl AsyncRead + Unpin)) -> usize {
        stream.read(&mut [0; 64]).await.unwrap_or(0)
    }

    /// A server for `localhost`, and the authority that vouches for it.
    fn certified() -> (TlsAcceptor, Vec<u8>) {
        let (key, authority_key) = (KeyPair::generate().unwrap(), KeyPair::generate().unwrap());
        let mut authority = CertificateParams::default();
        authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let root = authority.self_signed(&authority_key).unwrap();
        let params = CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
        let certificate = params.signed_by(&key, &Issuer::new(authority, authority_key)).unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
        let key = PrivateKeyDer::try_from(key.serialize_der()).unwrap();
        let config = config.with_no_client_auth().with_single_cert(vec![certificate.der().clone()], key).unwrap();
        (TlsAcceptor::from(Arc::new(config)), root.pem().into_bytes())
    }
}
