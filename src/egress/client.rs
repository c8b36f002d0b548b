//! A POST that is bounded in time and size.

use std::{sync::Arc, time::Duration};

use http::{HeaderMap, StatusCode, header::RETRY_AFTER};
use reqwest::{Certificate, Url, redirect};

use super::{Failure, Policy, RetryAfter, UrlError, resolver::Resolver};

/// This much of an answer is read; then the connection is dropped.
pub const MAX_ANSWER_BYTES: usize = 16 * 1024;
/// A connection that takes longer to be made counts as a failure.
const MAX_CONNECT: Duration = Duration::from_secs(5);
/// Registering a webhook waits this long for its name to be looked up, and then leaves the judgement to each attempt.
const MAX_LOOKUP: Duration = Duration::from_secs(2);
/// Idle connections kept for each host.
const MAX_IDLE_PER_HOST: usize = 8;
/// Idle connections are closed after this time.
const MAX_IDLE: Duration = Duration::from_secs(30);

/// Sends requests through the policy. Cheap to clone.
#[derive(Clone)]
pub struct Client {
    policy: Arc<Policy>,
    http: reqwest::Client,
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
#[error("the HTTP client cannot be made: {0}")]
pub struct StartError(#[from] reqwest::Error);

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
        // Someone else may have installed the same provider before: that is as good.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let policy = Arc::new(policy);
        let roots = settings.extra_roots.iter().map(|pem| Certificate::from_pem_bundle(pem));
        let roots = roots.collect::<Result<Vec<_>, _>>()?.into_iter().flatten();
        let http = reqwest::Client::builder()
            .user_agent(&settings.user_agent)
            .dns_resolver(Arc::new(Resolver(Arc::clone(&policy))))
            .no_proxy()
            .redirect(redirect::Policy::none())
            .referer(false)
            .connect_timeout(MAX_CONNECT.min(settings.request_timeout))
            .timeout(settings.request_timeout)
            .pool_max_idle_per_host(MAX_IDLE_PER_HOST)
            .pool_idle_timeout(MAX_IDLE)
            .tcp_nodelay(true)
            .tls_certs_merge(roots)
            .build()?;
        Ok(Self { policy, http })
    }

    /// Judges a URL as it will be used: its text, and every address that its name has now. A name that cannot be looked
    /// up yet is accepted, since every attempt judges again.
    pub async fn check(&self, text: &str) -> Result<Url, UrlError> {
        let url = self.policy.parse(text)?;
        if let Some(host) = url.domain() {
            let lookup = tokio::time::timeout(MAX_LOOKUP, tokio::net::lookup_host((host, 0))).await;
            if let Ok(Ok(mut found)) = lookup
                && !found.all(|address| self.policy.permits(address.ip()))
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
        match self.exchange(url, headers, body).await {
            Ok(outcome) => outcome,
            Err(error) => Outcome::Failed(Failure::from(&error)),
        }
    }

    async fn exchange(&self, url: Url, headers: HeaderMap, body: Vec<u8>) -> Result<Outcome, reqwest::Error> {
        let mut response = self.http.post(url).headers(headers).body(body).send().await?;
        if response.remote_addr().is_some_and(|peer| !self.policy.permits(peer.ip())) {
            return Ok(Outcome::Failed(Failure::BlockedAddress));
        }
        let status = response.status();
        let asks = matches!(status, StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE);
        let retry_after = response.headers().get(RETRY_AFTER).filter(|_| asks);
        let retry_after = retry_after.and_then(|value| RetryAfter::parse(value.to_str().ok()?));
        let mut kept = Vec::new();
        while let Some(chunk) = response.chunk().await? {
            let room = MAX_ANSWER_BYTES - kept.len();
            kept.extend_from_slice(&chunk[..chunk.len().min(room)]);
            if kept.len() == MAX_ANSWER_BYTES {
                break;
            }
        }
        Ok(Outcome::Answered(Answer { status: status.as_u16(), retry_after, body: kept }))
    }
}
