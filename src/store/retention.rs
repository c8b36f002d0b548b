//! Retention: what is finished and old is removed, in steps so small that nobody waits for one. In the same steps, with longer
//! pauses, goes what deleted webhooks left, and what is kept for a fixed time.
//!
//! Ids begin with the time at which they were made, so primary keys lead to what is old, and a round reads no further.
//! Reading goes on beside the writers. What it finds due is removed a few rows at a time, each time in a transaction of
//! its own that looks once more whether it still is; after each there is a pause as long as the step took, its wait for
//! the database included, or twice as long on SQLite, so that publishing has at least half, or two thirds, of the time, and
//! more the busier it is.
//!
//! What a round leaves behind, because it is pending or ended only lately, the next one looks at again; the time that this
//! takes says when the next one is.

mod deleted;
mod events;
mod janitor;

use std::{collections::BTreeMap, future::Future, time::Duration};

use sea_orm::{ConnectionTrait, DatabaseTransaction, QueryResult, TransactionTrait};

use super::{
    Error, Store,
    entity::delivery,
    rows::{Column, Rows, int, text},
    script::Script,
    silence::MAX_WAIT,
    sql::Sql,
};
use crate::{
    clock,
    webhook::{DeliveryStatus, Retention, Timestamp},
};

/// At most so many rows, or pages of 4 KiB, are removed at a time, and nothing for so many times as long after it.
#[derive(Clone, Copy)]
struct Step {
    most: usize,
    rest: u32,
}

const STEP: Step = Step { most: 128, rest: 1 };
/// There, publishes wait for it: a few milliseconds.
const STEP_ON_SQLITE: Step = Step { most: 32, rest: 2 };

const PAGE_BYTES: usize = 4096;
/// One read looks at no more than this many rows.
const MAX_READ: i64 = 5_000;
/// Between rounds …
const ROUND: Duration = Duration::from_secs(10);
/// … or this many times as long as the last one looked in vain.
const REST: u32 = 10;
/// … but at most this: what may be personal is not to wait for hours because much else has to stay.
const MAX_ROUND: Duration = Duration::from_secs(60 * 60);
/// A delivery that ends later than this after it was made is one of the few in the index `deliveries_late`.
const LATE: Duration = Duration::from_secs(60 * 60);
/// Identifies, among PostgreSQL's advisory locks, the one of whoever removes what is old.
const LOCK: i64 = 0x736b_7772;

/// PostgreSQL follows the keys and indexes that these statements are made for, whatever it believes of how much is old: sorting
/// all of that for a few rows would cost more the more there is.
const BY_KEY: &str = "SET LOCAL enable_sort TO off; SET LOCAL enable_bitmapscan TO off";

const DELIVERY_IDS: &[Column] = &[text("delivery_id")];
const REMOVE_ATTEMPTS: &str = "DELETE FROM attempts WHERE delivery_id IN (SELECT delivery_id FROM {rows})";

const COUNTS: &[Column] = &[text("webhook_id"), text("event_type"), text("status"), int("count")];
const COUNT_REMOVED: &str = "UPDATE delivery_counts SET total = delivery_counts.total - rows.count, \
    removed = delivery_counts.removed + rows.count FROM {rows}{ordered} \
    WHERE delivery_counts.webhook_id = rows.webhook_id AND delivery_counts.event_type = rows.event_type \
    AND delivery_counts.status = rows.status";

/// Up to which time of making, and of ending, attempts are forgotten: names in `settings`.
const FORGOTTEN: &str = "attempts_forgotten_ms";
const FORGOTTEN_LATE: &str = "late_attempts_forgotten_ms";

/// What is removed.
#[derive(Clone, Copy, PartialEq, Eq)]
enum What<'a> {
    /// Deliveries that ended before a time.
    Ended(Timestamp),
    /// The attempts of those.
    Attempts(Timestamp),
    /// Deliveries of this deleted webhook, pending or not, but for those of which an attempt may be on the wire.
    Deleted(&'a str),
}

/// Why a round ends early.
enum Stop {
    /// Another node is at it.
    Elsewhere,
    Failed(Error),
}

impl<E: Into<Error>> From<E> for Stop {
    fn from(error: E) -> Self {
        Self::Failed(error.into())
    }
}

struct Round<'a> {
    store: &'a Store,
    in_vain: Duration,
    step: Step,
    /// Of several nodes, the one that has it makes a step.
    lock: i64,
}

