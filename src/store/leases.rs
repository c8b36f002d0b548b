//! Leases: who makes an attempt, and until when. One that has expired comes back in [`super::rescue`].

use std::{collections::HashMap, sync::Arc, time::Duration};

use sea_orm::{ConnectionTrait, DbBackend, FromQueryResult};

use super::{
    Error, Store,
    deliveries::listed,
    entity::delivery,
    keys::tenant,
    rows::{Cell, Column, Rows, int, text},
    script::Script,
    sql::Sql,
    test_events::TestCaller,
    waiting::{Waiting, Waitlist},
    writer::Write,
};
use crate::{
    clock, failpoint,
    webhook::{Event, EventData, Plan, Tenant, Timestamp},
};

/// One claim takes at most this many deliveries; the rest is in the next, and what others write comes between.
const MAX_CLAIM: usize = 128;
/// No more than this while several organisations have something to write: on SQLite that waits for the claim itself, and on
/// both for what is then sent and recorded. But for [`MIN_SHARE`], which may make it twice as many.
const MAX_SHARED_CLAIM: usize = 32;
/// One claim serves at most this many webhooks, or as many as it may take deliveries if that is less; the rest is in the next.
const MAX_CLAIM_WEBHOOKS: usize = 64;
/// Each may have so many, if there is room: one more than is found shows that nothing is left.
const MIN_SHARE: usize = 2;
const RELEASES: &[Column] =
    &[text("webhook_id"), text("id"), text("node"), int("attempt"), int("expires_at_ms"), int("due_at_ms")];
/// Of that very lease: the attempt that is given back is this node's again, under the same number, when it is claimed.
pub(super) const RELEASE: &str = "UPDATE deliveries SET granted = TRUE, lease_node = NULL, lease_expires_at_ms = NULL, \
    next_attempt_at_ms = rows.due_at_ms FROM {rows} \
    WHERE deliveries.webhook_id = rows.webhook_id AND deliveries.id = rows.id \
    AND deliveries.attempts = rows.attempt AND deliveries.lease_node = rows.node \
    AND deliveries.lease_expires_at_ms = rows.expires_at_ms";

const WANTED: &[Column] =
    &[text("webhook_id"), int("due_at_ms"), int("places"), int("now_ms"), text("node"), int("expires_at_ms")];
/// Materialized, so that a plan that looks twice does not lock, and claim, more than there are places for. Whatever the
/// statistics say, it looks from webhook to webhook, and updates from row to row since the connection has no other joins.
/// The webhook is not joined: before there are statistics, PostgreSQL takes active ones for few, and would compare each with
/// each. What other nodes claim at the same time is left to them, and what a webhook holds that is not active any more where
/// it is. Data of an event comes with the first of its deliveries only.
const CLAIM_ON_POSTGRES: &str = concat!(
    "WITH due AS MATERIALIZED (SELECT d.webhook_id, d.id, rows.node, rows.expires_at_ms FROM {rows} CROSS JOIN LATERAL (\
     SELECT webhook_id, id FROM deliveries WHERE deliveries.webhook_id = (SELECT w.id FROM webhooks w \
      WHERE w.id = rows.webhook_id AND w.status = 'active' AND w.deleted_at_ms IS NULL) \
     AND next_attempt_at_ms >= rows.due_at_ms AND next_attempt_at_ms <= rows.now_ms \
     ORDER BY next_attempt_at_ms LIMIT rows.places FOR UPDATE SKIP LOCKED) AS d), \
    claimed AS (\
     UPDATE deliveries SET attempts = attempts + CASE WHEN granted THEN 0 ELSE 1 END, granted = FALSE, \
     next_attempt_at_ms = NULL, lease_node = due.node, lease_expires_at_ms = due.expires_at_ms FROM due \
     WHERE deliveries.webhook_id = due.webhook_id AND deliveries.id = due.id RETURNING deliveries.*) \
    SELECT named.*, e.created_at_ms AS published_at_ms, \
    CASE WHEN row_number() OVER (PARTITION BY named.event_id) = 1 THEN e.data END AS data \
    FROM (SELECT ",
    listed!(),
    " FROM claimed) AS named LEFT JOIN events e ON e.id = named.event_id"
);

