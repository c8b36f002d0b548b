//! A webhook endpoint that answers as it is told and remembers what it got.

use std::{
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::Duration,
};

use axum::{Router, body, extract::State, response::IntoResponse};
use http::{HeaderMap, Request, StatusCode};
use tokio::{net::TcpListener, sync::watch, task::JoinHandle};

use super::soon;

/// What a receiver got.
#[derive(Debug, Clone)]
pub(crate) struct Received {
    pub(crate) headers: HeaderMap,
    pub(crate) body: String,
}

/// What a receiver says.
#[derive(Debug, Clone)]
pub(crate) struct Reply {
    pub(crate) status: u16,
    pub(crate) headers: Vec<(&'static str, String)>,
    pub(crate) body: String,
    pub(crate) delay: Duration,
    /// Nothing is said before this is true, or its sender is gone.
    pub(crate) until: Option<watch::Receiver<bool>>,
}

type Script = Box<dyn Fn(usize, &Received) -> Reply + Send + Sync>;

struct Shared {
    script: Script,
    received: Mutex<Vec<Received>>,
    count: watch::Sender<usize>,
}

/// A running receiver; it ends when dropped.
pub(crate) struct Receiver {
    pub(crate) address: SocketAddr,
    shared: Arc<Shared>,
    task: JoinHandle<()>,
}

impl Received {
    pub(crate) fn header(&self, name: &str) -> &str {
        self.headers.get(name).unwrap_or_else(|| panic!("header {name}")).to_str().unwrap()
    }
}

impl Reply {
    pub(crate) fn status(status: u16) -> Self {
        Self { status, headers: Vec::new(), body: "OK".to_owned(), delay: Duration::ZERO, until: None }
    }
}

impl Receiver {
    /// Answers every request with 200 and `OK`.
    pub(crate) async fn start() -> Self {
        Self::scripted(|_, _| Reply::status(200)).await
    }

    /// Answers the request number `n`, from 0, as `script` says.
    pub(crate) async fn scripted(script: impl Fn(usize, &Received) -> Reply + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let shared =
            Arc::new(Shared { script: Box::new(script), received: Mutex::default(), count: watch::Sender::new(0) });
        let app = Router::new().fallback(answer).with_state(Arc::clone(&shared));
        let task = tokio::spawn(async move { axum::serve(listener, app).await.unwrap() });
        Self { address, shared, task }
    }

    pub(crate) fn url(&self) -> String {
        format!("http://{}/hook", self.address)
    }

    /// What came so far.
    pub(crate) fn received(&self) -> Vec<Received> {
        self.shared.received.lock().unwrap().clone()
    }

    /// Waits until `count` requests have come, and returns all of them.
    pub(crate) async fn wait_for(&self, count: usize) -> Vec<Received> {
        let mut seen = self.shared.count.subscribe();
        soon(&format!("request number {count}"), seen.wait_for(|seen| *seen >= count)).await.unwrap();
        self.received()
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn answer(State(shared): State<Arc<Shared>>, request: Request<body::Body>) -> impl IntoResponse {
    let (head, stream) = request.into_parts();
    let bytes = body::to_bytes(stream, usize::MAX).await.unwrap();
    let received = Received { headers: head.headers, body: String::from_utf8(bytes.to_vec()).unwrap() };
    let index = {
        let mut all = shared.received.lock().unwrap();
        all.push(received.clone());
        all.len() - 1
    };
    let reply = (shared.script)(index, &received);
    shared.count.send_modify(|count| *count += 1);
    tokio::time::sleep(reply.delay).await;
    if let Some(mut until) = reply.until {
        let _ = until.wait_for(|open| *open).await;
    }
    let headers: HeaderMap =
        reply.headers.iter().map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap())).collect();
    (StatusCode::from_u16(reply.status).unwrap(), headers, reply.body)
}
