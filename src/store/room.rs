//! Room for publishes that wait for their commit: what they hold together is bounded, and one organisation leaves some to
//! the others.
//!
//! An organisation may take more while what it holds is less than what is *free* (the rule of dynamic thresholds, see
//! `dispatch/shares.rs`): one alone has half of all, two have a third each, and something is always free for one that comes
//! new. One that holds few takes more as long as there is any.

use std::sync::Arc;

use super::{
    Error,
    holdings::{Holding, Holdings},
};

/// Publishes that wait for their commit may have this much data together; one more is refused with
/// [`Error::Overloaded`] …
pub(super) const MAX_WAITING_BYTES: usize = 64 * 1024 * 1024;
/// … and one more of an organisation that holds at least this much, and as much as is free, with
/// [`Error::OrganizationOverloaded`].
const FEW_BYTES: usize = 1024 * 1024;

/// What publishes hold that wait.
#[derive(Default)]
pub(super) struct Rooms(Holdings);

impl Rooms {
    /// Room for a publish of so many bytes, of which none is longer than all there may be.
    pub(super) fn take(&self, organization: &Arc<str>, bytes: usize) -> Result<Holding, Error> {
        let bytes = bytes.min(MAX_WAITING_BYTES);
        self.0.take(organization, bytes, |total, its| {
            let free = MAX_WAITING_BYTES - total;
            if its >= free.max(FEW_BYTES) {
                return Err(Error::OrganizationOverloaded);
            }
            if bytes > free { Err(Error::Overloaded) } else { Ok(()) }
        })
    }

    /// Ends when no publish waits.
    pub(super) async fn none(&self) {
        self.0.none().await;
    }

    /// What all hold together.
    pub(super) fn taken(&self) -> usize {
        self.0.total()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CALL: usize = 1_000 * 1024;

    /// What organisations hold that come one after another and each take all they can, and why it is no more.
    fn fill(rooms: &Rooms, organization: &str, calls: &mut Vec<Holding>) -> (usize, Error) {
        let organization = Arc::from(organization);
        let before = calls.len();
        loop {
            match rooms.take(&organization, CALL) {
                Ok(room) => calls.push(room),
                Err(error) => return (calls.len() - before, error),
            }
        }
    }

    #[test]
    fn an_organisation_leaves_room_to_the_others() {
        let (rooms, mut calls) = (Rooms::default(), Vec::new());
        for (name, its) in [("a", 33), ("b", 17), ("c", 8), ("d", 4), ("e", 2)] {
            let (count, refused) = fill(&rooms, name, &mut calls);
            assert_eq!(count, its, "{name}");
            assert!(matches!(refused, Error::OrganizationOverloaded), "{name}: {refused:?}");
        }
        for (name, its) in [("f", 1), ("g", 0)] {
            let (count, refused) = fill(&rooms, name, &mut calls);
            assert_eq!(count, its, "{name}");
            assert!(matches!(refused, Error::Overloaded), "{name}: {refused:?}");
        }
        assert!(
            matches!(rooms.take(&"a".into(), 1), Err(Error::OrganizationOverloaded)),
            "its own, when both are reached"
        );
        assert!(rooms.take(&"g".into(), 1).is_ok(), "there is some left");
    }

    #[test]
    fn the_books_balance() {
        let rooms = Rooms::default();
        let (one, other) = (Arc::from("one"), Arc::from("other"));
        let long = rooms.take(&one, usize::MAX).ok().unwrap();
        assert!(matches!(rooms.take(&other, 1), Err(Error::Overloaded)));
        assert!(matches!(rooms.take(&one, 1), Err(Error::OrganizationOverloaded)));
        drop(long);
        let short: Vec<_> = (1..100).map(|bytes| rooms.take(&one, bytes).ok().unwrap()).collect();
        assert_eq!(rooms.0.sums(), (99 * 50, 1));
        drop(short);
        assert_eq!(rooms.0.sums(), (0, 0));
    }
}