/// What leases are taken for.
#[derive(Debug, Clone)]
pub struct Lease {
    /// How long.
    pub length: Duration,
    /// The wait before the first attempt; a delivery is leased as it is stored only when that is over.
    pub first_wait: Duration,
}

/// A delivery leased to this node: its attempt is counted, and to be made before `expires_at`.
pub struct Leased {
    /// Whose it is.
    pub tenant: Tenant,
    /// Where it goes.
    pub webhook_id: Arc<str>,
    /// Its id.
    pub delivery_id: String,
    /// What is sent.
    pub event: Arc<Event>,
    /// Number of the attempt.
    pub attempt: i32,
    /// What follows a failure.
    pub plan: Plan,
    /// When another node may take it.
    pub expires_at: Timestamp,
    /// Somebody waits for this very attempt, which therefore goes out ahead of all others.
    pub done: Option<TestCaller>,
}

/// A lease to give back.
pub(super) struct Release {
    organization: Arc<str>,
    webhook_id: Arc<str>,
    delivery_id: String,
    attempt: i32,
    expires_at: Timestamp,
    due_at: Timestamp,
}

impl Release {
    fn of(leased: &Leased, due_at: Timestamp) -> Self {
        let Leased { tenant, webhook_id, delivery_id, attempt, expires_at, .. } = leased;
        Self {
            organization: Arc::clone(tenant.shared_organization()),
            webhook_id: webhook_id.clone(),
            delivery_id: delivery_id.clone(),
            attempt: *attempt,
            expires_at: *expires_at,
            due_at,
        }
    }

    /// That it waits again.
    pub(super) fn waiting(&self) -> Waiting {
        let (webhook_id, organization) = (Arc::clone(&self.webhook_id), Arc::clone(&self.organization));
        Waiting { webhook_id, organization, due_at: self.due_at }
    }

    pub(super) fn organization(&self) -> &Arc<str> {
        &self.organization
    }
}

/// What a claim came to.
#[derive(Debug, Clone, Copy)]
pub struct Claimed {
    /// How many deliveries this node has leased by it.
    pub count: usize,
    /// Whether there may be more to claim at once.
    pub more: bool,
}

/// Events by their ids.
type Events = HashMap<String, Arc<Event>>;

/// What is to be claimed of a webhook.
struct Wanted {
    webhook_id: Arc<str>,
    /// At most so many.
    places: usize,
    /// None is due before. PostgreSQL keeps what was claimed in the index until it is vacuumed, and would go through it
    /// each time.
    due_at: Timestamp,
}

impl Store {
    /// Leases to this node what is due of those in `list`, as far as there is room, and hands it to the engine.
    pub async fn claim(&self, list: &mut Waitlist, now: Timestamp, length: Duration) -> Result<Claimed, Error> {
        list.fall_due(now);
        let most = if self.is_shared() { MAX_SHARED_CLAIM } else { MAX_CLAIM };
        let most_webhooks = MAX_CLAIM_WEBHOOKS.min(most);
        let share = (most / list.due().clamp(1, most_webhooks)).max(MIN_SHARE);
        let mut wanted = Vec::new();
        while wanted.len() < most_webhooks
            && !self.0.handoff.is_full()
            && let Some((organization, webhook_id, due_at)) = list.next()
        {
            match self.0.handoff.take_for_waiting(&organization, &webhook_id, share) {
                0 => list.put_aside(webhook_id),
                places => wanted.push(Wanted { webhook_id, places, due_at }),
            }
        }
        if wanted.is_empty() {
            return Ok(Claimed { count: 0, more: false });
        }
        let expires_at = now.after(length);
        let (claimed, events) = self.heard(self.claim_up_to(&wanted, now, expires_at)).await.inspect_err(|_| {
            for Wanted { webhook_id, places, .. } in &wanted {
                self.0.handoff.give_back(webhook_id, *places);
                list.again(webhook_id);
            }
        })?;
        let mut found: HashMap<&str, usize> = HashMap::new();
        for row in &claimed {
            *found.entry(&row.webhook_id).or_default() += 1;
        }
        if found.len() < wanted.len() / 2 {
            list.evade();
        }
        let mut caught_up = Vec::new();
        for Wanted { webhook_id, places, .. } in &wanted {
            let unused = places.saturating_sub(found.get(&**webhook_id).copied().unwrap_or(0));
            if unused > 0 {
                self.0.handoff.caught_up(webhook_id);
                self.0.handoff.give_back(webhook_id, unused);
                caught_up.extend(list.caught_up(webhook_id).map(|organization| (Arc::clone(webhook_id), organization)));
            } else {
                self.0.handoff.waits(webhook_id);
                list.again(webhook_id);
            }
        }
        let count = claimed.len();
        for row in claimed {
            let webhook_id = Arc::from(row.webhook_id.as_str());
            match leased(row, Arc::clone(&webhook_id), &events, expires_at) {
                Some(leased) => {
                    self.0.handoff.fetched(&webhook_id, leased.event.data.as_str().len());
                    let _ = self.0.ready.send(leased);
                }
                None => self.0.handoff.give_back(&webhook_id, 1),
            }
        }
        match self.first_waiting(&caught_up, now).await {
            Ok(first) => first.into_iter().for_each(|waiting| list.add(waiting)),
            Err(error) => {
                // They are claimed once more, in vain, and this is asked again.
                let again = |(webhook_id, organization)| list.add(Waiting { webhook_id, organization, due_at: now });
                caught_up.into_iter().for_each(again);
                return Err(error);
            }
        }
        Ok(Claimed { count, more: list.due() > 0 && !self.0.handoff.is_full() })
    }

