//! Callers that leave in the middle: over HTTP/1.1, over HTTP/2, and from a stream of events.

use std::{convert::Infallible, net::SocketAddr, sync::Arc};

use http::Response;
use http_body_util::StreamBody;
use hyper_util::{
    rt::{TokioExecutor, TokioIo},
    server::conn::auto,
    service::TowerToHyperService,
};
use shortkit_webhooks::rest::Limits;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::Semaphore,
};
use tokio_stream::StreamExt;
use tonic::body::Body;
use tower::ServiceExt;

use super::Kitchen;
use crate::support::soon;

/// What a call does: a permit for each one that begins, and one for each that is dropped.
struct Calls {
    begun: Semaphore,
    dropped: Semaphore,
}

/// Is dropped with its call.
struct Call(Arc<Calls>);

impl Call {
    fn begin(calls: &Arc<Calls>) -> Self {
        calls.begun.add_permits(1);
        Self(Arc::clone(calls))
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        self.0.dropped.add_permits(1);
    }
}

/// The layer behind a real port, around calls that never end: a unary one answers nothing, a stream says nothing.
async fn endless() -> (SocketAddr, Arc<Calls>) {
    let calls = Arc::new(Calls { begun: Semaphore::new(0), dropped: Semaphore::new(0) });
    let noted = Arc::clone(&calls);
    let kitchen = Kitchen::new(Limits::default(), move |path, _| {
        let call = Call::begin(&noted);
        async move {
            if path.ends_with("/Watch") {
                let nothing = tokio_stream::pending::<Result<http_body::Frame<bytes::Bytes>, Infallible>>();
                return Response::new(Body::new(StreamBody::new(nothing.map(move |frame| (frame, &call).0))));
            }
            let _call = call;
            std::future::pending().await
        }
    });
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let service =
                kitchen.0.clone().map_request(|request: http::Request<hyper::body::Incoming>| request.map(Body::new));
            let server = auto::Builder::new(TokioExecutor::new());
            tokio::spawn(async move {
                server.serve_connection(TokioIo::new(stream), TowerToHyperService::new(service)).await.map_err(drop)
            });
        }
    });
    (address, calls)
}

impl Calls {
    async fn one(what: &str, permits: &Semaphore) {
        soon(what, permits.acquire()).await.unwrap().forget();
    }

    async fn begin(&self) {
        Self::one("the call", &self.begun).await;
        assert_eq!(self.dropped.available_permits(), 0, "it goes on");
    }

    async fn end(&self) {
        Self::one("the end of the call", &self.dropped).await;
    }
}

#[tokio::test]
async fn a_connection_that_breaks_ends_its_call() {
    let (address, calls) = endless().await;
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(b"GET /v1/items/a HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
    calls.begin().await;
    drop(stream);
    calls.end().await;
}

#[tokio::test]
async fn a_reset_ends_one_call_of_a_connection() {
    let (address, calls) = endless().await;
    let client = reqwest::Client::builder().no_proxy().http2_prior_knowledge().build().unwrap();
    let send = || tokio::spawn(client.get(format!("http://{address}/v1/items/a")).send());
    let (first, second) = (send(), send());
    calls.begin().await;
    calls.begin().await;
    first.abort();
    calls.end().await;
    assert!(!second.is_finished() && calls.dropped.available_permits() == 0, "the other one goes on");
    second.abort();
    calls.end().await;
}

#[tokio::test]
async fn a_reader_of_events_that_leaves_ends_the_stream() {
    let (address, calls) = endless().await;
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(b"GET /v1/watch HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
    let mut head = [0; 12];
    soon("the head of the answer", stream.read_exact(&mut head)).await.unwrap();
    assert_eq!(&head, b"HTTP/1.1 200");
    calls.begin().await;
    drop(stream);
    calls.end().await;
}
