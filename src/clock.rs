//! The only source of now, randomness and ids.
//!
//! Nodes that share a database go by its clock, see [`follow`]: they must agree on when a lease ends and a delivery is
//! due, whatever the clocks of their machines say.

use std::{
    sync::{
        LazyLock, Mutex, PoisonError,
        atomic::{AtomicI64, Ordering},
    },
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use ring::rand::{SecureRandom, SystemRandom};
use ulid::{ULID_LEN, Ulid};

use crate::webhook::Timestamp;

/// By less than this the time of day does not leap: a clock that is followed is not read exactly, and one that is often put
/// right by a second or two would else never let a lease end. A lease lasts longer than its request by more than this.
pub const LEAP: Duration = Duration::from_secs(4);

/// The last id given out: ids made within one millisecond count up from it, so that a list keeps their order.
static LAST_ID: Mutex<Ulid> = Mutex::new(Ulid::nil());

/// A moment from which on time only runs forward.
static START: LazyLock<Instant> = LazyLock::new(stopwatch);

/// What the clock that is followed said at [`START`]; [`ITS_OWN`] while none is.
static FOLLOWED_MS: AtomicI64 = AtomicI64::new(ITS_OWN);
const ITS_OWN: i64 = i64::MIN;

/// The time of day: by the clock that is followed, else by that of this machine.
pub fn now() -> Timestamp {
    match FOLLOWED_MS.load(Ordering::Relaxed) {
        ITS_OWN => of_this_machine(),
        start_ms => Timestamp::from_millis(start_ms + millis(START.elapsed())),
    }
}

/// From now on this process goes by a clock that showed `theirs` at the moment `at`. Between two calls its own clock is
/// not asked: it may be set to anything in the meantime.
pub fn follow(theirs: Timestamp, at: Instant) {
    let start_ms = match at.checked_duration_since(*START) {
        Some(since) => theirs.millis() - millis(since),
        None => theirs.millis() + millis(START.duration_since(at)),
    };
    FOLLOWED_MS.store(start_ms, Ordering::Relaxed);
}

fn millis(duration: Duration) -> i64 {
    i64::try_from(duration.as_millis()).unwrap_or(i64::MAX)
}

#[expect(clippy::disallowed_methods, reason = "this is the one place")]
fn of_this_machine() -> Timestamp {
    let millis = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis());
    Timestamp::from_millis(i64::try_from(millis).unwrap_or(i64::MAX))
}

/// A moment to measure from, which no change of the time of day moves.
#[expect(clippy::disallowed_methods, reason = "this is the one place")]
pub fn stopwatch() -> Instant {
    Instant::now()
}

/// Something that is to be done once in a while, however often there is reason to.
pub struct Seldom {
    every: Duration,
    past: Mutex<Past>,
}

struct Past {
    done: Option<Instant>,
    /// Reasons that came since, and the time of the last of them.
    reasons: u64,
    reason: Option<Instant>,
}

impl Seldom {
    /// Once in this time.
    pub const fn new(every: Duration) -> Self {
        Self { every, past: Mutex::new(Past { done: None, reasons: 0, reason: None }) }
    }

    /// Whether to do it now: it was not done for so long.
    pub fn is_time(&self) -> bool {
        self.reasons().is_some()
    }

    /// How many reasons there were, this one included, since it was done, or since there was none for so long; none when it
    /// is not time to do it.
    pub fn reasons(&self) -> Option<u64> {
        let mut past = self.past.lock().unwrap_or_else(PoisonError::into_inner);
        let now = stopwatch();
        let is_long_ago = |moment: Option<Instant>| moment.is_none_or(|moment| now - moment >= self.every);
        past.reasons = if is_long_ago(past.reason) { 1 } else { past.reasons + 1 };
        past.reason = Some(now);
        if !is_long_ago(past.done) {
            return None;
        }
        past.done = Some(now);
        Some(std::mem::take(&mut past.reasons))
    }
}

/// Notices when the time of day leaps ahead of the time that passes: its clock was set, or the machine slept.
#[derive(Default)]
pub struct Leaps(Option<(Timestamp, Instant)>);

impl Leaps {
    /// Whether it did since this was last asked.
    pub fn any(&mut self) -> bool {
        self.any_until(now(), stopwatch())
    }

    fn any_until(&mut self, now: Timestamp, at: Instant) -> bool {
        let last = self.0.replace((now, at));
        last.is_some_and(|(then, since)| now > then.after(at - since + LEAP))
    }
}

