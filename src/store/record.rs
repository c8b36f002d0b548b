//! Results of attempts, many in one commit, each only while its lease holds.

use std::collections::HashSet;

use sea_orm::{ConnectionTrait, DatabaseTransaction, EntityTrait, Set, Value, sea_query::OnConflict};

use super::{
    Error, Store, changes,
    counts::Deltas,
    entity::{attempt, change},
    ordered,
    sql::Sql,
};
use crate::webhook::{Attempt, ChangeKind, DeliveryStatus, Tenant, Timestamp, Transition};

/// An attempt that ended, and what `decide` made of it.
#[derive(Debug, Clone)]
pub struct Finished {
    /// Whose delivery it is.
    pub tenant: Tenant,
    /// Where it goes.
    pub webhook_id: String,
    /// Its id.
    pub delivery_id: String,
    /// Event type.
    pub event_type: String,
    /// What happened.
    pub attempt: Attempt,
    /// The new state.
    pub transition: Transition,
    /// When it ended.
    pub ended_at: Timestamp,
}

impl Store {
    /// Records the end of an attempt; false when the lease was lost, in which case nothing is recorded.
    pub async fn record(&self, finished: Finished) -> Result<bool, Error> {
        self.0.recorder.get().ok_or(Error::Closed)?.submit(finished).await
    }

    pub(super) async fn record_batch(self, batch: Vec<Finished>) -> Result<Vec<bool>, Error> {
        let transaction = self.write().await?;
        let statement = self.update(&batch).build(transaction.get_database_backend());
        let mut recorded = HashSet::with_capacity(batch.len());
        for row in transaction.query_all_raw(statement).await? {
            recorded.insert(row.try_get_by_index::<String>(0)?);
        }
        let held: Vec<&Finished> = batch.iter().filter(|finished| recorded.contains(&finished.delivery_id)).collect();
        if !held.is_empty() {
            let mut deltas = Deltas::default();
            for finished in &held {
                let (webhook_id, event_type) = (&finished.webhook_id, &finished.event_type);
                let status = finished.transition.status;
                if status != DeliveryStatus::Pending {
                    deltas.add(webhook_id, event_type, DeliveryStatus::Pending, -1);
                    deltas.add(webhook_id, event_type, status, 1);
                }
                deltas.attempted(webhook_id, event_type, status, finished.attempt.started_at);
            }
            insert_attempts(&transaction, held.iter().map(|finished| attempt_row(finished)).collect()).await?;
            ordered(&transaction).await?;
            deltas.write(&transaction).await?;
            changes::insert(&transaction, held.iter().map(|finished| change_row(finished)).collect()).await?;
        }
        transaction.commit().await?;
        self.0.feed.announce();
        Ok(batch.iter().map(|finished| recorded.contains(&finished.delivery_id)).collect())
    }

    /// Updates the deliveries of a batch, each only if this node still has the lease of that very attempt.
    fn update(&self, batch: &[Finished]) -> Sql {
        let mut sql = Sql::new(
            "WITH done (webhook_id, delivery_id, attempt, status, next_attempt_at_ms, status_code, response_time_ms, \
             last_error, last_attempt_at_ms) AS (VALUES ",
        );
        for (index, finished) in batch.iter().enumerate() {
            sql.text(if index > 0 { "," } else { "" });
            let attempt = &finished.attempt;
            sql.row([
                Value::from(finished.webhook_id.as_str()),
                finished.delivery_id.as_str().into(),
                attempt.number.into(),
                finished.transition.status.as_str().into(),
                finished.transition.next_attempt_at.map(Timestamp::millis).into(),
                attempt.answer.as_ref().map(|answer| i32::from(answer.status_code)).into(),
                attempt.answer.as_ref().map(|_| attempt.duration_ms).into(),
                attempt.error.clone().into(),
                attempt.started_at.millis().into(),
            ]);
        }
        sql.text(
            ") UPDATE deliveries SET status = done.status, next_attempt_at_ms = done.next_attempt_at_ms, \
             lease_node = NULL, lease_expires_at_ms = NULL, lost_leases = 0, status_code = done.status_code, \
             response_time_ms = done.response_time_ms, last_error = done.last_error, \
             last_attempt_at_ms = done.last_attempt_at_ms FROM done \
             WHERE deliveries.webhook_id = done.webhook_id AND deliveries.id = done.delivery_id \
             AND deliveries.attempts = done.attempt AND deliveries.lease_node = ",
        );
        sql.value(self.0.node.as_str()).text(" RETURNING id");
        sql
    }
}

/// Adds attempts to the log. An attempt that was interrupted and granted again keeps its first entry's place.
pub(super) async fn insert_attempts(
    transaction: &DatabaseTransaction,
    rows: Vec<attempt::ActiveModel>,
) -> Result<(), Error> {
    use attempt::Column;
    let latest = OnConflict::columns([Column::DeliveryId, Column::Number])
        .update_columns([Column::StartedAtMs, Column::DurationMs, Column::StatusCode, Column::Response, Column::Error])
        .to_owned();
    attempt::Entity::insert_many(rows).on_conflict(latest).exec_without_returning(transaction).await?;
    Ok(())
}

fn attempt_row(finished: &Finished) -> attempt::ActiveModel {
    let attempt = &finished.attempt;
    attempt::ActiveModel {
        delivery_id: Set(finished.delivery_id.clone()),
        number: Set(attempt.number),
        started_at_ms: Set(attempt.started_at.millis()),
        duration_ms: Set(attempt.duration_ms),
        status_code: Set(attempt.answer.as_ref().map(|answer| i32::from(answer.status_code))),
        response: Set(attempt.answer.as_ref().map(|answer| answer.body.clone())),
        error: Set(attempt.error.clone()),
    }
}

fn change_row(finished: &Finished) -> change::ActiveModel {
    let attempt = &finished.attempt;
    change::ActiveModel {
        organization: Set(finished.tenant.organization().to_owned()),
        environment: Set(finished.tenant.environment().as_str().to_owned()),
        webhook_id: Set(finished.webhook_id.clone()),
        delivery_id: Set(finished.delivery_id.clone()),
        event_type: Set(finished.event_type.clone()),
        kind: Set(ChangeKind::Attempted.as_str().to_owned()),
        status: Set(finished.transition.status.as_str().to_owned()),
        attempts: Set(attempt.number),
        status_code: Set(attempt.answer.as_ref().map(|answer| i32::from(answer.status_code))),
        response_time_ms: Set(attempt.answer.as_ref().map(|_| attempt.duration_ms)),
        last_error: Set(attempt.error.clone()),
        next_attempt_at_ms: Set(finished.transition.next_attempt_at.map(Timestamp::millis)),
        occurred_at_ms: Set(finished.ended_at.millis()),
        ..Default::default()
    }
}