impl Store {
    /// Sets how long what is finished is kept, once.
    pub fn retain(&self, retention: Retention) {
        let _ = self.0.retention.set(retention);
    }

    /// Removes what is finished and old, and answers how long to wait before the next time.
    pub async fn remove_old(&self) -> Result<Duration, Error> {
        let Some(retention) = self.0.retention.get() else { return Ok(ROUND) };
        let mut round = Round::new(self);
        match round.run(retention, clock::now()).await {
            Ok(()) | Err(Stop::Elsewhere) => Ok((round.in_vain * REST).clamp(ROUND, MAX_ROUND)),
            Err(Stop::Failed(error)) => Err(error),
        }
    }

    /// Whether the attempts of a delivery are older than they are kept, and removed already or soon.
    pub(super) fn has_forgotten_attempts(&self, row: &delivery::Model) -> bool {
        let keep = self.0.retention.get().and_then(|retention| retention.attempts);
        let ended_at_ms = row.last_attempt_at_ms.unwrap_or(row.created_at_ms);
        keep.is_some_and(|keep| ended_at_ms < clock::now().before(keep).millis())
            && row.status != DeliveryStatus::Pending.as_str()
    }
}

impl<'a> Round<'a> {
    fn new(store: &'a Store) -> Self {
        let step = if store.sqlite() { STEP_ON_SQLITE } else { STEP };
        Self { store, in_vain: Duration::ZERO, step, lock: LOCK }
    }

    /// All parts, also when one fails: it is not to keep the others from theirs.
    async fn run(&mut self, retention: &Retention, now: Timestamp) -> Result<(), Stop> {
        let mut ended = Ok(());
        if let Some(keep) = retention.deliveries {
            let old = now.before(keep);
            ended = ended.and(self.walk(What::Ended(old), [Timestamp::from_millis(0), old]).await);
        }
        if let Some(keep) = retention.attempts {
            ended = ended.and(self.forget_attempts(now.before(keep)).await);
        }
        if let Some(keep) = retention.payloads() {
            ended = ended.and(self.remove_events(now.before(keep)).await);
        }
        ended
    }

    /// Goes through the deliveries made between two times, the oldest first, and removes what is to go.
    async fn walk(&mut self, what: What<'_>, made: [Timestamp; 2]) -> Result<(), Stop> {
        let [mut after, to] = made.map(|at| clock::first_id("del", at));
        loop {
            let began = clock::stopwatch();
            let mut sql = Sql::new("SELECT id, webhook_id, attempts, CASE WHEN ");
            what.applies(&mut sql).text(" THEN 1 ELSE 0 END FROM deliveries WHERE id >= ").value(after.as_str());
            sql.text(" AND id < ").value(to.as_str()).text(" ORDER BY id LIMIT ").value(MAX_READ);
            let found = self.read(sql).await?;
            let rows = found.iter().map(QueryResult::try_get_many_by_index);
            let rows = rows.collect::<Result<Vec<(String, String, i32, i32)>, _>>()?;
            let mut due: Vec<_> = rows.iter().filter(|(.., due)| *due == 1).collect();
            if !self.store.sqlite() {
                // A step of few webhooks changes few counts, for which all commits wait. Differs on SQLite because there it
                // would change a page of the table, and one of its key, for each row.
                due.sort_by_key(|(_, webhook_id, ..)| webhook_id);
            }
            let due: Vec<(&str, usize)> =
                due.into_iter().map(|(id, _, attempts, _)| (id.as_str(), weight(*attempts))).collect();
            self.looked(began.elapsed(), rows.len() - due.len(), rows.len());
            self.remove(what, &due).await?;
            match rows.last() {
                // No id is between one and the same with a letter more.
                Some((last, ..)) if rows.len() as i64 == MAX_READ => after = format!("{last}0"),
                _ => return Ok(()),
            }
        }
    }

    /// Notes that a look found so many rows of which some stay, and will be looked at again each round.
    fn looked(&mut self, took: Duration, stay: usize, rows: usize) {
        let [stay, rows] = [stay, rows.max(1)].map(|count| u32::try_from(count).unwrap_or(u32::MAX));
        self.in_vain += took * stay / rows;
    }

