//! What deleted webhooks left: nobody can see it any more, and nobody waits for it to go.

use std::time::Duration;

use sea_orm::{ConnectionTrait, QueryResult};

use super::{MAX_READ, Round, Run, Step, Stop, What, steps, weight};
use crate::{
    clock,
    store::{Error, Store, sql::Sql},
    webhook::Timestamp,
};

/// A deleted webhook is left alone for so long: other nodes may still publish to it by what they knew a moment ago.
const SETTLED: Duration = Duration::from_secs(60);
/// Nothing is removed for so many times as long as a step took: nobody waits for it to go.
const REST: u32 = 8;
/// Identifies, among PostgreSQL's advisory locks, the one of whoever removes this.
const LOCK: i64 = 0x736b_7764;

impl Store {
    /// Removes webhooks that were deleted, with all that they left.
    pub async fn remove_deleted(&self) -> Result<(), Error> {
        let round = Round::new(self);
        let round = Round { step: Step { rest: REST, ..round.step }, lock: LOCK, ..round };
        match round.remove_deleted(clock::now().before(SETTLED)).await {
            Ok(()) | Err(Stop::Elsewhere) => Ok(()),
            Err(Stop::Failed(error)) => Err(error),
        }
    }
}

impl Round<'_> {
    async fn remove_deleted(&self, settled: Timestamp) -> Result<(), Stop> {
        if self.waits_for_parts(settled).await? {
            return Ok(());
        }
        for webhook_id in self.deleted(settled).await? {
            let mut after = String::new();
            loop {
                let left = self.left_of(&webhook_id, &after).await?;
                let Some((last, _)) = left.last() else { break };
                for step in steps(&left, self.step.most) {
                    let run = Run { webhook_id: &webhook_id, first: &step[0].0, last: &step[step.len() - 1].0 };
                    self.remove(What::Deleted, &[run]).await?;
                }
                after.clone_from(last);
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

    /// The next deliveries of a webhook, after one, that nobody has leased, each with how many rows it is.
    async fn left_of(&self, webhook_id: &str, after: &str) -> Result<Vec<(String, usize)>, Stop> {
        let mut sql = Sql::new("SELECT id, attempts FROM deliveries WHERE webhook_id = ");
        sql.value(webhook_id).text(" AND id > ").value(after);
        sql.text(" AND lease_node IS NULL ORDER BY id LIMIT ").value(MAX_READ);
        let found = self.read(sql).await?;
        let rows = found.iter().map(QueryResult::try_get_many_by_index);
        let rows = rows.collect::<Result<Vec<(String, i32)>, _>>()?;
        Ok(rows.into_iter().map(|(id, attempts)| (id, weight(attempts))).collect())
    }

    /// Removes a webhook itself, unless an attempt is on the wire, or its node is gone and the lease will be rescued.
    async fn forget(&self, webhook_id: &str) -> Result<(), Stop> {
        let mut left = Sql::new("SELECT 1 FROM deliveries WHERE webhook_id = ");
        left.value(webhook_id).text(" LIMIT 1");
        if !self.read(left).await?.is_empty() {
            return Ok(());
        }
        self.step(async {
            let transaction = self.begin().await?;
            for statement in ["DELETE FROM delivery_counts WHERE webhook_id = ", "DELETE FROM webhooks WHERE id = "] {
                let mut sql = Sql::new(statement);
                sql.value(webhook_id);
                transaction.execute_raw(sql.build(transaction.get_database_backend())).await?;
            }
            Ok(transaction.commit().await?)
        })
        .await
    }
}
