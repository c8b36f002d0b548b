//! Accepting events: an event and its deliveries in one transaction, many publishers in one commit.

use std::sync::Arc;

use sea_orm::{EntityTrait, Set};
use tokio::sync::oneshot;

use super::{
    Error, Leased, Store, changes,
    counts::Deltas,
    entity::{delivery, event},
    leases::Lease,
    ordered,
};
use crate::{
    clock,
    webhook::{Attempt, ChangeKind, DeliveryStatus, Event, EventData, Plan, Tenant, Timestamp},
};

/// The data of events that wait for their commit is at most this long together; one more is refused with
/// [`Error::Overloaded`].
pub(super) const MAX_WAITING_BYTES: u32 = 64 * 1024 * 1024;
/// SQLite takes this many values in a statement, 19 a delivery.
const MAX_ROWS: usize = 1_000;

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
}

/// A delivery about to be stored, with the lease if the node has room for it.
struct NewDelivery {
    tenant: Tenant,
    webhook_id: String,
    event: Arc<Event>,
    plan: Plan,
    first_attempt_at: Timestamp,
    lease: Option<Lease>,
}

impl Store {
    /// Stores an event and a delivery for each active subscriber. What it answers is on disk.
    pub async fn publish(
        &self,
        tenant: Tenant,
        event_type: String,
        data: EventData,
        lease: Lease,
    ) -> Result<Published, Error> {
        let publisher = self.0.publisher.get().ok_or(Error::Closed)?;
        let bytes = u32::try_from(data.as_str().len()).unwrap_or(u32::MAX);
        let _room = self.0.publishing.try_acquire_many(bytes.min(MAX_WAITING_BYTES)).map_err(|_| Error::Overloaded)?;
        publisher.submit(Publish { tenant, event_type, data, lease }).await
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
        let event = Arc::new(new_event(event_type, data));
        let new = NewDelivery {
            tenant,
            webhook_id: webhook_id.to_owned(),
            first_attempt_at: event.created_at,
            event: Arc::clone(&event),
            plan: Plan::Once,
            lease: Some(lease),
        };
        let mut leased = self.store_new(vec![event], vec![new]).await?;
        let mut test = leased.pop().ok_or(Error::Closed)?;
        let (done, attempted) = oneshot::channel();
        test.done = Some(done);
        let id = test.delivery_id.clone();
        self.0.ready.send(test).map_err(|_| Error::Closed)?;
        Ok((id, attempted))
    }

    pub(super) async fn publish_batch(self, batch: Vec<Publish>) -> Result<Vec<Published>, Error> {
        let wanted = batch.iter().map(|publish| (publish.tenant.clone(), publish.event_type.clone()));
        let subscribers = self.subscribers(wanted).await?;
        let (mut events, mut deliveries, mut published) = (Vec::new(), Vec::new(), Vec::new());
        for Publish { tenant, event_type, data, lease } in batch {
            let key = (tenant, event_type);
            let webhooks = subscribers.get(&key).cloned().unwrap_or_default();
            let (tenant, event_type) = key;
            let event = Arc::new(new_event(event_type, data));
            published.push(Published { event_id: event.id.clone(), deliveries: webhooks.len() });
            let first_attempt_at = event.created_at.after(lease.first_wait);
            for webhook_id in webhooks.iter() {
                let bytes = event.data.as_str().len();
                let at_once = lease.first_wait.is_zero() && self.0.handoff.try_take(webhook_id, bytes);
                deliveries.push(NewDelivery {
                    tenant: tenant.clone(),
                    webhook_id: webhook_id.clone(),
                    event: Arc::clone(&event),
                    plan: Plan::Schedule,
                    first_attempt_at,
                    lease: at_once.then(|| lease.clone()),
                });
            }
            events.push(event);
        }
        let held: Vec<(String, usize)> = deliveries
            .iter()
            .filter(|new| new.lease.is_some())
            .map(|new| (new.webhook_id.clone(), new.event.data.as_str().len()))
            .collect();
        let waiting = held.len() < deliveries.len();
        let leased = self.store_new(events, deliveries).await.inspect_err(|_| {
            held.iter().for_each(|(webhook_id, bytes)| self.0.handoff.let_go(webhook_id, *bytes));
        })?;
        leased.into_iter().for_each(|delivery| drop(self.0.ready.send(delivery)));
        if waiting {
            self.0.handoff.due.notify_one();
        }
        Ok(published)
    }

