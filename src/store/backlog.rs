//! How many deliveries are pending, of each organisation and in all, and when that is too many to accept more.
//!
//! Nothing is counted when somebody publishes: the counts are read in the background, and what this node let in since is
//! added to them. What was delivered since is not taken off, so for a moment the numbers are too high, never too low; of
//! what other nodes let in, or what a commit stored that seemed to fail, each learns with its next look.

use std::{
    collections::HashMap,
    sync::{Mutex, PoisonError},
    time::Duration,
};

use sea_orm::ConnectionTrait;

use super::{Error, Store, sql::Sql};
use crate::clock;

/// Between looks at the counts …
const LOOK: Duration = Duration::from_secs(1);
/// … or this many times as long as the last one took, so that many webhooks do not keep the database busy.
const REST: u32 = 20;

/// How many deliveries may be pending; publishing is refused while there are as many. An event that was let in makes all
/// its deliveries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BacklogLimits {
    /// Of all organisations.
    pub total: u64,
    /// Of one organisation.
    pub organization: u64,
}

/// What is known of the backlog.
pub(super) struct Backlog(Mutex<Known>);

struct Known {
    limits: BacklogLimits,
    /// What the last look found.
    found: Counts,
    /// Committed between its beginning and that of the next.
    before: Counts,
    /// Committed after that.
    since: Counts,
    /// Let in, and not committed yet, so that no look can find it.
    on_the_way: Counts,
}

#[derive(Default)]
struct Counts {
    total: u64,
    organizations: HashMap<String, u64>,
}

impl Default for Backlog {
    /// Without limits, until they are set.
    fn default() -> Self {
        let limits = BacklogLimits { total: u64::MAX, organization: u64::MAX };
        let [found, before, since, on_the_way] = std::array::from_fn(|_| Counts::default());
        Self(Mutex::new(Known { limits, found, before, since, on_the_way }))
    }
}

impl Backlog {
    /// Lets deliveries of the organisation in, or refuses them when too much is pending.
    pub(super) fn admit(&self, organization: &str, deliveries: usize) -> Result<(), Error> {
        let mut known = self.lock();
        let counts = [&known.found, &known.before, &known.since, &known.on_the_way];
        let of = |counts: &Counts| counts.organizations.get(organization).copied().unwrap_or(0);
        if counts.into_iter().map(of).sum::<u64>() >= known.limits.organization {
            return Err(Error::OrganizationBacklog);
        }
        if counts.into_iter().map(|counts| counts.total).sum::<u64>() >= known.limits.total {
            return Err(Error::Backlog);
        }
        if deliveries > 0 {
            known.on_the_way.add(organization, deliveries as u64);
        }
        Ok(())
    }

    /// Deliveries that were let in are stored, or could not be.
    pub(super) fn settle(&self, organization: &str, deliveries: usize, stored: bool) {
        if deliveries > 0 {
            let mut known = self.lock();
            known.on_the_way.remove(organization, deliveries as u64);
            if stored {
                known.since.add(organization, deliveries as u64);
            }
        }
    }

    /// A look at the counts begins: what is committed from now on may not be in them.
    fn begin(&self) {
        let mut known = self.lock();
        let Counts { total, organizations } = std::mem::take(&mut known.since);
        known.before.total += total;
        for (organization, count) in organizations {
            *known.before.organizations.entry(organization).or_default() += count;
        }
    }

