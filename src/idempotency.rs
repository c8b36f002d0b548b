//! Requests with an idempotency key: a layer for both protocols, since REST calls go through it as gRPC calls.
//!
//! The name of a request is its key, within its tenant and its call; what it asks is known by a hash of its message. Only
//! work that was done is kept: a request that was refused has changed nothing, and asking again cannot do it twice.

use std::{
    collections::HashSet,
    error::Error,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use bytes::{BufMut, Bytes, BytesMut};
use futures_util::{
    future::{BoxFuture, Either},
    stream,
};
use http::{
    HeaderMap, HeaderName, HeaderValue, Request, Response,
    header::{CONTENT_TYPE, ValueIter},
    request::Parts,
};
use http_body::Frame;
use http_body_util::{BodyExt, Limited, StreamBody};
use ring::digest::{SHA256, digest};
use tonic::{Code, Status, body::Body};
use tower::{Layer, Service, ServiceExt};

use crate::{
    auth::Principal,
    grpc::{self, KEEPS_ITS_ANSWER},
    store::{Claim, NamedRequest, Remembered, Store},
};

/// Names a request, over REST and over gRPC.
const IDEMPOTENCY_KEY: &str = "idempotency-key";
/// Says that an answer is the first one, again.
const REPLAYED: HeaderName = HeaderName::from_static("idempotency-replayed");
/// A longer key is refused.
const MAX_KEY_BYTES: usize = 255;
/// A longer message is refused.
const MAX_MESSAGE_BYTES: usize = 1024 * 1024;
/// What stands before a message: a flag, and the length in four bytes.
const PREFIX_BYTES: usize = 5;
/// A claim outlasts the longest call by this much: time to put the answer in its place.
const CLAIM_MARGIN: Duration = Duration::from_secs(5);
/// Between two looks at a request that another run is at work on: from this …
const MIN_WAIT: Duration = Duration::from_millis(10);
/// … doubling up to this.
const MAX_WAIT: Duration = Duration::from_millis(500);

/// The layer. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Idempotency(Arc<Shared>);

struct Shared {
    store: Store,
    /// The calls that take a key, by their gRPC paths.
    calls: HashSet<String>,
    /// How long a call may take.
    deadline: Duration,
}

/// The layer around a service.
#[derive(Clone)]
pub(crate) struct Idempotent<S> {
    shared: Arc<Shared>,
    inner: S,
}

/// An answer in one piece.
struct Reply {
    head: http::response::Parts,
    frame: Bytes,
    trailers: HeaderMap,
}

impl Idempotency {
    /// For these calls, none of which may take longer than `deadline`.
    pub(crate) fn new(store: Store, calls: HashSet<String>, deadline: Duration) -> Self {
        Self(Arc::new(Shared { store, calls, deadline }))
    }
}

impl<S> Layer<S> for Idempotency {
    type Service = Idempotent<S>;

    fn layer(&self, inner: S) -> Self::Service {
        Idempotent { shared: Arc::clone(&self.0), inner }
    }
}

impl<S> Service<Request<Body>> for Idempotent<S>
where
    S: Service<Request<Body>, Response = Response<Body>> + Clone + Send + 'static,
    S::Future: Send,
    S::Error: Send,
{
    type Response = Response<Body>;
    type Error = S::Error;
    type Future = Either<S::Future, BoxFuture<'static, Result<Self::Response, Self::Error>>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        // Without a key, this is all it costs.
        if !request.headers().contains_key(IDEMPOTENCY_KEY) || !self.shared.calls.contains(request.uri().path()) {
            return Either::Left(self.inner.call(request));
        }
        let (shared, inner) = (Arc::clone(&self.shared), self.inner.clone());
        Either::Right(Box::pin(async move {
            match shared.answer(inner, request).await {
                Ok(answered) => answered,
                Err(status) => Ok(status.into_http()),
            }
        }))
    }
}

