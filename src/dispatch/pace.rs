//! What a receiver's answers say of it: whether it is quick, and how many attempts it can take at a time.

use std::{
    ops::{Index, IndexMut},
    time::Duration,
};

/// A receiver that takes longer than this on average is slow: its attempts share a part of the wire with each other.
const QUICK: Duration = Duration::from_secs(1);
/// What is done within this time is worth holding in memory; the rest can as well wait in the database.
const AHEAD: Duration = Duration::from_secs(2);
/// How many attempts a receiver that has not been heard of gets at a time: should it hang, it hangs with no more than that.
const FIRST_WINDOW: usize = 8;

/// Which part of the wire a webhook uses. One that has not been heard of counts as quick.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Speed {
    Quick,
    Slow,
}

/// One for each speed.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct BySpeed<T> {
    pub(super) quick: T,
    pub(super) slow: T,
}

/// How an attempt ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Ended {
    pub(super) took: Duration,
    pub(super) answered: bool,
}

/// What is known of a receiver.
#[derive(Debug, Clone)]
pub(super) struct Pace {
    /// How long attempts take: the average of the last one and of the average before it.
    took: Duration,
    /// How many may be under way. Halved by one that was waited for in vain, and one more with each that was not, up to
    /// double of what was tried: so it doubles with each round of answers, as TCP's does at first.
    window: usize,
    /// The most that were under way since it was halved.
    tried: usize,
}

impl Speed {
    pub(super) fn other(self) -> Self {
        match self {
            Self::Quick => Self::Slow,
            Self::Slow => Self::Quick,
        }
    }
}

impl<T> Index<Speed> for BySpeed<T> {
    type Output = T;

    fn index(&self, speed: Speed) -> &T {
        match speed {
            Speed::Quick => &self.quick,
            Speed::Slow => &self.slow,
        }
    }
}

impl<T> IndexMut<Speed> for BySpeed<T> {
    fn index_mut(&mut self, speed: Speed) -> &mut T {
        match speed {
            Speed::Quick => &mut self.quick,
            Speed::Slow => &mut self.slow,
        }
    }
}

impl Pace {
    pub(super) fn unknown(max_in_flight: usize) -> Self {
        Self { took: Duration::ZERO, window: FIRST_WINDOW.min(max_in_flight), tried: 0 }
    }

    /// An attempt ended when so many were under way, it included.
    pub(super) fn learn(&mut self, ended: Ended, in_flight: usize, max_in_flight: usize) {
        self.took = (self.took + ended.took) / 2;
        let in_vain = !ended.answered && ended.took > QUICK;
        self.tried = self.tried.max(in_flight);
        if in_vain {
            self.window = (self.window / 2).max(1);
            self.tried = self.tried.min(self.window);
        } else if self.window < 2 * self.tried {
            self.window = (self.window + 1).min(max_in_flight);
        }
    }

    pub(super) fn window(&self) -> usize {
        self.window
    }

    pub(super) fn speed(&self) -> Speed {
        if self.took > QUICK { Speed::Slow } else { Speed::Quick }
    }

    /// Whether forgetting it would change what its webhook may do.
    pub(super) fn is_remarkable(&self, max_in_flight: usize) -> bool {
        self.is_wary(max_in_flight) || self.window > FIRST_WINDOW.min(max_in_flight)
    }

    /// Whether forgetting it would let its webhook do more.
    pub(super) fn is_wary(&self, max_in_flight: usize) -> bool {
        self.speed() == Speed::Slow || self.window < FIRST_WINDOW.min(max_in_flight)
    }

    /// How many deliveries are worth holding when `in_flight` attempts may be under way: those, and what they will have
    /// made room for within [`AHEAD`] (Little's law).
    pub(super) fn worth_holding(&self, in_flight: usize) -> usize {
        let rounds = AHEAD.as_millis() / self.took.as_millis().max(1);
        in_flight.saturating_mul(1 + usize::try_from(rounds).unwrap_or(usize::MAX - 1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answered(millis: u64) -> Ended {
        Ended { took: Duration::from_millis(millis), answered: true }
    }

    #[test]
    fn one_that_hangs_gets_little_until_it_answers() {
        let mut pace = Pace::unknown(32);
        let hung = Ended { took: Duration::from_secs(30), answered: false };
        (0..32).for_each(|_| pace.learn(hung, 1, 32));
        assert_eq!((pace.window(), pace.speed(), pace.worth_holding(1)), (1, Speed::Slow, 1));
        (0..31).for_each(|_| pace.learn(answered(5), 32, 32));
        assert_eq!((pace.window(), pace.speed(), pace.is_wary(32)), (32, Speed::Quick, false));
    }

    #[test]
    fn one_that_is_new_proves_itself_in_two_rounds() {
        let mut pace = Pace::unknown(32);
        assert_eq!((pace.window(), pace.is_remarkable(32)), (8, false));
        for expected in [16, 32, 32] {
            let round = pace.window();
            (0..round).for_each(|_| pace.learn(answered(5), round, 32));
            assert_eq!((pace.window(), pace.is_remarkable(32), pace.is_wary(32)), (expected, true, false));
        }
        let mut one_at_a_time = Pace::unknown(32);
        (0..100).for_each(|_| one_at_a_time.learn(answered(5), 1, 32));
        assert_eq!(one_at_a_time.window(), 8, "nobody knows what it would do with more");
        let few = Pace::unknown(3);
        assert_eq!((few.window(), few.is_remarkable(3)), (3, false));
    }

    #[test]
    fn slow_answers_are_answers_and_refusals_are_no_silence() {
        let mut pace = Pace::unknown(32);
        (0..4).for_each(|_| pace.learn(answered(14_900), 32, 32));
        assert_eq!((pace.window(), pace.speed()), (FIRST_WINDOW + 4, Speed::Slow));
        let refused = Ended { took: Duration::from_millis(1), answered: false };
        (0..8).for_each(|_| pace.learn(refused, 32, 32));
        assert_eq!((pace.window(), pace.speed()), (FIRST_WINDOW + 4 + 8, Speed::Quick));
    }

    #[test]
    fn what_is_done_soon_is_worth_holding() {
        let mut pace = Pace::unknown(32);
        (0..20).for_each(|_| pace.learn(answered(500), 32, 32));
        // Nearly: the average comes closer and closer.
        assert_eq!(pace.worth_holding(32), 32 + 4 * 32);
        (0..20).for_each(|_| pace.learn(answered(14_900), 32, 32));
        assert_eq!(pace.worth_holding(32), 32);
    }
}