    /// Removes the attempts of deliveries that ended before `old`: of those that ended soon after they were made, by when
    /// they were made, and of the others by when they ended. What was gone through once is not gone through again: a
    /// delivery that was pending then will be among the others.
    async fn forget_attempts(&mut self, old: Timestamp) -> Result<(), Stop> {
        let made = [self.mark(FORGOTTEN).await?, old.before(LATE)];
        if made[0] < made[1] {
            self.walk(What::Attempts(old), made).await?;
            self.set_mark(FORGOTTEN, made[1]).await?;
        }
        let mut after = (self.mark(FORGOTTEN_LATE).await?.millis(), String::new(), String::new());
        loop {
            let mut sql = Sql::new(
                "SELECT last_attempt_at_ms, webhook_id, id, attempts FROM deliveries \
                 WHERE status <> 'pending' AND last_attempt_at_ms > created_at_ms + 3600000 AND last_attempt_at_ms < ",
            );
            sql.value(old.millis()).text(" AND (last_attempt_at_ms, webhook_id, id) > ");
            sql.row([after.0.into(), after.1.as_str().into(), after.2.as_str().into()]);
            sql.text(" ORDER BY last_attempt_at_ms, webhook_id, id LIMIT ").value(MAX_READ);
            let found = self.read(sql).await?;
            let rows = found.iter().map(QueryResult::try_get_many_by_index);
            let rows = rows.collect::<Result<Vec<(i64, String, String, i32)>, _>>()?;
            let due: Vec<(&str, usize)> =
                rows.iter().map(|(_, _, id, attempts)| (id.as_str(), weight(*attempts))).collect();
            self.remove(What::Attempts(old), &due).await?;
            match rows.into_iter().next_back() {
                Some((at, webhook_id, id, _)) => after = (at, webhook_id, id),
                None => return self.set_mark(FORGOTTEN_LATE, old).await,
            }
        }
    }

    /// Removes what is to go of some deliveries, given with their weights, in as many steps as it takes.
    async fn remove(&self, what: What<'_>, due: &[(&str, usize)]) -> Result<(), Stop> {
        for step in steps(due, self.step.most) {
            self.step(self.try_remove(what, step)).await?;
        }
        Ok(())
    }

    async fn try_remove(&self, what: What<'_>, step: &[(&str, usize)]) -> Result<(), Stop> {
        let transaction = self.begin().await?;
        let backend = transaction.get_database_backend();
        let mut sql = Sql::new(match what {
            What::Ended(_) | What::Deleted(_) => "DELETE FROM deliveries WHERE id IN ",
            What::Attempts(_) => "UPDATE deliveries SET response = NULL WHERE id IN ",
        });
        sql.list("(", step.iter().map(|(id, _)| (*id).into()), ") AND ");
        what.applies(&mut sql).text(" RETURNING id, webhook_id, event_type, status, attempts");
        let mut attempts = Rows::new(backend, DELIVERY_IDS);
        let mut removed: BTreeMap<(String, String, String), i64> = BTreeMap::new();
        for row in transaction.query_all_raw(sql.build(backend)).await? {
            let (id, webhook_id, event_type, status, count): (String, String, String, String, i32) =
                row.try_get_many_by_index()?;
            // What succeeded at once has no others.
            if count > 1 || status != DeliveryStatus::Success.as_str() {
                attempts.push([(&id).into()]);
            }
            *removed.entry((webhook_id, event_type, status)).or_default() += 1;
        }
        let mut counts = Rows::new(backend, COUNTS);
        if matches!(what, What::Ended(_)) {
            for ((webhook_id, event_type, status), count) in &removed {
                counts.push([webhook_id.into(), event_type.into(), status.into(), (*count).into()]);
            }
        }
        Script::default().with(REMOVE_ATTEMPTS, attempts).with(COUNT_REMOVED, counts).run(&transaction).await?;
        Ok(transaction.commit().await?)
    }

    /// Removes what a statement names, as one step.
    async fn remove_by(&self, sql: Sql) -> Result<(), Stop> {
        self.step(async {
            let transaction = self.begin().await?;
            transaction.execute_raw(sql.build(transaction.get_database_backend())).await?;
            Ok(transaction.commit().await?)
        })
        .await
    }

    /// Does a step, and leaves the database to the others after it.
    async fn step(&self, step: impl Future<Output = Result<(), Stop>>) -> Result<(), Stop> {
        let began = clock::stopwatch();
        self.heard(step).await?;
        tokio::time::sleep(began.elapsed() * self.step.rest).await;
        Ok(())
    }

