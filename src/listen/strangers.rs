//! Calls without an accepted key, which anybody can make: each connection is answered so many of them in a second, and
//! the answers to the rest wait for their turn. Over HTTP/1.1 the next call waits behind the answer, and over HTTP/2 the
//! streams that wait are all that there may be, so a flood of them costs the service no more than that.
//!
//! Who has a key waits for nothing, also behind a balancer that mixes the calls of many on one connection.

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use crate::clock;

/// Calls without an accepted key that one connection is answered at once …
const MAX_AT_ONCE: u32 = 50;
/// … and after those, one in this time. Health checks and preflights of browsers have no key either, and are rarer.
const INTERVAL: Duration = Duration::from_millis(20);

/// What the strangers on one connection have used up.
pub(super) struct Strangers {
    /// When they have their whole allowance again (GCRA, as in `webhook::RateLimit`, but a call too many is not refused).
    full_at: Mutex<Instant>,
    /// There was a call with an accepted key.
    known: AtomicBool,
}

/// Whether a call came with an accepted key; among the extensions of a request, for whoever judges keys.
#[derive(Clone)]
pub struct Introduction(Arc<Introduced>);

struct Introduced {
    accepted: AtomicBool,
    to: Arc<Strangers>,
}

impl Introduction {
    /// The key was accepted.
    pub fn accept(&self) {
        self.0.accepted.store(true, Ordering::Relaxed);
        // Seldom written: all calls of a connection look at it.
        if !self.0.to.know_somebody() {
            self.0.to.known.store(true, Ordering::Relaxed);
        }
    }

    pub(super) fn new(to: &Arc<Strangers>) -> Self {
        Self(Arc::new(Introduced { accepted: AtomicBool::new(false), to: Arc::clone(to) }))
    }

    /// Whether it was.
    pub(super) fn is_accepted(&self) -> bool {
        self.0.accepted.load(Ordering::Relaxed)
    }
}

impl Strangers {
    pub(super) fn new() -> Self {
        Self { full_at: Mutex::new(clock::stopwatch()), known: AtomicBool::new(false) }
    }

    /// Whether there was a call with an accepted key on the connection.
    pub(super) fn know_somebody(&self) -> bool {
        self.known.load(Ordering::Relaxed)
    }

    /// Counts a call, and waits until its answer may go.
    pub(super) async fn turn(&self) {
        let wait = self.wait(clock::stopwatch());
        // A sleep of no time takes a millisecond.
        if !wait.is_zero() {
            tokio::time::sleep(wait).await;
        }
    }

    fn wait(&self, now: Instant) -> Duration {
        let mut full_at = self.full_at.lock().unwrap_or_else(PoisonError::into_inner);
        *full_at = (*full_at).max(now) + INTERVAL;
        full_at.duration_since(now).saturating_sub(MAX_AT_ONCE * INTERVAL)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_beyond_the_allowance_wait_for_their_turn() {
        let strangers = Strangers::new();
        let now = clock::stopwatch();
        let waits: Vec<_> = (0..MAX_AT_ONCE + 3).map(|_| strangers.wait(now)).collect();
        let (at_once, later) = waits.split_at(MAX_AT_ONCE as usize);
        assert!(at_once.iter().all(Duration::is_zero), "{at_once:?}");
        assert_eq!(later, [INTERVAL, 2 * INTERVAL, 3 * INTERVAL]);
        assert_eq!(strangers.wait(now + 4 * INTERVAL), Duration::ZERO, "a place has become free");
        let rested = now + 1000 * INTERVAL;
        assert!((0..MAX_AT_ONCE).all(|_| strangers.wait(rested).is_zero()), "and later all of them");
        assert_eq!(strangers.wait(rested), INTERVAL);
    }
}
