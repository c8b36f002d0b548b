//! Connections on which no call has had an accepted key yet: anybody can make them, and as many calls on each as the
//! network carries. Until it is known who calls, a connection is read slowly once it has used up an allowance. What waits
//! then waits in the peer and the network, where it costs the service nothing, and resetting a stream gains nothing.
//!
//! Once a key was accepted on a connection nothing waits on it any more: whoever has a key answers for what it does, and
//! a balancer that mixes the calls of many on one connection keeps strangers at bay itself.

use std::{
    pin::Pin,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    task::{Context, Poll, ready},
    time::{Duration, Instant},
};

use futures_util::task::AtomicWaker;
use tokio::time::{Sleep, sleep};

use crate::clock;

/// So many calls, frames without a request, or pieces of bytes a stranger's connection may use at once …
const MAX_AT_ONCE: u32 = 50;
/// … and after those, one in this time. Health checks and preflights of browsers have no key either, and are rarer.
const INTERVAL: Duration = Duration::from_millis(20);
/// Bytes of a piece.
const PIECE_BYTES: usize = 16 * 1024;
/// However much it used, it waits at most this long before it is read again.
const MAX_PAUSE: Duration = Duration::from_secs(1);

/// Whose one call is, as far as its key has told; among the extensions of every request. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct Caller(Arc<OfCall>);

#[derive(Debug, Default)]
struct OfCall {
    connection: Arc<Peer>,
    organization: OnceLock<Arc<str>>,
}

/// Who is at the other end of a connection, as far as keys have told.
#[derive(Debug, Default)]
pub(super) struct Peer {
    known: AtomicBool,
    /// Who waits until more may be read.
    waiting: AtomicWaker,
    /// Calls over HTTP/1.1 that are not counted yet.
    calls: AtomicU32,
}

/// How fast a connection is read.
pub(super) struct Pace {
    peer: Arc<Peer>,
    /// When the whole allowance is there again: GCRA, as in `webhook::RateLimit`, but what is too much is not refused.
    full_at: Instant,
    /// Used and not counted yet.
    used: u32,
    bytes: usize,
    pause: Option<Pin<Box<Sleep>>>,
}

impl Caller {
    /// A key was accepted that acts for this organization.
    pub fn accept(&self, organization: &Arc<str>) {
        let OfCall { connection, organization: of_call } = &*self.0;
        let _ = of_call.set(Arc::clone(organization));
        // Seldom written: all calls of a connection look at it.
        if !connection.is_known() {
            connection.known.store(true, Ordering::Release);
            connection.waiting.wake();
        }
    }

    /// Whose call it is, once that is known.
    pub fn organization(&self) -> Option<&Arc<str>> {
        self.0.organization.get()
    }
}

impl Peer {
    /// One call on the connection.
    pub(super) fn call(self: &Arc<Self>) -> Caller {
        Caller(Arc::new(OfCall { connection: Arc::clone(self), organization: OnceLock::new() }))
    }

