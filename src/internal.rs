//! The port for those who run the service, in cleartext and without a key, since it is on an address that others do not
//! reach: health, reflection and metrics.

use std::convert::Infallible;

use http::{HeaderValue, Request, Response, StatusCode, header};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tonic::{body::Body, service::Routes};
use tower::{ServiceExt, service_fn};

use crate::{
    health::{Health, fetched, plain},
    listen,
    store::Store,
};

/// Connections at a time, at most half of them from one address: whoever probes and scrapes.
const MAX_CONNECTIONS: usize = 128;
/// Nothing that is asked here has a body that is longer than a name.
const MAX_BODY_BYTES: usize = 1024 * 1024;
/// Prometheus' text format.
const METRICS: HeaderValue = HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
/// Said to whoever asks for anything else.
const WHAT_IS_HERE: &str =
    "this port has /livez, /readyz and /metrics, and over gRPC health and reflection, as far as they are switched on\n";

/// Serves for ever: whoever asks during the end of the node is told that it ends.
pub(crate) async fn serve(listener: TcpListener, store: Store, health: Option<Health>, routes: Routes) {
    let routes = routes.prepare();
    let service = service_fn(move |request: Request<Body>| {
        let (store, health, routes) = (store.clone(), health.clone(), routes.clone());
        async move { answer(request, &store, health.as_ref(), routes).await }
    });
    let limits =
        listen::Limits { connections: MAX_CONNECTIONS, body_bytes: MAX_BODY_BYTES, ..listen::Limits::default() };
    listen::serve(listener, None, limits, service, CancellationToken::new()).await;
}

async fn answer(
    request: Request<Body>,
    store: &Store,
    health: Option<&Health>,
    routes: Routes,
) -> Result<Response<Body>, Infallible> {
    if let Some(answer) = health.and_then(|health| health.answer(&request)) {
        return Ok(answer);
    }
    let format = request.headers().get(header::CONTENT_TYPE).map(HeaderValue::as_bytes);
    if format.is_some_and(|format| format.starts_with(b"application/grpc")) {
        return routes.oneshot(request).await;
    }
    if request.uri().path() == "/metrics" {
        return Ok(fetched(&request, || {
            let mut metrics = plain(StatusCode::OK, store.metrics().text(store.levels()));
            metrics.headers_mut().insert(header::CONTENT_TYPE, METRICS);
            metrics
        }));
    }
    Ok(plain(StatusCode::NOT_FOUND, WHAT_IS_HERE.to_owned()))
}
