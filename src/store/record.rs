//! Results of attempts, many in one commit, each only while its lease holds.

use std::{collections::HashSet, sync::Arc};

use sea_orm::{ConnectionTrait, DbBackend};

use super::{
    Error, Store,
    counts::Deltas,
    log::{Entry, Log},
    rows::{Column, Rows, int, int_or_null, text, text_or_null},
    waiting::Waiting,
    writer::{BYTES_PER_ITEM, Write},
};
use crate::webhook::{Attempt, ChangeKind, DeliveryStatus, Event, Tenant, Timestamp, Transition};

const RESULTS: &[Column] = &[
    text("webhook_id"),
    text("id"),
    text("node"),
    int("attempt"),
    text("status"),
    int_or_null("next_attempt_at_ms"),
    int_or_null("status_code"),
    int_or_null("response_time_ms"),
    text_or_null("last_error"),
    int("last_attempt_at_ms"),
    text_or_null("response"),
];
/// Each only if this node still has the lease of that very attempt. As in [`super::leases::RELEASE`], the state is left to
/// the lease, which only what is pending has: PostgreSQL keeps a plan from when all indexes cost the same, and knowing the
/// state it could go through the one of all that are pending.
pub(super) const UPDATE: &str = "UPDATE deliveries SET status = rows.status, \
    next_attempt_at_ms = rows.next_attempt_at_ms, lease_node = NULL, lease_expires_at_ms = NULL, lost_leases = 0, \
    status_code = rows.status_code, response_time_ms = rows.response_time_ms, last_error = rows.last_error, \
    last_attempt_at_ms = rows.last_attempt_at_ms, response = rows.response FROM {rows} \
    WHERE deliveries.webhook_id = rows.webhook_id AND deliveries.id = rows.id \
    AND deliveries.attempts = rows.attempt AND deliveries.lease_node = rows.node";

const LEASES: &[Column] = &[text("webhook_id"), text("id"), text("node"), int("attempt")];
const HOLDS: &str = "SELECT deliveries.id FROM {rows} JOIN deliveries \
    ON deliveries.webhook_id = rows.webhook_id AND deliveries.id = rows.id \
    AND deliveries.attempts = rows.attempt AND deliveries.lease_node = rows.node";

pub(super) const ATTEMPTS: &[Column] = &[
    text("delivery_id"),
    int("number"),
    int("started_at_ms"),
    int("duration_ms"),
    int_or_null("status_code"),
    text_or_null("response"),
    text("error"),
];
/// An attempt that was interrupted and granted again keeps its first entry's place.
pub(super) const INSERT_ATTEMPTS: &str = "INSERT INTO attempts (delivery_id, number, started_at_ms, duration_ms, \
    status_code, response, error) \
    SELECT delivery_id, number, started_at_ms, duration_ms, status_code, response, error FROM {rows} WHERE TRUE \
    ON CONFLICT (delivery_id, number) DO UPDATE SET started_at_ms = excluded.started_at_ms, \
    duration_ms = excluded.duration_ms, status_code = excluded.status_code, response = excluded.response, \
    error = excluded.error";

/// An attempt that ended, and what `decide` made of it.
#[derive(Debug)]
pub struct Finished {
    /// Whose delivery it is.
    pub tenant: Tenant,
    /// Where it goes.
    pub webhook_id: Arc<str>,
    /// Its id.
    pub delivery_id: String,
    /// What was sent.
    pub event: Arc<Event>,
    /// What happened.
    pub attempt: Attempt,
    /// The new state.
    pub transition: Transition,
    /// When it ended.
    pub ended_at: Timestamp,
}

impl Store {
    /// Records the end of an attempt; false when the lease was lost, in which case nothing is recorded.
    pub async fn record(&self, finished: Arc<Finished>) -> Result<bool, Error> {
        self.writer()?.submit(|answer| Write::Finish(finished, answer)).await
    }

