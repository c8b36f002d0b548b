//! Accepting events: an event and its deliveries in one transaction, many publishers in one commit; or, what is large, in many.

pub(super) mod keeping;
pub(super) mod parts;
pub(super) mod takeover;

use std::{collections::HashMap, sync::Arc, time::Duration};

use sea_orm::DbBackend;
use tokio::sync::{mpsc, oneshot};

use self::{keeping::Whole, parts::LARGE};
use super::{
    Error, Leased, Store,
    counts::Deltas,
    handoff::Handoff,
    holdings::Holding,
    idempotency::{Keep, Kept},
    leases::Lease,
    log::{Entry, Log},
    room::MAX_WAITING_BYTES,
    rows::{Column, Rows, int, int_or_null, text, text_or_null},
    targets::{Subscribers, Subscription},
    test_events::TestCaller,
    waiting::Waiting,
    writer::{BYTES_PER_ITEM, Write},
};
use crate::{
    clock,
    webhook::{Attempt, ChangeKind, DeliveryStatus, Event, EventData, Plan, Tenant, Timestamp},
};

/// An event counts as at least this much, which bounds how many wait for their commit.
const MIN_BYTES: usize = MAX_WAITING_BYTES / 65_536;

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

/// Events that are published together make at most this many deliveries together; more are refused with
/// [`Error::TooManyDeliveries`], lest one call hold up all others. One event alone goes to all of its subscribers.
const MAX_DELIVERIES_TOGETHER: usize = 10_000;

/// An event to publish.
pub struct NewEvent {
    /// Its type.
    pub event_type: String,
    /// Its data.
    pub data: EventData,
}

/// An accepted event.
#[derive(Debug, Clone)]
pub struct Published {
    /// Id of the event.
    pub event_id: String,
    /// How many deliveries were made.
    pub deliveries: usize,
}

/// Events on their way into the database: all of them, or none.
pub(super) struct Publish {
    tenant: Tenant,
    events: Vec<NewEvent>,
    lease: Lease,
    /// Whose subscribers the events are for, each with how many events; none for a test.
    subscriptions: Vec<(Subscription, usize)>,
    /// For a test: the only delivery of the only event, whatever the subscriptions say.
    test: Option<Test>,
    /// For a named request.
    keep: Option<Keep<Vec<Published>>>,
    /// Held until it is stored or refused, whether or not its caller still waits.
    room: Option<Holding>,
}

struct Test {
    webhook_id: Arc<str>,
    event_id: String,
    delivery_id: String,
    done: TestCaller,
}

/// Events and their deliveries, about to be stored.
pub(super) struct Draft {
    tenant: Tenant,
    events: Vec<DraftEvent>,
    first_attempt_at: Timestamp,
    lease: Duration,
    leased_until: Timestamp,
    plan: Plan,
    done: Option<TestCaller>,
    keep: Option<Keep<Vec<Published>>>,
    room: Option<Holding>,
    /// Of one that is kept first: its parts, and it has no events then.
    whole: Option<Whole>,
    /// The id under which a part is kept.
    part: Option<String>,
}

struct DraftEvent {
    event: Arc<Event>,
    deliveries: Vec<NewDelivery>,
    /// Its own row is there already.
    has_row: bool,
}

struct NewDelivery {
    id: String,
    webhook_id: Arc<str>,
    /// Whether this node, which had room for it, takes it on at once.
    leased: bool,
}

impl Store {
    /// Stores events, a delivery for each of their active subscribers, and what `keep` keeps: all of it or nothing. What it
    /// answers, in the order of the events, is on disk.
    pub async fn publish(
        &self,
        tenant: Tenant,
        events: Vec<NewEvent>,
        lease: Lease,
        keep: Option<Keep<Vec<Published>>>,
    ) -> Result<Vec<Published>, Error> {
        // Judged again in its turn; here, so that what is refused does not even queue.
        self.0.backlog.admit(tenant.organization(), 0)?;
        let bytes = events.iter().map(|event| event.data.as_str().len().max(MIN_BYTES)).sum();
        let room = self.0.publishing.take(tenant.shared_organization(), bytes)?;
        self.submit(Publish { keep, room: Some(room), ..Publish::of(tenant, events, lease) }).await
    }

