//! What is published together is accepted whole or not at all. As one commit, a thousand events would be long for everybody who
//! waits behind it; so where several organisations write, they are first kept, as text in rows of `publish_parts` (see
//! [`super::keeping`]), and once they are accepted, each of those parts is a commit's worth of events and deliveries like any
//! other: it takes turns, and the commit that stores it removes its row, so it is stored once, by whoever has its lease. The
//! caller is answered when all parts are stored. Should one fail, the answer is the same, and comes at once, since it will be
//! stored: by whoever finds that its lease has run out (see [`super::takeover`]), which may be a minute later.

use std::{
    borrow::Cow,
    mem,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use sea_orm::DbBackend;
use serde::{Deserialize, Serialize};
use tokio::sync::oneshot;

use super::{Draft, DraftEvent, NewDelivery, Published, keeping::Whole, weight};
use crate::{
    clock,
    store::{
        Error,
        handoff::Handoff,
        holdings::Holding,
        keys::tenant,
        rows::{Column, Rows, text},
        writer::{Answer, BYTES_PER_ITEM},
    },
    webhook::{Event, EventData, Plan, Tenant, Timestamp},
};

/// What has more deliveries or events than this is kept first, and stored in parts …
pub(super) const LARGE: usize = 64;
/// … of at most so many.
pub(super) const PART: usize = 16;
/// A part also ends with the event that makes its data so long.
const PART_BYTES: usize = PART * BYTES_PER_ITEM;

const REMOVED: &[Column] = &[text("id"), text("node")];
/// Each only if it is this node's.
pub(in crate::store) const fn remove_parts(backend: DbBackend) -> &'static str {
    match backend {
        // A semi-join would go through all parts there are: it is planned while there are none. The lock sees whether another
        // node takes a part over meanwhile.
        DbBackend::Postgres => {
            "DELETE FROM publish_parts WHERE id = ANY (ARRAY(SELECT part.id FROM {rows} CROSS JOIN LATERAL \
             (SELECT id FROM publish_parts WHERE publish_parts.id = rows.id AND publish_parts.node = rows.node \
             LIMIT 1 FOR UPDATE) AS part))"
        }
        _ => "DELETE FROM publish_parts WHERE (id, node) IN (SELECT id, node FROM {rows})",
    }
}

/// Where the outcome of storing a draft goes.
pub(in crate::store) enum Done {
    /// To who published it.
    Caller(Answer<Vec<Published>>),
    /// To the whole of which it is a part.
    Part(Arc<Parts>),
    /// To who has taken the part over, if it still waits.
    TakenOver(oneshot::Sender<Result<(), Error>>),
}

/// The parts that are on their way.
pub(in crate::store) struct Parts {
    left: AtomicUsize,
    caller: Mutex<Option<Caller>>,
    _room: Option<Holding>,
}

/// Who waits for them, and what for.
struct Caller {
    answer: Answer<Vec<Published>>,
    published: Vec<Published>,
}

/// A part as it is kept.
#[derive(Serialize, Deserialize)]
struct Content<'a> {
    organization: Cow<'a, str>,
    environment: Cow<'a, str>,
    first_attempt_at_ms: i64,
    events: Vec<KeptEvent<'a>>,
}

#[derive(Serialize, Deserialize)]
struct KeptEvent<'a> {
    id: Cow<'a, str>,
    event_type: Cow<'a, str>,
    /// None when the event itself is stored as it is accepted.
    data: Option<Cow<'a, str>>,
    created_at_ms: i64,
    /// Ids of deliveries and of their webhooks.
    deliveries: Vec<(Cow<'a, str>, Cow<'a, str>)>,
}

impl Done {
    /// It is stored, or was refused for this reason; what was kept before is stored by whoever takes it over.
    pub(in crate::store) fn send(self, outcome: Result<Vec<Published>, Error>) {
        match self {
            Self::Caller(answer) => drop(answer.send(outcome)),
            Self::Part(parts) => parts.ended(outcome.is_ok()),
            Self::TakenOver(done) => drop(done.send(outcome.map(drop))),
        }
    }
}

impl Parts {
    fn ended(&self, stored: bool) {
        // One that failed is not waited for: it is some time until somebody takes it over.
        if self.left.fetch_sub(1, Ordering::AcqRel) == 1 || !stored {
            let caller = self.caller.lock().unwrap_or_else(PoisonError::into_inner).take();
            if let Some(Caller { answer, published }) = caller {
                let _ = answer.send(Ok(published));
            }
        }
    }
}