    /// The ids of those deliveries whose leases this node still has.
    pub(super) async fn holds(&self, finished: &[&Finished]) -> Result<HashSet<String>, Error> {
        let connection = &self.0.engine_write;
        let mut rows = Rows::new(connection.get_database_backend(), LEASES);
        for finished in finished {
            let (webhook_id, node) = (&*finished.webhook_id, self.0.node.as_str());
            rows.push([webhook_id.into(), (&finished.delivery_id).into(), node.into(), finished.attempt.number.into()]);
        }
        let mut holds = HashSet::new();
        for statement in rows.statements(HOLDS) {
            for row in self.looked_up(async { Ok(connection.query_all_raw(statement).await?) }).await? {
                holds.insert(row.try_get_by_index::<String>(0)?);
            }
        }
        Ok(holds)
    }
}

impl Finished {
    fn status_code(&self) -> Option<u16> {
        self.attempt.answer.as_ref().map(|answer| answer.status_code)
    }

    fn response_time_ms(&self) -> Option<i32> {
        self.attempt.answer.as_ref().map(|_| self.attempt.duration_ms)
    }

    fn next_attempt_at_ms(&self) -> Option<i64> {
        self.transition.next_attempt_at.map(Timestamp::millis)
    }

    /// What came back; nothing is as good as an empty text.
    fn response(&self) -> Option<&str> {
        self.attempt.answer.as_ref().map(|answer| answer.body.as_str()).filter(|body| !body.is_empty())
    }

    /// How much it is to write: as much as one result, and more when the answer is long.
    pub(super) fn weight(&self) -> usize {
        (self.response().map_or(0, str::len) / BYTES_PER_ITEM).max(1)
    }

    /// That there will be another attempt.
    pub(super) fn waiting(&self) -> Option<Waiting> {
        self.transition.next_attempt_at.map(|due_at| Waiting {
            webhook_id: Arc::clone(&self.webhook_id),
            organization: Arc::clone(self.tenant.shared_organization()),
            due_at,
        })
    }

    /// Counts the attempt, and says that it was made.
    pub(super) fn tell<'a>(&'a self, deltas: &mut Deltas<'a>, log: &mut Log) {
        let (webhook_id, event_type, status) = (&*self.webhook_id, &*self.event.event_type, self.transition.status);
        if status != DeliveryStatus::Pending {
            deltas.add(webhook_id, event_type, DeliveryStatus::Pending, -1);
            deltas.add(webhook_id, event_type, status, 1);
        }
        deltas.attempted(webhook_id, event_type, status, self.attempt.started_at);
        let entry = Entry {
            kind: ChangeKind::Attempted.as_str().into(),
            webhook_id: webhook_id.into(),
            delivery_id: self.delivery_id.as_str().into(),
            event_type: event_type.into(),
            status: status.as_str().into(),
            attempts: self.attempt.number,
            occurred_at_ms: self.ended_at.millis(),
            status_code: self.status_code(),
            response_time_ms: self.response_time_ms(),
            last_error: self.attempt.error.as_deref().map(Into::into),
            next_attempt_at_ms: self.next_attempt_at_ms(),
        };
        log.push(&self.tenant, &entry);
    }
}

/// The rows for [`UPDATE`].
pub(super) fn results(backend: DbBackend, node: &str, finished: &[&Finished]) -> Rows {
    let mut rows = Rows::new(backend, RESULTS);
    for finished in finished {
        let attempt = &finished.attempt;
        rows.push([
            (&finished.webhook_id).into(),
            (&finished.delivery_id).into(),
            node.into(),
            attempt.number.into(),
            finished.transition.status.as_str().into(),
            finished.next_attempt_at_ms().into(),
            finished.status_code().map(i32::from).into(),
            finished.response_time_ms().into(),
            attempt.error.as_deref().into(),
            attempt.started_at.millis().into(),
            // What came back with a failure stands with its attempt.
            finished.response().filter(|_| attempt.error.is_none()).into(),
        ]);
    }
    rows
}

/// The rows for [`INSERT_ATTEMPTS`]: the attempts that failed.
pub(super) fn failures(backend: DbBackend, finished: &[&Finished]) -> Rows {
    let mut rows = Rows::new(backend, ATTEMPTS);
    for finished in finished {
        let attempt = &finished.attempt;
        if let Some(error) = &attempt.error {
            rows.push([
                (&finished.delivery_id).into(),
                attempt.number.into(),
                attempt.started_at.millis().into(),
                attempt.duration_ms.into(),
                finished.status_code().map(i32::from).into(),
                finished.response().into(),
                error.into(),
            ]);
        }
    }
    rows
}
