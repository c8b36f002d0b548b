//! Test events under way on this node: how many there may be, and who waits for them.
//!
//! A test goes out at once, outside the shares of the engine, so it has limits of its own. It counts until its attempt has
//! ended and not only until its caller leaves: leaving costs a caller nothing, and the attempt goes on without it.

use std::{ops::RangeInclusive, sync::Arc};

use tokio::sync::oneshot;

use super::{
    Error,
    holdings::{Holding, Holdings},
};
use crate::webhook::Attempt;

/// Test events under way at a time on this node; one more is refused with [`Error::Tests`].
const MAX_TESTS: usize = 128;
/// The last of them are for organizations that have few, so that a handful whose receivers hang leave room for all others.
const MAX_SHARED_TESTS: usize = MAX_TESTS / 4 * 3;
/// One organization has at most as many as are then still free of those, within these; one more is refused with
/// [`Error::OrganizationTests`].
const TESTS_PER_ORGANIZATION: RangeInclusive<usize> = 4..=MAX_TESTS / 4;

/// What is under way.
#[derive(Default)]
pub(super) struct TestEvents(Holdings);

/// Who waits for the attempt of a test event, which counts as under way until this is dropped.
pub struct TestCaller {
    to: oneshot::Sender<Attempt>,
    place: Holding,
}

impl TestEvents {
    /// Lets a test event in, or refuses it when too many are under way; where its attempt is awaited.
    pub(super) fn admit(&self, organization: &Arc<str>) -> Result<(TestCaller, oneshot::Receiver<Attempt>), Error> {
        let place = self.0.take(organization, 1, |total, its| {
            let free = MAX_SHARED_TESTS.saturating_sub(total);
            if its >= free.clamp(*TESTS_PER_ORGANIZATION.start(), *TESTS_PER_ORGANIZATION.end()) {
                return Err(Error::OrganizationTests);
            }
            if total >= MAX_TESTS { Err(Error::Tests) } else { Ok(()) }
        })?;
        let (to, attempted) = oneshot::channel();
        Ok((TestCaller { to, place }, attempted))
    }
}

impl TestCaller {
    /// The attempt has ended. Whoever has left in the meantime misses only that.
    pub(crate) fn tell(self, attempt: Attempt) {
        // First, so that a caller who sends the next test has room for it.
        drop(self.place);
        let _ = self.to.send(attempt);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_books_balance() {
        let tests = TestEvents::default();
        let mut callers = Vec::new();
        // Half of what is free each, as soon as that is less than 32; then 4, of the 32 that are left for that.
        for (name, room) in [("a", 32), ("b", 32), ("c", 16), ("d", 8), ("e", 4), ("f", 4), ("g", 4), ("h", 4)] {
            let organization = Arc::from(name);
            callers.extend((0..room).map(|_| tests.admit(&organization).ok().unwrap().0));
            let refused = tests.admit(&organization).err();
            assert!(matches!(refused, Some(Error::OrganizationTests)), "{name}: {refused:?}");
        }
        while let Ok((caller, _)) = tests.admit(&Arc::from(format!("another {}", callers.len()))) {
            callers.push(caller);
        }
        assert_eq!(callers.len(), MAX_TESTS);
        assert!(matches!(tests.admit(&Arc::from("h")).err(), Some(Error::OrganizationTests)), "when both are reached");
        let other = Arc::from("other");
        assert!(matches!(tests.admit(&other).err(), Some(Error::Tests)));
        callers.pop();
        assert!(tests.admit(&other).is_ok());
        callers.clear();
        assert_eq!(tests.0.sums(), (0, 0));
    }
}
