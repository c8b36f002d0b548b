//! What one node, or the command line, changes holds on the other nodes, within a second.

use std::time::{Duration, Instant};

use http::Method;
use sea_orm::{ConnectionTrait, Database as SeaOrm, TransactionTrait};
use shortkit_webhooks::{
    clock,
    config::Config,
    grpc::proto::WatchDeliveriesResponse,
    store::{KeyKind, Lease, NewEvent, NewKey, Store},
    webhook::{Environment, EventData, RetrySchedule, Tenant},
};
use tokio::sync::watch;
use tonic::{Code, Streaming};
use tonic_types::StatusExt;

use crate::{
    delivering::shortform,
    support::{Database, Kind, Receiver, Reply, TestServer, config, on_both_databases, soon},
};

on_both_databases!(a_revoked_key_shuts_everywhere, an_expired_key_shuts_by_itself);

/// A second, and what a busy machine takes on top.
const SECOND: Duration = Duration::from_secs(5);

/// Asks again and again until it has `seen` the change; and that must not take long.
async fn in_time(what: &str, mut seen: impl AsyncFnMut() -> bool) {
    let since = clock::stopwatch();
    soon(what, async { while !seen().await {} }).await;
    assert!(since.elapsed() < SECOND, "{what} took {:?}", since.elapsed());
}

