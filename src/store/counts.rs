//! Counts kept as deliveries change, so that nothing is counted when somebody asks.

use std::collections::BTreeMap;

use sea_orm::{ColumnTrait, DbBackend, EntityTrait, QueryFilter};

use super::{
    Error, Store,
    entity::delivery_count,
    rows::{Column, Rows, int, int_or_null, text},
};
use crate::webhook::{DeliveryStatus, Timestamp};

/// Deliveries of a webhook by state, as many as there ever were.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Stats {
    /// All of them, also those that retention removed.
    pub total: i64,
    /// Those a receiver accepted.
    pub successful: i64,
    /// Those that ended without.
    pub failed: i64,
    /// When the last attempt was made.
    pub last_attempt_at: Option<Timestamp>,
}

const COLUMNS: &[Column] =
    &[text("webhook_id"), text("event_type"), text("status"), int("total"), int_or_null("last_attempt_at_ms")];
pub(super) const ADD: &str = "INSERT INTO delivery_counts (webhook_id, event_type, status, total, last_attempt_at_ms) \
    SELECT webhook_id, event_type, status, total, last_attempt_at_ms FROM {rows}{ordered} WHERE TRUE \
    ON CONFLICT (webhook_id, event_type, status) DO UPDATE SET total = delivery_counts.total + excluded.total, \
    last_attempt_at_ms = CASE WHEN delivery_counts.last_attempt_at_ms IS NULL \
    OR excluded.last_attempt_at_ms > delivery_counts.last_attempt_at_ms \
    THEN excluded.last_attempt_at_ms ELSE delivery_counts.last_attempt_at_ms END";

/// Changes of counts, added up before they are written.
#[derive(Default)]
pub(super) struct Deltas<'a>(BTreeMap<(&'a str, &'a str, DeliveryStatus), (i64, Option<i64>)>);

impl<'a> Deltas<'a> {
    /// Counts `by` more deliveries of a webhook, a type and a state.
    pub(super) fn add(&mut self, webhook_id: &'a str, event_type: &'a str, status: DeliveryStatus, by: i64) {
        self.0.entry((webhook_id, event_type, status)).or_default().0 += by;
    }

    /// Notes an attempt, which left its delivery in `status`.
    pub(super) fn attempted(
        &mut self,
        webhook_id: &'a str,
        event_type: &'a str,
        status: DeliveryStatus,
        at: Timestamp,
    ) {
        let last = &mut self.0.entry((webhook_id, event_type, status)).or_default().1;
        *last = (*last).max(Some(at.millis()));
    }

    /// The rows for [`ADD`].
    pub(super) fn rows(self, backend: DbBackend) -> Rows {
        let mut rows = Rows::new(backend, COLUMNS);
        for ((webhook_id, event_type, status), (total, last)) in self.0 {
            rows.push([webhook_id.into(), event_type.into(), status.as_str().into(), total.into(), last.into()]);
        }
        rows
    }
}

impl Store {
    /// The statistics of a webhook.
    pub async fn stats(&self, webhook_id: &str) -> Result<Stats, Error> {
        let mut stats = Stats::default();
        for row in self.counts(webhook_id).await? {
            let ever = row.total + row.removed;
            stats.total += ever;
            match DeliveryStatus::parse(&row.status) {
                Some(DeliveryStatus::Success) => stats.successful += ever,
                Some(DeliveryStatus::Failed) => stats.failed += ever,
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