    /// Begins a step. On PostgreSQL the others do not have one at the same time: whoever finds a node at it leaves the
    /// round to that one. Nothing is lost when a step is, so no step waits for the disk there.
    async fn begin(&self) -> Result<DatabaseTransaction, Stop> {
        let transaction = self.store.write().await?;
        if !self.store.sqlite() {
            let lock = Sql::new(&format!("SELECT pg_try_advisory_xact_lock({})", self.lock));
            let row = transaction.query_one_raw(lock.build(transaction.get_database_backend())).await?;
            if !row.map(|row| row.try_get_by_index(0)).transpose()?.unwrap_or(false) {
                return Err(Stop::Elsewhere);
            }
            transaction.execute_unprepared(&format!("{BY_KEY}; SET LOCAL synchronous_commit TO off")).await?;
        }
        Ok(transaction)
    }

    async fn read(&self, sql: Sql) -> Result<Vec<QueryResult>, Stop> {
        let read = &self.store.0.read;
        let statement = sql.build(read.get_database_backend());
        if self.store.sqlite() {
            return Ok(read.query_all_raw(statement).await?);
        }
        self.heard(async {
            let transaction = read.begin().await?;
            transaction.execute_unprepared(BY_KEY).await?;
            let rows = transaction.query_all_raw(statement).await?;
            transaction.commit().await?;
            Ok(rows)
        })
        .await
    }

    async fn heard<T>(&self, work: impl Future<Output = Result<T, Stop>>) -> Result<T, Stop> {
        self.store.0.silence.heard(MAX_WAIT, work).await
    }

    async fn mark(&self, name: &str) -> Result<Timestamp, Stop> {
        let mut sql = Sql::new("SELECT value FROM settings WHERE name = ");
        sql.value(name);
        let value = self.read(sql).await?.first().map(|row| row.try_get_by_index::<String>(0)).transpose()?;
        let millis = value.map_or(Ok(0), |value| value.parse().map_err(|_| Error::Corrupt("time in settings")))?;
        Ok(Timestamp::from_millis(millis))
    }

    async fn set_mark(&self, name: &str, at: Timestamp) -> Result<(), Stop> {
        let mut sql = Sql::new("INSERT INTO settings (name, value) VALUES ");
        sql.row([name.into(), at.millis().to_string().into()]);
        sql.text(" ON CONFLICT (name) DO UPDATE SET value = excluded.value");
        self.heard(async { Ok(self.store.run(sql).await.map(drop)?) }).await
    }
}

impl What<'_> {
    /// Adds the condition that a delivery is one of those.
    fn applies(self, sql: &mut Sql) -> &mut Sql {
        match self {
            Self::Ended(old) | Self::Attempts(old) => ended_before(sql, old),
            Self::Deleted(webhook_id) => sql.text("lease_node IS NULL AND webhook_id = ").value(webhook_id),
        }
    }
}

/// Adds the condition that a delivery is finished, and was before `old`: when its last attempt began, since only that is
/// stored, and it took no longer than an attempt may.
fn ended_before(sql: &mut Sql, old: Timestamp) -> &mut Sql {
    sql.text("status <> 'pending' AND COALESCE(last_attempt_at_ms, created_at_ms) < ").value(old.millis())
}

/// A delivery counts as one row for each of its attempts.
fn weight(attempts: i32) -> usize {
    usize::try_from(attempts).unwrap_or(1).max(1)
}

/// A row with a text of so many bytes counts as one, and as one more for each page that it fills.
fn pages(bytes: i32) -> usize {
    1 + usize::try_from(bytes).unwrap_or(0) / PAGE_BYTES
}

/// Cuts what is to be removed, each with its weight, into steps.
fn steps<T>(due: &[(T, usize)], most: usize) -> impl Iterator<Item = &[(T, usize)]> {
    let mut sum = 0;
    due.chunk_by(move |(_, one), (_, next)| {
        sum += one;
        let together = sum + next <= most;
        if !together {
            sum = 0;
        }
        together
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_are_small_and_leave_nothing_out() {
        let lengths = |weights: &[usize]| {
            let due: Vec<((), usize)> = weights.iter().map(|weight| ((), *weight)).collect();
            steps(&due, 32).map(<[_]>::len).collect::<Vec<_>>()
        };
        assert_eq!(lengths(&[]), [0; 0]);
        assert_eq!(lengths(&[1; 75]), [32, 32, 11]);
        assert_eq!(lengths(&[31, 1, 1, 1000, 2, 30]), [2, 1, 1, 2]);
    }

    #[test]
    fn late_is_what_the_index_says() {
        let migration = include_str!("../../migrations/m0007_retention.rs");
        assert!(migration.contains(&format!("created_at_ms + {};", LATE.as_millis())));
    }
}
