//! Bodies within their bounds: what comes in, in time and in size; what goes out, as fast as the peer takes it.

use std::{
    future::ready,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use futures_util::stream;
use http::{Request, Response, Version, header::EXPECT};
use http_body::{Frame, SizeHint};
use http_body_util::{BodyExt, StreamBody};
use hyper::body::Incoming;
use tokio::{
    sync::oneshot,
    time::{Sleep, sleep, timeout},
};
use tonic::{Status, body::Body};

use super::{
    connection::Call,
    peers::{Full, Reserved},
};

/// An answer leaves in pieces of this size. The next one is asked for only when the one before could leave, so that one
/// piece and what the service holds is all that waits for a slow reader; what is longer than a piece is counted while it does.
const PIECE_BYTES: usize = 16 * 1024;

/// Bytes of a body that nobody wants which are read for nothing; when there are more, the connection ends.
const MAX_DISCARDED_BYTES: usize = 1024 * 1024;
/// Reading for nothing takes at most this long, since the answer waits for it; what is slower ends the connection too.
const MAX_DISCARD: Duration = Duration::from_secs(2);

/// A request's body on its way in.
pub(super) struct Receiving {
    /// None at its end.
    body: Option<Incoming>,
    reserved: Arc<Reserved>,
    time: Duration,
    /// Runs from the first time that there is nothing to read.
    late: Option<Pin<Box<Sleep>>>,
    /// Where the body goes when it is dropped before its end.
    unread: Option<oneshot::Sender<Unread>>,
}

/// What is left of a body that the service did not want.
pub(super) struct Unread(Incoming);

impl Receiving {
    /// With where to find what is left of the body once this is dropped.
    pub(super) fn new(
        request: Request<Incoming>,
        reserved: Arc<Reserved>,
        time: Duration,
    ) -> (Request<Self>, oneshot::Receiver<Unread>) {
        let (unread, left) = oneshot::channel();
        // HTTP/2 can end one stream, and a client that waits to be asked for the body has sent none.
        let kept = request.version() < Version::HTTP_2 && !request.headers().contains_key(EXPECT);
        let unread = kept.then_some(unread);
        (request.map(|body| Self { body: Some(body), reserved, time, late: None, unread }), left)
    }

    fn poll_late(&mut self, context: &mut Context<'_>) -> Poll<Status> {
        let time = self.time;
        let late = self.late.get_or_insert_with(|| Box::pin(sleep(time)));
        late.as_mut().poll(context).map(|()| Status::deadline_exceeded("the body of the request took too long"))
    }

    fn give_up(&mut self) {
        let body = self.body.take().filter(|body| !http_body::Body::is_end_stream(body));
        if let Some((body, unread)) = body.zip(self.unread.take()) {
            let _ = unread.send(Unread(body));
        }
    }
}

impl Drop for Receiving {
    fn drop(&mut self) {
        self.give_up();
    }
}

impl Unread {
    /// Reads it for nothing: over HTTP/1.1 a client that is still writing would not see the answer.
    pub(super) async fn discard(mut self) {
        let whole = async {
            let mut discarded = 0;
            while let Some(Ok(frame)) = self.0.frame().await
                && discarded <= MAX_DISCARDED_BYTES
            {
                discarded += frame.data_ref().map_or(0, Bytes::len);
            }
        };
        let _ = timeout(MAX_DISCARD, whole).await;
    }
}

impl http_body::Body for Receiving {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let Some(body) = &mut self.body else { return Poll::Ready(None) };
        let ended = match Pin::new(body).poll_frame(context) {
            Poll::Ready(Some(Ok(frame))) => {
                let refused = match self.reserved.grow(frame.data_ref().map_or(0, Bytes::len)) {
                    Ok(()) => return Poll::Ready(Some(Ok(frame))),
                    Err(Full::Memory) => Status::unavailable("too many requests are being received; try again"),
                    Err(Full::Share) => Status::resource_exhausted(
                        "too many requests of this organization are being received; try again",
                    ),
                    Err(Full::Stranger) => Status::resource_exhausted("a call without a key may not send so much"),
                };
                self.give_up();
                Some(refused)
            }
            Poll::Ready(Some(Err(error))) => Some(Status::from_error(error.into())),
            Poll::Ready(None) => None,
            Poll::Pending => Some(std::task::ready!(self.poll_late(context))),
        };
        self.body = None;
        Poll::Ready(ended.map(Err))
    }

    fn is_end_stream(&self) -> bool {
        self.body.as_ref().is_none_or(http_body::Body::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        self.body.as_ref().map_or_else(|| SizeHint::with_exact(0), http_body::Body::size_hint)
    }
}

/// An answer on its way out.
pub(super) struct Sending {
    body: Body,
    /// What the service gave and the peer has not asked for.
    rest: Bytes,
    reserved: Reserved,
    /// Whether room is reserved for all of it, until its end.
    whole: bool,
    taking: Option<Arc<Taking>>,
    /// Until the answer has left, its call is under way.
    _call: Call,
}

/// How long an answer is that is then compressed piece by piece, as the peer takes it, and held whole until its end.
#[derive(Debug, Clone, Copy)]
struct Whole(usize);

/// Notes how long an answer is, for whoever sends it once it has been compressed.
pub fn weigh(mut response: Response<Body>) -> Response<Body> {
    let bytes = http_body::Body::size_hint(response.body()).exact().and_then(|bytes| usize::try_from(bytes).ok());
    if let Some(bytes) = bytes.filter(|bytes| *bytes > PIECE_BYTES) {
        response.extensions_mut().insert(Whole(bytes));
    }
    response
}

impl Sending {
    pub(super) fn of(response: Response<Body>, reserved: Reserved, call: Call) -> Response<Self> {
        let compressed = http_body::Body::size_hint(response.body()).exact().is_none();
        let whole = response.extensions().get::<Whole>().copied().filter(|_| compressed);
        let room = whole.is_none_or(|Whole(bytes)| reserved.grow(bytes).is_ok());
        let taking = TAKING.try_with(Arc::clone).ok();
        response.map(|body| {
            let body = if room { body } else { Body::new(StreamBody::new(stream::once(ready(Err(too_many()))))) };
            Self { body, rest: Bytes::new(), reserved, whole: whole.is_some(), taking, _call: call }
        })
    }

    /// Whether there is room for what the service gave. One piece needs none.
    fn holds(&self) -> bool {
        self.whole || self.rest.len() <= PIECE_BYTES || self.reserved.grow(self.rest.len()).is_ok()
    }
}

/// The head of the answer is out, or nobody here could make another that callers understand: this is the end of its stream.
fn too_many() -> Status {
    Status::unavailable("too many answers wait for their readers")
}

impl http_body::Body for Sending {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        if let Some(taking) = &self.taking {
            taking.asked();
        }
        if self.rest.is_empty() {
            match std::task::ready!(Pin::new(&mut self.body).poll_frame(context)) {
                Some(Ok(frame)) => match frame.into_data() {
                    Ok(data) => self.rest = data,
                    Err(trailers) => return Poll::Ready(Some(Ok(trailers))),
                },
                ended => return Poll::Ready(ended),
            }
            if !self.holds() {
                (self.body, self.rest) = (Body::empty(), Bytes::new());
                return Poll::Ready(Some(Err(too_many())));
            }
        }
        let piece = self.rest.len().min(PIECE_BYTES);
        let piece = self.rest.split_to(piece);
        if self.rest.is_empty() && !self.whole {
            self.reserved.clear();
        }
        if let Some(taking) = &self.taking {
            taking.given();
        }
        Poll::Ready(Some(Ok(Frame::data(piece))))
    }

    fn is_end_stream(&self) -> bool {
        self.rest.is_empty() && self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        let (rest, mut hint) = (self.rest.len() as u64, self.body.size_hint());
        // The upper bound first: it must not be passed by the lower one.
        if let Some(upper) = hint.upper() {
            hint.set_upper(upper + rest);
        }
        hint.set_lower(hint.lower() + rest);
        hint
    }
}

