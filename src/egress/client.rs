//! A POST that is bounded in time and size.

use std::{error::Error, sync::Arc, time::Duration};

use bytes::Bytes;
use http::{
    HeaderMap, HeaderValue, Request, StatusCode,
    header::{InvalidHeaderValue, RETRY_AFTER, USER_AGENT},
};
use http_body_util::{BodyExt, Full};
use hyper_util::rt::{TokioExecutor, TokioTimer};
use url::Url;

use super::{
    Failure, Policy, RetryAfter, UrlError,
    connector::{self, Connector},
    names::Names,
};

/// This much of an answer is read; then the connection is dropped.
pub const MAX_ANSWER_BYTES: usize = 16 * 1024;
/// The head of an answer is at most this long, over HTTP/1.1 and over HTTP/2; a longer one is no valid answer.
const MAX_HEAD_BYTES: u32 = 64 * 1024;
/// So much of an answer a receiver may send over HTTP/2 before it is read.
const MAX_UNREAD_BYTES: u32 = 64 * 1024;
/// A connection that takes longer to be made, from the look-up to the end of the handshake, counts as a failure.
const MAX_CONNECT: Duration = Duration::from_secs(5);
/// Connecting ends so much before the request must, so that the failure names what was not reached.
const TO_NAME: Duration = Duration::from_millis(100);
/// Registering a webhook waits this long for its name to be looked up, and then leaves the judgement to each attempt.
const MAX_LOOKUP: Duration = Duration::from_secs(2);
/// Idle connections kept for each host: as many as a webhook uses at a time, lest they be made anew all the time.
const MAX_IDLE_PER_HOST: usize = 32;
/// Idle connections are closed after this time.
const MAX_IDLE: Duration = Duration::from_secs(30);
/// An HTTP/2 connection under use that is silent for so long is asked whether it lives …
const KEEP_ALIVE: Duration = Duration::from_secs(10);
/// … and given up when it does not answer within this, lest every later request end on it.
const KEEP_ALIVE_TIMEOUT: Duration = Duration::from_secs(5);

/// Sends requests through the policy. Cheap to clone.
#[derive(Clone)]
pub struct Client {
    policy: Arc<Policy>,
    names: Arc<Names>,
    http: hyper_util::client::legacy::Client<Connector, Full<Bytes>>,
    user_agent: HeaderValue,
    timeout: Duration,
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
    /// The product's name is no value of a header.
    #[error("the user agent cannot be sent: {0}")]
    UserAgent(#[from] InvalidHeaderValue),
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
        let names = Arc::new(Names::system().map_err(|error| StartError::Names(error.to_string()))?);
        let connect = MAX_CONNECT.min(settings.request_timeout.saturating_sub(TO_NAME));
        let tls = connector::tls(&settings.extra_roots)?;
        let connector = Connector::new(Arc::clone(&names), Arc::clone(&policy), tls, connect);
        let http = hyper_util::client::legacy::Client::builder(TokioExecutor::new())
            .timer(TokioTimer::new())
            .pool_timer(TokioTimer::new())
            .pool_idle_timeout(MAX_IDLE)
            .pool_max_idle_per_host(MAX_IDLE_PER_HOST)
            .http1_max_buf_size(MAX_HEAD_BYTES as usize)
            .http2_max_header_list_size(MAX_HEAD_BYTES)
            .http2_initial_stream_window_size(MAX_UNREAD_BYTES)
            .http2_keep_alive_interval(KEEP_ALIVE)
            .http2_keep_alive_timeout(KEEP_ALIVE_TIMEOUT)
            .build(connector);
        let user_agent = HeaderValue::try_from(&settings.user_agent)?;
        Ok(Self { policy, names, http, user_agent, timeout: settings.request_timeout })
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
    pub async fn post(&self, url: &str, headers: HeaderMap, body: Vec<u8>) -> Outcome {
        let url = match self.policy.parse(url) {
            Ok(url) => url,
            Err(UrlError::Blocked) => return Outcome::Failed(Failure::BlockedAddress),
            Err(_) => return Outcome::Failed(Failure::InvalidUrl),
        };
        match tokio::time::timeout(self.timeout, self.exchange(url, headers, body)).await {
            Ok(Ok(answer)) => Outcome::Answered(answer),
            Ok(Err(error)) => Outcome::Failed(Failure::exchanging(error.as_ref())),
            Err(_) => Outcome::Failed(Failure::RequestTimeout),
        }
    }

    async fn exchange(&self, url: Url, mut headers: HeaderMap, body: Vec<u8>) -> Result<Answer, Box<dyn Error>> {
        headers.insert(USER_AGENT, self.user_agent.clone());
        let mut request = Request::post(url.as_str()).body(Full::from(body))?;
        *request.headers_mut() = headers;
        let mut response = self.http.request(request).await?;
        let status = response.status();
        let asks = matches!(status, StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE);
        let retry_after = response.headers().get(RETRY_AFTER).filter(|_| asks);
        let retry_after = retry_after.and_then(|value| RetryAfter::parse(value.to_str().ok()?));
        let mut kept = Vec::new();
        while let Some(frame) = response.frame().await {
            let Ok(chunk) = frame?.into_data() else { continue };
            let room = MAX_ANSWER_BYTES - kept.len();
            kept.extend_from_slice(&chunk[..chunk.len().min(room)]);
            if kept.len() == MAX_ANSWER_BYTES {
                break;
            }
        }
        Ok(Answer { status: status.as_u16(), retry_after, body: kept })
    }
}
