//! Several servers on one PostgreSQL: work is shared, a node that is gone is replaced, streams and changes are the same
//! everywhere.

use std::{
    collections::BTreeSet,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use futures_util::future::join_all;
use sea_orm::{ConnectionTrait, Database as SeaOrm, DatabaseTransaction, DbBackend, Statement, TransactionTrait};
use shortkit_webhooks::{
    clock,
    config::Config,
    grpc::proto::{DeliveryChange, WatchDeliveriesRequest, WatchDeliveriesResponse},
};
use tokio::{runtime::Runtime, task::JoinSet};

use crate::support::{Database, Kind, Received, Receiver, Reply, TestServer, Watch, config, soon};

const NODES: usize = 3;

/// Three servers on one database, with one key for all.
async fn nodes(database: &Database, configure: impl Fn(Config) -> Config) -> Vec<Arc<TestServer>> {
    let mut nodes: Vec<TestServer> = Vec::new();
    for _ in 0..NODES {
        let mut node = TestServer::with(configure(config(database))).await;
        node.key = nodes.first().map_or(node.key, |first| first.key.clone());
        nodes.push(node);
    }
    nodes.into_iter().map(Arc::new).collect()
}

/// What one node has too much of, the others do.
#[tokio::test]
async fn deliveries_of_a_busy_node_are_made_by_the_others() {
    const IN_FLIGHT: usize = 8;
    let database = Database::fresh(Kind::Postgres).await;
    let limits = |config| Config { max_in_flight_per_webhook: IN_FLIGHT, shutdown_grace: Duration::ZERO, ..config };
    let nodes = nodes(&database, limits).await;
    // Nothing is answered, so that as many requests come as all nodes together have on the wire at once.
    let receiver = Receiver::scripted(|_, _| Reply { delay: Duration::from_secs(60), ..Reply::status(200) }).await;
    nodes[0].webhook(&receiver.url(), &["content.ready"]).await;
    let mut publishing = JoinSet::new();
    for _ in 0..10 {
        let node = Arc::clone(&nodes[0]);
        publishing.spawn(async move {
            for _ in 0..40 {
                node.publish("content.ready", "{}").await;
            }
        });
    }
    publishing.join_all().await;
    let received = receiver.wait_for(NODES * IN_FLIGHT).await;
    // On a slow machine one may have been given up meanwhile, and be there a second time as its second attempt.
    let header = |got: &Received, name| got.header(name).to_owned();
    let attempt =
        |got: &Received| (header(got, "x-shortform-delivery-id"), header(got, "x-shortform-delivery-attempt"));
    let attempts: BTreeSet<(String, String)> = received.iter().map(attempt).collect();
    assert_eq!(attempts.len(), received.len(), "no two nodes make the same attempt");
}

/// A server on a runtime of its own, which ends as a killed process does: at once, and with nothing given back.
struct Mortal {
    server: TestServer,
    runtime: Runtime,
}

impl Mortal {
    async fn start(config: Config) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let server = runtime.spawn(TestServer::with(config)).await.unwrap();
        Self { server, runtime }
    }

    fn kill(self) {
        self.runtime.shutdown_background();
    }
}

#[tokio::test]
async fn what_a_killed_node_had_is_taken_over() {
    const WEBHOOKS: usize = 4;
    /// As many as a node holds of one webhook: together more than one step of a rescue takes.
    const EVENTS: usize = 256;
    let database = Database::fresh(Kind::Postgres).await;
    let short = Config { request_timeout: Duration::from_secs(10), ..config(&database) };
    let lease = Duration::from_secs(40);
    let killed = Arc::new(AtomicBool::new(false));
    let gone = Arc::clone(&killed);
    let receiver = Receiver::scripted(move |_, _| match gone.load(Ordering::SeqCst) {
        true => Reply::status(200),
        // As long as the node lives, nothing is answered.
        false => Reply { delay: Duration::from_secs(60), ..Reply::status(200) },
    })
    .await;
    let mortal = Mortal::start(short.clone()).await;
    let mut ids = Vec::new();
    for _ in 0..WEBHOOKS {
        ids.push(mortal.server.webhook(&receiver.url(), &["content.ready"]).await.0);
    }
    join_all((0..EVENTS).map(|_| mortal.server.publish("content.ready", "{}"))).await;
    let published = clock::stopwatch();
    let on_the_wire = receiver.wait_for(1).await[0].header("x-shortform-delivery-id").to_owned();
    let admin = SeaOrm::connect(&database.url).await.unwrap();
    let leases = async || -> i64 {
        let count = "SELECT count(*) FROM deliveries WHERE attempts = 1 AND lease_node IS NOT NULL";
        let row = admin.query_one_raw(Statement::from_string(DbBackend::Postgres, count)).await.unwrap().unwrap();
        row.try_get_by_index(0).unwrap()
    };
    assert!(leases().await > 3 * 256, "it held {}", leases().await);
    mortal.kill();
    killed.store(true, Ordering::SeqCst);
    let other = TestServer::with(short).await;
    soon("the end of all its leases", async { while leases().await > 0 {} }).await;
    let took = published.elapsed();
    assert!(took <= lease + Duration::from_secs(2), "taken over after {took:?}");

    let all = "SELECT count(*) FROM deliveries WHERE status = 'pending'";
    let pending = async || -> i64 {
        let row = admin.query_one_raw(Statement::from_string(DbBackend::Postgres, all)).await.unwrap().unwrap();
        row.try_get_by_index(0).unwrap()
    };
    soon("the end of all deliveries", async { while pending().await > 0 {} }).await;
    let repeated = receiver.received().into_iter().filter(|got| got.header("x-shortform-delivery-id") == on_the_wire);
    let attempts: Vec<String> = repeated.map(|got| got.header("x-shortform-delivery-attempt").to_owned()).collect();
    assert_eq!(attempts, ["1", "2"]);
    for id in ids {
        let stats = other.get(&format!("/v1/webhooks/{id}")).await.data()["stats"].clone();
        assert_eq!(stats["successfulDeliveries"], EVENTS, "{stats}");
    }
}

