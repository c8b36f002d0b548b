//! What is tidied up in the background, in steps so small that nobody waits for one.

use std::time::Duration;

use sea_orm::ConnectionTrait;

use super::{Error, Store, sql::Sql};
use crate::clock;

/// How far the log of changes reaches back; older resume tokens are refused.
const KEEP_CHANGES: Duration = Duration::from_secs(3 * 24 * 60 * 60);
/// One step removes at most this many rows.
const MAX_STEP: i64 = 128;

impl Store {
    /// One round: notes the use of keys, and forgets old changes and answers. True when there is more to do at once.
    pub async fn purge(&self) -> Result<bool, Error> {
        self.write_used_keys().await?;
        let changes = self.forget_changes().await?;
        let answers = self.forget_answers().await?;
        Ok(changes || answers)
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

    pub(super) async fn run(&self, sql: Sql) -> Result<u64, Error> {
        Ok(self.0.write.execute_raw(sql.build(self.0.write.get_database_backend())).await?.rows_affected())
    }
}
