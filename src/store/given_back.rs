//! What a node gives back when it stops, told to the others: by themselves they would find it as they look through all that
//! waits, see [`super::waiting`]. SQLite has no others.

use std::collections::HashMap;

use sea_orm::{ConnectionTrait, DatabaseTransaction};

use super::{
    Error, Store,
    leases::Release,
    revisions::GIVEN_BACK,
    rows::{Column, Rows, int, text},
    sql::Sql,
    waiting::Waiting,
};
use crate::webhook::Timestamp;

/// What so many nodes gave back last stays noted.
const KEPT: i64 = 16;

const WEBHOOKS: &[Column] = &[text("webhook_id"), text("organization"), int("due_at_ms")];
/// The last statement before the commit, as those of all that is counted in `revisions`.
const NOTE: &str = "WITH counted AS (UPDATE revisions SET number = number + 1 WHERE name = 'given_back' RETURNING number) \
    INSERT INTO given_back (number, webhook_id, organization, due_at_ms) \
    SELECT counted.number, rows.webhook_id, rows.organization, rows.due_at_ms FROM counted CROSS JOIN {rows}";

impl Store {
    /// Notes, in the transaction that gives them back, of which webhooks these are.
    pub(super) async fn note_given_back(
        &self,
        transaction: &DatabaseTransaction,
        releases: &[Release],
    ) -> Result<(), Error> {
        if self.sqlite() {
            return Ok(());
        }
        let mut webhooks = HashMap::new();
        releases.iter().for_each(|release| release.waiting().add_to(&mut webhooks));
        let mut rows = Rows::new(transaction.get_database_backend(), WEBHOOKS);
        for Waiting { webhook_id, organization, due_at } in webhooks.values() {
            rows.push([webhook_id.into(), organization.into(), due_at.millis().into()]);
        }
        for statement in rows.statements(NOTE) {
            transaction.execute_raw(statement).await?;
        }
        Ok(())
    }

    /// Tells the engine what was given back after one number and up to another.
    pub(super) async fn hear_of_given_back(&self, after: i64, upto: i64) -> Result<(), Error> {
        let mut sql = Sql::new("SELECT webhook_id, organization, due_at_ms FROM given_back WHERE number > ");
        sql.value(after).text(" AND number <= ").value(upto);
        let reader = &self.0.revisions_read;
        let mut given_back = Vec::new();
        for row in reader.query_all_raw(sql.build(reader.get_database_backend())).await? {
            let (webhook_id, organization, due_at_ms): (String, String, i64) = row.try_get_many_by_index()?;
            let (webhook_id, organization) = (webhook_id.into(), organization.into());
            given_back.push(Waiting { webhook_id, organization, due_at: Timestamp::from_millis(due_at_ms) });
        }
        self.0.handoff.tell(given_back);
        Ok(())
    }

    /// Removes the notes of what was given back long ago.
    pub(super) async fn forget_given_back(&self) -> Result<(), Error> {
        let mut sql = Sql::new("DELETE FROM given_back WHERE number <= (SELECT number FROM revisions WHERE name = ");
        sql.value(GIVEN_BACK).text(") - ").value(KEPT);
        self.run(sql).await.map(drop)
    }
}