    /// It has ended.
    fn end(&self, found: Counts) {
        let mut known = self.lock();
        known.found = found;
        known.before = Counts::default();
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Known> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Counts {
    fn add(&mut self, organization: &str, count: u64) {
        self.total += count;
        match self.organizations.get_mut(organization) {
            Some(known) => *known += count,
            None => drop(self.organizations.insert(organization.to_owned(), count)),
        }
    }

    fn remove(&mut self, organization: &str, count: u64) {
        self.total = self.total.saturating_sub(count);
        if let Some(known) = self.organizations.get_mut(organization) {
            *known = known.saturating_sub(count);
            if *known == 0 {
                self.organizations.remove(organization);
            }
        }
    }
}

impl Store {
    /// Sets the limits of the backlog.
    pub fn limit_backlog(&self, limits: BacklogLimits) {
        self.0.backlog.lock().limits = limits;
    }

    /// Looks at the counts now, and answers how long to wait before the next time.
    pub async fn look_at_backlog(&self) -> Result<Duration, Error> {
        const PENDING: &str = "\
            SELECT w.organization, CAST(sum(c.total) AS BIGINT) FROM delivery_counts c JOIN webhooks w ON w.id = c.webhook_id \
            WHERE c.status = 'pending' AND c.total > 0 AND w.deleted_at_ms IS NULL GROUP BY w.organization";
        let began = clock::stopwatch();
        self.0.backlog.begin();
        let reader = &self.0.engine_read;
        let statement = Sql::new(PENDING).build(reader.get_database_backend());
        let rows = self.heard(async { Ok(reader.query_all_raw(statement).await?) }).await?;
        let mut found = Counts::default();
        for row in rows {
            let (organization, count): (String, i64) = row.try_get_many_by_index()?;
            found.add(&organization, count.unsigned_abs());
        }
        self.0.backlog.end(found);
        Ok((began.elapsed() * REST).max(LOOK))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(counts: &[(&str, u64)]) -> Counts {
        let mut found = Counts::default();
        counts.iter().for_each(|(organization, count)| found.add(organization, *count));
        found
    }

    fn limited(total: u64, organization: u64) -> Backlog {
        let backlog = Backlog::default();
        backlog.lock().limits = BacklogLimits { total, organization };
        backlog
    }

    fn publish(backlog: &Backlog, organization: &str, deliveries: usize) {
        backlog.admit(organization, deliveries).unwrap();
        backlog.settle(organization, deliveries, true);
    }

    #[test]
    fn an_organisation_is_refused_at_its_own_limit_and_everybody_at_the_common_one() {
        let backlog = limited(5, 3);
        publish(&backlog, "loud", 3);
        assert!(matches!(backlog.admit("loud", 0), Err(Error::OrganizationBacklog)));
        assert!(backlog.admit("quiet", 0).is_ok());
        backlog.begin();
        backlog.end(found(&[("loud", 2), ("other", 3)]));
        assert!(matches!(backlog.admit("quiet", 0), Err(Error::Backlog)));
    }

    #[test]
    fn what_is_committed_during_a_look_is_not_forgotten() {
        let backlog = limited(u64::MAX, 3);
        publish(&backlog, "acme", 1);
        backlog.begin();
        publish(&backlog, "acme", 2);
        assert!(backlog.admit("acme", 0).is_err(), "all three are known while it lasts");
        backlog.end(found(&[("acme", 1)]));
        assert!(backlog.admit("acme", 0).is_err(), "the two may not be among those found");
        backlog.begin();
        backlog.end(found(&[("acme", 2)]));
        assert!(backlog.admit("acme", 0).is_ok());
    }

    #[test]
    fn what_is_committed_after_a_look_that_it_was_let_in_before_is_not_forgotten() {
        let backlog = limited(u64::MAX, 2);
        backlog.admit("acme", 2).unwrap();
        backlog.begin();
        backlog.end(found(&[]));
        assert!(backlog.admit("acme", 0).is_err());
        backlog.settle("acme", 2, true);
        assert!(backlog.admit("acme", 0).is_err());
    }

    #[test]
    fn what_could_not_be_stored_leaves_nothing_behind() {
        let backlog = limited(u64::MAX, 2);
        backlog.admit("acme", 2).unwrap();
        backlog.settle("acme", 2, false);
        assert!(backlog.admit("acme", 0).is_ok());
        assert!(backlog.lock().on_the_way.organizations.is_empty());
    }

    #[test]
    fn a_look_that_failed_forgets_nothing() {
        let backlog = limited(u64::MAX, 2);
        publish(&backlog, "acme", 1);
        backlog.begin();
        publish(&backlog, "acme", 1);
        backlog.begin();
        assert!(backlog.admit("acme", 0).is_err());
    }
}
