//! The order in which organisations have their turns, whatever each has under way: one with a thousand quick webhooks has
//! little, and another whose only receiver takes a tenth of a second needs ten at a time for a hundred deliveries a second.
//! Only every other turn is for those with nothing under way; were each, many whose receivers are quick would leave the
//! others one attempt at a time.
//!
//! So whoever may start has its turn after at most twice as many turns as organisations wait, whoever has them, and whoever
//! comes new after twice as many as wait with nothing under way either.
//!
//! Organisations stand apart by what the next webhook of each has under way, which decides who may start, and among their
//! like by their last turn. A look for the next one asks the first of each of these few kinds, and others only behind those
//! that have more than their share.

use std::collections::BTreeSet;

use super::shares::Level;

/// Organisations with a webhook that waits.
#[derive(Default)]
pub(super) struct Order {
    places: BTreeSet<Place>,
    /// Whether the next turn is that of whoever had none for longest, instead of whoever has nothing under way.
    by_age: bool,
}

/// Where an organisation stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Place {
    /// Those with nothing under way, whose next webhook has nothing under way either, come first.
    pub(super) is_busy: bool,
    /// What its next webhook has under way.
    pub(super) level: Level,
    /// Drawn after the last turn.
    pub(super) ticket: u64,
    pub(super) who: usize,
}

impl Order {
    /// Lets an organisation in, moves it, or takes it out.
    pub(super) fn replace(&mut self, before: Option<Place>, place: Option<Place>) {
        if before != place {
            before.map(|before| self.places.remove(&before));
            place.map(|place| self.places.insert(place));
        }
    }

    /// Whose turn it is. `may` says whether webhooks of a level may start another attempt, which those of a higher one may
    /// not when these may not; `may_within` whether this organisation may, if so.
    pub(super) fn first(
        &self,
        may: impl Fn(Level) -> bool,
        mut may_within: impl FnMut(&Place) -> bool,
    ) -> Option<usize> {
        let mut longest: Option<&Place> = None;
        let mut next = self.places.first();
        while let Some(first) = next
            && may(first.level)
        {
            let idle_is_found = longest.is_some_and(|found| !found.is_busy);
            if idle_is_found && first.is_busy && !self.by_age {
                break;
            }
            let is_like = |place: &&Place| (place.is_busy, place.level) == (first.is_busy, first.level);
            let found = self.places.range(first..).take_while(is_like).find(|place| may_within(place));
            longest = longest.into_iter().chain(found).min_by_key(|place| place.ticket);
            next = self.places.range(Place { ticket: u64::MAX, who: usize::MAX, ..*first }..).next();
        }
        longest.map(|place| place.who)
    }

    /// Somebody has had a turn.
    pub(super) fn go_on(&mut self) {
        self.by_age = !self.by_age;
    }

    #[cfg(test)]
    pub(super) fn is_empty(&self) -> bool {
        self.places.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// However many wait, and wherever: of those who may, one of each kind is asked.
        #[test]
        fn few_are_asked(
            places in prop::collection::vec((any::<bool>(), 0..64_usize, any::<bool>()), 0..400),
            highest in 0..64_usize,
            by_age in any::<bool>(),
        ) {
            let mut order = Order { by_age, ..Order::default() };
            for (who, (is_busy, in_flight, _)) in places.iter().enumerate() {
                let level = Level::of(if *is_busy { *in_flight } else { 0 });
                order.replace(None, Some(Place { is_busy: *is_busy, level, ticket: (who * 7_919 % 997) as u64, who }));
            }
            let may = |level: Level| level <= Level::of(highest);
            let has_its_share = |place: &&Place| places[place.who].2;
            let mut asked = 0;
            let first = order.first(may, |place| {
                asked += 1;
                !has_its_share(&place)
            });
            let refused = order.places.iter().filter(has_its_share).count();
            prop_assert!(asked <= refused + 8, "{asked} of {}, {refused} refused", places.len());
            let could = || order.places.iter().filter(|place| may(place.level) && !has_its_share(place));
            let idle = could().filter(|place| !by_age && !place.is_busy).min_by_key(|place| place.ticket);
            let expected = idle.or_else(|| could().min_by_key(|place| place.ticket));
            prop_assert_eq!(first, expected.map(|place| place.who));
        }
    }
}
