//! Accepting events: an event and its deliveries in one transaction, many publishers in one commit.

use std::{collections::HashMap, sync::Arc};

use sea_orm::DbBackend;
use tokio::sync::{mpsc, oneshot};

use super::{
    Error, Leased, Store,
    counts::Deltas,
    handoff::Handoff,
    idempotency::{Keep, Kept},
    leases::Lease,
    log::{Entry, Log},
    rows::{Column, Rows, int, int_or_null, text, text_or_null},
    targets::{Subscribers, Subscription},
    writer::Write,
};
use crate::{
    clock,
    webhook::{Attempt, ChangeKind, DeliveryStatus, Event, EventData, Plan, Tenant, Timestamp},
};

/// Publishes that wait for their commit may have this much data together; one more is refused with
/// [`Error::Overloaded`].
pub(super) const MAX_WAITING_BYTES: u32 = 64 * 1024 * 1024;
/// A publish counts as at least this much, which bounds how many wait.
const MIN_BYTES: u32 = MAX_WAITING_BYTES / 16_384;

const EVENTS: &[Column] = &[text("id"), text("event_type"), text("data"), int("created_at_ms")];
pub(super) const INSERT_EVENTS: &str = "INSERT INTO events (id, event_type, data, created_at_ms) \
    SELECT id, event_type, data, created_at_ms FROM {rows}";

const DELIVERIES: &[Column] = &[
    text("webhook_id"),
    text("id"),
    text("organization"),
    text("environment"),
    text("event_id"),
    text("event_type"),
    int("attempts"),
    int("once"),
    int_or_null("next_attempt_at_ms"),
    text_or_null("lease_node"),
    int_or_null("lease_expires_at_ms"),
    int("created_at_ms"),
];
pub(super) const INSERT_DELIVERIES: &str = "INSERT INTO deliveries (webhook_id, id, organization, environment, event_id, \
    event_type, status, attempts, granted, once, lost_leases, next_attempt_at_ms, lease_node, lease_expires_at_ms, \
    created_at_ms) \
    SELECT webhook_id, id, organization, environment, event_id, event_type, 'pending', attempts, FALSE, once = 1, 0, \
    next_attempt_at_ms, lease_node, lease_expires_at_ms, created_at_ms FROM {rows}";

/// An accepted event.
#[derive(Debug, Clone)]
pub struct Published {
    /// Id of the event.
    pub event_id: String,
    /// How many deliveries were made.
    pub deliveries: usize,
}

/// An event on its way into the database.
pub(super) struct Publish {
    tenant: Tenant,
    event_type: String,
    data: EventData,
    lease: Lease,
    /// For a test: its only delivery, whatever the subscriptions say.
    test: Option<Test>,
    /// For a named request.
    keep: Option<Keep<Published>>,
}

struct Test {
    webhook_id: Arc<str>,
    delivery_id: String,
    done: oneshot::Sender<Attempt>,
}

/// An event and its deliveries, about to be stored.
pub(super) struct Draft {
    tenant: Tenant,
    event: Arc<Event>,
    first_attempt_at: Timestamp,
    leased_until: Timestamp,
    plan: Plan,
    deliveries: Vec<NewDelivery>,
    done: Option<oneshot::Sender<Attempt>>,
    keep: Option<Keep<Published>>,
}

struct NewDelivery {
    id: String,
    webhook_id: Arc<str>,
    /// Whether this node, which had room for it, takes it on at once.
    leased: bool,
}

impl Store {
    /// Stores an event and a delivery for each active subscriber, and what `keep` keeps. What it answers is on disk.
    pub async fn publish(
        &self,
        tenant: Tenant,
        event_type: String,
        data: EventData,
        lease: Lease,
        keep: Option<Keep<Published>>,
    ) -> Result<Published, Error> {
        // Judged again in its turn; here, so that what is refused does not even queue.
        self.0.backlog.admit(tenant.organization(), 0)?;
        let bytes = u32::try_from(data.as_str().len()).unwrap_or(u32::MAX).clamp(MIN_BYTES, MAX_WAITING_BYTES);
        let _room = self.0.publishing.try_acquire_many(bytes).map_err(|_| Error::Overloaded)?;
        self.submit(Publish { tenant, event_type, data, lease, test: None, keep }).await
    }

    /// Stores a test event as a delivery of its own and has it attempted at once, whatever else is under way; answers
    /// with its id and the attempt.
    pub async fn publish_test(
        &self,
        tenant: Tenant,
        webhook_id: &str,
        event_type: String,
        data: EventData,
        lease: Lease,
    ) -> Result<(String, oneshot::Receiver<Attempt>), Error> {
        let (done, attempted) = oneshot::channel();
        let delivery_id = clock::new_id("del");
        let test = Test { webhook_id: webhook_id.into(), delivery_id: delivery_id.clone(), done };
        self.submit(Publish { tenant, event_type, data, lease, test: Some(test), keep: None }).await?;
        Ok((delivery_id, attempted))
    }

    async fn submit(&self, publish: Publish) -> Result<Published, Error> {
        self.writer()?.submit(|answer| Write::Publish(Box::new(publish), answer)).await
    }