    async fn claim_up_to(
        &self,
        wanted: &[Wanted],
        now: Timestamp,
        expires_at: Timestamp,
    ) -> Result<(Vec<delivery::Model>, Events), Error> {
        if self.sqlite() {
            self.claim_on_sqlite(wanted, now, expires_at).await
        } else {
            self.claim_on_postgres(wanted, now, expires_at).await
        }
    }

    /// One statement, and so one transaction and one trip.
    async fn claim_on_postgres(
        &self,
        wanted: &[Wanted],
        now: Timestamp,
        expires_at: Timestamp,
    ) -> Result<(Vec<delivery::Model>, Events), Error> {
        let mut rows = Rows::new(DbBackend::Postgres, WANTED);
        for Wanted { webhook_id, places, due_at } in wanted {
            rows.push([
                webhook_id.into(),
                due_at.millis().into(),
                i64::try_from(*places).unwrap_or(i64::MAX).into(),
                now.millis().into(),
                self.0.node.as_str().into(),
                expires_at.millis().into(),
            ]);
        }
        // In the middle of a statement nothing can be done.
        failpoint::reached("claim", "before commit");
        let (mut claimed, mut events) = (Vec::new(), HashMap::new());
        for statement in rows.statements(CLAIM_ON_POSTGRES) {
            for row in self.0.engine_write.query_all_raw(statement).await? {
                let delivery = delivery::Model::from_query_result(&row, "")?;
                if let Some(data) = row.try_get("", "data")? {
                    let created_at = Timestamp::from_millis(row.try_get("", "published_at_ms")?);
                    let (id, event_type) = (delivery.event_id.clone(), delivery.event_type.clone());
                    let event = Event { id, event_type, data: EventData::trusted(data), created_at };
                    events.insert(delivery.event_id.clone(), Arc::new(event));
                }
                claimed.push(delivery);
            }
        }
        if !claimed.is_empty() {
            failpoint::reached("claim", "after commit");
        }
        Ok((claimed, events))
    }