/// A node that stood still comes back with a result when another has long taken over: it does not count.
#[tokio::test]
async fn a_late_result_is_fenced_out() {
    let database = Database::fresh(Kind::Postgres).await;
    let open = Arc::new(AtomicBool::new(false));
    let opened = Arc::clone(&open);
    let receiver = Receiver::scripted(move |index, _| match index {
        // The first node has its answer, a failure, only when the second is through.
        0 => Reply { delay: Duration::from_secs(4), ..Reply::status(500) },
        _ => {
            opened.store(true, Ordering::SeqCst);
            Reply::status(200)
        }
    })
    .await;
    let late = TestServer::start(&database).await;
    let other = TestServer::start(&database).await;
    let (id, _) = late.webhook(&receiver.url(), &["content.ready"]).await;
    late.publish("content.ready", "{}").await;
    receiver.wait_for(1).await;
    // As if the lease had run out.
    let admin = SeaOrm::connect(&database.url).await.unwrap();
    let expire = "UPDATE deliveries SET lease_expires_at_ms = 0 WHERE lease_node IS NOT NULL";
    assert_eq!(admin.execute_unprepared(expire).await.unwrap().rows_affected(), 1);
    let received = receiver.wait_for(2).await;
    assert!(open.load(Ordering::SeqCst));
    let delivery_id = received[0].header("x-shortform-delivery-id");
    // An orderly end waits for the answer, and for the attempt to record it.
    late.stop().await;
    recorded_once(&other, &id, delivery_id).await;
    assert_eq!(receiver.received().len(), 2, "the late failure causes no retry");
}

/// The delivery was interrupted once, then succeeded, and was counted once.
async fn recorded_once(node: &TestServer, webhook_id: &str, delivery_id: &str) {
    let path = format!("/v1/webhooks/{webhook_id}/deliveries/{delivery_id}");
    let delivery = soon("success", async {
        loop {
            let delivery = node.get(&path).await.data();
            if delivery["status"] == "success" {
                return delivery;
            }
        }
    })
    .await;
    assert_eq!(delivery["attempts"], 2, "{delivery}");
    let log = &delivery["attemptLog"];
    assert_eq!(log.as_array().unwrap().len(), 2, "{log}");
    assert_eq!(log[0]["error"], "The attempt was interrupted", "{log}");
    assert!(log[0]["statusCode"].is_null(), "{log}");
    assert_eq!(log[1]["statusCode"], 200, "{log}");
    let stats = node.get(&format!("/v1/webhooks/{webhook_id}")).await.data();
    let count = |of: &str| stats["stats"][of].as_u64();
    assert_eq!((count("totalDeliveries"), count("successfulDeliveries")), (Some(1), Some(1)), "{stats}");
}

