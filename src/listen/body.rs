//! Bodies within their bounds: what comes in, in time and in size; what goes out, as fast as the peer takes it.

use std::{
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use http_body::{Frame, SizeHint};
use hyper::body::Incoming;
use tokio::time::{Sleep, sleep};
use tonic::{Status, body::Body};

use super::{connection::Call, peers::Reserved};

/// An answer leaves in pieces of this size. The next one is asked for only when the one before could leave, so that one
/// piece and what the service holds is all that waits for a slow reader.
const PIECE_BYTES: usize = 16 * 1024;

/// Bytes of a body that is refused which are read for nothing: a client that is still writing would not see the answer.
const MAX_DISCARDED_BYTES: usize = 1024 * 1024;

/// A request's body on its way in.
pub(super) struct Receiving {
    body: Incoming,
    reserved: Arc<Reserved>,
    time: Duration,
    /// Runs from the first time that there is nothing to read.
    late: Option<Pin<Box<Sleep>>>,
    refused: Option<Status>,
    discarded: usize,
    ended: bool,
}

impl Receiving {
    pub(super) fn new(body: Incoming, reserved: Arc<Reserved>, time: Duration) -> Self {
        Self { body, reserved, time, late: None, refused: None, discarded: 0, ended: false }
    }

    fn poll_late(&mut self, context: &mut Context<'_>) -> Poll<Status> {
        let time = self.time;
        let late = self.late.get_or_insert_with(|| Box::pin(sleep(time)));
        late.as_mut().poll(context).map(|()| Status::deadline_exceeded("the body of the request took too long"))
    }
}

impl http_body::Body for Receiving {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        while !self.ended {
            let failure = match Pin::new(&mut self.body).poll_frame(context) {
                Poll::Ready(Some(Ok(frame))) => {
                    let bytes = frame.data_ref().map_or(0, Bytes::len);
                    if self.refused.is_none() && self.reserved.grow(bytes) {
                        return Poll::Ready(Some(Ok(frame)));
                    }
                    let refuse = || Status::unavailable("too many requests are being received; try again");
                    self.refused.get_or_insert_with(refuse);
                    self.discarded += bytes;
                    if self.discarded <= MAX_DISCARDED_BYTES {
                        continue;
                    }
                    None
                }
                Poll::Ready(Some(Err(error))) => Some(Status::from_error(error.into())),
                Poll::Ready(None) => None,
                Poll::Pending => Some(std::task::ready!(self.poll_late(context))),
            };
            self.ended = true;
            return Poll::Ready(self.refused.take().or(failure).map(Err));
        }
        Poll::Ready(None)
    }

    fn is_end_stream(&self) -> bool {
        self.ended || (self.refused.is_none() && self.body.is_end_stream())
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// An answer on its way out.
pub(super) struct Sending {
    body: Body,
    /// What the service gave and the peer has not asked for.
    rest: Bytes,
    taking: Option<Arc<Taking>>,
    /// Until the answer has left, its call is under way.
    _call: Call,
}

impl Sending {
    pub(super) fn new(body: Body, call: Call) -> Self {
        Self { body, rest: Bytes::new(), taking: TAKING.try_with(Arc::clone).ok(), _call: call }
    }
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
        }
        let piece = self.rest.len().min(PIECE_BYTES);
        let piece = self.rest.split_to(piece);
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