impl Draft {
    /// The same, to be kept first and stored in parts. None of its deliveries is leased yet.
    pub(super) fn in_parts(mut self, handoff: &Handoff) -> Self {
        let published = self.published();
        let (tenant, first_attempt_at, lease) = (self.tenant.clone(), self.first_attempt_at, self.lease);
        let (id, mut number) = (clock::new_id("prt"), 0);
        let mut part = || {
            number += 1;
            Self::part(tenant.clone(), first_attempt_at, lease, format!("{id}.{number}"))
        };
        let mut parts = vec![part()];
        let (mut weight, mut bytes, mut long) = (0, 0, Vec::new());
        for DraftEvent { event, deliveries, .. } in mem::take(&mut self.events) {
            // One that goes to more than a part holds is stored as they are accepted; the parts only have its deliveries.
            let has_row = deliveries.len() > PART;
            if has_row {
                long.push(DraftEvent { event: Arc::clone(&event), deliveries: Vec::new(), has_row: false });
            }
            let no_room = !has_row && (weight + deliveries.len().max(1) > PART || bytes > PART_BYTES);
            if no_room || weight == PART {
                parts.push(part());
                (weight, bytes) = (0, 0);
            }
            let mut left = deliveries.into_iter().peekable();
            loop {
                let some: Vec<_> = left.by_ref().take(PART - weight).collect();
                weight += some.len().max(1);
                bytes += if has_row { 0 } else { event.data.as_str().len() };
                if let Some(part) = parts.last_mut() {
                    part.events.push(DraftEvent { event: Arc::clone(&event), deliveries: some, has_row });
                }
                if left.peek().is_none() {
                    break;
                }
                parts.push(part());
                (weight, bytes) = (0, 0);
            }
        }
        if let [one] = &mut parts[..] {
            // One event with long data is no shorter for being kept first.
            self.events = mem::take(&mut one.events);
            self.begin_leases(handoff);
        } else {
            self.whole = Some(Whole::new(id, published, long, parts));
        }
        self
    }

    /// A part without anything in it, of what goes out first at this time.
    fn part(tenant: Tenant, first_attempt_at: Timestamp, lease: Duration, id: String) -> Self {
        Self {
            tenant,
            events: Vec::new(),
            first_attempt_at,
            lease,
            leased_until: clock::now().after(lease),
            plan: Plan::Schedule,
            done: None,
            keep: None,
            room: None,
            whole: None,
            part: Some(id),
        }
    }

    pub(in crate::store) fn is_part(&self) -> bool {
        self.part.is_some()
    }

    /// How much it is to write now.
    pub(in crate::store) fn weight(&self) -> usize {
        match &self.whole {
            Some(whole) => whole.weight(),
            None => weight(self.events.len(), self.deliveries().count(), data(&self.events)),
        }
    }

    /// Leases begin now, of itself where it is kept, and of as many of its deliveries as may go out and this node has room
    /// for. Not before it is written: room that is held in vain makes others wait.
    pub(in crate::store) fn begin_leases(&mut self, handoff: &Handoff) {
        let now = clock::now();
        self.leased_until = now.after(self.lease);
        if self.first_attempt_at <= now {
            let organization = self.tenant.shared_organization();
            for DraftEvent { event, deliveries, .. } in &mut self.events {
                let bytes = event.data.as_str().len();
                deliveries
                    .iter_mut()
                    .for_each(|new| new.leased = handoff.try_take(organization, &new.webhook_id, bytes));
            }
        }
    }

    /// The parts that are to be stored, now that all are accepted, and where the outcome of each goes.
    pub(super) fn accepted(
        parts: Vec<Self>,
        published: Vec<Published>,
        room: Option<Holding>,
        answer: Answer<Vec<Published>>,
    ) -> impl Iterator<Item = (Self, Done)> {
        let left = AtomicUsize::new(parts.len());
        let caller = Mutex::new(Some(Caller { answer, published }));
        let all = Arc::new(Parts { left, caller, _room: room });
        parts.into_iter().map(move |part| (part, Done::Part(Arc::clone(&all))))
    }

