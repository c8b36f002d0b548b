//! The only code that chooses the state of a delivery.

use std::time::Duration;

use super::{DeliveryStatus, RetrySchedule, Timestamp, retry_schedule::MAX_WAIT};

/// How a delivery's attempts are planned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Plan {
    /// By the retry schedule.
    Schedule,
    /// One attempt and no other: a test event, or a retry by hand.
    Once,
}

impl Plan {
    /// As a row says it.
    pub fn of(once: bool) -> Self {
        if once { Self::Once } else { Self::Schedule }
    }
}

/// How an attempt ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// A 2xx in time.
    Accepted,
    /// Anything else, with the wait that the receiver asked for.
    Refused {
        /// From `Retry-After` on a 429 or 503.
        retry_after: Option<Duration>,
    },
}

/// What becomes of the delivery.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Transition {
    /// The new state.
    pub status: DeliveryStatus,
    /// When the next attempt is due; present exactly while pending.
    pub next_attempt_at: Option<Timestamp>,
}

/// The state after attempt number `attempts` ended at `now` with `outcome`.
///
/// A `Retry-After` lengthens the wait that the schedule plans, to a day at most; it never shortens it, and never grants
/// an attempt that the schedule has not.
pub fn decide(attempts: i32, plan: Plan, outcome: &Outcome, schedule: &RetrySchedule, now: Timestamp) -> Transition {
    let retry_after = match outcome {
        Outcome::Accepted => return Transition { status: DeliveryStatus::Success, next_attempt_at: None },
        Outcome::Refused { retry_after } => retry_after.unwrap_or_default().min(MAX_WAIT),
    };
    let planned = match plan {
        Plan::Schedule => schedule.wait_after(attempts),
        Plan::Once => None,
    };
    match planned {
        Some(wait) => {
            Transition { status: DeliveryStatus::Pending, next_attempt_at: Some(now.after(wait.max(retry_after))) }
        }
        None => Transition { status: DeliveryStatus::Failed, next_attempt_at: None },
    }
}

/// The state of a delivery whose node died with its attempt leased, which has happened `lost` times since an attempt was
/// last recorded.
///
/// Nobody knows whether the receiver saw the attempt, or whether it even began: the first time it is due again at once.
/// After that it counts as a refusal, with the waits of the schedule, so that a delivery that takes nodes down with it
/// does so ever more rarely, and ends. A test event is not made again: whoever asked for it is gone.
pub fn rescue(lost: i32, attempts: i32, plan: Plan, schedule: &RetrySchedule, now: Timestamp) -> Transition {
    let is_test = plan == Plan::Once && attempts == 1;
    if lost <= 1 && !is_test {
        return Transition { status: DeliveryStatus::Pending, next_attempt_at: Some(now) };
    }
    decide(attempts, plan, &Outcome::Refused { retry_after: None }, schedule, now)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const NOW: Timestamp = Timestamp::from_millis(1_000_000);

    fn refused(secs: Option<u64>) -> Outcome {
        Outcome::Refused { retry_after: secs.map(Duration::from_secs) }
    }

    #[test]
    fn follows_the_schedule_and_then_fails() {
        let schedule = RetrySchedule::default();
        for (attempts, wait_secs) in [(1, 60), (2, 300), (3, 1_800), (4, 7_200), (5, 86_400)] {
            let transition = decide(attempts, Plan::Schedule, &refused(None), &schedule, NOW);
            assert_eq!(transition.next_attempt_at, Some(NOW.after(Duration::from_secs(wait_secs))));
            assert_eq!(transition.status, DeliveryStatus::Pending);
        }
        assert_eq!(decide(6, Plan::Schedule, &refused(None), &schedule, NOW).status, DeliveryStatus::Failed);
    }

    #[test]
    fn retry_after_only_lengthens() {
        let wait = |secs| {
            let next = decide(1, Plan::Schedule, &refused(Some(secs)), &RetrySchedule::default(), NOW).next_attempt_at;
            NOW.until(next.unwrap()).as_secs()
        };
        assert_eq!(wait(5), 60);
        assert_eq!(wait(600), 600);
        assert_eq!(wait(u64::MAX), 86_400);
    }

    #[test]
    fn a_delivery_that_kills_its_node_ends() {
        let schedule = RetrySchedule::default();
        let rescued = |lost, attempts, plan| rescue(lost, attempts, plan, &schedule, NOW);
        assert_eq!(rescued(1, 6, Plan::Schedule).next_attempt_at, Some(NOW));
        assert_eq!(rescued(2, 2, Plan::Schedule).next_attempt_at, Some(NOW.after(Duration::from_secs(5 * 60))));
        assert_eq!(rescued(2, 6, Plan::Schedule).status, DeliveryStatus::Failed);
        assert_eq!(rescued(1, 7, Plan::Once).next_attempt_at, Some(NOW), "a retry by hand");
        assert_eq!(rescued(2, 8, Plan::Once).status, DeliveryStatus::Failed);
        assert_eq!(rescued(1, 1, Plan::Once).status, DeliveryStatus::Failed, "a test event");
    }

    proptest! {
        #[test]
        fn a_next_attempt_is_planned_exactly_while_pending(
            attempts in 1..100_i32, once: bool, accepted: bool, retry_after in proptest::option::of(any::<u64>()),
        ) {
            let plan = Plan::of(once);
            let outcome = if accepted { Outcome::Accepted } else { refused(retry_after) };
            let transition = decide(attempts, plan, &outcome, &RetrySchedule::default(), NOW);
            prop_assert_eq!(transition.status == DeliveryStatus::Pending, transition.next_attempt_at.is_some());
            prop_assert_eq!(transition.status == DeliveryStatus::Success, accepted);
            prop_assert!(transition.next_attempt_at.is_none_or(|next| next > NOW));
        }
    }
}
