//! What is kept for a fixed time, whatever the operator says: the log of changes, and the answers to named requests.

use std::time::Duration;

use sea_orm::{ConnectionTrait, QueryResult};

use super::{Round, Step, Stop, pages, steps};
use crate::{
    clock,
    store::{Error, Store, sql::Sql},
    webhook::Timestamp,
};

/// How far the log of changes reaches back; older resume tokens are refused.
const KEEP_CHANGES: Duration = Duration::from_secs(3 * 24 * 60 * 60);
/// One read looks at no more than this many rows; what follows is in the next.
const MAX_READ: i64 = 1_024;
/// There, a step is mostly trips, and nobody waits for it.
const STEP: Step = Step { most: 512, rest: 1 };
/// A few milliseconds there too, since these rows are smaller than those of deliveries and have fewer indexes: three times
/// 10,000 a second when nobody writes.
const STEP_ON_SQLITE: Step = Step { most: 256, rest: 2 };
/// Identifies, among PostgreSQL's advisory locks, the one of whoever removes this.
const LOCK: i64 = 0x736b_776c;

impl Store {
    /// Forgets changes and answers that are older than they are kept, in as many steps as it takes.
    pub async fn purge(&self) -> Result<(), Error> {
        let step = if self.sqlite() { STEP_ON_SQLITE } else { STEP };
        let round = Round { step, lock: LOCK, ..Round::new(self) };
        match round.purge(clock::now()).await {
            Ok(()) | Err(Stop::Elsewhere) => Ok(()),
            Err(Stop::Failed(error)) => Err(error),
        }
    }

    pub(super) async fn run(&self, sql: Sql) -> Result<u64, Error> {
        Ok(self.0.write.execute_raw(sql.build(self.0.write.get_database_backend())).await?.rows_affected())
    }
}

impl Round<'_> {
    /// Some of both in turns, so that much of one makes the other wait no longer, and neither when one fails.
    async fn purge(&self, now: Timestamp) -> Result<(), Stop> {
        let mut places = (Some(0), Some(0));
        while places != (None, None) {
            let changes = self.forget_changes(places.0, now.before(KEEP_CHANGES)).await;
            let answers = self.forget_answers(places.1, now).await;
            places = (changes?, answers?);
        }
        Ok(())
    }

    /// Removes the next changes after a number that are from before `old`, and answers with where to go on; never the
    /// newest one, which says where the log stands.
    async fn forget_changes(&self, after: Option<i64>, old: Timestamp) -> Result<Option<i64>, Stop> {
        let Some(after) = after else { return Ok(None) };
        let mut sql = Sql::new("SELECT seq, octet_length(entries), occurred_at_ms FROM changes WHERE seq > ");
        sql.value(after).text(" AND seq < (SELECT max(seq) FROM changes) ORDER BY seq LIMIT ").value(MAX_READ);
        let found = self.read(sql).await?;
        let rows = found.iter().map(QueryResult::try_get_many_by_index);
        let rows = rows.collect::<Result<Vec<(i64, i32, i64)>, _>>()?;
        let due = rows.iter().filter(|(.., occurred_at_ms)| *occurred_at_ms < old.millis());
        let due: Vec<(i64, usize)> = due.map(|(seq, bytes, _)| (*seq, pages(*bytes))).collect();
        for step in steps(&due, self.step.most) {
            let mut sql = Sql::new("DELETE FROM changes WHERE seq >= ");
            sql.value(step[0].0).text(" AND seq <= ").value(step[step.len() - 1].0);
            sql.text(" AND occurred_at_ms < ").value(old.millis());
            self.remove_by(sql).await?;
        }
        Ok(rows.last().filter(|_| !due.is_empty()).map(|(seq, ..)| *seq))
    }

    /// Removes the next answers that expired after a time and until `now`, and answers with where to go on. What expired
    /// in the same millisecond goes together: what has not is nowhere among it.
    async fn forget_answers(&self, after: Option<i64>, now: Timestamp) -> Result<Option<i64>, Stop> {
        let Some(after) = after else { return Ok(None) };
        let mut sql =
            Sql::new("SELECT expires_at_ms, octet_length(answer) FROM idempotency_keys WHERE expires_at_ms > ");
        sql.value(after).text(" AND expires_at_ms <= ").value(now.millis());
        sql.text(" ORDER BY expires_at_ms LIMIT ").value(MAX_READ);
        let found = self.read(sql).await?;
        let rows = found.iter().map(QueryResult::try_get_many_by_index);
        let rows = rows.collect::<Result<Vec<(i64, Option<i32>)>, _>>()?;
        let together = rows.chunk_by(|(one, _), (next, _)| one == next);
        let weight = |rows: &[(i64, Option<i32>)]| rows.iter().map(|(_, bytes)| pages(bytes.unwrap_or(0))).sum();
        let due: Vec<(i64, usize)> = together.map(|rows| (rows[0].0, weight(rows))).collect();
        for step in steps(&due, self.step.most) {
            let mut sql = Sql::new("DELETE FROM idempotency_keys WHERE expires_at_ms >= ");
            sql.value(step[0].0).text(" AND expires_at_ms <= ").value(step[step.len() - 1].0);
            self.remove_by(sql).await?;
        }
        Ok(due.last().map(|(expires_at_ms, _)| *expires_at_ms))
    }
}