    pub(super) fn content(&self) -> Result<String, Error> {
        let events = self.events.iter().map(|DraftEvent { event, deliveries, has_row }| KeptEvent {
            id: (&*event.id).into(),
            event_type: (&*event.event_type).into(),
            data: (!has_row).then(|| event.data.as_str().into()),
            created_at_ms: event.created_at.millis(),
            deliveries: deliveries.iter().map(|new| ((&*new.id).into(), (&*new.webhook_id).into())).collect(),
        });
        let content = Content {
            organization: self.tenant.organization().into(),
            environment: self.tenant.environment().as_str().into(),
            first_attempt_at_ms: self.first_attempt_at.millis(),
            events: events.collect(),
        };
        serde_json::to_string(&content).map_err(|_| Error::Corrupt("part"))
    }

    /// A part that was kept by another node, or before a start. Its deliveries are claimed like all that is due: not all data
    /// that they need is in it.
    pub(super) fn taken_over(id: String, content: &str, lease: Duration) -> Result<Self, Error> {
        let content: Content<'_> = serde_json::from_str(content).map_err(|_| Error::Corrupt("part"))?;
        let events = content.events.into_iter().map(|kept| {
            let has_row = kept.data.is_none();
            let event = Event {
                id: kept.id.into_owned(),
                event_type: kept.event_type.into_owned(),
                data: EventData::trusted(kept.data.unwrap_or_default().into_owned()),
                created_at: Timestamp::from_millis(kept.created_at_ms),
            };
            let new = |(id, webhook_id): (Cow<'_, str>, Cow<'_, str>)| NewDelivery {
                id: id.into_owned(),
                webhook_id: webhook_id.into(),
                leased: false,
            };
            let deliveries = kept.deliveries.into_iter().map(new).collect();
            DraftEvent { event: Arc::new(event), deliveries, has_row }
        });
        let first_attempt_at = Timestamp::from_millis(content.first_attempt_at_ms);
        let part = Self::part(tenant(&content.organization, &content.environment)?, first_attempt_at, lease, id);
        Ok(Self { events: events.collect(), ..part })
    }
}

/// Bytes of the data that is to be written with these.
pub(super) fn data(events: &[DraftEvent]) -> usize {
    events.iter().filter(|new| !new.has_row).map(|new| new.event.data.as_str().len()).sum()
}

/// The rows for [`remove_parts`].
pub(in crate::store) fn to_remove<'a>(backend: DbBackend, node: &str, drafts: impl Iterator<Item = &'a Draft>) -> Rows {
    let mut rows = Rows::new(backend, REMOVED);
    drafts.filter_map(|draft| draft.part.as_deref()).for_each(|id| rows.push([id.into(), node.into()]));
    rows
}