    /// Stores a test event as a delivery of its own and has it attempted at once, whatever else is under way but other
    /// tests; answers with its id and the attempt.
    pub async fn publish_test(
        &self,
        tenant: Tenant,
        webhook_id: &str,
        event: NewEvent,
        lease: Lease,
    ) -> Result<(String, oneshot::Receiver<Attempt>), Error> {
        let (done, attempted) = self.0.test_events.admit(tenant.shared_organization())?;
        let (event_id, mut delivery_ids) = clock::new_ids("evt", "del", 1);
        let delivery_id = delivery_ids.remove(0);
        let test = Test { webhook_id: webhook_id.into(), event_id, delivery_id: delivery_id.clone(), done };
        self.submit(Publish::of_test(tenant, event, lease, test)).await?;
        Ok((delivery_id, attempted))
    }

    async fn submit(&self, publish: Publish) -> Result<Vec<Published>, Error> {
        self.writer()?.submit(|answer| Write::Publish(Box::new(publish), answer)).await
    }

    /// The rows of events, with as many deliveries leased to this node as it has room for; refused when too much is
    /// pending. Of what is large, and is to be stored `in_parts`, none is leased yet.
    pub(super) fn draft_of(
        &self,
        publish: Publish,
        subscribers: &HashMap<Subscription, Subscribers>,
        in_parts: bool,
    ) -> Result<Draft, Error> {
        let Publish { tenant, events, lease, subscriptions, test, keep, room } = publish;
        let webhooks: Vec<Subscribers> = match &test {
            Some(test) => vec![Arc::new([Arc::clone(&test.webhook_id)])],
            None => {
                let known =
                    subscriptions.iter().filter_map(|(subscription, _)| subscribers.get_key_value(subscription));
                let to: HashMap<&str, _> = known.map(|((_, event_type), to)| (&**event_type, Arc::clone(to))).collect();
                let of = |event: &NewEvent| to.get(&*event.event_type).cloned().unwrap_or_default();
                let webhooks: Vec<_> = events.iter().map(of).collect();
                let deliveries = webhooks.iter().map(|webhooks| webhooks.len()).sum();
                if webhooks.len() > 1 && deliveries > MAX_DELIVERIES_TOGETHER {
                    return Err(Error::TooManyDeliveries(MAX_DELIVERIES_TOGETHER));
                }
                self.0.backlog.admit(tenant.organization(), deliveries)?;
                webhooks
            }
        };
        let created_at = clock::now();
        let bytes = events.iter().map(|event| event.data.as_str().len()).sum();
        let deliveries = webhooks.iter().map(|webhooks| webhooks.len()).sum();
        let in_parts = in_parts && test.is_none() && weight(events.len(), deliveries, bytes) > LARGE;
        let events = events.into_iter().zip(webhooks).map(|(NewEvent { event_type, data }, webhooks)| {
            let (id, delivery_ids) = match &test {
                Some(test) => (test.event_id.clone(), vec![test.delivery_id.clone()]),
                // Made together: retention finds the deliveries of an event by its id.
                None => clock::new_ids("evt", "del", webhooks.len()),
            };
            let event = Arc::new(Event { id, event_type, data, created_at });
            let bytes = event.data.as_str().len();
            let new = webhooks.iter().zip(delivery_ids).map(|(webhook_id, id)| NewDelivery {
                id,
                webhook_id: Arc::clone(webhook_id),
                // A test takes no place: somebody waits for it.
                leased: test.is_some()
                    || !in_parts
                        && lease.first_wait.is_zero()
                        && self.0.handoff.try_take(tenant.shared_organization(), webhook_id, bytes),
            });
            DraftEvent { deliveries: new.collect(), event, has_row: false }
        });
        let draft = Draft {
            events: events.collect(),
            tenant,
            first_attempt_at: created_at.after(lease.first_wait),
            lease: lease.length,
            leased_until: created_at.after(lease.length),
            plan: if test.is_some() { Plan::Once } else { Plan::Schedule },
            done: test.map(|test| test.done),
            keep,
            room,
            whole: None,
            part: None,
        };
        Ok(if in_parts { draft.in_parts(&self.0.handoff) } else { draft })
    }
}

