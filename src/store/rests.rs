//! An organisation that fills SQLite's commits by itself, while others write as well, rests for a part of the time that they
//! take. What another one writes in between finds no commit under way that it has to wait for, and processors that are not
//! all taken. Beside PostgreSQL the quiet one is quick enough without: there, a commit keeps the processors of another process
//! busy, and claims have connections of their own.

use std::{collections::HashMap, sync::Arc, time::Duration};

use tokio::{sync::mpsc::UnboundedReceiver, time::timeout_at};

use super::turns::Turns;
use crate::clock;

/// A rest is this part of what the commits took.
const PART: u32 = 4;
/// One has filled a commit that has no more than this part from others.
const OTHERS: usize = 4;
/// Timers are no finer, so shorter rests are saved up.
const LEAST: Duration = Duration::from_millis(1);
/// No rest is longer, however long a commit took.
const MOST: Duration = Duration::from_millis(20);

/// How much of a commit is whose.
#[derive(Default)]
pub(super) struct Shares(HashMap<Arc<str>, usize>);

impl Shares {
    pub(super) fn add(&mut self, organization: Arc<str>, weight: usize) {
        *self.0.entry(organization).or_default() += weight;
    }

    /// Who has so much of it that it is full of that.
    fn who_filled_it(self) -> Option<Arc<str>> {
        let all: usize = self.0.values().sum();
        let (who, most) = self.0.into_iter().max_by_key(|(_, weight)| *weight)?;
        ((all - most) * OTHERS <= all).then_some(who)
    }
}

/// Who is to rest, and for how long.
#[derive(Default)]
pub(super) struct Rests {
    who: Option<Arc<str>>,
    owed: Duration,
}

impl Rests {
    /// A full commit took so long.
    pub(super) fn earn(&mut self, shares: Shares, took: Duration) {
        let Some(who) = shares.who_filled_it() else { return };
        if self.who.as_ref() != Some(&who) {
            *self = Self { who: Some(who), owed: Duration::ZERO };
        }
        self.owed = (self.owed + took / PART).min(MOST);
    }

    /// Lets pass what is owed, once that is long enough, unless somebody else has something waiting or comes with it.
    pub(super) async fn take<T>(
        &mut self,
        waiting: &mut Turns<T>,
        coming: &mut UnboundedReceiver<T>,
        whose: impl Fn(&T) -> Arc<str>,
    ) {
        let Some(who) = self.who.as_ref().filter(|_| self.owed >= LEAST) else { return };
        let began = clock::stopwatch();
        while !waiting.has_others(who)
            && let Ok(Some(next)) = timeout_at((began + self.owed).into(), coming.recv()).await
        {
            waiting.push(whose(&next), next);
        }
        self.owed = self.owed.saturating_sub(began.elapsed());
    }
}

#[cfg(test)]
mod tests {
    use tokio::sync::mpsc;

    use super::*;

    const COMMIT: Duration = Duration::from_millis(2);

    fn whose(one: &&'static str) -> Arc<str> {
        Arc::from(*one)
    }

    fn shares(of: &[(&'static str, usize)]) -> Shares {
        let mut shares = Shares::default();
        of.iter().for_each(|(one, weight)| shares.add(whose(one), *weight));
        shares
    }

    /// After these commits.
    fn after(commits: &[&[(&'static str, usize)]]) -> Rests {
        let mut rests = Rests::default();
        commits.iter().for_each(|commit| rests.earn(shares(commit), COMMIT));
        rests
    }

    #[tokio::test]
    async fn one_that_fills_commits_rests_a_quarter_of_their_time() {
        let full: &[_] = &[("loud", 15), ("quiet", 1)];
        let (mut waiting, (others, mut coming)) = (Turns::default(), mpsc::unbounded_channel());
        others.send("loud").unwrap();
        let mut rests = after(&[full]);
        rests.take(&mut waiting, &mut coming, whose).await;
        assert_eq!((rests.owed, waiting.len()), (COMMIT / 4, 0), "too short for a timer");
        rests.earn(shares(full), COMMIT);
        assert_eq!(rests.owed, COMMIT / 2);
        let began = clock::stopwatch();
        rests.take(&mut waiting, &mut coming, whose).await;
        assert!(began.elapsed() >= COMMIT / 2);
        assert_eq!(waiting.len(), 1, "what came meanwhile waits");
        assert!(rests.owed.is_zero());
    }

    #[tokio::test]
    async fn it_ends_when_somebody_else_writes() {
        let full: &[_] = &[("loud", 16)];
        let (mut waiting, (others, mut coming)) = (Turns::default(), mpsc::unbounded_channel());
        for one in ["loud", "quiet", "loud"] {
            others.send(one).unwrap();
        }
        after(&[full; 8]).take(&mut waiting, &mut coming, whose).await;
        assert_eq!((waiting.len(), coming.len()), (2, 1), "comes");
        after(&[full; 8]).take(&mut waiting, &mut coming, whose).await;
        assert_eq!((waiting.len(), coming.len()), (2, 1), "waits already");
    }

    #[test]
    fn who_shares_does_not_rest() {
        let (both, one, other): (&[_], &[_], &[_]) = (&[("one", 11), ("other", 5)], &[("one", 16)], &[("other", 16)]);
        assert!(after(&[both; 8]).who.is_none());
        assert!(after(&[one, other, one, other]).owed < LEAST, "each had one");
        assert!(after(&[both, one, both]).owed == COMMIT / 4);
    }

    #[test]
    fn however_long_a_commit_took_a_rest_is_short() {
        let mut rests = Rests::default();
        rests.earn(shares(&[("loud", 16)]), Duration::from_secs(60));
        assert_eq!(rests.owed, MOST);
    }
}