    /// As [`CLAIM_ON_POSTGRES`], which SQLite has no word for: a range of the index for each webhook.
    async fn claim_on_sqlite(
        &self,
        wanted: &[Wanted],
        now: Timestamp,
        expires_at: Timestamp,
    ) -> Result<(Vec<delivery::Model>, Events), Error> {
        let mut sql = Sql::new("WITH due AS MATERIALIZED (");
        for (index, Wanted { webhook_id, places, due_at }) in wanted.iter().enumerate() {
            sql.text(if index > 0 { " UNION ALL " } else { "" });
            sql.text(
                "SELECT * FROM (SELECT webhook_id, id FROM deliveries WHERE webhook_id = (SELECT id FROM webhooks ",
            );
            sql.text("WHERE status = 'active' AND deleted_at_ms IS NULL AND id = ").value(&**webhook_id);
            sql.text(") AND next_attempt_at_ms >= ").value(due_at.millis());
            sql.text(" AND next_attempt_at_ms <= ").value(now.millis());
            sql.text(" ORDER BY next_attempt_at_ms LIMIT ").value(i64::try_from(*places).unwrap_or(i64::MAX));
            sql.text(&format!(") AS r{index}"));
        }
        sql.text(
            ") UPDATE deliveries SET attempts = attempts + CASE WHEN granted THEN 0 ELSE 1 END, granted = FALSE, \
             next_attempt_at_ms = NULL, lease_node = ",
        );
        sql.value(self.0.node.as_str()).text(", lease_expires_at_ms = ").value(expires_at.millis());
        sql.text(concat!(" WHERE (webhook_id, id) IN (SELECT webhook_id, id FROM due) RETURNING ", listed!()));
        // Then the events, once each. Others wait for the connection, so both are one trip; should only the second fail, leases
        // are held for nothing until they run out, as with a claim on PostgreSQL that nobody hears of.
        sql.text("; SELECT id AS published_id, event_type, data, created_at_ms FROM events WHERE id IN (");
        sql.text("SELECT event_id FROM deliveries WHERE lease_expires_at_ms = ").value(expires_at.millis());
        sql.text(" AND lease_node = ").value(self.0.node.as_str()).text(")");
        let claim = sql.build(DbBackend::Sqlite);
        // In the middle of a trip nothing can be done.
        failpoint::reached("claim", "before commit");
        let (mut claimed, mut events) = (Vec::new(), HashMap::new());
        for row in self.0.engine_write.query_all_raw(claim).await? {
            let Ok(id) = row.try_get::<String>("", "published_id") else {
                claimed.push(delivery::Model::from_query_result(&row, "")?);
                continue;
            };
            let (event_type, data) = (row.try_get("", "event_type")?, EventData::trusted(row.try_get("", "data")?));
            let created_at = Timestamp::from_millis(row.try_get("", "created_at_ms")?);
            events.insert(id.clone(), Arc::new(Event { id, event_type, data, created_at }));
        }
        if !claimed.is_empty() {
            failpoint::reached("claim", "after commit");
        }
        Ok((claimed, events))
    }

    /// Says that a delivery of so many bytes of data is no longer held in memory, because its result is recorded or its
    /// attempt is given up.
    pub fn let_go(&self, webhook_id: &str, bytes: usize) {
        self.0.handoff.let_go(webhook_id, bytes);
    }

    /// Says how many deliveries of a webhook are worth holding in memory.
    pub fn worth_holding(&self, webhook_id: &str, count: usize) {
        self.0.handoff.learn(webhook_id, count);
    }

    /// Gives leases back unused: the deliveries are due again at once, and the attempts stay granted.
    pub async fn release(&self, leased: &[Leased]) -> Result<(), Error> {
        let now = clock::now();
        let releases: Vec<Release> = leased.iter().map(|leased| Release::of(leased, now)).collect();
        self.heard(async {
            let transaction = self.write_by(&self.0.engine_write).await?;
            Script::default().with(RELEASE, self.releases(releases.iter())).run(&transaction).await?;
            self.note_given_back(&transaction, &releases).await?;
            Ok(transaction.commit().await?)
        })
        .await
    }

    /// Gives one lease back unused, together with others that are given back at the same time. Whoever does it again, because
    /// nobody answered, names the same time from which on it is due: it may have been done.
    pub async fn release_one(&self, leased: &Leased, due_at: Timestamp) -> Result<(), Error> {
        self.writer()?.submit(|answer| Write::Release(Release::of(leased, due_at), answer)).await
    }

    /// The rows for [`RELEASE`].
    pub(super) fn releases<'a>(&self, releases: impl Iterator<Item = &'a Release>) -> Rows {
        let node = self.0.node.as_str();
        let mut rows = Rows::new(self.0.write.get_database_backend(), RELEASES);
        for Release { webhook_id, delivery_id, attempt, expires_at, due_at, .. } in releases {
            let [attempt, expires_at_ms, due_at_ms] =
                [(*attempt).into(), expires_at.millis(), due_at.millis()].map(Cell::from);
            rows.push([webhook_id.into(), delivery_id.into(), node.into(), attempt, expires_at_ms, due_at_ms]);
        }
        rows
    }
}