/// Many write on all nodes, some watch, one breaks off again and again and goes on elsewhere: all see the same.
#[tokio::test]
async fn a_stream_that_goes_on_elsewhere_misses_nothing() {
    const PUBLISHERS: usize = 6;
    const EVENTS: usize = 40;
    /// Each event is created and attempted.
    const CHANGES: usize = 2 * PUBLISHERS * EVENTS;
    let database = Database::fresh(Kind::Postgres).await;
    let nodes = nodes(&database, |config| config).await;
    let receiver = Receiver::start().await;
    nodes[0].webhook(&receiver.url(), &["content.ready"]).await;
    let mut watching = JoinSet::new();
    for node in &nodes {
        let mut watch = node.watch().await;
        watching.spawn(async move { watch.until(CHANGES, |_| true).await });
    }
    let wanderer = tokio::spawn(wander(nodes.clone(), nodes[1].watch().await, CHANGES));
    let mut publishing = JoinSet::new();
    for publisher in 0..PUBLISHERS {
        let node = Arc::clone(&nodes[publisher % NODES]);
        publishing.spawn(async move {
            for _ in 0..EVENTS {
                node.publish("content.ready", "{}").await;
            }
        });
    }
    publishing.join_all().await;
    let wandered = wanderer.await.unwrap();
    let steady = watching.join_all().await;
    // What the log holds, read at one go, after the first of all.
    let mut replay = resume(&nodes[2], wandered[0].resume_token.clone()).await;
    let replayed = replay.until(CHANGES - 1, |_| true).await;

    let unique: BTreeSet<_> = wandered.iter().map(change).collect();
    assert_eq!(unique.len(), CHANGES, "nothing twice");
    let log: Vec<_> = std::iter::once(&wandered[0]).chain(&replayed).map(change).collect();
    assert_eq!(wandered.iter().map(change).collect::<Vec<_>>(), log, "in the order of the log");
    for seen in &steady {
        assert_eq!(seen.iter().map(change).collect::<Vec<_>>(), log, "the same on every node");
    }
    let created = wandered.iter().filter(|seen| seen.change() == DeliveryChange::Created).count();
    assert_eq!(created, CHANGES / 2);
}

/// A commit that stands still between its place in the log and its end: what another node writes meanwhile must not pass
/// it, or a stream that has seen the later change would never look for the earlier one.
#[tokio::test]
async fn a_later_change_waits_for_an_earlier_commit() {
    /// Of the trigger that makes a commit stand still.
    const HELD: i64 = 4_711;
    let database = Database::fresh(Kind::Postgres).await;
    let nodes = nodes(&database, |config| config).await;
    let receiver = Receiver::start().await;
    let (slow, _) = nodes[0].webhook(&receiver.url(), &["content.ready"]).await;
    let (quick, _) = nodes[0].webhook(&receiver.url(), &["content.errored"]).await;
    let mut watch = nodes[2].watch().await;
    let held = locked(&database, HELD).await;
    database
        .execute(&format!(
            "CREATE FUNCTION stand_still() RETURNS trigger LANGUAGE plpgsql SET lock_timeout = 0 AS \
             'BEGIN PERFORM pg_advisory_xact_lock_shared({HELD}); RETURN NULL; END'; \
             CREATE CONSTRAINT TRIGGER stand_still AFTER INSERT ON changes DEFERRABLE INITIALLY DEFERRED \
             FOR EACH ROW WHEN (NEW.entries LIKE '%{slow}%') EXECUTE FUNCTION stand_still()"
        ))
        .await;
    let waiting = async |count: i64| {
        let sql = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted AND database = \
                   (SELECT oid FROM pg_database WHERE datname = current_database())";
        database.rows(sql).await[0].try_get_by_index::<i64>(0).unwrap() >= count
    };
    let publish = |node: usize, event: &'static str| {
        let node = Arc::clone(&nodes[node]);
        tokio::spawn(async move { node.publish(event, "{}").await })
    };
    let first = publish(0, "content.ready");
    soon("the first commit", async { while !waiting(1).await {} }).await;
    let second = publish(1, "content.errored");
    soon("the second publish", async { while !second.is_finished() && !waiting(2).await {} }).await;
    let mut seen = Vec::new();
    if second.is_finished() {
        seen.extend(watch.until(1, |seen| seen.webhook_id == quick).await);
    }
    held.rollback().await.unwrap();
    assert_eq!((first.await.unwrap(), second.await.unwrap()), (1, 1));
    seen.extend(watch.until(1, |seen| seen.webhook_id == slow).await);
    assert_eq!(seen.len(), 1, "the later change was seen first");
}

/// A transaction that has an advisory lock.
async fn locked(database: &Database, lock: i64) -> DatabaseTransaction {
    let transaction = database.open().await.begin().await.unwrap();
    transaction.execute_unprepared(&format!("SELECT pg_advisory_xact_lock({lock})")).await.unwrap();
    transaction
}

/// Which delivery, and what happened to it.
fn change(seen: &WatchDeliveriesResponse) -> (String, i32) {
    (seen.delivery_id.clone(), seen.change)
}

async fn resume(node: &TestServer, token: String) -> Watch {
    let request = WatchDeliveriesRequest { resume_token: Some(token), ..Default::default() };
    Watch(node.deliveries().watch_deliveries(request).await.unwrap().into_inner())
}

