//! The way of a request from the port to the services: gRPC goes to them directly, everything else through what REST and
//! browsers need.

use std::{
    any::Any,
    convert::Infallible,
    panic::AssertUnwindSafe,
    sync::Arc,
    task::{Context, Poll},
};

use futures_util::{
    FutureExt,
    future::{BoxFuture, Either},
};
use http::{HeaderName, HeaderValue, Request, Response, Version, header::CONTENT_TYPE};
use tonic::body::Body;
use tower::{Service, ServiceBuilder, ServiceExt, util::BoxCloneSyncService};
use tower_http::{compression::CompressionLayer, map_response_body::MapResponseBodyLayer};

use crate::{clock, cors, grpc, health::Health, listen, rest};

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// The way in. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Gateway<S> {
    services: S,
    /// Behind one pointer, since a gRPC call needs none of it, and every request gets a clone.
    web: Arc<Web>,
    health: Option<Health>,
}

type Web = BoxCloneSyncService<Request<Body>, Response<Body>, Infallible>;

impl<S> Gateway<S>
where
    S: Service<Request<Body>, Response = Response<Body>, Error = Infallible> + Clone + Send + Sync + 'static,
    S::Future: Send,
{
    /// The way to `services`, which all protocols share, and to `health`, if it is told here.
    pub(crate) fn new(services: S, transcode: rest::Transcode, health: Option<Health>) -> Self {
        let web = ServiceBuilder::new()
            .layer(MapResponseBodyLayer::new(Body::new))
            .layer(CompressionLayer::new())
            .map_response(listen::weigh)
            .layer(transcode)
            .layer(tonic_web::GrpcWebLayer::new())
            .service(services.clone());
        Self { services, web: Arc::new(BoxCloneSyncService::new(web)), health }
    }
}

impl<S> Service<Request<Body>> for Gateway<S>
where
    S: Service<Request<Body>, Response = Response<Body>, Error = Infallible>,
    S::Future: Send + 'static,
{
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<Response<Body>, Infallible>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.services.poll_ready(context)
    }

    fn call(&mut self, mut request: Request<Body>) -> Self::Future {
        let id = request_id();
        // One that the caller chose is forgotten: ids are ours, so that one in a log is one request.
        request.headers_mut().insert(REQUEST_ID, id.clone());
        if is_grpc(&request) {
            let answered = AssertUnwindSafe(self.services.call(request)).catch_unwind();
            return Box::pin(async move {
                let mut response =
                    answered.await.unwrap_or_else(|panic| Ok(grpc::panicked(panic.as_ref()).into_http()))?;
                response.headers_mut().insert(REQUEST_ID, id);
                Ok(response)
            });
        }
        let from_page = cors::is_from_page(request.headers());
        let known = self.health.as_ref().and_then(|health| health.answer(&request));
        let answered = match known.or_else(|| cors::preflight(&request)) {
            Some(response) => Either::Left(std::future::ready(Ok(response))),
            None => Either::Right(Web::clone(&self.web).oneshot(request)),
        };
        Box::pin(async move {
            let answered = AssertUnwindSafe(answered).catch_unwind().await;
            let mut response = answered.unwrap_or_else(|panic| Ok(panicked(panic.as_ref(), &id)))?;
            response.headers_mut().insert(REQUEST_ID, id);
            if from_page {
                cors::allow(response.headers_mut());
            }
            Ok(response)
        })
    }
}

/// Whether it is gRPC as it is. Over HTTP/1.1 that cannot be: its trailers would be lost.
fn is_grpc(request: &Request<Body>) -> bool {
    let format =
        request.headers().get(CONTENT_TYPE).and_then(|value| value.as_bytes().strip_prefix(b"application/grpc"));
    request.version() == Version::HTTP_2 && format.is_some_and(|format| !format.starts_with(b"-web"))
}

fn request_id() -> HeaderValue {
    let mut id = HeaderValue::try_from(clock::new_id("req")).unwrap_or_else(|_| unreachable!("an id is plain text"));
    // HTTP/2 keeps such values out of its table of headers, where one that never comes back would displace others.
    id.set_sensitive(true);
    id
}

/// What a panic outside of the handlers answers: nothing of the inside.
fn panicked(panic: &(dyn Any + Send), id: &HeaderValue) -> Response<Body> {
    // Logs it.
    let _ = grpc::panicked(panic);
    rest::internal_error(id.to_str().ok())
}

#[cfg(test)]
mod tests {
    use http_body_util::BodyExt;
    use tonic_types::StatusExt;
    use tower::service_fn;

    use super::*;

    /// A way to services whose insides break.
    fn broken()
    -> Gateway<impl Service<Request<Body>, Response = Response<Body>, Error = Infallible, Future: Send> + Clone> {
        let transcode = rest::Transcode::new(grpc::DESCRIPTORS, rest::Limits::default()).unwrap();
        let services = service_fn(async |_: Request<Body>| -> Result<Response<Body>, Infallible> { panic!("secret") });
        Gateway::new(services, transcode, None)
    }

    #[tokio::test]
    async fn a_panic_is_an_error_in_the_caller_s_protocol() {
        let request = Request::get("/v1/webhooks").header(REQUEST_ID, "mine").body(Body::empty()).unwrap();
        let (head, body) = broken().call(request).await.unwrap().into_parts();
        let text = String::from_utf8(body.collect().await.unwrap().to_bytes().to_vec()).unwrap();
        let id = head.headers[REQUEST_ID].to_str().unwrap();
        assert!(head.status == 500 && id.starts_with("req_") && text.contains(id), "{text}");
        assert!(text.contains("\"INTERNAL_ERROR\"") && !text.contains("secret"), "{text}");

        let request = Request::post("/x").version(Version::HTTP_2).header(CONTENT_TYPE, "application/grpc");
        let answer = broken().call(request.body(Body::empty()).unwrap()).await.unwrap();
        let status = tonic::Status::from_header_map(answer.headers()).unwrap();
        assert_eq!((status.code(), status.message()), (tonic::Code::Internal, "internal error"));
        assert_eq!(status.get_error_details().error_info().unwrap().reason, "INTERNAL_ERROR");
        assert!(answer.headers().contains_key(REQUEST_ID));
    }
}
