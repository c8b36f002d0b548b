//! Lets pages in browsers call the API with a key that their user gave them: any origin, no cookies.

use std::{
    task::{Context, Poll},
    time::Duration,
};

use http::{
    HeaderName, Method, Request, Response,
    header::{ACCESS_CONTROL_REQUEST_METHOD, ALLOW, RETRY_AFTER},
};
use tower::{Layer, Service};
use tower_http::cors::{AllowHeaders, Any, Cors as Answering, CorsLayer};

/// How long a browser may remember what it asked.
const MAX_AGE: Duration = Duration::from_secs(60 * 60);
/// Headers that pages may read beside the ordinary ones: those of REST, and those of gRPC-Web.
const EXPOSED: [HeaderName; 10] = [
    ALLOW,
    RETRY_AFTER,
    HeaderName::from_static("x-request-id"),
    HeaderName::from_static("idempotency-replayed"),
    HeaderName::from_static("x-ratelimit-limit"),
    HeaderName::from_static("x-ratelimit-remaining"),
    HeaderName::from_static("x-ratelimit-reset"),
    HeaderName::from_static("grpc-status"),
    HeaderName::from_static("grpc-message"),
    HeaderName::from_static("grpc-status-details-bin"),
];

/// The layer.
#[derive(Clone, Copy)]
pub(crate) struct Cors;

/// The layer around a service. An OPTIONS that is no preflight belongs to the service, and not to CORS.
#[derive(Clone)]
pub(crate) struct WithCors<S> {
    answering: Answering<S>,
    service: S,
}

impl<S: Clone> Layer<S> for Cors {
    type Service = WithCors<S>;

    fn layer(&self, service: S) -> WithCors<S> {
        let cors = CorsLayer::new()
            .allow_origin(Any)
            .allow_methods([Method::GET, Method::POST, Method::PATCH, Method::DELETE])
            // Mirrored, since a wildcard would not include `Authorization`.
            .allow_headers(AllowHeaders::mirror_request())
            .expose_headers(EXPOSED)
            .max_age(MAX_AGE);
        WithCors { answering: cors.layer(service.clone()), service }
    }
}

impl<S, I, O> Service<Request<I>> for WithCors<S>
where
    S: Service<Request<I>, Response = Response<O>>,
    S::Future: Send + 'static,
    O: Default + 'static,
    S::Error: 'static,
    S::Response: 'static,
{
    type Response = Response<O>;
    type Error = S::Error;
    type Future = futures_util::future::Either<<Answering<S> as Service<Request<I>>>::Future, S::Future>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        std::task::ready!(self.answering.poll_ready(context))?;
        self.service.poll_ready(context)
    }

    fn call(&mut self, request: Request<I>) -> Self::Future {
        let preflight = request.headers().contains_key(ACCESS_CONTROL_REQUEST_METHOD);
        if request.method() == Method::OPTIONS && !preflight {
            return futures_util::future::Either::Right(self.service.call(request));
        }
        futures_util::future::Either::Left(self.answering.call(request))
    }
}