    /// The rows of an event, with as many deliveries leased to this node as it has room for; refused when too much is
    /// pending.
    pub(super) fn draft_of(
        &self,
        publish: Publish,
        subscribers: &HashMap<Subscription, Subscribers>,
    ) -> Result<Draft, Error> {
        let subscription = publish.subscription();
        let Publish { tenant, event_type, data, lease, test, keep } = publish;
        let created_at = clock::now();
        let event = Arc::new(Event { id: clock::new_id("evt"), event_type, data, created_at });
        let bytes = event.data.as_str().len();
        let (deliveries, done) = match test {
            Some(Test { webhook_id, delivery_id, done }) => {
                (vec![NewDelivery { id: delivery_id, webhook_id, leased: true }], Some(done))
            }
            None => {
                let webhooks = subscribers.get(&subscription).cloned().unwrap_or_default();
                self.0.backlog.admit(tenant.organization(), webhooks.len())?;
                let new = webhooks.iter().map(|webhook_id| NewDelivery {
                    id: clock::new_id("del"),
                    webhook_id: Arc::clone(webhook_id),
                    leased: lease.first_wait.is_zero() && self.0.handoff.try_take(webhook_id, bytes),
                });
                (new.collect(), None)
            }
        };
        Ok(Draft {
            tenant,
            event,
            first_attempt_at: created_at.after(lease.first_wait),
            leased_until: created_at.after(lease.length),
            plan: if done.is_some() { Plan::Once } else { Plan::Schedule },
            deliveries,
            done,
            keep,
        })
    }
}

impl Publish {
    /// Whose subscribers it is for.
    pub(super) fn subscription(&self) -> Subscription {
        (self.tenant.clone(), self.event_type.clone())
    }
}

impl Draft {
    pub(super) fn published(&self) -> Published {
        Published { event_id: self.event.id.clone(), deliveries: self.deliveries.len() }
    }

    /// Whose backlog its deliveries are in, and how many; a test is in nobody's.
    pub(super) fn backlog(&self) -> (&str, usize) {
        (self.tenant.organization(), if self.done.is_some() { 0 } else { self.deliveries.len() })
    }

    /// What is to be kept of it.
    pub(super) fn kept(&self) -> Option<Kept<'_>> {
        self.keep.as_ref().map(|keep| keep.of(&self.published()))
    }

    /// Counts the deliveries, and says that they were made.
    pub(super) fn tell<'a>(&'a self, deltas: &mut Deltas<'a>, log: &mut Log) {
        let event_type = self.event.event_type.as_str();
        for new in &self.deliveries {
            deltas.add(&new.webhook_id, event_type, DeliveryStatus::Pending, 1);
            let entry = Entry {
                kind: ChangeKind::Created.as_str().into(),
                webhook_id: (&*new.webhook_id).into(),
                delivery_id: new.id.as_str().into(),
                event_type: event_type.into(),
                status: DeliveryStatus::Pending.as_str().into(),
                attempts: i32::from(new.leased),
                occurred_at_ms: self.event.created_at.millis(),
                status_code: None,
                response_time_ms: None,
                last_error: None,
                next_attempt_at_ms: (!new.leased).then(|| self.first_attempt_at.millis()),
            };
            log.push(&self.tenant, &entry);
        }
    }

    /// Hands what is leased to the engine; true when something waits in the database.
    pub(super) fn hand_over(self, ready: &mpsc::UnboundedSender<Leased>) -> bool {
        let Self { tenant, event, leased_until, plan, deliveries, mut done, .. } = self;
        let mut waiting = false;
        for NewDelivery { id, webhook_id, leased } in deliveries {
            waiting |= !leased;
            if leased {
                let _ = ready.send(Leased {
                    tenant: tenant.clone(),
                    webhook_id,
                    delivery_id: id,
                    event: Arc::clone(&event),
                    attempt: 1,
                    plan,
                    expires_at: leased_until,
                    done: done.take(),
                });
            }
        }
        waiting
    }

    /// Gives the places of what could not be stored back.
    pub(super) fn give_back(self, handoff: &Handoff) {
        if self.done.is_none() {
            let bytes = self.event.data.as_str().len();
            let held = self.deliveries.iter().filter(|new| new.leased);
            held.for_each(|new| handoff.let_go(&new.webhook_id, bytes));
        }
    }
}

/// The rows for [`INSERT_EVENTS`].
pub(super) fn events<'a>(backend: DbBackend, drafts: impl Iterator<Item = &'a Draft>) -> Rows {
    let mut rows = Rows::new(backend, EVENTS);
    for Draft { event, .. } in drafts {
        let Event { id, event_type, data, created_at } = &**event;
        rows.push([id.into(), event_type.into(), data.as_str().into(), created_at.millis().into()]);
    }
    rows
}

/// The rows for [`INSERT_DELIVERIES`].
pub(super) fn deliveries<'a>(backend: DbBackend, node: &str, drafts: impl Iterator<Item = &'a Draft>) -> Rows {
    let mut rows = Rows::new(backend, DELIVERIES);
    for draft in drafts {
        for new in &draft.deliveries {
            rows.push([
                (&*new.webhook_id).into(),
                (&new.id).into(),
                draft.tenant.organization().into(),
                draft.tenant.environment().as_str().into(),
                (&draft.event.id).into(),
                (&draft.event.event_type).into(),
                // An attempt counts when it is leased.
                i32::from(new.leased).into(),
                i32::from(draft.plan == Plan::Once).into(),
                (!new.leased).then(|| draft.first_attempt_at.millis()).into(),
                new.leased.then_some(node).into(),
                new.leased.then(|| draft.leased_until.millis()).into(),
                draft.event.created_at.millis().into(),
            ]);
        }
    }
    rows
}
