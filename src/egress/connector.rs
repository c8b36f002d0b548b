//! Makes connections: look up, judge, dial, judge again, encrypt, all within one limit.

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use futures_util::future::BoxFuture;
use http::{Uri, uri::Scheme};
use hyper_rustls::MaybeHttpsStream;
use hyper_util::{
    client::legacy::connect::{HttpConnector, dns::Name},
    rt::TokioIo,
};
use rustls::{
    ClientConfig,
    pki_types::{CertificateDer, ServerName, pem::PemObject},
};
use rustls_platform_verifier::Verifier;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tower::Service;

use super::{Failure, Policy, StartError, names::Names};

/// A connection, encrypted or not.
pub(super) type Connection = MaybeHttpsStream<TokioIo<TcpStream>>;

/// Makes connections to where the policy lets it. Whatever asks for one gets it from here.
#[derive(Clone)]
pub(super) struct Connector {
    policy: Arc<Policy>,
    tcp: HttpConnector<Permitted>,
    tls: TlsConnector,
    limit: Duration,
}

impl Connector {
    /// Connections that take longer than `limit`, from the look-up to the end of the handshake, fail.
    pub(super) fn new(names: Arc<Names>, policy: Arc<Policy>, tls: ClientConfig, limit: Duration) -> Self {
        let mut tcp = HttpConnector::new_with_resolver(Permitted { names, policy: Arc::clone(&policy) });
        tcp.enforce_http(false);
        tcp.set_nodelay(true);
        // Divided between the addresses of a name, so that one that is dead does not hide one that lives.
        tcp.set_connect_timeout(Some(limit));
        Self { policy, tcp, tls: TlsConnector::from(Arc::new(tls)), limit }
    }

    async fn connect(mut self, uri: Uri) -> Result<Connection, Failure> {
        let limit = tokio::time::sleep(self.limit);
        tokio::pin!(limit);
        let tcp = tokio::select! {
            dialled = self.dial(&uri) => dialled?,
            () = &mut limit => return Err(Failure::ConnectionTimeout),
        };
        if uri.scheme() != Some(&Scheme::HTTPS) {
            return Ok(MaybeHttpsStream::Http(tcp));
        }
        let name = ServerName::try_from(host(&uri).to_owned()).map_err(|_| Failure::InvalidUrl)?;
        tokio::select! {
            shaken = self.tls.connect(name, TokioIo::new(tcp)) => {
                shaken.map(MaybeHttpsStream::from).map_err(|error| Failure::handshake(&error))
            }
            () = &mut limit => Err(Failure::TlsTimeout),
        }
    }

    async fn dial(&mut self, uri: &Uri) -> Result<TokioIo<TcpStream>, Failure> {
        // An address in the URL is dialled as it is, and no name that `Permitted` would see.
        if host(uri).parse::<IpAddr>().is_ok_and(|address| !self.policy.permits(address)) {
            return Err(Failure::BlockedAddress);
        }
        let tcp = self.tcp.call(uri.clone()).await.map_err(|error| Failure::dialling(&error))?;
        // Whatever led here: nothing is said to an address that may not hear it.
        match tcp.inner().peer_addr() {
            Ok(peer) if self.policy.permits(peer.ip()) => Ok(tcp),
            _ => Err(Failure::BlockedAddress),
        }
    }
}

impl Service<Uri> for Connector {
    type Response = Connection;
    type Error = Failure;
    type Future = BoxFuture<'static, Result<Connection, Failure>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Failure>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, uri: Uri) -> Self::Future {
        Box::pin(self.clone().connect(uri))
    }
}

/// The addresses of a name that may be dialled: of good and bad ones, the good ones.
#[derive(Clone)]
struct Permitted {
    names: Arc<Names>,
    policy: Arc<Policy>,
}

impl Service<Name> for Permitted {
    type Response = std::vec::IntoIter<SocketAddr>;
    type Error = Failure;
    type Future = BoxFuture<'static, Result<Self::Response, Failure>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Failure>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, name: Name) -> Self::Future {
        let Self { names, policy } = self.clone();
        Box::pin(async move {
            let found = names.addresses(name.as_str()).await?;
            let some = !found.is_empty();
            let permitted = found.into_iter().filter(|address| policy.permits(*address));
            let permitted: Vec<SocketAddr> = permitted.map(|address| SocketAddr::new(address, 0)).collect();
            match permitted.is_empty() {
                false => Ok(permitted.into_iter()),
                true if some => Err(Failure::BlockedAddress),
                true => Err(Failure::DnsLookup),
            }
        })
    }
}

/// TLS that trusts the system's authorities and those of these PEM files.
pub(super) fn tls(extra_roots: &[Vec<u8>]) -> Result<ClientConfig, StartError> {
    let mut roots = Vec::new();
    for pem in extra_roots {
        let before = roots.len();
        for root in CertificateDer::pem_slice_iter(pem) {
            roots.push(root.map_err(|error| StartError::Certificates(error.to_string()))?);
        }
        if roots.len() == before {
            return Err(StartError::Certificates("a file holds none".to_owned()));
        }
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let verifier = Verifier::new_with_extra_roots(roots, Arc::clone(&provider))?;
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        // Its own word for a verifier that is not its own: this one asks the system.
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier))
        .with_no_client_auth();
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(config)
}

/// The host, an IPv6 address without its brackets.
fn host(uri: &Uri) -> &str {
    let host = uri.host().unwrap_or_default();
    host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host)
}

#[cfg(test)]
mod tests {
    use std::{io, net::TcpListener};

    use tokio::io::AsyncReadExt;

    use super::*;

    const LIMIT: Duration = Duration::from_secs(5);

    fn connector(policy: Policy) -> Connector {
        Connector::new(Arc::new(Names::system().unwrap()), Arc::new(policy), tls(&[]).unwrap(), LIMIT)
    }

    #[tokio::test]
    async fn what_is_blocked_is_not_dialled() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        let port = listener.local_addr().unwrap().port();
        for host in ["127.0.0.1", "localhost", "[::ffff:127.0.0.1]"] {
            let uri: Uri = format!("http://{host}:{port}/").parse().unwrap();
            let connected = connector(Policy::default()).connect(uri.clone()).await;
            assert_eq!(connected.map(drop), Err(Failure::BlockedAddress), "{host}");
            assert_eq!(listener.accept().unwrap_err().kind(), io::ErrorKind::WouldBlock, "{host}");
            let development = Policy { allow_loopback: true, ..Policy::default() };
            assert!(connector(development).connect(uri).await.is_ok(), "{host}");
            listener.accept().unwrap();
        }
    }

    #[test]
    fn a_file_without_authorities_is_refused() {
        assert!(tls(&[]).is_ok());
        assert!(matches!(tls(&[b"no certificate".to_vec()]), Err(StartError::Certificates(_))));
    }

    /// Should a look-up ever let something through: the address at the other end is asked for, and told nothing.
    #[tokio::test]
    async fn what_was_dialled_is_judged_once_more() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let Connector { tcp, .. } = connector(Policy { allow_loopback: true, ..Policy::default() });
        let leaky = Connector { tcp, ..connector(Policy::default()) };
        for scheme in ["http", "https"] {
            let uri = format!("{scheme}://localhost:{port}/").parse().unwrap();
            assert_eq!(leaky.clone().connect(uri).await.map(drop), Err(Failure::BlockedAddress));
            let (mut stream, _) = listener.accept().await.unwrap();
            assert_eq!(stream.read(&mut [0; 1]).await.unwrap(), 0);
        }
    }
}