/// Reads `count` changes, a few from each stream, and then goes on at any node.
async fn wander(nodes: Vec<Arc<TestServer>>, mut watch: Watch, count: usize) -> Vec<WatchDeliveriesResponse> {
    let mut seen: Vec<WatchDeliveriesResponse> = Vec::new();
    while seen.len() < count {
        let [some, where_to] = clock::random();
        let some = (1 + usize::from(some) % 30).min(count - seen.len());
        seen.extend(watch.until(some, |_| true).await);
        let token = seen.last().unwrap().resume_token.clone();
        drop(watch);
        watch = resume(&nodes[usize::from(where_to) % nodes.len()], token).await;
    }
    seen
}

/// What is changed on one node holds on the others a second later.
#[tokio::test]
async fn a_change_of_a_webhook_holds_everywhere_within_a_second() {
    const WITHIN: Duration = Duration::from_secs(1);
    let database = Database::fresh(Kind::Postgres).await;
    let nodes = nodes(&database, |config| config).await;
    let (old, new) = (Receiver::start().await, Receiver::start().await);
    let (id, _) = nodes[0].webhook(&old.url(), &["content.ready"]).await;
    let path = format!("/v1/webhooks/{id}");
    for node in &nodes {
        // Every node knows the webhook, and where it points.
        let delivered = old.received().len();
        while node.publish("content.ready", r#"{"at":"before"}"#).await == 0 {}
        old.wait_for(delivered + 1).await;
    }

    // The URL: what is published later than a second after the change goes to the new one only.
    let moved = nodes[0].patch(&path, &format!(r#"{{"url":"{}"}}"#, new.url())).await;
    assert_eq!(moved.status, 200, "{}", moved.text);
    let changed = clock::stopwatch();
    let before = old.received().len();
    let made = publish_for(&nodes[1..], changed, 2 * WITHIN).await.len();
    let all_came = async {
        while old.received().len() + new.received().len() < before + made {
            tokio::task::yield_now().await;
        }
    };
    soon("the arrival of everything", all_came).await;
    let published_at =
        |got: &Received| -> Option<u128> { got.body.split_once(r#""ms":"#)?.1.split('}').next()?.parse().ok() };
    assert!(new.received().iter().filter_map(published_at).any(|ms| ms > WITHIN.as_millis()));
    let stale = old.received().iter().filter_map(published_at).max().unwrap_or(0);
    assert!(stale <= WITHIN.as_millis(), "still sent to the old URL {stale} ms after the change");

    // The secret: what is published later than a second after it was replaced carries two signatures.
    let before = new.received().len();
    let replaced = nodes[0].post(&format!("{path}/rotate-secret"), "").await;
    assert_eq!(replaced.status, 200, "{}", replaced.text);
    let made = publish_for(&nodes[1..], clock::stopwatch(), 2 * WITHIN).await.len();
    let got = new.wait_for(before + made).await.split_off(before);
    assert!(got.iter().filter_map(published_at).any(|ms| ms > WITHIN.as_millis()));
    let stale = got.iter().filter(|got| !got.header("x-shortform-signature").contains(','));
    let stale = stale.filter_map(published_at).max().unwrap_or(0);
    assert!(stale <= WITHIN.as_millis(), "still signed by the old secret alone {stale} ms after the change");

    // Disabled, and then deleted: nothing is made of what is published a second later.
    for (method, body) in [(http::Method::PATCH, r#"{"status":"disabled"}"#), (http::Method::DELETE, "")] {
        nodes[0].patch(&path, r#"{"status":"active"}"#).await;
        for node in &nodes {
            soon("the webhook to be active", async { while node.publish("content.ready", "{}").await == 0 {} }).await;
        }
        assert_eq!(nodes[0].call(method.clone(), &path, body).await.status, 200);
        let changed = clock::stopwatch();
        let made = publish_for(&nodes[1..], changed, 2 * WITHIN).await;
        let stale = made.into_iter().max().unwrap_or_default();
        assert!(stale <= WITHIN, "{method}: still a delivery {stale:?} after the change");
    }
}

/// Publishes on all of `nodes` until `time` after `changed`; when those publishes began that made a delivery.
async fn publish_for(nodes: &[Arc<TestServer>], changed: Instant, time: Duration) -> Vec<Duration> {
    let mut publishing = JoinSet::new();
    for node in nodes {
        let node = Arc::clone(node);
        publishing.spawn(async move {
            let mut made = Vec::new();
            while changed.elapsed() < time {
                let began = changed.elapsed();
                if node.publish("content.ready", &format!(r#"{{"ms":{}}}"#, began.as_millis())).await > 0 {
                    made.push(began);
                }
            }
            made
        });
    }
    publishing.join_all().await.concat()
}
