//! Counts kept as deliveries change, so that nothing is counted when somebody asks.

use std::collections::BTreeMap;

use sea_orm::{ColumnTrait, ConnectionTrait, DatabaseTransaction, EntityTrait, QueryFilter, Value};

use super::{Error, Store, entity::delivery_count, sql::Sql};
use crate::webhook::{DeliveryStatus, Timestamp};

/// Deliveries of a webhook by state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Stats {
    /// All of them.
    pub total: i64,
    /// Those a receiver accepted.
    pub successful: i64,
    /// Those that ended without.
    pub failed: i64,
    /// When the last attempt was made.
    pub last_attempt_at: Option<Timestamp>,
}

/// One statement writes at most this many counts, since a database takes only so many values in one.
const MAX_ROWS: usize = 1_000;

/// Changes of counts, added up before they are written.
#[derive(Default)]
pub(super) struct Deltas(BTreeMap<(String, String, DeliveryStatus), (i64, Option<i64>)>);

impl Deltas {
    /// Counts `by` more deliveries of a webhook, a type and a state.
    pub(super) fn add(&mut self, webhook_id: &str, event_type: &str, status: DeliveryStatus, by: i64) {
        self.entry(webhook_id, event_type, status).0 += by;
    }

    /// Notes an attempt, which left its delivery in `status`.
    pub(super) fn attempted(&mut self, webhook_id: &str, event_type: &str, status: DeliveryStatus, at: Timestamp) {
        let last = &mut self.entry(webhook_id, event_type, status).1;
        *last = (*last).max(Some(at.millis()));
    }

    /// Writes them; the transaction must be [`super::ordered`].
    pub(super) async fn write(self, transaction: &DatabaseTransaction) -> Result<(), Error> {
        let mut rows = self.0.into_iter().peekable();
        while rows.peek().is_some() {
            let mut sql = Sql::new(
                "INSERT INTO delivery_counts (webhook_id, event_type, status, total, last_attempt_at_ms) VALUES ",
            );
            for (index, ((webhook_id, event_type, status), (total, last))) in rows.by_ref().take(MAX_ROWS).enumerate() {
                sql.text(if index > 0 { "," } else { "" });
                sql.row([
                    webhook_id.into(),
                    event_type.into(),
                    status.as_str().into(),
                    total.into(),
                    Value::from(last),
                ]);
            }
            sql.text(
                " ON CONFLICT (webhook_id, event_type, status) DO UPDATE SET \
                 total = delivery_counts.total + excluded.total, \
                 last_attempt_at_ms = CASE WHEN delivery_counts.last_attempt_at_ms IS NULL \
                 OR excluded.last_attempt_at_ms > delivery_counts.last_attempt_at_ms \
                 THEN excluded.last_attempt_at_ms ELSE delivery_counts.last_attempt_at_ms END",
            );
            transaction.execute_raw(sql.build(transaction.get_database_backend())).await?;
        }
        Ok(())
    }

    fn entry(&mut self, webhook_id: &str, event_type: &str, status: DeliveryStatus) -> &mut (i64, Option<i64>) {
        self.0.entry((webhook_id.to_owned(), event_type.to_owned(), status)).or_default()
    }
}

impl Store {
    /// The statistics of a webhook.
    pub async fn stats(&self, webhook_id: &str) -> Result<Stats, Error> {
        let mut stats = Stats::default();
        for row in self.counts(webhook_id).await? {
            stats.total += row.total;
            match DeliveryStatus::parse(&row.status) {
                Some(DeliveryStatus::Success) => stats.successful += row.total,
                Some(DeliveryStatus::Failed) => stats.failed += row.total,
                _ => {}
            }
            stats.last_attempt_at = stats.last_attempt_at.max(row.last_attempt_at_ms.map(Timestamp::from_millis));
        }
        Ok(stats)
    }

    /// The counts of a webhook: one row for each type and state it ever had.
    pub(super) async fn counts(&self, webhook_id: &str) -> Result<Vec<delivery_count::Model>, Error> {
        let rows = delivery_count::Entity::find().filter(delivery_count::Column::WebhookId.eq(webhook_id));
        Ok(rows.all(&self.0.read).await?)
    }
}
