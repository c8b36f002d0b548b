//! What deleted webhooks left: nobody can see it any more, and nobody waits for it to go.

use std::time::Duration;

use sea_orm::{ConnectionTrait, QueryResult};

use super::{MAX_READ, Round, Step, Stop, What, weight};
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

/// What has an index of its own: its condition, and the order of the index behind the webhook.
struct Part {
    literal: &'static str,
    columns: &'static str,
}

const PENDING: Part = Part { literal: "status = 'pending'", columns: "event_type, id" };
const ENDED: Part = Part { literal: "status <> 'pending'", columns: "event_type, status, id" };

/// A delivery that is left.
struct Left {
    event_type: String,
    status: String,
    id: String,
    attempts: i32,
}

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
            for part in [PENDING, ENDED] {
                let mut after = None;
                loop {
                    let left = self.left_of(&webhook_id, &part, after.as_ref()).await?;
                    let due: Vec<(&str, usize)> = left.iter().map(|left| (&*left.id, weight(left.attempts))).collect();
                    self.remove(What::Deleted(&webhook_id), &due).await?;
                    let Some(last) = left.into_iter().next_back() else { break };
                    after = Some(last);
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

    /// The next deliveries of a webhook, after one, that nobody has leased.
    async fn left_of(&self, webhook_id: &str, part: &Part, after: Option<&Left>) -> Result<Vec<Left>, Stop> {
        let Part { literal, columns } = part;
        let mut sql = Sql::new("SELECT event_type, status, id, attempts FROM deliveries WHERE webhook_id = ");
        sql.value(webhook_id).text(&format!(" AND {literal} AND lease_node IS NULL"));
        // What was removed stays in PostgreSQL's index until it is vacuumed, and is not gone through once more.
        if let Some(Left { event_type, status, id, .. }) = after {
            let place = columns.split(", ").map(|column| match column {
                "event_type" => event_type,
                "status" => status,
                _ => id,
            });
            sql.text(&format!(" AND ({columns}) > ")).row(place.map(|value| value.as_str().into()));
        }
        sql.text(&format!(" ORDER BY {columns} LIMIT ")).value(MAX_READ);
        let found = self.read(sql).await?;
        let left = |row: &QueryResult| {
            let (event_type, status, id, attempts) = row.try_get_many_by_index()?;
            Ok(Left { event_type, status, id, attempts })
        };
        found.iter().map(left).collect()
    }

    /// Removes a webhook itself, unless an attempt is on the wire, or its node is gone and the lease will be rescued.
    async fn forget(&self, webhook_id: &str) -> Result<(), Stop> {
        // In one statement: what was pending may just have ended.
        let mut left = Sql::new("SELECT 1 WHERE");
        for (index, Part { literal, .. }) in [PENDING, ENDED].iter().enumerate() {
            left.text(if index > 0 { " OR" } else { "" }).text(" EXISTS (SELECT 1 FROM deliveries WHERE webhook_id = ");
            left.value(webhook_id).text(&format!(" AND {literal})"));
        }
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