#[cfg(test)]
pub(super) mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;
    use sea_orm::ConnectionTrait;

    use super::*;
    use crate::{
        store::{
            Lease, NewEvent, Store,
            publish::{
                Publish,
                keeping::{INSERT_PARTS, Pieces},
                takeover::{MAX_TAKEN_OVER, SET_ASIDE},
            },
            script::Script,
            sql::Sql,
            targets::Subscribers,
            waiting::Waitlist,
            writer::Write,
        },
        webhook::Environment,
    };

    pub(in crate::store::publish) const LEASE: Lease =
        Lease { length: Duration::from_secs(60), first_wait: Duration::ZERO };

    /// An event for as many webhooks as each number says, with data of as many bytes.
    pub(in crate::store::publish) fn draft(store: &Store, events: &[(usize, usize)], in_parts: bool) -> Draft {
        let tenant = Tenant::new("acme", Environment::Live).unwrap();
        let (mut new, mut subscribers) = (Vec::new(), HashMap::new());
        for (index, (webhooks, bytes)) in events.iter().enumerate() {
            let event_type = format!("type.{index}");
            let to: Subscribers = (0..*webhooks).map(|number| format!("whk_{number}").into()).collect();
            subscribers.insert((tenant.clone(), event_type.clone()), to);
            let data = EventData::parse(&format!("{{\"index\":{index},\"a\":\"{}\"}}", "x".repeat(*bytes))).unwrap();
            new.push(NewEvent { event_type, data });
        }
        store.draft_of(Publish::of(tenant, new, LEASE), &subscribers, in_parts).unwrap()
    }

    /// Events with their deliveries, in order.
    type Seen = Vec<(String, String, Vec<(String, String)>)>;

    fn seen<'a>(drafts: impl IntoIterator<Item = &'a Draft>) -> Seen {
        let mut all: Seen = Vec::new();
        for DraftEvent { event, deliveries, .. } in drafts.into_iter().flat_map(|draft| &draft.events) {
            if all.last().is_none_or(|(id, ..)| *id != event.id) {
                all.push((event.id.clone(), event.data.as_str().to_owned(), Vec::new()));
            }
            let new = deliveries.iter().map(|new| (new.id.clone(), new.webhook_id.to_string()));
            all.last_mut().unwrap().2.extend(new);
        }
        all
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn parts_are_the_whole_and_small(
            events in proptest::collection::vec((prop_oneof![0..3_usize, 0..40_usize], prop_oneof![1..50_usize, 1..20_000_usize]), 1..90),
        ) {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let (_directory, store) = Store::fresh().await;
                let draft = draft(&store, &events, false);
                let (before, published) = (seen([&draft]), draft.published());
                let (backlog, weight) = (draft.backlog().1, draft.weight());
                let draft = if weight > LARGE { draft.in_parts(&store.0.handoff) } else { draft };
                prop_assert!(draft.whole.is_none() || weight > LARGE);
                prop_assert_eq!(draft.backlog().1, backlog);
                prop_assert_eq!(seen(draft.parts()), before.clone());
                for (one, other) in draft.published().iter().zip(&published) {
                    prop_assert_eq!((&one.event_id, one.deliveries), (&other.event_id, other.deliveries));
                }
                let deliveries: usize = published.iter().map(|one| one.deliveries).sum();
                prop_assert!(draft.whole.is_some() || deliveries.max(events.len()) <= LARGE);
                if draft.is_whole() {
                    prop_assert!(draft.parts().len() > 1);
                    for part in draft.parts() {
                        prop_assert!(!part.events.is_empty());
                        prop_assert!(part.deliveries().count() <= PART && part.events.len() <= PART);
                    }
                    let kept: Vec<_> = draft.parts().iter().map(|part| {
                        Draft::taken_over("prt_1".to_owned(), &part.content().unwrap(), LEASE.length).unwrap()
                    }).collect();
                    // What has a row of its own is not kept a second time.
                    let mut expected = before;
                    let long = |id: &str| draft.parts().iter().flat_map(|part| &part.events).any(|new| new.event.id == id && new.has_row);
                    expected.iter_mut().filter(|(id, ..)| long(id)).for_each(|(_, data, _)| data.clear());
                    prop_assert_eq!(seen(&kept), expected);
                }
                Ok(())
            })?;
        }
    }

    pub(in crate::store::publish) async fn count(store: &Store, of: &str) -> i64 {
        let sql = Sql::new(&format!("SELECT count(*) FROM {of}"));
        store.0.read.query_one_raw(sql.build(DbBackend::Sqlite)).await.unwrap().unwrap().try_get_by_index(0).unwrap()
    }

    /// Those that [`draft`] has events for.
    async fn webhooks(store: &Store, count: usize) {
        let insert = format!(
            "INSERT OR IGNORE INTO webhooks (id, organization, environment, url, events, status, secret, created_at_ms) \
             WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {count}) \
             SELECT 'whk_' || (i - 1), 'acme', 'live', 'https://example.com/', '[]', 'active', '', 1 FROM n"
        );
        store.0.write.execute_unprepared(&insert).await.unwrap();
    }

    /// Keeps a large publish as a node would that ends right after that.
    async fn keep(store: &Store, node: &str) -> Draft {
        webhooks(store, 2).await;
        let draft = draft(store, &[(2, 10); 100], true);
        let pieces = Pieces::of(DbBackend::Sqlite, node, std::iter::once(&draft)).unwrap();
        store.0.commits.run(Script::default().with(INSERT_PARTS, pieces.parts)).await.unwrap();
        draft
    }

    #[tokio::test]
    async fn what_a_node_kept_before_it_ended_is_stored_once() {
        let (_directory, store) = Store::fresh().await;
        let draft = keep(&store, "node_gone").await;
        assert_eq!(count(&store, "publish_parts").await, i64::try_from(draft.parts().len()).unwrap());
        assert_eq!(store.store_kept_parts(LEASE.length, || true).await.unwrap(), 0, "its leases hold");
        store.store_kept_parts_at_start(LEASE.length).await.unwrap();
        assert_eq!((count(&store, "events").await, count(&store, "deliveries").await), (100, 200));
        assert_eq!(count(&store, "publish_parts").await, 0);
        assert_eq!(count(&store, "delivery_counts WHERE status = 'pending' AND total = 1").await, 200);
        let waiting = "deliveries WHERE lease_node IS NULL AND next_attempt_at_ms IS NOT NULL";
        assert_eq!(count(&store, waiting).await, 200, "they are claimed like all that is due");
    }

    /// However many a node had kept: they do not wait for one look after the other.
    #[tokio::test]
    async fn all_that_a_node_kept_is_taken_over_when_its_lease_has_run_out() {
        let (_directory, store) = Store::fresh().await;
        let mut kept = 0;
        while kept <= 2 * MAX_TAKEN_OVER {
            kept += keep(&store, "node_gone").await.parts().len();
        }
        store.0.write.execute_unprepared("UPDATE publish_parts SET lease_expires_at_ms = 1").await.unwrap();
        assert_eq!(store.store_kept_parts(LEASE.length, || true).await.unwrap(), kept);
        assert_eq!(count(&store, "publish_parts").await, 0);
    }

    /// The data of an event for many is not in its parts.
    #[tokio::test]
    async fn what_is_taken_over_is_sent_with_its_data() {
        let (_directory, store) = Store::fresh().await;
        webhooks(&store, 100).await;
        let draft = draft(&store, &[(100, 10)], true);
        let pieces = Pieces::of(DbBackend::Sqlite, "node_gone", std::iter::once(&draft)).unwrap();
        let events = super::super::events(DbBackend::Sqlite, std::iter::once(&draft));
        let script = Script::default().with(INSERT_PARTS, pieces.parts).with(super::super::INSERT_EVENTS, events);
        store.0.commits.run(script).await.unwrap();
        store.store_kept_parts_at_start(LEASE.length).await.unwrap();
        let (mut ready, mut list) = (store.ready().unwrap(), Waitlist::default());
        assert!(ready.try_recv().is_err(), "it is not in memory");
        store.look(&mut list).await.unwrap();
        while store.claim(&mut list, clock::now(), LEASE.length).await.unwrap().more {}
        let claimed: Vec<_> = std::iter::from_fn(|| ready.try_recv().ok()).collect();
        assert_eq!(claimed.len(), 100);
        assert!(claimed.iter().all(|leased| leased.event.data.as_str().starts_with("{\"index\":0")));
    }

    /// Otherwise its deliveries would come when there is nothing left that they belong to.
    #[tokio::test]
    async fn a_deleted_webhook_stays_for_what_is_kept() {
        let (_directory, store) = Store::fresh().await;
        let id = clock::first_id("prt", Timestamp::from_millis(1_000));
        for sql in [
            "INSERT INTO webhooks (id, organization, environment, url, events, status, secret, created_at_ms, deleted_at_ms) \
             VALUES ('whk_1', 'acme', 'live', 'https://example.com/', '[]', 'active', '', 1, 2000)",
            &format!("INSERT INTO publish_parts (id, node, lease_expires_at_ms, content) VALUES ('{id}', 'n', 1, '')"),
        ] {
            store.0.write.execute_unprepared(sql).await.unwrap();
        }
        store.remove_deleted().await.unwrap();
        assert_eq!(count(&store, "webhooks").await, 1);
        assert_eq!(store.store_kept_parts(LEASE.length, || true).await.unwrap(), 0, "it cannot be read, and stays");
        store.remove_deleted().await.unwrap();
        assert_eq!((count(&store, "webhooks").await, count(&store, "publish_parts").await), (0, 1));

        // It has been mended, too late for one of its webhooks.
        webhooks(&store, 1).await;
        let content = draft(&store, &[(2, 10)], false).content().unwrap();
        let mended = format!("UPDATE publish_parts SET lease_expires_at_ms = 0, content = '{content}'");
        store.0.write.execute_unprepared(&mended).await.unwrap();
        assert_eq!(store.store_kept_parts(LEASE.length, || true).await.unwrap(), 1);
        assert_eq!(count(&store, "publish_parts").await, 0);
        for table in ["deliveries", "delivery_counts"] {
            assert_eq!(count(&store, &format!("{table} WHERE webhook_id = 'whk_0'")).await, 1);
            assert_eq!(count(&store, table).await, 1, "{table}: what belongs to nothing would stay for ever");
        }
    }

    /// Others that are taken over with it are stored, and nothing waits for it; but it is not lost.
    #[tokio::test]
    async fn what_cannot_be_read_is_set_aside() {
        let (_directory, store) = Store::fresh().await;
        let parts = keep(&store, "node_gone").await.parts().len();
        let execute = async |sql: &str| store.0.write.execute_unprepared(sql).await.unwrap();
        for sql in [
            "CREATE TABLE sound AS SELECT id, content FROM publish_parts",
            "UPDATE publish_parts SET lease_expires_at_ms = 1",
            "UPDATE publish_parts SET content = '{' WHERE id = (SELECT min(id) FROM publish_parts)",
            "UPDATE publish_parts SET content = CAST(X'FF' AS TEXT) WHERE id = (SELECT max(id) FROM publish_parts)",
        ] {
            execute(sql).await;
        }
        assert_eq!(store.store_kept_parts(LEASE.length, || true).await.unwrap(), parts - 2);
        let aside = format!("publish_parts WHERE lease_expires_at_ms = {SET_ASIDE}");
        assert_eq!((count(&store, &aside).await, count(&store, "publish_parts").await), (2, 2));

        execute("UPDATE publish_parts SET node = 'nobody'").await;
        assert_eq!(store.store_kept_parts(LEASE.length, || true).await.unwrap(), 0);
        assert_eq!(
            count(&store, "publish_parts WHERE node = 'nobody'").await,
            2,
            "it is not taken over again and again"
        );
        store.store_kept_parts_at_start(LEASE.length).await.unwrap();
        assert_eq!(count(&store, "publish_parts WHERE node = 'nobody'").await, 0, "a start tries once more");
        assert_eq!(count(&store, &aside).await, 2);

        execute(
            "UPDATE publish_parts SET lease_expires_at_ms = 0, content = (SELECT content FROM sound WHERE id = publish_parts.id)",
        )
        .await;
        assert_eq!(store.store_kept_parts(LEASE.length, || true).await.unwrap(), 2, "it has been mended");
        let all = ["events", "deliveries", "publish_parts"];
        assert_eq!(
            [count(&store, all[0]).await, count(&store, all[1]).await, count(&store, all[2]).await],
            [100, 200, 0]
        );
    }

    /// A node that was frozen meanwhile stores nothing of what another has taken over, and what is in the same commit is
    /// not lost.
    #[tokio::test]
    async fn what_another_node_has_taken_over_is_left_to_it() {
        let (_directory, store) = Store::fresh().await;
        let whole = keep(&store, &store.0.node).await;
        let count_of_parts = whole.parts().len();
        let sql = "UPDATE publish_parts SET node = 'node_other' WHERE id IN (SELECT id FROM publish_parts LIMIT 2)";
        store.0.write.execute_unprepared(sql).await.unwrap();
        let (answer, answered) = oneshot::channel();
        for (part, done) in whole.after_piece(Done::Caller(answer)) {
            store.writer().unwrap().send(Write::Draft(Box::new(part), done)).unwrap();
        }
        assert_eq!(answered.await.unwrap().unwrap().len(), 100);
        // The writer is through when it has done what comes after.
        let other = Tenant::new("other", Environment::Live).unwrap();
        let event = NewEvent { event_type: "a".to_owned(), data: EventData::parse("{}").unwrap() };
        store.publish(other, vec![event], LEASE, None).await.unwrap();
        assert_eq!(count(&store, "publish_parts WHERE node = 'node_other'").await, 2);
        assert_eq!(count(&store, "publish_parts").await, 2);
        assert!(count_of_parts > 2 && count(&store, "deliveries").await > 0);
    }

    /// With others that write, it is answered as without, and nothing is left behind.
    #[tokio::test]
    async fn a_large_publish_beside_others_is_stored_in_parts() {
        let (_directory, store) = Store::fresh().await;
        let event = || NewEvent { event_type: "content.ready".to_owned(), data: EventData::parse("{}").unwrap() };
        for organization in ["one", "other", "one"] {
            let tenant = Tenant::new(organization, Environment::Live).unwrap();
            store.publish(tenant, vec![event()], LEASE, None).await.unwrap();
        }
        let removed = "CREATE TRIGGER t AFTER DELETE ON publish_parts BEGIN INSERT INTO removed SELECT OLD.id; END";
        for sql in ["CREATE TABLE removed (id TEXT)", removed] {
            store.0.write.execute_unprepared(sql).await.unwrap();
        }
        let tenant = Tenant::new("acme", Environment::Live).unwrap();
        let events: Vec<_> = std::iter::repeat_with(event).take(1_000).collect();
        let published = store.publish(tenant, events, LEASE, None).await.unwrap();
        assert_eq!(published.len(), 1_000);
        assert_eq!((count(&store, "events").await, count(&store, "publish_parts").await), (1_003, 0));
        assert_eq!(count(&store, "removed").await, i64::try_from(1_000_usize.div_ceil(PART)).unwrap());
    }
}
