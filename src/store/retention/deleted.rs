//! What deleted webhooks left: nobody can see it any more, and nobody waits for it to go.

use std::time::Duration;

use sea_orm::{ConnectionTrait, QueryResult};

use super::{MAX_READ, Round, Run, Stop, What, steps};
use crate::{clock, store::sql::Sql, webhook::Timestamp};

/// A deleted webhook is left alone for so long: other nodes may still publish to it by what they knew a moment ago.
const SETTLED: Duration = Duration::from_secs(60);
/// After so long in one round, the rest is left to the next: what is old is not to wait for it.
const TURN: Duration = Duration::from_secs(60);

impl Round<'_> {
    /// Removes webhooks that were deleted, with all that they left.
    pub(super) async fn remove_deleted(&self, now: Timestamp) -> Result<(), Stop> {
        let began = clock::stopwatch();
        for webhook_id in self.deleted(now.before(SETTLED)).await? {
            loop {
                let left = self.left_of(&webhook_id).await?;
                if left.is_empty() {
                    break;
                }
                for step in steps(&left, self.step.most) {
                    let run = Run { webhook_id: &webhook_id, first: &step[0].0, last: &step[step.len() - 1].0 };
                    self.remove(What::Deleted, &[run]).await?;
                }
                if began.elapsed() >= TURN {
                    return Ok(());
                }
            }
            self.forget(&webhook_id).await?;
        }
        Ok(())
    }

    /// Some of the webhooks that were deleted before `settled`.
    async fn deleted(&self, settled: Timestamp) -> Result<Vec<String>, Stop> {
        let mut sql = Sql::new("SELECT id FROM webhooks WHERE deleted_at_ms < ");
        sql.value(settled.millis()).text(" ORDER BY deleted_at_ms LIMIT ").value(MAX_READ);
        Ok(self.read(sql).await?.iter().map(|row| row.try_get_by_index(0)).collect::<Result<_, _>>()?)
    }

    /// The first deliveries of a webhook that nobody has leased, each with how many rows it is.
    async fn left_of(&self, webhook_id: &str) -> Result<Vec<(String, usize)>, Stop> {
        let mut sql = Sql::new("SELECT id, attempts FROM deliveries WHERE webhook_id = ");
        sql.value(webhook_id).text(" AND lease_node IS NULL ORDER BY id LIMIT ").value(MAX_READ);
        let found = self.read(sql).await?;
        let rows = found.iter().map(QueryResult::try_get_many_by_index);
        let rows = rows.collect::<Result<Vec<(String, i32)>, _>>()?;
        Ok(rows.into_iter().map(|(id, attempts)| (id, super::weight(attempts))).collect())
    }

    /// Removes a webhook itself, unless an attempt is on the wire, or its node is gone and the lease will be rescued.
    async fn forget(&self, webhook_id: &str) -> Result<(), Stop> {
        let transaction = self.begin().await?;
        let backend = transaction.get_database_backend();
        let mut left = Sql::new("SELECT 1 FROM deliveries WHERE webhook_id = ");
        left.value(webhook_id).text(" LIMIT 1");
        if transaction.query_one_raw(left.build(backend)).await?.is_some() {
            return Ok(());
        }
        for statement in ["DELETE FROM delivery_counts WHERE webhook_id = ", "DELETE FROM webhooks WHERE id = "] {
            let mut sql = Sql::new(statement);
            sql.value(webhook_id);
            transaction.execute_raw(sql.build(backend)).await?;
        }
        Ok(transaction.commit().await?)
    }
}