impl Shared {
    async fn answer<S>(
        self: Arc<Self>,
        inner: S,
        request: Request<Body>,
    ) -> Result<Result<Response<Body>, S::Error>, Status>
    where
        S: Service<Request<Body>, Response = Response<Body>> + Clone + Send + 'static,
        S::Future: Send,
        S::Error: Send,
    {
        let (head, body) = request.into_parts();
        let key = key(head.headers.get_all(IDEMPOTENCY_KEY).iter())?;
        let principal = head.extensions.get::<Principal>().ok_or_else(|| grpc::internal("no principal"))?;
        let message = Limited::new(body, MAX_MESSAGE_BYTES + PREFIX_BYTES).collect().await;
        let message = message.map_err(unread)?.to_bytes();
        let named = Arc::new(NamedRequest {
            tenant: principal.tenant.clone(),
            call: head.uri.path().to_owned(),
            key,
            fingerprint: digest(&SHA256, &message).as_ref().iter().map(|byte| format!("{byte:02x}")).collect(),
        });
        let mut wait = MIN_WAIT;
        loop {
            let known = self.store.remembered(&named).await.map_err(grpc::store_failed)?;
            // While another run is at work on it there is nothing to claim: waiting reads, and writes nothing.
            if known != Remembered::AtWork {
                if let Some(answered) = answered(known)? {
                    return Ok(Ok(answered));
                }
                if KEEPS_ITS_ANSWER.contains(&named.call.as_str()) {
                    return self.run_keeping(inner, rebuilt(head, message), named).await;
                }
                let claimed = self.store.claim_request(Arc::clone(&named), self.deadline + CLAIM_MARGIN).await;
                if let Some(claim) = claimed.map_err(grpc::store_failed)? {
                    let run = Arc::clone(&self).run_claimed(inner, rebuilt(head, message), claim);
                    // A task of its own: what has begun gets its answer kept, also when the caller leaves.
                    return tokio::spawn(run).await.map_err(|error| grpc::internal(&error.to_string()));
                }
            }
            tokio::time::sleep(wait).await;
            wait = (wait * 2).min(MAX_WAIT);
        }
    }

    /// Runs a call whose transaction keeps its answer.
    async fn run_keeping<S>(
        &self,
        inner: S,
        mut request: Request<Body>,
        named: Arc<NamedRequest>,
    ) -> Result<Result<Response<Body>, S::Error>, Status>
    where
        S: Service<Request<Body>, Response = Response<Body>> + Send + 'static,
        S::Future: Send,
    {
        request.extensions_mut().insert(Arc::clone(&named));
        let reply = match inner.oneshot(request).await {
            Ok(response) => Reply::read(response).await?,
            Err(error) => return Ok(Err(error)),
        };
        if reply.code() != Code::Ok {
            // It may be done all the same: by another with the same key that was faster, or here, when only the reply of
            // the commit was lost. Without an answer to this question the caller gets the failure, and asks again.
            match self.store.remembered(&named).await.map_err(grpc::store_failed).and_then(answered) {
                Ok(Some(done)) => return Ok(Ok(done)),
                Err(status) if status.code() == Code::FailedPrecondition => return Err(status),
                Ok(None) | Err(_) => {}
            }
        }
        Ok(Ok(reply.response()))
    }

    /// Runs any other call, and puts its answer where the claim was.
    async fn run_claimed<S>(
        self: Arc<Self>,
        inner: S,
        request: Request<Body>,
        claim: Claim,
    ) -> Result<Response<Body>, S::Error>
    where
        S: Service<Request<Body>, Response = Response<Body>> + Send + 'static,
        S::Future: Send,
    {
        let whole = async {
            let response = inner.oneshot(request).await?;
            Ok(Reply::read(response).await)
        };
        let reply = match tokio::time::timeout(self.deadline, whole).await {
            Ok(Ok(reply)) => reply,
            Ok(Err(error)) => return Err(error),
            Err(_) => Err(Status::deadline_exceeded("the call took too long and was given up")),
        };
        let settled = match &reply {
            Ok(reply) if reply.code() == Code::Ok => {
                self.store.answer_claim(&claim, reply.frame.get(PREFIX_BYTES..).unwrap_or_default()).await
            }
            _ => self.store.release_claim(&claim).await.map(|()| true),
        };
        match settled {
            Ok(true) => {}
            Ok(false) => tracing::warn!("the claim of a named request ran out before its answer came"),
            Err(error) => tracing::warn!(%error, "the claim of a named request is not settled; it will run out"),
        }
        Ok(reply.map_or_else(Status::into_http, Reply::response))
    }
}

