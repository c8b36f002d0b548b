//! The endpoint of all webhooks: verifies every signature, and writes every request down.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use http::{HeaderMap, Request, Response, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper_util::rt::{TokioExecutor, TokioIo};
use serde_json::Value;
use shortkit_webhooks::{
    clock,
    webhook::{Secret, SigningKey, verify, verify_shortform},
};
use tokio::{net::TcpListener, task::JoinHandle};

use crate::ledger::{Arrival, Ledger};

/// How the receiver answers.
#[derive(Default)]
pub(crate) struct Manners {
    /// Before each answer.
    pub(crate) delay_ms: AtomicU64,
    /// Attempts up to this number are refused with 503.
    pub(crate) refused_attempts: AtomicU64,
}

/// A running receiver, one path for each organisation; it ends when dropped.
pub(crate) struct Receiver {
    pub(crate) base: String,
    pub(crate) manners: Arc<Manners>,
    shared: Arc<Shared>,
    task: JoinHandle<()>,
}

struct Shared {
    ledger: Arc<Ledger>,
    manners: Arc<Manners>,
    /// By organisation. A request that comes before the secret is known waits for nothing: it is a violation.
    keys: Mutex<HashMap<String, SigningKey>>,
}

impl Receiver {
    pub(crate) async fn start(ledger: Arc<Ledger>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let base = format!("http://{}", listener.local_addr().expect("an address"));
        let manners = Arc::new(Manners::default());
        let shared = Arc::new(Shared { ledger, manners: Arc::clone(&manners), keys: Mutex::default() });
        let task = tokio::spawn(serve(listener, Arc::clone(&shared)));
        Self { base, manners, shared, task }
    }

    /// Where the webhook of `organization` points.
    pub(crate) fn url(&self, organization: &str) -> String {
        format!("{}/{organization}", self.base)
    }

    pub(crate) fn trust(&self, organization: &str, secret: &str) {
        let key = SigningKey::new(&Secret::parse(secret).expect("a secret"));
        self.shared.keys.lock().expect("no panic").insert(organization.to_owned(), key);
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn serve(listener: TcpListener, shared: Arc<Shared>) {
    while let Ok((stream, _)) = listener.accept().await {
        let shared = Arc::clone(&shared);
        let _ = stream.set_nodelay(true);
        tokio::spawn(async move {
            let service = hyper::service::service_fn(move |request| answer(Arc::clone(&shared), request));
            let connection = hyper_util::server::conn::auto::Builder::new(TokioExecutor::new());
            let _ = connection.serve_connection(TokioIo::new(stream), service).await;
        });
    }
}

async fn answer(shared: Arc<Shared>, request: Request<Incoming>) -> Result<Response<Full<Bytes>>, hyper::Error> {
    let (head, body) = request.into_parts();
    let body = body.collect().await?.to_bytes();
    let organization = head.uri.path().trim_start_matches('/');
    let accepted = match arrival(&shared, organization, &head.headers, &body) {
        Ok(arrival) => {
            let accepted = arrival.accepted;
            shared.ledger.arrival(organization, arrival);
            accepted
        }
        Err(violation) => {
            shared.ledger.violation(violation);
            false
        }
    };
    tokio::time::sleep(Duration::from_millis(shared.manners.delay_ms.load(Ordering::Relaxed))).await;
    let mut response = Response::new(Full::new(Bytes::from_static(b"OK")));
    *response.status_mut() = if accepted { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    Ok(response)
}

/// What the request says, when its signatures hold.
fn arrival(shared: &Shared, organization: &str, headers: &HeaderMap, body: &[u8]) -> Result<Arrival, String> {
    let header = |name: &str| headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let delivery_id = header("x-shortform-delivery-id").to_owned();
    let key = shared.keys.lock().expect("no panic").get(organization).cloned();
    let key = key.ok_or_else(|| format!("a request to /{organization}, which no webhook names"))?;
    let (id, timestamp, signature) = (header("webhook-id"), header("webhook-timestamp"), header("webhook-signature"));
    verify(&key, id, timestamp, signature, body, clock::now()).map_err(|error| format!("{delivery_id}: {error}"))?;
    verify_shortform(&key, header("x-shortform-signature"), body).map_err(|error| format!("{delivery_id}: {error}"))?;
    let event: Value = serde_json::from_slice(body).map_err(|error| format!("{delivery_id}: {error}"))?;
    let number = event["data"]["number"].as_u64().ok_or_else(|| format!("{delivery_id}: no number in {event}"))?;
    let attempt: u32 = header("x-shortform-delivery-attempt").parse().map_err(|_| format!("{delivery_id}: attempt"))?;
    let accepted = u64::from(attempt) > shared.manners.refused_attempts.load(Ordering::Relaxed);
    Ok(Arrival { number, delivery_id, attempt, at: clock::stopwatch(), accepted })
}
