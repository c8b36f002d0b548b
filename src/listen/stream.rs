//! The bytes of a connection, watched: a peer that takes nothing is cut off, and so is one that floods; one that begins
//! more streams than it may is read slowly.

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
    connection::{Activity, MAX_STREAMS},
    frames::Frames,
    strangers::Strangers,
};

/// Nothing is read for this long …
const PAUSE: Duration = Duration::from_millis(10);
/// … for each stream beyond those that may be open, which the peer was told, and for each frame without a request beyond
/// many; but at most for so many in one go. Each costs the service more than the peer.
const MAX_PAUSES: u32 = 100;
/// … and for each read beyond so many bytes of bodies, as long as no call on the connection had a key that was accepted: nobody
/// reads what strangers send, and who has a key has shown it before the body.
const BYTES_OF_STRANGERS: u64 = 64 * 1024;

/// A stream in cleartext, or what TLS makes of one.
pub(super) struct Watched<S> {
    stream: S,
    frames: Frames,
    activity: Arc<Activity>,
    strangers: Arc<Strangers>,
    /// Runs while nothing is read.
    pause: Option<Pin<Box<Sleep>>>,
    write_time: Duration,
    /// Runs while the peer takes nothing.
    stalled: Option<Pin<Box<Sleep>>>,
}

impl<S> Watched<S> {
    pub(super) fn new(stream: S, activity: Arc<Activity>, strangers: Arc<Strangers>, write_time: Duration) -> Self {
        Self { stream, frames: Frames::new(), activity, strangers, pause: None, write_time, stalled: None }
    }

    /// Notes what was read; whether the peer is still within its bounds.
    fn was_read(&mut self, bytes: &[u8]) -> bool {
        let fine = self.frames.read(bytes);
        let new = self.frames.new_streams();
        let refused = if self.activity.under_way() >= MAX_STREAMS { new } else { 0 };
        let unwanted = self.frames.body_bytes() > BYTES_OF_STRANGERS && !self.strangers.know_somebody();
        let pauses = refused.saturating_add(self.frames.excess()).max(u32::from(unwanted)).min(MAX_PAUSES);
        if pauses > 0 {
            self.pause = Some(Box::pin(sleep(PAUSE * pauses)));
        }
        fine
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
        if let Some(pause) = &mut self.pause {
            ready!(pause.as_mut().poll(context));
            self.pause = None;
        }
        let before = buffer.filled().len();
        let read = Pin::new(&mut self.stream).poll_read(context, buffer);
        if !self.was_read(&buffer.filled()[before..]) {
            return Poll::Ready(Err(Error::other("the peer floods the connection")));
        }
        read
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Watched<S> {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(context, bytes);
        self.written(context, written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write_vectored(context, slices);
        self.written(context, written)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Result<()>> {
        let flushed = Pin::new(&mut self.stream).poll_flush(context);
        self.in_time(context, flushed)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Result<()>> {
        let shut = Pin::new(&mut self.stream).poll_shutdown(context);
        self.in_time(context, shut)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};

    use super::*;
    use crate::{
        clock,
        listen::{connection::Call, strangers::Introduction},
    };

    const PIECE_BYTES: usize = 8 * 1024;

    /// How long it takes to read this as a client's first bytes, in pieces.
    async fn time_to_read(bytes: &[u8], activity: &Arc<Activity>, strangers: &Arc<Strangers>) -> Duration {
        let bytes = [b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", bytes].concat();
        let (mut client, server) = duplex(bytes.len());
        client.write_all(&bytes).await.unwrap();
        drop(client);
        let mut stream = Watched::new(server, Arc::clone(activity), Arc::clone(strangers), Duration::MAX);
        let (mut piece, started) = ([0; PIECE_BYTES], clock::stopwatch());
        while stream.read(&mut piece).await.unwrap() > 0 {}
        started.elapsed()
    }

    #[tokio::test]
    async fn bodies_of_strangers_are_read_slowly() {
        let (activity, strangers) = (Arc::default(), Arc::new(Strangers::new()));
        let piece = [&[0, 32, 0, 0, 0, 0, 0, 0, 1][..], &[0; PIECE_BYTES]].concat();
        let (pieces, free) = (24, u32::try_from(BYTES_OF_STRANGERS / PIECE_BYTES as u64).unwrap());
        let body = piece.repeat(pieces as usize);
        let took = time_to_read(&body, &activity, &strangers).await;
        assert!(took >= PAUSE * (pieces - free - 1), "{took:?}");
        Introduction::new(&strangers).accept();
        let known = time_to_read(&body, &activity, &strangers).await;
        assert!(known < took / 2, "who is known does not wait: {known:?}");
    }

    #[tokio::test]
    async fn streams_beyond_those_that_may_be_open_slow_the_connection_down() {
        let (activity, strangers) = (Arc::default(), Arc::new(Strangers::new()));
        let streams = 30;
        let heads = [0, 0, 1, 1, 4, 0, 0, 0, 1, 0x82].repeat(streams as usize);
        let mut calls: Vec<_> = (0..MAX_STREAMS).map(|_| Call::begin(&activity)).collect();
        let took = time_to_read(&heads, &activity, &strangers).await;
        assert!(took >= PAUSE * streams, "{took:?}");
        calls.pop();
        let within = time_to_read(&heads, &activity, &strangers).await;
        assert!(within < took / 2, "{within:?}");
    }
}
