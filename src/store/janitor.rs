//! What is tidied up in the background, in steps so small that nobody waits for one.

use std::time::Duration;

use sea_orm::ConnectionTrait;

use super::{Error, Store, sql::Sql};
use crate::clock;

/// How far the log of changes reaches back; older resume tokens are refused.
const KEEP_CHANGES: Duration = Duration::from_secs(3 * 24 * 60 * 60);
/// A deleted webhook is left alone for so long: other nodes may still publish to it by what they knew a moment ago.
const SETTLED: Duration = Duration::from_secs(60);
/// One step removes at most this many rows.
const MAX_STEP: i64 = 128;

impl Store {
    /// One round: notes the use of keys, forgets old changes and answers, and removes what deleted webhooks left. True
    /// when there is more to do at once.
    pub async fn purge(&self) -> Result<bool, Error> {
        self.write_used_keys().await?;
        let changes = self.forget_changes().await?;
        let answers = self.forget_answers().await?;
        Ok(self.remove_deleted().await? || changes || answers)
    }

    /// Removes changes older than [`KEEP_CHANGES`], the oldest first, and never the newest one, which says where the
    /// log stands.
    async fn forget_changes(&self) -> Result<bool, Error> {
        let oldest = i64::try_from(KEEP_CHANGES.as_millis()).unwrap_or(i64::MAX);
        let mut sql = Sql::new("DELETE FROM changes WHERE seq < (SELECT max(seq) FROM changes) AND occurred_at_ms < ");
        sql.value(clock::now().millis() - oldest);
        // Judged among the first few only, so that a log with nothing to remove is not read to its end.
        sql.text(" AND seq IN (SELECT seq FROM changes ORDER BY seq LIMIT ").value(MAX_STEP).text(")");
        Ok(self.run(sql).await? == MAX_STEP.unsigned_abs())
    }

    async fn remove_deleted(&self) -> Result<bool, Error> {
        let mut find = Sql::new("SELECT id FROM webhooks WHERE deleted_at_ms < ");
        let settled = i64::try_from(SETTLED.as_millis()).unwrap_or(i64::MAX);
        find.value(clock::now().millis() - settled).text(" LIMIT 1");
        let found = self.0.read.query_one_raw(find.build(self.0.read.get_database_backend())).await?;
        let Some(id) = found.map(|row| row.try_get_by_index::<String>(0)).transpose()? else { return Ok(false) };
        // One transaction: a lease that ends in between must not leave attempts without their delivery.
        let transaction = self.write().await?;
        let backend = transaction.get_database_backend();
        let mut deliveries = Sql::new("DELETE FROM deliveries WHERE webhook_id = ");
        deliveries.value(id.as_str()).text(" AND id IN (SELECT id FROM deliveries WHERE webhook_id = ");
        deliveries.value(id.as_str()).text(" AND lease_node IS NULL ORDER BY id LIMIT ").value(MAX_STEP);
        deliveries.text(") RETURNING id");
        let rows = transaction.query_all_raw(deliveries.build(backend)).await?;
        let removed = rows.iter().map(|row| row.try_get_by_index::<String>(0)).collect::<Result<Vec<_>, _>>()?;
        if !removed.is_empty() {
            let mut attempts = Sql::new("DELETE FROM attempts WHERE delivery_id IN ");
            attempts.list("(", removed.into_iter().map(Into::into), ")");
            transaction.execute_raw(attempts.build(backend)).await?;
            transaction.commit().await?;
            return Ok(true);
        }
        let mut leased = Sql::new("SELECT 1 FROM deliveries WHERE webhook_id = ");
        leased.value(id.as_str()).text(" LIMIT 1");
        if transaction.query_one_raw(leased.build(backend)).await?.is_some() {
            // An attempt is on the wire, or its node is gone and the lease will be rescued.
            return Ok(false);
        }
        for statement in ["DELETE FROM delivery_counts WHERE webhook_id = ", "DELETE FROM webhooks WHERE id = "] {
            let mut sql = Sql::new(statement);
            sql.value(id.as_str());
            transaction.execute_raw(sql.build(backend)).await?;
        }
        transaction.commit().await?;
        Ok(true)
    }

    pub(super) async fn run(&self, sql: Sql) -> Result<u64, Error> {
        Ok(self.0.write.execute_raw(sql.build(self.0.write.get_database_backend())).await?.rows_affected())
    }
}
