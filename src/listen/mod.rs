//! The way from a socket to the service: connections, their limits, and their end.
//!
//! tonic's own server hides settings of hyper that a public port needs, so the loop is here. One connection's way:
//! `peers` admits it → `tls` makes it private → `stream` watches its bytes, as fast as `caller` lets them come →
//! `connection` speaks HTTP/1.1 or HTTP/2 and ends it in time → `body` bounds what comes in and what goes out. Every limit
//! is in [`Limits`], or a constant beside the code that keeps it; the README has them in one table.

mod body;
mod caller;
mod connection;
mod frames;
mod peers;
mod stream;
mod tls;

use std::{convert::Infallible, sync::Arc, time::Duration};

use http::{Request, Response};
use tokio::{
    net::{TcpListener, TcpStream},
    task::JoinSet,
};
use tokio_util::sync::CancellationToken;
use tonic::body::Body;
use tower::Service;

pub use self::{
    body::weigh,
    caller::Caller,
    tls::{ClientCertificate, Tls, TlsError, TlsFiles},
};
use self::{connection::Protocols, peers::Peers};
use crate::clock;

/// What connections may take, and for how long.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Connections at a time; one more is closed at once. One address has at most half of them.
    pub connections: usize,
    /// Bytes of request bodies that are held at a time; beyond, a body is refused as unavailable. As many of answers, of
    /// those longer than a piece; beyond, an answer is cut off. One address has at most half of them, and an organization
    /// not more than are free of that half; beyond, its body is refused as one too many of it.
    pub body_bytes: usize,
    /// For a TLS handshake.
    pub handshake_time: Duration,
    /// From the first byte of a request's head to its last, and from the accepting of a connection to its first request.
    pub head_time: Duration,
    /// From a request's head to the end of its body.
    pub body_time: Duration,
    /// For a piece of an answer to be taken by the peer, and for a written byte to leave.
    pub write_time: Duration,
    /// Without a request; the connection is then ended politely.
    pub idle_time: Duration,
    /// Without a byte from an HTTP/2 peer; it is then asked whether it is there …
    pub silent_time: Duration,
    /// … and the connection closed when it does not answer within this.
    pub ping_time: Duration,
    /// Of a connection; it is then ended politely, so that load spreads again. Up to a tenth longer, at random.
    pub age: Duration,
    /// For what is under way on a connection that has reached its age; streams are cut off then, and resume.
    pub age_grace: Duration,
}

/// Wait before the next connection is accepted after that failed, for example for want of files.
const ACCEPT_AGAIN: Duration = Duration::from_millis(100);
/// Between two words about connections that were turned away.
const COMPLAIN: Duration = Duration::from_secs(10);

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 4096,
            body_bytes: 512 * 1024 * 1024,
            handshake_time: Duration::from_secs(10),
            head_time: Duration::from_secs(30),
            body_time: Duration::from_secs(30),
            write_time: Duration::from_secs(30),
            idle_time: Duration::from_secs(5 * 60),
            silent_time: Duration::from_secs(30),
            ping_time: Duration::from_secs(10),
            age: Duration::from_secs(30 * 60),
            age_grace: Duration::from_secs(5 * 60),
        }
    }
}

/// Serves on `listener` until `shutdown`, then ends every connection politely and waits for the last. Dropping the
/// future cuts them off.
pub async fn serve<S>(listener: TcpListener, tls: Option<Tls>, limits: Limits, service: S, shutdown: CancellationToken)
where
    S: Service<Request<Body>, Response = Response<Body>, Error = Infallible> + Clone + Send + 'static,
    S::Future: Send,
{
    let peers = Arc::new(Peers::new(limits.connections, limits.body_bytes));
    let protocols = Arc::new(Protocols::new(tls, limits));
    let mut connections = JoinSet::new();
    let mut turned_away = TurnedAway::default();
    loop {
        let stream = tokio::select! {
            () = shutdown.cancelled() => break,
            Some(_) = connections.join_next(), if !connections.is_empty() => continue,
            accepted = accept(&listener) => accepted,
        };
        let Ok(address) = stream.peer_addr() else { continue };
        let Some(admitted) = peers.admit(address.ip()) else {
            turned_away.one_more();
            continue;
        };
        let (protocols, service, shutdown) = (Arc::clone(&protocols), service.clone(), shutdown.clone());
        connections.spawn(async move { protocols.serve(stream, admitted, service, shutdown).await });
    }
    // Whoever comes now is refused by the system, and goes to another node.
    drop(listener);
    while connections.join_next().await.is_some() {}
}

/// The next connection.
async fn accept(listener: &TcpListener) -> TcpStream {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => return stream,
            Err(error) => {
                tracing::warn!(%error, "a connection could not be accepted");
                tokio::time::sleep(ACCEPT_AGAIN).await;
            }
        }
    }
}

/// Counts connections that were turned away, and says so now and then: a flood must not fill the log.
#[derive(Default)]
struct TurnedAway {
    count: u64,
    said: Option<std::time::Instant>,
}

impl TurnedAway {
    fn one_more(&mut self) {
        self.count += 1;
        if self.said.is_none_or(|said| said.elapsed() >= COMPLAIN) {
            tracing::warn!(count = self.count, "connections were turned away: too many, or too many from one address");
            *self = Self { count: 0, said: Some(clock::stopwatch()) };
        }
    }
}