#[tokio::test]
async fn a_changed_webhook_is_changed_on_every_node() {
    let database = Database::fresh(Kind::Postgres).await;
    let one = TestServer::start(&database).await;
    let mut other = TestServer::start(&database).await;
    other.key.clone_from(&one.key);
    let (before, after) = (Receiver::start().await, Receiver::start().await);
    let (id, _) = one.webhook(&before.url(), &["content.ready"]).await;
    let path = format!("/v1/webhooks/{id}");
    in_time("the new webhook", async || other.publish("content.ready", "{}").await == 1).await;
    before.wait_for(1).await;

    one.patch(&path, &format!(r#"{{"url":"{}"}}"#, after.url())).await.data();
    in_time("the new address", async || {
        other.publish("content.ready", "{}").await;
        !after.received().is_empty()
    })
    .await;
    one.post(&format!("{path}/rotate-secret"), "").await.data();
    in_time("the new secret", async || {
        other.publish("content.ready", "{}").await;
        after.received().iter().any(|got| got.header("x-shortform-signature").contains(','))
    })
    .await;
    one.patch(&path, r#"{"status":"disabled"}"#).await.data();
    in_time("that it is disabled", async || other.publish("content.ready", "{}").await == 0).await;
    one.patch(&path, r#"{"status":"active"}"#).await.data();
    in_time("that it is active", async || other.publish("content.ready", "{}").await == 1).await;
    one.delete(&path).await.data();
    in_time("that it is gone", async || other.publish("content.ready", "{}").await == 0).await;
    one.stop().await;
    other.stop().await;
}

async fn watching(server: &TestServer, key: &str) -> (Streaming<WatchDeliveriesResponse>, reqwest::Response) {
    let (id, _) = server.webhook("https://example.com/", &["content.ready"]).await;
    let watch = soon("a stream", server.watch_as(key)).await;
    let path = format!("/v1/webhooks/{id}/deliveries/watch");
    let events = server.anonymous(Method::GET, &path).bearer_auth(key).send().await.unwrap();
    assert_eq!(events.status(), 200);
    (watch.0, events)
}

/// Both streams end, and the key opens nothing any more, all with the same reason.
async fn shut_out(
    server: &TestServer,
    key: &str,
    (mut watch, events): (Streaming<WatchDeliveriesResponse>, reqwest::Response),
    reason: &str,
) {
    let ended = soon("the end of the stream", watch.message()).await.map(drop).unwrap_err();
    let details = ended.get_error_details();
    assert_eq!(ended.code(), Code::Unauthenticated);
    assert_eq!(details.error_info().expect("ErrorInfo").reason, reason);
    let text = soon("the end of the events", events.text()).await.unwrap();
    assert!(text.contains("event: error") && text.contains(reason), "{text}");
    let call = server.send(server.anonymous(Method::GET, "/v1/webhooks").bearer_auth(key)).await;
    assert_eq!((call.status, call.json()["error"]["code"].as_str()), (401, Some(reason)));
}

async fn a_revoked_key_shuts_everywhere(database: Database) {
    let server = TestServer::start(&database).await;
    let new = NewKey {
        organization: Some("acme".to_owned()),
        environment: Environment::Test,
        kind: KeyKind::Secret,
        expires_at: None,
    };
    // As another node or the command line would.
    let elsewhere = Store::connect(&database.url).await.unwrap();
    let created = elsewhere.create_key(new).await.unwrap();
    let streams = watching(&server, &created.key).await;
    let since = clock::stopwatch();
    assert!(elsewhere.revoke_key(&created.info.id).await.unwrap());
    shut_out(&server, &created.key, streams, "KEY_REVOKED").await;
    assert!(since.elapsed() < SECOND, "{:?}", since.elapsed());
    // The other key is not held to blame.
    assert_eq!(server.get("/v1/webhooks").await.status, 200);
    server.stop().await;
}

async fn an_expired_key_shuts_by_itself(database: Database) {
    let server = TestServer::start(&database).await;
    let expires_at = clock::now().after(Duration::from_secs(3));
    let new = NewKey {
        organization: Some("acme".to_owned()),
        environment: Environment::Test,
        kind: KeyKind::Secret,
        expires_at: Some(expires_at),
    };
    let key = server.store.create_key(new).await.unwrap().key;
    let streams = watching(&server, &key).await;
    shut_out(&server, &key, streams, "KEY_EXPIRED").await;
    let late = expires_at.until(clock::now());
    assert!(clock::now() >= expires_at && late < SECOND, "{late:?} late");
    server.stop().await;
}

/// What is known is asked for again only when a revision moved, or when the revisions cannot be read.
#[tokio::test]
async fn a_node_that_cannot_read_the_revisions_asks_each_time() {
    let database = Database::fresh(Kind::Postgres).await;
    let server = TestServer::start(&database).await;
    let known = async || {
        let since = clock::stopwatch();
        while since.elapsed() < Duration::from_millis(1500) {
            assert_eq!(server.get("/v1/webhooks").await.status, 200, "no revision has moved");
        }
    };
    // Until the making of the key itself was noticed for long.
    known().await;
    let behind_its_back = SeaOrm::connect(&database.url).await.unwrap();
    let revoke = "UPDATE api_keys SET revoked_at_ms = 1";
    behind_its_back.execute_unprepared(revoke).await.unwrap();
    known().await;
    let locked = behind_its_back.begin().await.unwrap();
    locked.execute_unprepared("LOCK TABLE revisions IN ACCESS EXCLUSIVE MODE").await.unwrap();
    in_time("that the key was revoked", async || server.get("/v1/webhooks").await.status == 401).await;
    locked.rollback().await.unwrap();
    server.stop().await;
}

/// A node that stops says what it gave back; without looking through all that waits, the others know.
#[tokio::test]
async fn what_a_node_gives_back_is_heard_of() {
    let database = Database::fresh(Kind::Postgres).await;
    let server = TestServer::start(&database).await;
    let receiver = Receiver::start().await;
    let (id, _) = server.webhook(&receiver.url(), &["content.ready"]).await;
    server.stop().await;
    let [stopping, other] =
        [Store::connect(&database.url).await.unwrap(), Store::connect(&database.url).await.unwrap()];
    let (followed, mut read) = (other.clone(), other.key_changes());
    tokio::spawn(async move { followed.follow_revisions().await });
    // What was noted before its first reading is not for it to hear of.
    soon("the first reading", read.changed()).await.unwrap();
    let tenant = Tenant::new("acme", Environment::Test).unwrap();
    let event = NewEvent { event_type: "content.ready".to_owned(), data: EventData::parse("{}").unwrap() };
    let lease = Lease { length: Duration::from_secs(60), first_wait: Duration::ZERO };
    stopping.publish(tenant, vec![event], lease, None).await.unwrap();
    let leased = stopping.ready().unwrap().recv().await.unwrap();
    stopping.release(&[leased]).await.unwrap();
    soon("the news", other.due()).await;
    let waiting = other.news().waiting;
    assert_eq!(waiting.keys().map(|id| &**id).collect::<Vec<_>>(), [id]);
    assert!(waiting.values().all(|waiting| waiting.due_at <= clock::now()));
}

/// What a change must hold within.
const WITHIN: Duration = Duration::from_secs(1);

/// Publishes through a node until a change, made through another, must hold there; how many deliveries that made meanwhile,
/// and with the one event that came after.
async fn publish_until_it_holds(node: &TestServer, changed: Instant) -> (i64, i64) {
    let mut meanwhile = 0;
    while changed.elapsed() <= WITHIN {
        meanwhile += node.publish("content.ready", "{}").await;
    }
    (meanwhile, node.publish("content.ready", "{}").await)
}

/// Deliveries of a webhook that one node has in memory, behind one whose receiver has not answered yet.
struct Queue {
    database: Database,
    one: TestServer,
    other: TestServer,
    receiver: Receiver,
    /// Lets the receiver answer.
    answer: watch::Sender<bool>,
    webhook_id: String,
    /// How many are behind the first.
    count: usize,
}

impl Queue {
    async fn new() -> Self {
        let database = Database::fresh(Kind::Postgres).await;
        let limited = || Config { max_in_flight_per_webhook: 1, ..config(&database) };
        let one = TestServer::with(limited()).await;
        let mut other = TestServer::with(limited()).await;
        other.key.clone_from(&one.key);
        let (answer, until) = watch::channel(false);
        let receiver = Receiver::scripted(move |_, _| Reply { until: Some(until.clone()), ..Reply::status(200) }).await;
        let (webhook_id, _) = one.webhook(&receiver.url(), &["content.ready"]).await;
        for _ in 0..5 {
            assert_eq!(one.publish("content.ready", "{}").await, 1);
        }
        receiver.wait_for(1).await;
        let queue = Self { database, one, other, receiver, answer, webhook_id, count: 4 };
        assert_eq!(queue.leased().await, (5, 1));
        queue
    }

    fn path(&self) -> String {
        format!("/v1/webhooks/{}", self.webhook_id)
    }

    /// How many of its deliveries nodes have, and how many nodes.
    async fn leased(&self) -> (i64, i64) {
        let leased = "SELECT count(*), count(DISTINCT lease_node) FROM deliveries WHERE lease_node IS NOT NULL";
        let sql = format!("{leased} AND webhook_id = '{}'", self.webhook_id);
        self.database.rows(&sql).await[0].try_get_many_by_index().unwrap()
    }

    /// Lets the first one end, and waits until nothing more is made of the others, nor when they would be due again.
    async fn nothing_more_goes_out(&self) {
        let later = Receiver::start().await;
        self.one.webhook(&later.url(), &["export.ready"]).await;
        self.answer.send_replace(true);
        soon("the end of all its leases", async { while self.leased().await.0 > 0 {} }).await;
        assert_eq!(self.receiver.received().len(), 1);
        let due = format!("SELECT max(next_attempt_at_ms) FROM deliveries WHERE webhook_id = '{}'", self.webhook_id);
        let due: i64 = self.database.rows(&due).await[0].try_get_by_index(0).unwrap();
        let mut published = 0;
        let until_due = async {
            while clock::now().millis() <= due || published == 0 {
                published += 1;
                assert_eq!(self.one.publish("export.ready", "{}").await, 1);
                later.wait_for(published).await;
            }
        };
        soon("what was published later", until_due).await;
        assert_eq!((self.receiver.received().len(), self.leased().await), (1, (0, 0)));
    }

    async fn stop(self) {
        self.one.stop().await;
        self.other.stop().await;
    }
}

#[tokio::test]
async fn what_a_node_has_in_memory_is_held_when_its_webhook_is_disabled_on_another() {
    let mut queue = Queue::new().await;
    queue.other.patch(&queue.path(), r#"{"status":"disabled"}"#).await.data();
    let (meanwhile, then) = publish_until_it_holds(&queue.one, clock::stopwatch()).await;
    assert_eq!(then, 0);
    queue.count += usize::try_from(meanwhile).unwrap();
    queue.nothing_more_goes_out().await;
    let held = queue.one.get(&format!("{}/deliveries?status=pending", queue.path())).await;
    assert_eq!(held.json()["meta"]["total"], queue.count);

    queue.other.patch(&queue.path(), r#"{"status":"active"}"#).await.data();
    let all = queue.receiver.wait_for(1 + queue.count).await;
    assert!(all.iter().all(|got| got.header("x-shortform-delivery-attempt") == "1"), "none was used up");
    queue.stop().await;
}

#[tokio::test]
async fn what_a_node_has_in_memory_goes_with_its_webhook_that_is_deleted_on_another() {
    let queue = Queue::new().await;
    queue.other.delete(&queue.path()).await.data();
    assert_eq!(publish_until_it_holds(&queue.one, clock::stopwatch()).await.1, 0);
    queue.nothing_more_goes_out().await;
    // As if it had been a minute ago.
    assert_eq!(queue.database.execute("UPDATE webhooks SET deleted_at_ms = 1 WHERE deleted_at_ms > 1").await, 1);
    let left = format!("SELECT id FROM deliveries WHERE webhook_id = '{}'", queue.webhook_id);
    let removed = async {
        while !queue.database.rows(&left).await.is_empty() {
            queue.one.store.remove_deleted().await.unwrap();
        }
    };
    soon("the end of its deliveries", removed).await;
    assert_eq!(queue.receiver.received().len(), 1);
    queue.stop().await;
}

#[tokio::test]
async fn what_a_node_has_in_memory_goes_where_its_webhook_was_moved_on_another() {
    let mut queue = Queue::new().await;
    let moved = Receiver::start().await;
    queue.other.patch(&queue.path(), &format!(r#"{{"url":"{}"}}"#, moved.url())).await.data();
    let (meanwhile, then) = publish_until_it_holds(&queue.one, clock::stopwatch()).await;
    queue.count += usize::try_from(meanwhile + then).unwrap();
    queue.answer.send_replace(true);
    moved.wait_for(queue.count).await;
    assert_eq!(queue.receiver.received().len(), 1);
    queue.stop().await;
}

/// To where it was moved on another node, signed with the secret that was made there.
#[tokio::test]
async fn what_waits_for_its_retry_goes_where_its_webhook_was_moved_on_another_node() {
    let database = Database::fresh(Kind::Postgres).await;
    let limited = || Config { retry_schedule: RetrySchedule::parse("0s,1h").unwrap(), ..config(&database) };
    let one = TestServer::with(limited()).await;
    let mut other = TestServer::with(limited()).await;
    other.key.clone_from(&one.key);
    let (old, new) = (Receiver::scripted(|_, _| Reply::status(500)).await, Receiver::start().await);
    let (id, old_secret) = one.webhook(&old.url(), &["content.ready"]).await;
    let path = format!("/v1/webhooks/{id}");
    for _ in 0..3 {
        one.publish("content.ready", "{}").await;
    }
    old.wait_for(3).await;

    other.patch(&path, &format!(r#"{{"url":"{}"}}"#, new.url())).await.data();
    let rotated = other.post(&format!("{path}/rotate-secret"), "").await.data();
    let (meanwhile, then) = publish_until_it_holds(&one, clock::stopwatch()).await;
    let count = async |which: &str| -> i64 {
        let sql = format!("SELECT count(*) FROM deliveries WHERE {which}");
        database.rows(&sql).await[0].try_get_by_index(0).unwrap()
    };
    soon("the end of all attempts", async { while count("lease_node IS NOT NULL").await > 0 {} }).await;
    let waiting = usize::try_from(count("status = 'pending'").await).unwrap();
    let attempted = [old.received().len(), new.received().len()];
    assert_eq!(attempted.iter().sum::<usize>(), 3 + usize::try_from(meanwhile + then).unwrap());
    assert!(attempted[0] == waiting && waiting >= 3 && attempted[1] >= 1, "{attempted:?} {waiting}");

    // There is nobody else then to make them.
    other.stop().await;
    let fall_due = "UPDATE deliveries SET next_attempt_at_ms = 1 WHERE status = 'pending'";
    assert_eq!(database.execute(fall_due).await, waiting as u64);
    let retries = new.wait_for(attempted[1] + waiting).await.split_off(attempted[1]);
    for got in retries {
        assert_eq!(got.header("x-shortform-delivery-attempt"), "2");
        let signatures = [rotated["secret"].as_str().unwrap(), &old_secret].map(|secret| shortform(secret, &got.body));
        assert_eq!(got.header("x-shortform-signature"), signatures.join(","));
    }
    assert_eq!(old.received().len(), attempted[0]);
    one.stop().await;
}
