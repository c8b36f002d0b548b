//! Any annotated gRPC service as JSON over HTTP: a tower layer that knows no resource.
//!
//! At the start it reads `google.api.http` and the options of `shortkit.rest.v1` from the descriptors. A REST request
//! becomes one gRPC call of the service inside, in this process, so authentication and handlers run once for both
//! protocols; its reply becomes JSON. A request that is gRPC already passes untouched.
//!
//! One request's way: `routes` finds the route → `request` reads the body, `decode` turns its JSON into wire bytes, and
//! `query` appends what path and query say, because in protobuf what stands later counts → `call` → `encode` turns the
//! wire bytes of the reply into JSON, for `answer` or `sse`. All of it is driven by `tables`; descriptors are looked at
//! only at the start.

mod answer;
mod call;
mod decode;
#[cfg(test)]
mod differential;
mod encode;
mod error;
mod gzip;
mod json;
mod path;
mod query;
mod request;
mod routes;
mod scalar;
mod service;
mod sse;
mod tables;
mod template;
mod wire;

use std::{sync::Arc, time::Duration};

use http::{Extensions, Response};
use tokio_util::sync::CancellationToken;
use tonic::body::Body;
use tower::Layer;

use self::{error::Failure, routes::Routes};
pub use self::{routes::StartError, service::Transcoded};

/// A body is at most this long, also after it was unpacked; a longer one is a 413.
pub const MAX_BODY_BYTES: usize = 1024 * 1024;
/// Messages in a body may be nested this deep; deeper ones are a 400.
pub const MAX_DEPTH: usize = 64;

/// What the layer bounds.
#[derive(Debug, Clone)]
pub struct Limits {
    /// How long a call that is no stream may take; then it is dropped and answered with a 504.
    pub deadline: Duration,
    /// A stream that says nothing for so long sends a comment, so that nobody between takes it for dead.
    pub heartbeat: Duration,
    /// Ends open streams.
    pub shutdown: CancellationToken,
    /// Tells from the extensions of a request for which organization it is, once the service inside knows: each has one packed
    /// body unpacked at a time.
    pub organization: fn(&Extensions) -> Option<Arc<str>>,
}

/// The layer.
#[derive(Clone)]
pub struct Transcode(Arc<Plan>);

/// What every request goes by.
struct Plan {
    routes: Routes,
    limits: Limits,
    unpacker: gzip::Unpacker,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            deadline: Duration::from_secs(60),
            heartbeat: Duration::from_secs(15),
            shutdown: CancellationToken::new(),
            organization: |_| None,
        }
    }
}

impl Transcode {
    /// Reads the annotations; a route that is wrong or stands twice is an error that names its method.
    pub fn new(descriptor_set: &[u8], limits: Limits) -> Result<Self, StartError> {
        Ok(Self(Arc::new(Plan { routes: Routes::read(descriptor_set)?, limits, unpacker: gzip::Unpacker::default() })))
    }

    /// The gRPC paths of all calls that REST makes with this method.
    pub fn calls(&self, verb: &http::Method) -> impl Iterator<Item = &str> {
        self.0.routes.calls(verb)
    }
}

impl<S> Layer<S> for Transcode {
    type Service = Transcoded<S>;

    fn layer(&self, inner: S) -> Self::Service {
        Transcoded::new(Arc::clone(&self.0), inner)
    }
}

/// The answer to a request that a fault of the server's own ended, for those who find one outside of this layer.
pub fn internal_error(request_id: Option<&str>) -> Response<Body> {
    Failure::internal().response(request_id)
}