impl Reply {
    async fn read(response: Response<Body>) -> Result<Self, Status> {
        let (head, body) = response.into_parts();
        let collected = body.collect().await?;
        let trailers = collected.trailers().cloned().unwrap_or_default();
        Ok(Self { head, frame: collected.to_bytes(), trailers })
    }

    /// A failure without a message stands in the headers.
    fn code(&self) -> Code {
        let status = Status::from_header_map(&self.head.headers).or_else(|| Status::from_header_map(&self.trailers));
        status.map_or(Code::Unknown, |status| status.code())
    }

    fn response(self) -> Response<Body> {
        // A failure that stands in the headers must end with them.
        if self.frame.is_empty() && self.trailers.is_empty() {
            return Response::from_parts(self.head, Body::empty());
        }
        let frames = [Frame::data(self.frame), Frame::trailers(self.trailers)].map(Ok::<_, Status>);
        Response::from_parts(self.head, Body::new(StreamBody::new(stream::iter(frames))))
    }
}

/// The answer that is kept; none when the request was not done, or is being done.
fn answered(known: Remembered) -> Result<Option<Response<Body>>, Status> {
    match known {
        Remembered::Nothing | Remembered::AtWork => Ok(None),
        Remembered::OtherBody => Err(grpc::key_reused()),
        Remembered::Answer(message) => Ok(Some(replay(&message))),
    }
}

/// The one key among the values of the header.
fn key(mut values: ValueIter<'_, HeaderValue>) -> Result<String, Status> {
    let only = values.next().filter(|_| values.next().is_none()).map(HeaderValue::as_bytes);
    let printable = |key: &&[u8]| key.iter().all(|byte| matches!(byte, b' '..=b'~'));
    let key = only.filter(|key| (1..=MAX_KEY_BYTES).contains(&key.len())).filter(printable);
    key.map(|key| String::from_utf8_lossy(key).into_owned()).ok_or_else(|| {
        let message = format!("{IDEMPOTENCY_KEY} must be one value of 1 to {MAX_KEY_BYTES} printable ASCII characters");
        grpc::invalid_parameter(IDEMPOTENCY_KEY, "invalid", message)
    })
}

/// Why there is no message: it is too long, or whoever hands it in has a reason of its own not to go on.
fn unread(error: Box<dyn Error + Send + Sync>) -> Status {
    error.downcast().map_or_else(|_| grpc::message_too_long(MAX_MESSAGE_BYTES), |status| *status)
}

/// The request again, with its message in one piece.
fn rebuilt(head: Parts, message: Bytes) -> Request<Body> {
    Request::from_parts(head, Body::new(http_body_util::Full::new(message)))
}

/// The first answer again.
fn replay(message: &[u8]) -> Response<Body> {
    let mut frame = BytesMut::with_capacity(PREFIX_BYTES + message.len());
    frame.put_u8(0);
    // What is kept is far from four bytes of length.
    frame.put_u32(u32::try_from(message.len()).unwrap_or(u32::MAX));
    frame.put_slice(message);
    let mut trailers = HeaderMap::new();
    trailers.insert(Status::GRPC_STATUS, HeaderValue::from_static("0"));
    let (mut head, ()) = Response::new(()).into_parts();
    head.headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    head.headers.insert(REPLAYED, HeaderValue::from_static("true"));
    Reply { head, frame: frame.freeze(), trailers }.response()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_body_that_fails_says_why() {
        let late = stream::once(async { Err::<Frame<Bytes>, _>(Status::deadline_exceeded("too late")) });
        let read = Limited::new(Body::new(StreamBody::new(late)), 8).collect().await;
        assert_eq!(unread(read.unwrap_err()).code(), Code::DeadlineExceeded);
        let long = Limited::new(Body::new(http_body_util::Full::from("123456789")), 8).collect().await;
        assert_eq!(unread(long.unwrap_err()).code(), Code::OutOfRange);
    }
}
