//! How many deliveries are pending, of each organisation and in all, and when that is too many to accept more.
//!
//! Two fixed limits are not enough: ten organisations at theirs, whose receivers are dead, would fill the common one for 26
//! hours and stop everybody. So the rule is that of dynamic thresholds (see `dispatch/shares.rs`): an organisation may have
//! more pending only while it has less than a multiple α of what is *free* of the total. A few get all that they may have,
//! many get less each, and something is always free for one that comes new:
//!
//! ```text
//! free = total − reserve − all pending
//! more, for one with n pending:  while n < its limit  and  all pending < total  and  (n < α × free  or  n < few)
//! ```
//!
//! α is 1, or as much as it takes for one alone to reach its limit; with a limit that is not below the total, nine tenths of
//! that. Those that come one after another could still halve what is free until nothing is: the reserve, the last tenth, or
//! half of what one at its limit leaves if that is less, is only for those that have few. With the defaults of 10,000,000 and
//! 1,000,000, eight organisations can reach their limit, ten have 818,000 each and leave as much beside the reserve, and
//! that has 1,000 for each of 1,000 others.
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

/// Of what may be pending in all, one of so many is the reserve, which only organisations with few pending may use …
const TOTAL_PER_RESERVE: u64 = 10;
/// … and few are fewer than one of so many, or none. More are refused with [`Error::OrganizationBacklog`].
const TOTAL_PER_FEW: u64 = 10_000;

/// How many deliveries may be pending; publishing is refused while there are as many. An event that was let in makes all
/// its deliveries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BacklogLimits {
    /// Of all organisations.
    pub total: u64,
    /// Of one organisation, while there is room for others.
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

impl BacklogLimits {
    /// Whether an organisation may have more pending than `its`, when `all` are.
    fn judge(&self, its: u64, all: u64) -> Result<(), Error> {
        if its >= self.organization {
            return Err(Error::OrganizationBacklog);
        }
        if all >= self.total {
            return Err(Error::Backlog);
        }
        if its >= self.few() && its >= self.free(all).saturating_mul(self.multiple()) {
            return Err(Error::OrganizationBacklog);
        }
        Ok(())
    }

    /// What one organisation alone may have.
    fn most(&self) -> u64 {
        if self.organization < self.total { self.organization } else { self.total - self.total / TOTAL_PER_RESERVE }
    }

    fn reserve(&self) -> u64 {
        (self.total / TOTAL_PER_RESERVE).min((self.total - self.most()) / 2)
    }

    fn few(&self) -> u64 {
        (self.total / TOTAL_PER_FEW).max(1)
    }

    fn free(&self, all: u64) -> u64 {
        (self.total - self.reserve()).saturating_sub(all)
    }

    /// α.
    fn multiple(&self) -> u64 {
        self.most().div_ceil(self.free(self.most()).max(1)).max(1)
    }
}

impl Backlog {
    /// Lets deliveries of the organisation in, or refuses them when too much is pending.
    pub(super) fn admit(&self, organization: &str, deliveries: usize) -> Result<(), Error> {
        let mut known = self.lock();
        let counts = [&known.found, &known.before, &known.since, &known.on_the_way];
        let of = |counts: &Counts| counts.organizations.get(organization).copied().unwrap_or(0);
        let (its, all) = (counts.into_iter().map(of).sum(), counts.into_iter().map(|counts| counts.total).sum());
        known.limits.judge(its, all)?;
        if deliveries > 0 {
            known.on_the_way.add(organization, deliveries as u64);
        }
        Ok(())
    }

    /// Lets in what was accepted before, however much is pending.
    pub(super) fn let_in(&self, organization: &str, deliveries: usize) {
        if deliveries > 0 {
            self.lock().on_the_way.add(organization, deliveries as u64);
        }
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

    /// All that is known to be pending.
    pub(super) fn pending(&self) -> u64 {
        let known = self.lock();
        [&known.found, &known.before, &known.since, &known.on_the_way].into_iter().map(|counts| counts.total).sum()
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

    /// What organisations have that come one after another and each take all they can.
    fn fill(limits: BacklogLimits, organizations: usize) -> Vec<u64> {
        let mut all = 0;
        let take = |_| {
            let its = (0..).find(|its| limits.judge(*its, all + its).is_err()).unwrap();
            all += its;
            its
        };
        (0..organizations).map(take).collect()
    }

    #[test]
    fn one_alone_reaches_its_limit() {
        for (total, organization, most) in [
            (100_000, 10_000, 10_000),
            (100_000, 60_000, 60_000),
            (100_000, 99_999, 99_999),
            (10, 9, 9),
            (2, 1, 1),
            // No limit of its own leaves room for others all the same.
            (100_000, 100_000, 90_000),
            (100_000, u64::MAX, 90_000),
            (10, 10, 9),
        ] {
            assert_eq!(fill(BacklogLimits { total, organization }, 1), [most], "{total} {organization}");
        }
    }

    #[test]
    fn few_have_their_limit_and_many_leave_room() {
        // A hundredth of the defaults.
        let limits = BacklogLimits { total: 100_000, organization: 10_000 };
        assert_eq!(fill(limits, 8), [10_000; 8]);
        let mut its = [0; 10];
        while let Some(least) = its.iter().min()
            && limits.judge(*least, its.iter().sum()).is_ok()
        {
            *its.iter_mut().min().unwrap() += 1;
        }
        assert!(its.iter().all(|its| (8_181..=8_182).contains(its)), "{its:?}");
        assert!(limits.judge(8_000, its.iter().sum()).is_ok(), "one that has less than they");
    }

    #[test]
    fn those_that_come_last_have_few_but_not_none() {
        let limits = BacklogLimits { total: 100_000, organization: 10_000 };
        let its = fill(limits, 1_000);
        assert!(its.iter().all(|its| *its >= limits.few()), "{its:?}");
        assert!(its.iter().sum::<u64>() <= limits.total);
        assert!(matches!(limits.judge(0, limits.total), Err(Error::Backlog)), "the total is hard");
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
