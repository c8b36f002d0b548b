//! What one node, or the command line, changes holds on the other nodes, within a second.

use std::time::Duration;

use http::Method;
use sea_orm::{ConnectionTrait, Database as SeaOrm, TransactionTrait};
use shortkit_webhooks::{
    clock,
    grpc::proto::WatchDeliveriesResponse,
    store::{KeyKind, Lease, NewEvent, NewKey, Store},
    webhook::{Environment, EventData, Tenant},
};
use tonic::{Code, Streaming};
use tonic_types::StatusExt;

use crate::support::{Database, Kind, Receiver, TestServer, on_both_databases, soon};

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
