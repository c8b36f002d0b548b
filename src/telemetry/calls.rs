//! Counts calls by method and status: a layer around all services, so for every protocol.

use std::{
    collections::HashMap,
    sync::Arc,
    task::{Context, Poll},
};

use futures_util::future::BoxFuture;
use http::{HeaderMap, Request, Response};
use tonic::{Code, Status};
use tower::{Layer, Service};

use super::metrics::{Calls, Metrics};
use crate::clock;

/// What is called and is none of the methods: health, reflection, and what does not exist. Its path is the caller's choice.
const OTHER: &str = "other";

/// The layer. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Counted(Arc<Methods>);

struct Methods {
    of: HashMap<String, Calls>,
    other: Calls,
}

/// The layer around a service.
#[derive(Clone)]
pub(crate) struct WithCounts<S> {
    methods: Arc<Methods>,
    inner: S,
}

impl Counted {
    /// Counts the calls of these methods, each with its service, and of all others together.
    pub(crate) fn new(metrics: &Metrics, methods: impl IntoIterator<Item = (String, String)>) -> Self {
        let of = methods.into_iter().map(|(service, method)| {
            let calls = metrics.calls(&service, &method);
            (format!("/{service}/{method}"), calls)
        });
        Self(Arc::new(Methods { of: of.collect(), other: metrics.calls(OTHER, OTHER) }))
    }
}

impl<S> Layer<S> for Counted {
    type Service = WithCounts<S>;

    fn layer(&self, inner: S) -> Self::Service {
        WithCounts { methods: Arc::clone(&self.0), inner }
    }
}

impl<S, B, C> Service<Request<B>> for WithCounts<S>
where
    S: Service<Request<B>, Response = Response<C>>,
    S::Future: Send + 'static,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = BoxFuture<'static, Result<Self::Response, Self::Error>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        let stopwatch = clock::stopwatch();
        let methods = Arc::clone(&self.methods);
        let calls = methods.of.get(request.uri().path()).unwrap_or(&methods.other).clone();
        let answered = self.inner.call(request);
        Box::pin(async move {
            let response = answered.await?;
            calls.answered(code(response.headers()), stopwatch.elapsed());
            Ok(response)
        })
    }
}

/// An error is an answer of headers alone; anything else has its status behind the message, and begins when all is well.
fn code(headers: &HeaderMap) -> Code {
    headers.get(Status::GRPC_STATUS).map_or(Code::Ok, |code| Code::from_bytes(code.as_bytes()))
}