/// A claimed delivery with its event. One whose event is gone cannot be sent; its lease runs out, and after some of those it
/// ends as failed.
fn leased(row: delivery::Model, webhook_id: Arc<str>, events: &Events, expires_at: Timestamp) -> Option<Leased> {
    let Some(event) = events.get(&row.event_id) else {
        tracing::error!(delivery = row.id, event = row.event_id, "a delivery has lost its event");
        return None;
    };
    let Ok(tenant) = tenant(&row.organization, &row.environment) else {
        tracing::error!(delivery = row.id, row.organization, row.environment, "a delivery is of no tenant");
        return None;
    };
    Some(Leased {
        tenant,
        webhook_id,
        delivery_id: row.id,
        event: Arc::clone(event),
        attempt: row.attempts,
        plan: Plan::of(row.once),
        expires_at,
        done: None,
    })
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use futures_util::FutureExt;

    use super::*;
    use crate::{
        store::{Actor, Finished, NewEvent},
        webhook::{Attempt, DeliveryStatus, Environment, RetrySchedule, Transition, WebhookStatus, WebhookUpdate},
    };

    const WEBHOOK: &str = "INSERT INTO webhooks (id, organization, environment, url, description, events, status, secret, \
        created_at_ms) VALUES ('whk_1', 'acme', 'live', 'https://example.com/', '', '[]', 'active', '', 1)";

    /// After a start the books know of nothing that waits; what a claim leaves for want of room is fetched when there is.
    #[tokio::test]
    async fn what_a_claim_leaves_is_due_when_there_is_room() {
        const MANY: usize = 300;
        let (_directory, store) = Store::fresh().await;
        for insert in [
            WEBHOOK,
            "INSERT INTO events (id, event_type, data, created_at_ms) VALUES ('evt_1', 'content.ready', '{}', 1)",
            "INSERT INTO deliveries (webhook_id, id, organization, environment, event_id, event_type, status, attempts, \
             granted, once, lost_leases, next_attempt_at_ms, created_at_ms) \
             WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 300) \
             SELECT 'whk_1', 'del_' || i, 'acme', 'live', 'evt_1', 'content.ready', 'pending', 0, FALSE, FALSE, 0, 1, 1 FROM n",
        ] {
            store.0.write.execute_unprepared(insert).await.unwrap();
        }
        let mut ready = store.ready().unwrap();
        let due_at = Timestamp::from_millis(1);
        let mut list = Waitlist::default();
        list.add(Waiting { webhook_id: "whk_1".into(), organization: "acme".into(), due_at });
        let mut claimed = Vec::new();
        for _ in 0..2 {
            while store.claim(&mut list, clock::now(), Duration::from_secs(60)).await.unwrap().more {}
            let came = claimed.len();
            claimed.extend(std::iter::from_fn(|| ready.try_recv().ok()));
            assert!(came < claimed.len() && store.due().now_or_never().is_none());
            if claimed.len() < MANY {
                claimed.iter().for_each(|leased| store.let_go(&leased.webhook_id, 2));
                store.due().now_or_never().expect("there is room again");
                store.news().room.iter().for_each(|webhook_id| list.has_room(webhook_id));
            }
        }
        let ids: HashSet<&str> = claimed.iter().map(|leased| leased.delivery_id.as_str()).collect();
        assert_eq!((claimed.len(), ids.len()), (MANY, MANY));
        assert_eq!(list.known(), 0);
    }

    async fn look(store: &Store) -> Waitlist {
        let mut list = Waitlist::default();
        assert!(store.look(&mut list).await.unwrap(), "that is all");
        list
    }

    /// Publishes to the webhook, which is subscribed the first time.
    async fn publish(store: &Store, first_wait: Duration) {
        let subscribe = "INSERT INTO subscriptions (organization, environment, event_type, webhook_id) \
            VALUES ('acme', 'live', 'content.ready', 'whk_1') ON CONFLICT DO NOTHING";
        store.0.write.execute_unprepared(subscribe).await.unwrap();
        let event = NewEvent { event_type: "content.ready".to_owned(), data: EventData::trusted("{}".to_owned()) };
        let lease = Lease { length: Duration::from_secs(60), first_wait };
        let tenant = Tenant::new("acme", Environment::Live).unwrap();
        store.publish(tenant, vec![event], lease, None).await.unwrap();
    }

    /// Said again because nobody heard that it was done, it does not take back the lease that came after it.
    #[tokio::test]
    async fn a_lease_is_given_back_once() {
        let (_directory, store) = Store::fresh().await;
        store.0.write.execute_unprepared(WEBHOOK).await.unwrap();
        publish(&store, Duration::ZERO).await;
        let mut ready = store.ready().unwrap();
        let first = ready.try_recv().unwrap();
        store.release_one(&first, clock::now()).await.unwrap();
        let longer = Duration::from_secs(90);
        store.claim(&mut look(&store).await, clock::now(), longer).await.unwrap();
        let second = ready.try_recv().unwrap();
        assert!(second.attempt == first.attempt && second.expires_at > first.expires_at);
        for (given_back, waiting) in [(&first, 0), (&second, 1)] {
            store.release_one(given_back, clock::now()).await.unwrap();
            assert_eq!(look(&store).await.known(), waiting);
        }
    }

    /// When the engine is told that something of the webhook will be due.
    fn told(store: &Store) -> Option<Timestamp> {
        store.due().now_or_never()?;
        Some(store.news().waiting["whk_1"].due_at)
    }

    /// Whoever leaves something in the database says so: the engine does not come to look for it soon.
    #[tokio::test]
    async fn the_engine_is_told_of_what_waits() {
        let (_directory, store) = Store::fresh().await;
        store.0.write.execute_unprepared(WEBHOOK).await.unwrap();
        publish(&store, Duration::ZERO).await;
        assert_eq!(told(&store), None, "the engine has it");

        let wait = Duration::from_secs(10);
        let before = clock::now();
        publish(&store, wait).await;
        assert!((before.after(wait)..=clock::now().after(wait)).contains(&told(&store).unwrap()));

        let leased = store.ready().unwrap().try_recv().unwrap();
        let next = clock::now().after(Duration::from_secs(5));
        let attempt =
            Attempt { number: 1, started_at: before, duration_ms: 1, answer: None, error: Some("no".to_owned()) };
        let finished = Finished {
            tenant: leased.tenant,
            webhook_id: leased.webhook_id,
            delivery_id: leased.delivery_id,
            event: leased.event,
            attempt,
            transition: Transition { status: DeliveryStatus::Pending, next_attempt_at: Some(next) },
            ended_at: before,
        };
        assert!(store.record(Arc::new(finished)).await.unwrap());
        assert_eq!(told(&store), Some(next));
    }

    /// So does whoever changes something about what is there.
    #[tokio::test]
    async fn the_engine_is_told_of_what_waits_again() {
        let (_directory, store) = Store::fresh().await;
        store.0.write.execute_unprepared(WEBHOOK).await.unwrap();
        publish(&store, Duration::ZERO).await;
        let leased = store.ready().unwrap().try_recv().unwrap();
        let due_at = Timestamp::from_millis(7);
        store.release_one(&leased, due_at).await.unwrap();
        assert_eq!(told(&store), Some(due_at), "a lease was given back");

        let (tenant, by) = (leased.tenant.clone(), Actor::command_line());
        for (status, expected) in [(WebhookStatus::Disabled, None), (WebhookStatus::Active, Some(due_at))] {
            let update = WebhookUpdate { status: Some(status), ..WebhookUpdate::default() };
            store.update_webhook(&tenant, "whk_1", update, &by).await.unwrap().unwrap();
            assert_eq!(told(&store), expected, "{status:?}");
        }

        let length = Duration::from_millis(1);
        store.claim(&mut look(&store).await, clock::now().before(length), length).await.unwrap();
        assert_eq!(told(&store), None);
        let before = clock::now();
        assert_eq!(store.rescue(false, &RetrySchedule::parse("0s,5s").unwrap()).await.unwrap(), 1);
        assert!(told(&store).unwrap() >= before, "its lease had run out");

        let failed = "UPDATE deliveries SET status = 'failed', next_attempt_at_ms = NULL";
        store.0.write.execute_unprepared(failed).await.unwrap();
        store.retry_delivery(&tenant, "whk_1", &leased.delivery_id, &by).await.unwrap();
        assert!(told(&store).unwrap() >= before, "it was retried by hand");
    }
}
