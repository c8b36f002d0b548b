//! The clock of a database that several nodes share, by which all of them go.

use std::{
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use sea_orm::{ConnectionTrait, DbBackend};

use super::{Error, Store, sql::Sql};
use crate::{clock, webhook::Timestamp};

/// What the database's clock says may be wrong by half the time that asking took. Up to this time it is good enough.
const MAX_ROUND_TRIP: Duration = Duration::from_millis(250);
/// Who goes by no clock yet asks so many times, unless an answer is good enough before, and takes the best there was: the
/// clock of its machine may be wrong by any time, and what other nodes have leased would be taken from them.
const FIRST_TRIES: usize = 5;
/// Two clocks drift apart by less than one part in so many. A slow answer is taken when it is better than what that leaves
/// of the one before.
const DRIFT: u32 = 1_000;
/// That no answer was good enough for so long is said, and again after as long.
const MAX_WITHOUT: Duration = Duration::from_secs(60);

static WITHOUT: clock::Seldom = clock::Seldom::new(MAX_WITHOUT);

/// The answer by which this node goes.
#[derive(Default)]
pub(super) struct Followed(Mutex<Option<Answer>>);

#[derive(Clone, Copy)]
struct Answer {
    now: Timestamp,
    asked: Instant,
    round_trip: Duration,
}

impl Answer {
    fn is_good(&self) -> bool {
        self.round_trip <= MAX_ROUND_TRIP
    }

    /// Whether to go by this one, after the `last`.
    fn is_better_than(&self, last: Option<Self>) -> bool {
        let left = |last: Self| last.round_trip + self.asked.saturating_duration_since(last.asked) / DRIFT;
        self.is_good() || last.is_none_or(|last| self.round_trip <= left(last))
    }

    /// Whether this node goes by an answer that was not good, or by one of long ago.
    fn is_doubtful(&self) -> bool {
        !self.is_good() || self.asked.elapsed() >= MAX_WITHOUT
    }
}

impl Store {
    /// Makes [`clock::now`] go by the clock of a database that several nodes share. To be called once in a while, since
    /// no two clocks run equally fast.
    pub async fn follow_clock(&self) -> Result<(), Error> {
        if self.sqlite() {
            return Ok(());
        }
        let followed = || self.0.followed.0.lock().unwrap_or_else(PoisonError::into_inner);
        let last = *followed();
        let tries = if last.is_some() { 1 } else { FIRST_TRIES };
        let best = best_of(tries, || self.ask_clock()).await?;
        let known = last.filter(|_| !best.is_better_than(last)).unwrap_or(best);
        if known.is_doubtful() && WITHOUT.is_time() {
            let round_trip_secs = best.round_trip.as_secs_f64();
            tracing::warn!(
                round_trip_secs,
                "the database answers so slowly that the time it tells may be wrong by half of that"
            );
        }
        *followed() = Some(known);
        clock::follow(known.now, known.asked + known.round_trip / 2);
        Ok(())
    }

    async fn ask_clock(&self) -> Result<Answer, Error> {
        const NOW: &str = "SELECT (extract(epoch FROM clock_timestamp()) * 1000)::bigint";
        let asked = clock::stopwatch();
        let row = async { Ok(self.0.engine_read.query_one_raw(Sql::new(NOW).build(DbBackend::Postgres)).await?) };
        let row = self.heard(row).await?.ok_or(Error::Corrupt("time"))?;
        let round_trip = asked.elapsed();
        Ok(Answer { now: Timestamp::from_millis(row.try_get_by_index(0)?), asked, round_trip })
    }
}

/// The best of so many answers, or the first that is good.
async fn best_of<F: Future<Output = Result<Answer, Error>>>(
    tries: usize,
    mut ask: impl FnMut() -> F,
) -> Result<Answer, Error> {
    let mut best = ask().await?;
    for _ in 1..tries {
        if best.is_good() {
            break;
        }
        // One that fails takes nothing from those before.
        let Ok(next) = ask().await else { break };
        if next.round_trip < best.round_trip {
            best = next;
        }
    }
    Ok(best)
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;

    #[test]
    fn the_best_answer_counts_though_a_later_one_fails() {
        // What each try comes to: the milliseconds that it took, or nothing.
        let best = |answers: &[Option<u64>]| {
            let mut answers = answers.iter();
            let ask = || {
                let round_trip = answers.next().unwrap().map(Duration::from_millis).ok_or(Error::Closed);
                let (now, asked) = (Timestamp::from_millis(0), clock::stopwatch());
                std::future::ready(round_trip.map(|round_trip| Answer { now, asked, round_trip }))
            };
            let best = best_of(4, ask).now_or_never().unwrap();
            best.ok().map(|best| best.round_trip.as_millis())
        };
        assert_eq!(best(&[Some(900), Some(300), Some(700), Some(800)]), Some(300));
        assert_eq!(best(&[Some(900), Some(250)]), Some(250), "it is good");
        assert_eq!(best(&[Some(900), Some(700), None]), Some(700));
        assert_eq!(best(&[None]), None);
    }

    #[test]
    fn a_slow_answer_is_better_than_none_or_an_old_one() {
        let start = clock::stopwatch();
        let after = |secs, millis| Answer {
            now: Timestamp::from_millis(0),
            asked: start + Duration::from_secs(secs),
            round_trip: Duration::from_millis(millis),
        };
        assert!(after(0, 3_000).is_better_than(None));
        assert!(after(2, 2_000).is_better_than(Some(after(0, 3_000))));
        assert!(after(2, 250).is_better_than(Some(after(0, 1))), "it is good");
        assert!(!after(60, 300).is_better_than(Some(after(0, 1))));
        assert!(after(300, 300).is_better_than(Some(after(0, 1))), "the one before has drifted");
    }
}