/// Bytes that nobody can guess.
///
/// # Panics
///
/// When the operating system has no randomness to give: nothing that needs a secret may go on then.
pub fn random<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    SystemRandom::new().fill(&mut bytes).expect("the operating system gives randomness");
    bytes
}

/// A new id: `prefix`, `_`, and 26 characters that sort by time and then by order of making.
pub fn new_id(prefix: &str) -> String {
    new_ids(prefix, "", 0).0
}

/// A new id, and `count` others that follow it at once, all with its time.
pub fn new_ids(first: &str, others: &str, count: usize) -> (String, Vec<String>) {
    let millis = u64::try_from(now().millis()).unwrap_or(0);
    let mut last = LAST_ID.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let mut next = |prefix| {
        *last = match last.increment() {
            Ok(next) if millis <= last.timestamp_ms() => next,
            _ => Ulid::from_parts(millis, u128::from_be_bytes(random())),
        };
        id(prefix, *last)
    };
    (next(first), (0..count).map(|_| next(others)).collect())
}

/// What sorts before all ids that are made from `at` on.
pub fn first_id(prefix: &str, at: Timestamp) -> String {
    id(prefix, Ulid::from_parts(u64::try_from(at.millis()).unwrap_or(0), 0))
}

/// The time that an id begins with.
pub fn made_at(id: &str) -> Option<Timestamp> {
    let ulid = Ulid::from_string(id.split_once('_')?.1).ok()?;
    Some(Timestamp::from_millis(i64::try_from(ulid.timestamp_ms()).ok()?))
}

fn id(prefix: &str, ulid: Ulid) -> String {
    let mut letters = [0; ULID_LEN];
    let letters = ulid.array_to_str(&mut letters);
    letters.make_ascii_lowercase();
    [prefix, "_", letters].concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn says_how_many_reasons_there_were() {
        let often = Seldom::new(Duration::ZERO);
        assert_eq!([often.reasons(), often.reasons()], [Some(1), Some(1)]);
        let once = Seldom::new(Duration::from_secs(3_600));
        assert_eq!([once.reasons(), once.reasons(), once.reasons()], [Some(1), None, None]);
        {
            let mut past = once.past.lock().unwrap();
            past.done = past.done.map(|done| done - Duration::from_secs(3_600));
        }
        assert_eq!(once.reasons(), Some(3));
    }

    #[test]
    fn notices_when_time_leaps_forward() {
        let (mut leaps, start, began) = (Leaps::default(), now(), stopwatch());
        // What the time of day says after so many seconds.
        let steps = [(0, 0, false), (1, 1, false), (70, 70, false), (7_271, 71, true), (7_272, 72, false)];
        for (says, passed, leapt) in
            steps.into_iter().chain([(73, 73, false), (78, 74, false), (83, 75, false), (89, 76, true)])
        {
            let [says, passed] = [says, passed].map(Duration::from_secs);
            assert_eq!(leaps.any_until(start.after(says), began + passed), leapt, "{says:?} {passed:?}");
        }
    }

    /// One test, since the clock is the process's: it leaves things as they were for the others.
    #[test]
    fn goes_by_the_clock_that_is_followed() {
        // Both pairs in this order, so that it is no less when something else runs in between.
        let (at, real) = (stopwatch(), of_this_machine());
        follow(Timestamp::from_millis(real.millis() + 2), at);
        let (own, followed) = (of_this_machine(), now());
        assert!((1..1_000).contains(&(followed.millis() - own.millis())), "{followed} {own}");
        follow(real, at);
        assert!(now().millis() - of_this_machine().millis() < 1_000);
    }

    #[test]
    fn ids_sort_in_the_order_they_were_made() {
        let ids: Vec<String> = (0..10_000).map(|_| new_id("del")).collect();
        assert!(ids.is_sorted_by(|earlier, later| earlier < later));
        assert!(ids.iter().all(|id| id.len() == 30 && !id.contains('.')));
    }

    #[test]
    fn ids_tell_their_time() {
        let before = now();
        let (first, others) = new_ids("evt", "del", 3);
        let made = made_at(&first).unwrap();
        assert!(made >= before);
        assert!(others.iter().all(|other| made_at(other) == Some(made) && other[4..] > first[4..]));
        assert!(first_id("del", made) <= others[0]);
        assert!(others[2] < first_id("del", Timestamp::from_millis(made.millis() + 1)));
        assert_eq!(made_at("evt_1"), None);
    }
}
