//! From request to response.

use std::{
    sync::Arc,
    task::{Context, Poll},
};

use futures_util::future::BoxFuture;
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, Version, header};
use tonic::body::Body;
use tower::{Service, ServiceExt};

use super::{
    Plan, answer, call,
    error::Failure,
    request::Source,
    routes::{Found, Route},
    sse,
    template::Bound,
};

const GRPC: &[u8] = b"application/grpc";
const GRPC_WEB: &[u8] = b"application/grpc-web";

/// The layer around a service.
#[derive(Clone)]
pub struct Transcoded<S> {
    plan: Arc<Plan>,
    inner: S,
}

impl<S> Transcoded<S> {
    pub(super) fn new(plan: Arc<Plan>, inner: S) -> Self {
        Self { plan, inner }
    }
}

impl<S> Service<Request<Body>> for Transcoded<S>
where
    S: Service<Request<Body>, Response = Response<Body>> + Clone + Send + 'static,
    S::Future: Send,
    S::Error: Send,
{
    type Response = Response<Body>;
    type Error = S::Error;
    type Future = BoxFuture<'static, Result<Self::Response, Self::Error>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        if passes(&request) {
            return Box::pin(self.inner.call(request));
        }
        let this = self.clone();
        Box::pin(async move {
            let request_id = request.headers().get("x-request-id").and_then(|id| id.to_str().ok()).map(str::to_owned);
            let head = request.method() == Method::HEAD;
            let answered = match this.answer(request, request_id.clone()).await {
                Ok(response) => response?,
                Err(failure) => failure.response(request_id.as_deref()),
            };
            Ok(if head { without_body(answered) } else { answered })
        })
    }
}

impl<S> Transcoded<S>
where
    S: Service<Request<Body>, Response = Response<Body>> + Clone + Send + 'static,
    S::Future: Send,
{
    async fn answer(
        self,
        request: Request<Body>,
        request_id: Option<String>,
    ) -> Result<Result<Response<Body>, S::Error>, Failure> {
        let plan = Arc::clone(&self.plan);
        let answered = match plan.routes.find(request.method(), request.uri().path()) {
            Found::Route(route, bound) => return self.call_inner(route, bound, request, request_id).await,
            Found::OtherMethods(methods) if request.method() == Method::OPTIONS => Ok(options(&methods)),
            Found::OtherMethods(methods) => Err(Failure::method_not_allowed(&methods.join(", "))),
            Found::BadPath => Err(Failure::new("INVALID_PARAMETER", "the path has a broken escape")),
            Found::Unknown if is_grpc(&request) => Err(Failure::new("UNSUPPORTED_MEDIA_TYPE", "gRPC needs HTTP/2")),
            Found::Unknown => Err(Failure::new("NOT_FOUND", "no such path")),
        };
        let allowance = self.allowance(request).await;
        match answered {
            Ok(mut response) => {
                response.headers_mut().extend(allowance);
                Ok(Ok(response))
            }
            Err(failure) => Err(failure.with_headers(allowance)),
        }
    }

    /// What the service inside says of every call with a key, also of one that there is not: how many more it may make.
    async fn allowance(self, request: Request<Body>) -> HeaderMap {
        if !request.headers().contains_key(header::AUTHORIZATION) {
            return HeaderMap::new();
        }
        let (parts, _) = request.into_parts();
        match self.inner.oneshot(call::no_such(parts)).await {
            Ok(response) => answer::passed_on(response.into_parts().0.headers),
            Err(_) => HeaderMap::new(),
        }
    }

    async fn call_inner(
        self,
        route: &Arc<Route>,
        bound: Bound<'_>,
        request: Request<Body>,
        request_id: Option<String>,
    ) -> Result<Result<Response<Body>, S::Error>, Failure> {
        let (parts, body) = request.into_parts();
        let deadline = self.plan.limits.deadline;
        let whole = async {
            let (body, mut fault) = call::body(Source::new(&self.plan, route, bound, &parts, body));
            let called = self.inner.oneshot(call::request(route, parts, body)).await;
            let response = match called {
                Ok(response) => response,
                Err(error) => return Ok(Err(error)),
            };
            let (parts, body) = response.into_parts();
            if let Ok(failure) = fault.try_recv() {
                return Err(failure.with_headers(answer::passed_on(parts.headers)));
            }
            if route.streaming {
                if let Some(status) = call::refusal(&parts.headers) {
                    return Err(Failure::from_status(&status, route).with_headers(answer::passed_on(parts.headers)));
                }
                return sse::response(route, self.plan, request_id, parts.headers, body).map(Ok);
            }
            let reply = match call::unary(&parts.headers, body).await {
                Ok(reply) => reply,
                Err(error) => {
                    return Err(Failure::from_inner(error, route).with_headers(answer::passed_on(parts.headers)));
                }
            };
            answer::response(route, parts.headers, &reply).map(Ok).map_err(|error| Failure::from_inner(error, route))
        };
        // Dropping the call when the time is over also drops the handler inside.
        tokio::time::timeout(deadline, whole).await.unwrap_or_else(|_| Err(Failure::deadline()))
    }
}

/// Whether the request is for the service inside as it is: gRPC, and gRPC-Web, which alone can go over HTTP/1.1.
fn passes(request: &Request<Body>) -> bool {
    is_grpc(request) && (request.version() == Version::HTTP_2 || content_type(request).starts_with(GRPC_WEB))
}

fn is_grpc(request: &Request<Body>) -> bool {
    content_type(request).starts_with(GRPC)
}

fn content_type(request: &Request<Body>) -> &[u8] {
    request.headers().get(header::CONTENT_TYPE).map_or(b"", HeaderValue::as_bytes)
}

fn options(methods: &[&str]) -> Response<Body> {
    let mut response = Response::new(Body::empty());
    *response.status_mut() = StatusCode::NO_CONTENT;
    if let Ok(allow) = HeaderValue::from_str(&methods.join(", ")) {
        response.headers_mut().insert(header::ALLOW, allow);
    }
    response
}

/// An answer to HEAD: all but the body, with its length where it is known.
fn without_body(response: Response<Body>) -> Response<Body> {
    let (mut parts, body) = response.into_parts();
    if let Some(length) = http_body::Body::size_hint(&body).exact() {
        parts.headers.insert(header::CONTENT_LENGTH, HeaderValue::from(length));
    }
    Response::from_parts(parts, Body::empty())
}
