//! The services by their paths; what tonic refuses by itself becomes as complete as what we refuse.

use std::{
    any::Any,
    convert::Infallible,
    panic::AssertUnwindSafe,
    sync::Arc,
    task::{Context, Poll},
};

use futures_util::{
    FutureExt,
    future::{BoxFuture, CatchUnwind, Map},
};
use http::{HeaderMap, Request, Response, header::CONTENT_TYPE};
use tonic::{Status, body::Body, server::NamedService, service::Routes};
use tower::Service;

use super::{
    Api,
    proto::{
        audit_service_server::AuditServiceServer, delivery_service_server::DeliveryServiceServer,
        webhook_service_server::WebhookServiceServer,
    },
    status,
};

/// A request message is at most this long; a longer one is refused.
pub(super) const MAX_MESSAGE_BYTES: usize = 1024 * 1024;

/// Everything that gRPC can call here. Cheap to clone, since every call gets one.
#[derive(Clone)]
pub struct Services(Arc<Parts>);

struct Parts {
    webhooks: WebhookServiceServer<Api>,
    deliveries: DeliveryServiceServer<Api>,
    audit: AuditServiceServer<Api>,
    others: Routes,
}

/// Our services, by name.
pub(crate) const SERVICES: [&str; 3] =
    [WebhookServiceServer::<Api>::NAME, DeliveryServiceServer::<Api>::NAME, AuditServiceServer::<Api>::NAME];

type Answered = Result<Response<Body>, Infallible>;
type Caught = Result<Answered, Box<dyn Any + Send>>;

impl Services {
    /// Our services, and `others` for every path that is not theirs.
    pub fn new(api: Api, others: Routes) -> Self {
        Self(Arc::new(Parts {
            webhooks: WebhookServiceServer::new(api.clone()).max_decoding_message_size(MAX_MESSAGE_BYTES),
            audit: AuditServiceServer::new(api.clone()).max_decoding_message_size(MAX_MESSAGE_BYTES),
            deliveries: DeliveryServiceServer::new(api).max_decoding_message_size(MAX_MESSAGE_BYTES),
            others: others.prepare(),
        }))
    }
}

impl Service<Request<Body>> for Services {
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Map<CatchUnwind<AssertUnwindSafe<BoxFuture<'static, Answered>>>, fn(Caught) -> Answered>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let service = request.uri().path().strip_prefix('/').and_then(|path| path.split('/').next());
        // Not all of it through one router: that costs as much as reading and writing the messages.
        let answered = match service {
            _ if !is_protobuf(request.headers()) => std::future::ready(Ok(status::not_protobuf().into_http())).boxed(),
            Some(DeliveryServiceServer::<Api>::NAME) => self.0.deliveries.clone().call(request),
            Some(WebhookServiceServer::<Api>::NAME) => self.0.webhooks.clone().call(request),
            Some(AuditServiceServer::<Api>::NAME) => self.0.audit.clone().call(request),
            _ => self.0.others.clone().call(request).boxed(),
        };
        AssertUnwindSafe(answered).catch_unwind().map(completed)
    }
}

/// Protobuf is what a message is in when its content type does not say.
fn is_protobuf(headers: &HeaderMap) -> bool {
    let format = headers.get(CONTENT_TYPE).and_then(|value| value.as_bytes().strip_prefix(b"application/grpc"));
    format.is_some_and(|format| matches!(format, b"" | b"+proto") || format.starts_with(b";"))
}

/// The answer, with all details when it is an error, also when the handler panicked.
fn completed(caught: Caught) -> Answered {
    let response = match caught {
        Ok(Ok(response)) => response,
        Err(panic) => return Ok(status::panicked(panic.as_ref()).into_http()),
    };
    let headers = response.headers();
    if !headers.contains_key(Status::GRPC_STATUS) || headers.contains_key(Status::GRPC_STATUS_DETAILS) {
        return Ok(response);
    }
    Ok(Status::from_header_map(headers).map_or(response, |bare| status::explained(&bare).into_http()))
}

#[cfg(test)]
mod tests {
    use tonic::Code;
    use tonic_types::StatusExt;

    use super::*;

    #[test]
    fn a_handler_that_panics_is_an_internal_error_that_says_nothing() {
        let response = completed(Err(Box::new("secret"))).unwrap();
        let status = Status::from_header_map(response.headers()).unwrap();
        assert_eq!((status.code(), status.message()), (Code::Internal, "internal error"));
        assert_eq!(status.get_error_details().error_info().unwrap().reason, "INTERNAL_ERROR");
    }
}
