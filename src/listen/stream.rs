//! The bytes of a connection, watched: a peer that takes nothing is cut off, and so is one that floods; strangers are read
//! slowly.

use std::{
    io::{Error, ErrorKind, IoSlice, Result},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::{Sleep, sleep},
};

use super::{
    caller::{Pace, Peer},
    frames::Frames,
};

/// A stream in cleartext, or what TLS makes of one.
pub(super) struct Watched<S> {
    stream: S,
    frames: Frames,
    pace: Pace,
    write_time: Duration,
    /// Runs while the peer takes nothing.
    stalled: Option<Pin<Box<Sleep>>>,
    /// The one of others that comes before a write.
    turn: Turn,
}

/// A turn that a connection gives to whatever else waits on its thread.
enum Turn {
    /// Before the next write.
    Due,
    /// It was given.
    Given,
    /// And all that was written after it has gone out: one is due again as soon as the connection reads.
    Flushed,
}

impl<S> Watched<S> {
    pub(super) fn new(stream: S, peer: Arc<Peer>, write_time: Duration) -> Self {
        Self { stream, frames: Frames::new(), pace: Pace::new(peer), write_time, stalled: None, turn: Turn::Due }
    }

    /// Whether answers may go out. Those to many calls of an HTTP/2 connection are made at the same moment, when a commit has
    /// ended, and the connection runs as soon as the first of them is there: it would write, and wake the peer, for each. So it
    /// goes behind all that waits on its thread, once for all that it writes until it reads again: h2 reads first, each time it
    /// runs, and long answers are pieces that it flushes one by one.
    fn is_gathered(&mut self, context: &Context<'_>) -> bool {
        let gathers = matches!(self.turn, Turn::Due) && self.frames.are_http2();
        self.turn = Turn::Given;
        if gathers {
            context.waker().wake_by_ref();
        }
        !gathers
    }

    /// Notes how much went out.
    fn written(&mut self, context: &mut Context<'_>, written: Poll<Result<usize>>) -> Poll<Result<usize>> {
        if let Poll::Ready(Ok(bytes)) = written {
            self.frames.wrote(bytes);
        }
        self.in_time(context, written)
    }

    /// Passes on what became of a write, unless it has been waiting for too long.
    fn in_time<T>(&mut self, context: &mut Context<'_>, written: Poll<Result<T>>) -> Poll<Result<T>> {
        if written.is_ready() {
            self.stalled = None;
            return written;
        }
        let write_time = self.write_time;
        let stalled = self.stalled.get_or_insert_with(|| Box::pin(sleep(write_time)));
        stalled.as_mut().poll(context).map(|()| Err(Error::new(ErrorKind::TimedOut, "the peer takes nothing")))
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Watched<S> {
    fn poll_read(mut self: Pin<&mut Self>, context: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<Result<()>> {
        if matches!(self.turn, Turn::Flushed) {
            self.turn = Turn::Due;
        }
        ready!(self.pace.poll_turn(context));
        let before = buffer.filled().len();
        let read = Pin::new(&mut self.stream).poll_read(context, buffer);
        let bytes = &buffer.filled()[before..];
        let fine = self.frames.read(bytes);
        let frames = self.frames.new_ones();
        self.pace.was_read(bytes.len(), frames);
        if !fine {
            return Poll::Ready(Err(Error::other("the peer floods the connection")));
        }
        read
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Watched<S> {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<Result<usize>> {
        if !self.is_gathered(context) {
            return Poll::Pending;
        }
        let written = Pin::new(&mut self.stream).poll_write(context, bytes);
        self.written(context, written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<Result<usize>> {
        if !self.is_gathered(context) {
            return Poll::Pending;
        }
        let written = Pin::new(&mut self.stream).poll_write_vectored(context, slices);
        self.written(context, written)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Result<()>> {
        let flushed = Pin::new(&mut self.stream).poll_flush(context);
        if flushed.is_ready() && matches!(self.turn, Turn::Given) {
            self.turn = Turn::Flushed;
        }
        self.in_time(context, flushed)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Result<()>> {
        let shut = Pin::new(&mut self.stream).poll_shutdown(context);
        self.in_time(context, shut)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use futures_util::FutureExt;
    use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};

    use super::*;

    /// A watched stream whose peer has begun to speak like this.
    async fn begun(with: &[u8]) -> (Watched<DuplexStream>, DuplexStream) {
        let (mut peer, stream) = tokio::io::duplex(1024);
        peer.write_all(with).await.unwrap();
        let mut watched = Watched::new(stream, Arc::default(), Duration::from_secs(5));
        watched.read_exact(&mut vec![0; with.len()]).await.unwrap();
        (watched, peer)
    }

    /// However many pieces there are to write, others have one turn before the first of them.
    #[tokio::test]
    async fn answers_gather() {
        let (mut watched, mut peer) = begun(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await;
        for round in 1..=2 {
            let turns = Arc::new(AtomicUsize::new(0));
            let others = Arc::clone(&turns);
            let other = tokio::spawn(async move {
                loop {
                    others.fetch_add(1, Ordering::Relaxed);
                    tokio::task::yield_now().await;
                }
            });
            for _ in 0..3 {
                tokio::time::timeout(Duration::from_secs(5), watched.write_all(b"piece"))
                    .await
                    .expect("its turn")
                    .unwrap();
                watched.flush().await.unwrap();
                assert_eq!(turns.load(Ordering::Relaxed), 1, "round {round}");
            }
            other.abort();
            peer.write_all(b"ping").await.unwrap();
            watched.read_exact(&mut [0; 4]).await.unwrap();
        }
        let mut said = [0; 30];
        peer.read_exact(&mut said).await.unwrap();
        assert_eq!(said, *b"piece".repeat(6));
    }

    #[tokio::test]
    async fn an_answer_over_http1_does_not_wait() {
        let (mut watched, _peer) = begun(b"POST / HTTP/1.1\r\n").await;
        assert_eq!(watched.write(b"answer").now_or_never().expect("at once").unwrap(), 6);
    }
}