impl Publish {
    /// For the subscribers of each event.
    pub(super) fn of(tenant: Tenant, events: Vec<NewEvent>, lease: Lease) -> Self {
        let mut types: HashMap<&str, usize> = HashMap::new();
        events.iter().for_each(|event| *types.entry(&event.event_type).or_default() += 1);
        let subscription = |event_type: &str| (tenant.clone(), event_type.to_owned());
        let subscriptions = types.into_iter().map(|(event_type, events)| (subscription(event_type), events)).collect();
        Self { tenant, events, lease, subscriptions, test: None, keep: None, room: None }
    }

    fn of_test(tenant: Tenant, event: NewEvent, lease: Lease, test: Test) -> Self {
        let (events, subscriptions) = (vec![event], Vec::new());
        Self { tenant, events, lease, subscriptions, test: Some(test), keep: None, room: None }
    }

    pub(super) fn organization(&self) -> &Arc<str> {
        self.tenant.shared_organization()
    }

    /// Whose subscribers it is for, and how many events they get.
    pub(super) fn subscriptions(&self) -> impl Iterator<Item = &(Subscription, usize)> {
        self.subscriptions.iter()
    }

    /// How much it is to write with so many deliveries: as much as they are, and more when its data is long.
    pub(super) fn weight(&self, deliveries: usize) -> usize {
        let bytes: usize = self.events.iter().map(|event| event.data.as_str().len()).sum();
        weight(self.events.len(), deliveries, bytes)
    }
}

impl Draft {
    pub(super) fn organization(&self) -> &Arc<str> {
        self.tenant.shared_organization()
    }

    pub(super) fn published(&self) -> Vec<Published> {
        let of = |new: &DraftEvent| Published { event_id: new.event.id.clone(), deliveries: new.deliveries.len() };
        self.whole.as_ref().map_or_else(|| self.events.iter().map(of).collect(), |whole| whole.published().to_vec())
    }

    /// Whose backlog its deliveries are in, and how many; a test is in nobody's.
    pub(super) fn backlog(&self) -> (&str, usize) {
        let deliveries = self.parts().iter().map(|part| part.deliveries().count()).sum();
        (self.tenant.organization(), if self.done.is_some() { 0 } else { deliveries })
    }

    /// What its request is to be known by, from now on.
    pub(super) fn kept(&self) -> Option<Kept<'_>> {
        self.keep.as_ref().filter(|_| self.is_accepted_now()).map(|keep| keep.of(&self.published()))
    }

    fn deliveries(&self) -> impl Iterator<Item = (&Event, &NewDelivery)> {
        self.events
            .iter()
            .flat_map(|DraftEvent { event, deliveries, .. }| deliveries.iter().map(move |new| (&**event, new)))
    }

    /// Counts the deliveries, and says that they were made.
    pub(super) fn tell<'a>(&'a self, deltas: &mut Deltas<'a>, log: &mut Log) {
        for (event, new) in self.deliveries() {
            let event_type = event.event_type.as_str();
            deltas.add(&new.webhook_id, event_type, DeliveryStatus::Pending, 1);
            let entry = Entry {
                kind: ChangeKind::Created.as_str().into(),
                webhook_id: (&*new.webhook_id).into(),
                delivery_id: new.id.as_str().into(),
                event_type: event_type.into(),
                status: DeliveryStatus::Pending.as_str().into(),
                attempts: i32::from(new.leased),
                occurred_at_ms: event.created_at.millis(),
                status_code: None,
                response_time_ms: None,
                last_error: None,
                next_attempt_at_ms: (!new.leased).then(|| self.first_attempt_at.millis()),
            };
            log.push(&self.tenant, &entry);
        }
    }

    /// Hands what is leased to the engine, and adds what is not to `waiting`.
    pub(super) fn hand_over(self, ready: &mpsc::UnboundedSender<Leased>, waiting: &mut Vec<Waiting>) {
        let Self { tenant, events, first_attempt_at, leased_until, plan, mut done, .. } = self;
        for DraftEvent { event, deliveries, .. } in events {
            for NewDelivery { id, webhook_id, leased } in deliveries {
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
                } else {
                    let organization = Arc::clone(tenant.shared_organization());
                    waiting.push(Waiting { webhook_id, organization, due_at: first_attempt_at });
                }
            }
        }
    }

    /// Gives the places of what could not be stored back.
    pub(super) fn give_back(self, handoff: &Handoff) {
        if self.done.is_none() {
            let held = self.parts().iter().flat_map(Self::deliveries).filter(|(_, new)| new.leased);
            held.for_each(|(event, new)| handoff.let_go(&new.webhook_id, event.data.as_str().len()));
        }
    }
}