tokio::task_local! {
    /// Of the HTTP/2 stream that this task is about.
    static TAKING: Arc<Taking>;
}

/// Whether the peer is to take a piece: an odd number since one was given, an even one since the next was asked for.
#[derive(Default)]
struct Taking(AtomicU64);

impl Taking {
    fn given(&self) {
        self.0.fetch_or(1, Ordering::Relaxed);
    }

    fn asked(&self) {
        let now = self.0.load(Ordering::Relaxed);
        self.0.store(now + now % 2, Ordering::Relaxed);
    }
}

/// Runs each HTTP/2 stream as a task, and ends it when its peer takes nothing: flow control lets a peer hold an answer
/// for ever while it answers every ping. The other streams of the connection go on. (On HTTP/1.1 the connection is the
/// stream, and [`super::stream`] sees that it does not move.)
#[derive(Clone)]
pub(super) struct Streams {
    pub(super) write_time: Duration,
}

impl<F> hyper::rt::Executor<F> for Streams
where
    F: Future<Output = ()> + Send + 'static,
{
    fn execute(&self, stream: F) {
        let write_time = self.write_time;
        tokio::spawn(async move {
            let taking = Arc::new(Taking::default());
            let mut stream = std::pin::pin!(TAKING.scope(Arc::clone(&taking), stream));
            let mut waiting: Option<(u64, Pin<Box<Sleep>>)> = None;
            std::future::poll_fn(|context| {
                if stream.as_mut().poll(context).is_ready() {
                    return Poll::Ready(());
                }
                let now = taking.0.load(Ordering::Relaxed);
                if now.is_multiple_of(2) {
                    waiting = None;
                    return Poll::Pending;
                }
                if waiting.as_ref().is_none_or(|(since, _)| *since != now) {
                    waiting = Some((now, Box::pin(sleep(write_time))));
                }
                // When the time is over, dropping the stream resets it.
                waiting.as_mut().map_or(Poll::Pending, |(_, over)| over.as_mut().poll(context))
            })
            .await;
        });
    }
}
