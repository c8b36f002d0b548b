//! Rescue: the only place where a lease that has expired comes back.

use std::time::Duration;

use sea_orm::{ColumnTrait, ConnectionTrait, DatabaseTransaction, EntityTrait, QueryFilter, QueryOrder, QuerySelect};

use super::{
    Error, Store,
    counts::Deltas,
    entity::delivery,
    keys::tenant,
    log::{Entry, Log},
    record,
    rows::{Cell, Column, Rows, int, int_or_null, text},
    script::Script,
    waiting::Waiting,
};
use crate::{
    clock::{self, Seldom},
    webhook::{ChangeKind, DeliveryStatus, Plan, RetrySchedule, Timestamp, rescue},
};

/// One rescue takes at most this many deliveries; the rest is in the next.
const MAX_RESCUE: u64 = 256;

const RESCUED: &[Column] = &[
    text("webhook_id"),
    text("id"),
    text("status"),
    int_or_null("next_attempt_at_ms"),
    int("lost_leases"),
    text("last_error"),
    int("last_attempt_at_ms"),
];
const RESCUE: &str = "UPDATE deliveries SET status = rows.status, next_attempt_at_ms = rows.next_attempt_at_ms, \
    lease_node = NULL, lease_expires_at_ms = NULL, lost_leases = rows.lost_leases, last_error = rows.last_error, \
    last_attempt_at_ms = rows.last_attempt_at_ms \
    FROM {rows} WHERE deliveries.webhook_id = rows.webhook_id AND deliveries.id = rows.id";
/// What the log of a delivery says of an attempt whose node died.
const LOST: &str = "The attempt was interrupted";
/// That rows are broken is said once in this time.
static OF_NO_TENANT: Seldom = Seldom::new(Duration::from_secs(1));

impl Store {
    /// Brings back what a process that is gone had leased, stores what it had accepted, and files what that logged. On SQLite no
    /// other node can hold a lease, so that is all; on PostgreSQL leases of others run out in their own time.
    pub async fn rescue_all_at_start(&self, schedule: &RetrySchedule, lease: Duration) -> Result<usize, Error> {
        let mut total = 0;
        while self.sqlite() {
            match self.rescue(true, schedule).await? {
                0 => break,
                rescued => total += rescued,
            }
        }
        self.store_kept_parts_at_start(lease).await?;
        self.file_changes_at_start().await;
        Ok(total)
    }

    /// Brings back deliveries whose lease has expired, or all leased ones when `all`: on SQLite no other node can hold
    /// a lease, so those found at the start are from a process that is gone. Answers how many there were.
    pub async fn rescue(&self, all: bool, schedule: &RetrySchedule) -> Result<usize, Error> {
        self.heard(self.try_rescue(all, schedule)).await
    }

    async fn try_rescue(&self, all: bool, schedule: &RetrySchedule) -> Result<usize, Error> {
        let now = clock::now();
        let transaction = self.write_by(&self.0.engine_write).await?;
        let mut find = delivery::Entity::find().filter(delivery::Column::LeaseExpiresAtMs.is_not_null());
        if !all {
            find = find.filter(delivery::Column::LeaseExpiresAtMs.lte(now.millis()));
        }
        if !self.sqlite() {
            find = find
                .lock_with_behavior(sea_orm::sea_query::LockType::Update, sea_orm::sea_query::LockBehavior::SkipLocked);
        }
        let mut rows =
            find.order_by_asc(delivery::Column::LeaseExpiresAtMs).limit(MAX_RESCUE).all(&transaction).await?;
        if rows.is_empty() {
            return Ok(0);
        }
        self.write_rescued(&transaction, &mut rows, schedule, now).await?;
        transaction.commit().await?;
        self.0.feed.announce();
        self.metrics().taken_over(rows.len());
        for row in &rows {
            if let Some(status) = DeliveryStatus::parse(&row.status) {
                self.count_end(status, Plan::of(row.once));
            }
        }
        self.0.handoff.tell(rows.iter().filter_map(Waiting::of));
        Ok(rows.len())
    }

    async fn write_rescued(
        &self,
        transaction: &DatabaseTransaction,
        rows: &mut [delivery::Model],
        schedule: &RetrySchedule,
        now: Timestamp,
    ) -> Result<(), Error> {
        let backend = transaction.get_database_backend();
        let (mut deltas, mut log) = (Deltas::default(), Log::default());
        let (mut rescued, mut attempts) = (Rows::new(backend, RESCUED), Rows::new(backend, record::ATTEMPTS));
        let mut started = Vec::with_capacity(rows.len());
        for row in &mut *rows {
            let lost = row.lost_leases + 1;
            let transition = rescue(lost, row.attempts, Plan::of(row.once), schedule, now);
            // When it began is not known: before its lease ended.
            let ended_at_ms = row.lease_expires_at_ms.unwrap_or_default().min(now.millis()).max(row.created_at_ms);
            row.last_attempt_at_ms = Some(ended_at_ms);
            started.push((transition.status, ended_at_ms));
            row.status = transition.status.as_str().to_owned();
            row.next_attempt_at_ms = transition.next_attempt_at.map(Timestamp::millis);
            row.lost_leases = lost;
            row.last_error = Some(LOST.to_owned());
        }
        for (row, (status, started_at_ms)) in rows.iter().zip(started) {
            let next = row.next_attempt_at_ms.into();
            let (webhook_id, id) = (&row.webhook_id, &row.id);
            rescued.push([
                webhook_id.into(),
                id.into(),
                (&row.status).into(),
                next,
                row.lost_leases.into(),
                LOST.into(),
                started_at_ms.into(),
            ]);
            attempts.push([
                id.into(),
                row.attempts.into(),
                started_at_ms.into(),
                0.into(),
                Cell::Null,
                Cell::Null,
                LOST.into(),
            ]);
            deltas.attempted(webhook_id, &row.event_type, status, Timestamp::from_millis(started_at_ms));
            if status != DeliveryStatus::Pending {
                deltas.add(webhook_id, &row.event_type, DeliveryStatus::Pending, -1);
                deltas.add(webhook_id, &row.event_type, status, 1);
            }
            // One that is of nobody, whose change nobody may see, is not to hold up all others.
            match tenant(&row.organization, &row.environment) {
                Ok(tenant) => log.push(&tenant, &Entry::of(row, ChangeKind::Attempted, now)),
                Err(error) => {
                    if let Some(count) = OF_NO_TENANT.reasons() {
                        tracing::error!(delivery = id, %error, count, "deliveries of no tenant are taken over unseen");
                    }
                }
            }
        }
        Script::default().with(RESCUE, rescued).with(record::INSERT_ATTEMPTS, attempts).run(transaction).await?;
        Script::default().tell(backend, deltas, log)?.run(transaction).await?;
        Ok(())
    }
}