/// How much so many events, deliveries and bytes of data are to write.
fn weight(events: usize, deliveries: usize, bytes: usize) -> usize {
    deliveries.max(events).max(bytes / BYTES_PER_ITEM)
}

/// The rows for [`INSERT_EVENTS`].
pub(super) fn events<'a>(backend: DbBackend, drafts: impl Iterator<Item = &'a Draft>) -> Rows {
    let mut rows = Rows::new(backend, EVENTS);
    let events = |draft: &'a Draft| draft.whole.as_ref().map_or(&*draft.events, Whole::events);
    for DraftEvent { event, .. } in drafts.flat_map(events).filter(|new| !new.has_row) {
        let Event { id, event_type, data, created_at } = &**event;
        rows.push([id.into(), event_type.into(), data.shared().into(), created_at.millis().into()]);
    }
    rows
}

/// The rows for [`INSERT_DELIVERIES`].
pub(super) fn deliveries<'a>(backend: DbBackend, node: &str, drafts: impl Iterator<Item = &'a Draft>) -> Rows {
    let mut rows = Rows::new(backend, DELIVERIES);
    for draft in drafts {
        for (event, new) in draft.deliveries() {
            rows.push([
                (&new.webhook_id).into(),
                (&new.id).into(),
                draft.tenant.shared_organization().into(),
                draft.tenant.environment().as_str().into(),
                (&event.id).into(),
                (&event.event_type).into(),
                // An attempt counts when it is leased.
                i32::from(new.leased).into(),
                i32::from(draft.plan == Plan::Once).into(),
                (!new.leased).then(|| draft.first_attempt_at.millis()).into(),
                new.leased.then_some(node).into(),
                new.leased.then(|| draft.leased_until.millis()).into(),
                event.created_at.millis().into(),
            ]);
        }
    }
    rows
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;
    use sea_orm::EntityTrait;

    use super::*;
    use crate::{store::entity::event, webhook::Environment};

    /// Also what a caller who has left published counts until it is settled, and is not stored then.
    #[tokio::test]
    async fn who_leaves_does_not_make_room() {
        let (_directory, store) = Store::fresh().await;
        let publish = |organization: &str, bytes: usize| {
            let tenant = Tenant::new(organization, Environment::Live).unwrap();
            let data = EventData::parse(&format!("{{\"a\":\"{}\"}}", "x".repeat(bytes))).unwrap();
            let lease = Lease { length: std::time::Duration::from_secs(60), first_wait: std::time::Duration::ZERO };
            let event = NewEvent { event_type: "content.ready".to_owned(), data };
            store.publish(tenant, vec![event], lease, None)
        };
        // Nothing is stored meanwhile.
        let busy = store.write().await.unwrap();
        let most = MAX_WAITING_BYTES;
        assert!(publish("acme", most / 4).now_or_never().is_none());
        assert!(publish("acme", most / 2).now_or_never().is_none());
        assert!(matches!(publish("acme", 1).now_or_never(), Some(Err(Error::OrganizationOverloaded))));
        assert!(matches!(publish("other", most / 4).now_or_never(), Some(Err(Error::Overloaded))));
        let mut quiet = Box::pin(publish("other", most / 8));
        assert!(quiet.as_mut().now_or_never().is_none(), "there is room for others");
        drop(busy);
        let quiet = quiet.await.unwrap();
        let last = loop {
            match publish("acme", 10).await {
                Ok(last) => break last,
                Err(Error::OrganizationOverloaded) => tokio::task::yield_now().await,
                Err(error) => panic!("{error}"),
            }
        };
        let stored = event::Entity::find().all(&store.0.read).await.unwrap();
        let stored: Vec<_> = stored.into_iter().map(|event| event.id).collect();
        assert_eq!(stored, [&quiet, &last].map(|published| published[0].event_id.clone()));
        assert!(publish("acme", most / 2).await.is_ok());
    }
}