    /// Writes events and deliveries in one transaction and answers with those leased to this node.
    async fn store_new(&self, events: Vec<Arc<Event>>, new: Vec<NewDelivery>) -> Result<Vec<Leased>, Error> {
        let rows: Vec<delivery::Model> = new.iter().map(|new| self.row(new)).collect();
        let mut deltas = Deltas::default();
        for row in &rows {
            deltas.add(&row.webhook_id, &row.event_type, DeliveryStatus::Pending, 1);
        }
        let created: Vec<_> = rows
            .iter()
            .map(|row| changes::of(row, ChangeKind::Created, Timestamp::from_millis(row.created_at_ms)))
            .collect();
        let leased = new.into_iter().zip(&rows).filter_map(|(new, row)| leased(new, row)).collect();

        let transaction = self.write().await?;
        for events in events.chunks(MAX_ROWS) {
            event::Entity::insert_many(events.iter().map(|event| event_row(event)))
                .exec_without_returning(&transaction)
                .await?;
        }
        if !rows.is_empty() {
            let mut rows = rows.into_iter().map(sea_orm::IntoActiveModel::into_active_model);
            loop {
                let chunk: Vec<delivery::ActiveModel> = rows.by_ref().take(MAX_ROWS).collect();
                if chunk.is_empty() {
                    break;
                }
                let chunk = chunk.into_iter().map(sea_orm::ActiveModelTrait::reset_all);
                delivery::Entity::insert_many(chunk).exec_without_returning(&transaction).await?;
            }
            ordered(&transaction).await?;
            deltas.write(&transaction).await?;
            changes::insert(&transaction, created).await?;
        }
        transaction.commit().await?;
        self.0.feed.announce();
        Ok(leased)
    }

    fn row(&self, new: &NewDelivery) -> delivery::Model {
        let created_at = new.event.created_at;
        delivery::Model {
            webhook_id: new.webhook_id.clone(),
            id: clock::new_id("del"),
            organization: new.tenant.organization().to_owned(),
            environment: new.tenant.environment().as_str().to_owned(),
            event_id: new.event.id.clone(),
            event_type: new.event.event_type.clone(),
            status: DeliveryStatus::Pending.as_str().to_owned(),
            // An attempt counts when it is leased.
            attempts: i32::from(new.lease.is_some()),
            granted: false,
            once: new.plan == Plan::Once,
            lost_leases: 0,
            next_attempt_at_ms: new.lease.is_none().then(|| new.first_attempt_at.millis()),
            lease_node: new.lease.as_ref().map(|_| self.0.node.clone()),
            lease_expires_at_ms: new.lease.as_ref().map(|lease| created_at.after(lease.length).millis()),
            status_code: None,
            response_time_ms: None,
            last_error: None,
            last_attempt_at_ms: None,
            created_at_ms: created_at.millis(),
        }
    }
}

fn new_event(event_type: String, data: EventData) -> Event {
    Event { id: clock::new_id("evt"), event_type, data, created_at: clock::now() }
}

fn event_row(event: &Event) -> event::ActiveModel {
    event::ActiveModel {
        id: Set(event.id.clone()),
        event_type: Set(event.event_type.clone()),
        data: Set(event.data.as_str().to_owned()),
        created_at_ms: Set(event.created_at.millis()),
    }
}

fn leased(new: NewDelivery, row: &delivery::Model) -> Option<Leased> {
    let lease = new.lease?;
    Some(Leased {
        tenant: new.tenant,
        webhook_id: new.webhook_id,
        delivery_id: row.id.clone(),
        expires_at: new.event.created_at.after(lease.length),
        event: new.event,
        attempt: row.attempts,
        plan: new.plan,
        done: None,
    })
}