    /// Notes a call over HTTP/1.1; one over HTTP/2 begins with a frame, which is counted as it is read.
    pub(super) fn called(&self) {
        if !self.is_known() {
            self.calls.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn is_known(&self) -> bool {
        self.known.load(Ordering::Acquire)
    }
}

impl Pace {
    pub(super) fn new(peer: Arc<Peer>) -> Self {
        Self { peer, full_at: clock::stopwatch(), used: 0, bytes: 0, pause: None }
    }

    /// Notes what was read: so many bytes, and frames that are counted.
    pub(super) fn was_read(&mut self, bytes: usize, frames: u32) {
        self.bytes += bytes;
        let pieces = u32::try_from(self.bytes / PIECE_BYTES).unwrap_or(u32::MAX);
        self.bytes %= PIECE_BYTES;
        self.used = self.used.saturating_add(frames).saturating_add(pieces);
    }

    /// Ready when more may be read.
    pub(super) fn poll_turn(&mut self, context: &mut Context<'_>) -> Poll<()> {
        if self.peer.is_known() {
            self.pause = None;
            return Poll::Ready(());
        }
        if self.pause.is_none() {
            self.used = self.used.saturating_add(self.peer.calls.swap(0, Ordering::Relaxed));
            if self.used == 0 {
                return Poll::Ready(());
            }
            let wait = self.count(clock::stopwatch());
            if wait.is_zero() {
                return Poll::Ready(());
            }
            self.pause = Some(Box::pin(sleep(wait)));
        }
        if let Some(pause) = &mut self.pause {
            self.peer.waiting.register(context.waker());
            // It may have become known before there was anybody to wake.
            if !self.peer.is_known() {
                ready!(pause.as_mut().poll(context));
            }
            self.pause = None;
        }
        Poll::Ready(())
    }

    /// Counts what was used; how long to wait for it.
    fn count(&mut self, now: Instant) -> Duration {
        let at_once = MAX_AT_ONCE * INTERVAL;
        let used = INTERVAL.saturating_mul(std::mem::take(&mut self.used)).min(at_once + MAX_PAUSE);
        self.full_at = (self.full_at.max(now) + used).min(now + at_once + MAX_PAUSE);
        self.full_at.duration_since(now).saturating_sub(at_once)
    }
}

#[cfg(test)]
mod tests {
    use std::task::{Wake, Waker};

    use super::*;

    #[derive(Default)]
    struct Woken(AtomicBool);

    impl Wake for Woken {
        fn wake(self: Arc<Self>) {
            self.0.store(true, Ordering::Relaxed);
        }
    }

    /// How long a connection waits that has used so much.
    fn wait(pace: &mut Pace, now: Instant, used: u32) -> Duration {
        pace.used = used;
        pace.count(now)
    }

    #[test]
    fn what_is_beyond_the_allowance_waits() {
        let mut pace = Pace::new(Arc::default());
        let now = pace.full_at;
        assert_eq!(wait(&mut pace, now, MAX_AT_ONCE), Duration::ZERO);
        assert_eq!(wait(&mut pace, now, 1), INTERVAL);
        assert_eq!(wait(&mut pace, now, 2), 3 * INTERVAL);
        assert_eq!(wait(&mut pace, now + 4 * INTERVAL, 1), Duration::ZERO, "it has come back by itself");
        assert_eq!(wait(&mut pace, now, u32::MAX), MAX_PAUSE, "no debt is for ever");
        assert_eq!(wait(&mut pace, now, u32::MAX), MAX_PAUSE);
        assert_eq!(wait(&mut pace, now + MAX_AT_ONCE * INTERVAL + MAX_PAUSE, MAX_AT_ONCE), Duration::ZERO);
    }

    #[tokio::test]
    async fn who_has_a_key_waits_for_nothing() {
        for (bytes, frames, calls, waits) in [
            (PIECE_BYTES * 50, 0, 0, false),
            (PIECE_BYTES * 100, 0, 0, true),
            (0, 50, 0, false),
            (0, 100, 0, true),
            (0, 0, 50, false),
            (0, 0, 100, true),
        ] {
            let peer = Arc::<Peer>::default();
            let mut pace = Pace::new(Arc::clone(&peer));
            pace.was_read(bytes, frames);
            (0..calls).for_each(|_| peer.called());
            let woken = Arc::new(Woken::default());
            let waker = Waker::from(Arc::clone(&woken));
            let ready = |pace: &mut Pace| pace.poll_turn(&mut Context::from_waker(&waker)).is_ready();
            assert_eq!(ready(&mut pace), !waits, "{bytes} {frames} {calls}");
            peer.call().accept(&Arc::from("acme"));
            assert_eq!(woken.0.load(Ordering::Relaxed), waits, "{bytes} {frames} {calls}");
            assert!(ready(&mut pace), "{bytes} {frames} {calls}");
        }
    }
}
