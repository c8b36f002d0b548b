//! What is finished and old goes; what is pending stays, with all that it needs; statistics tell of all there ever was.

use std::time::Duration;

use http::Method;
use serde_json::Value;
use shortkit_webhooks::{
    clock,
    config::Config,
    grpc::proto,
    store::Store,
    webhook::{Retention, RetrySchedule, Timestamp},
};
use tonic::Code;

use crate::support::{Answer, Database, Receiver, Reply, TestServer, config, on_both_databases, soon};

on_both_databases!(
    old_deliveries_go_and_pending_ones_stay,
    a_payload_goes_when_nothing_needs_it,
    a_retry_keeps_its_payload,
    attempts_go_by_when_the_delivery_ended,
    a_payload_stays_when_one_of_many_needs_it,
    publishing_goes_on_meanwhile,
    nodes_count_what_they_remove_once,
    the_service_removes_what_is_old,
    what_deleted_webhooks_left_goes,
);

const DAY: Duration = Duration::from_secs(24 * 60 * 60);

fn retain(deliveries: Option<u32>, payloads: Option<u32>, attempts: Option<u32>) -> Retention {
    let [deliveries, payloads, attempts] = [deliveries, payloads, attempts].map(|days| days.map(|days| DAY * days));
    Retention { deliveries, payloads, attempts }
}

/// One round of whoever removes.
async fn remove_old(database: &Database, retention: Retention) {
    let store = Store::connect(&database.url).await.unwrap();
    store.retain(retention);
    store.remove_old().await.unwrap();
}

async fn number(database: &Database, sql: &str) -> i64 {
    database.rows(sql).await[0].try_get_by_index(0).unwrap()
}

/// An id with the time of so many days before.
fn older(id: &str, days: u32) -> String {
    let made = clock::made_at(id).unwrap().before(DAY * days);
    format!("{}{}", &clock::first_id(&id[..3], made)[..14], &id[14..])
}

/// The path of a delivery after [`age`].
fn aged(path: &str, days: u32) -> String {
    let (webhook, id) = path.rsplit_once('/').unwrap();
    format!("{webhook}/{}", older(id, days))
}

/// Makes everything there is so many days older, the times in ids included.
async fn age(database: &Database, days: u32) {
    for (table, column) in
        [("events", "id"), ("deliveries", "id"), ("deliveries", "event_id"), ("attempts", "delivery_id")]
    {
        let sql = format!("SELECT DISTINCT substr({column}, 1, 14) FROM {table}");
        for row in database.rows(&sql).await {
            let start: String = row.try_get_by_index(0).unwrap();
            let older = &older(&format!("{start}{}", "0".repeat(16)), days)[..14];
            let sql = format!(
                "UPDATE {table} SET {column} = '{older}' || substr({column}, 15) WHERE substr({column}, 1, 14) = '{start}'"
            );
            assert!(database.execute(&sql).await > 0);
        }
    }
    let millis = (DAY * days).as_millis();
    for (table, column) in [
        ("events", "created_at_ms"),
        ("deliveries", "created_at_ms"),
        ("deliveries", "last_attempt_at_ms"),
        ("attempts", "started_at_ms"),
    ] {
        database.execute(&format!("UPDATE {table} SET {column} = {column} - {millis}")).await;
    }
    // How far the attempts were gone through.
    let value = format!("CAST(CAST(value AS BIGINT) - {millis} AS TEXT)");
    database.execute(&format!("UPDATE settings SET value = {value} WHERE name LIKE '%forgotten_ms'")).await;
}

/// A server with a receiver that takes `"ok"` and refuses all else. What it refuses is due again in an hour, but for test
/// events, which fail.
async fn server(database: &Database, retention: Retention) -> (TestServer, Receiver) {
    let schedule = RetrySchedule::parse("0s,1h").unwrap();
    let server = TestServer::with(Config { retry_schedule: schedule, retention, ..config(database) }).await;
    let takes = |body: &str| if body.contains("\"ok\"") { 200 } else { 500 };
    (server, Receiver::scripted(move |_, got| Reply::status(takes(&got.body))).await)
}

/// Publishes, and waits until as many attempts as it made deliveries have ended.
async fn publish(server: &TestServer, data: &str) {
    let mut watch = server.watch().await;
    let deliveries = server.publish("content.ready", data).await;
    watch.until(usize::try_from(deliveries).unwrap(), |change| change.response_time.is_some()).await;
}

/// A failed delivery.
async fn fail(server: &TestServer, webhook_id: &str) -> String {
    let test = server.post(&format!("/v1/webhooks/{webhook_id}/test"), "").await.data();
    assert_eq!(test["status"], "failed");
    format!("/v1/webhooks/{webhook_id}/deliveries/{}", test["deliveryId"].as_str().unwrap())
}

async fn stats(server: &TestServer, webhook_id: &str) -> Value {
    server.get(&format!("/v1/webhooks/{webhook_id}")).await.data()["stats"].clone()
}

/// How many deliveries a list shows; it counts as many.
async fn listed(server: &TestServer, webhook_id: &str, filter: &str) -> usize {
    let list = server.get(&format!("/v1/webhooks/{webhook_id}/deliveries?limit=100{filter}")).await;
    let shown = list.data().as_array().unwrap().len();
    assert_eq!(list.json()["meta"]["total"], shown, "{filter}");
    shown
}

async fn retry(server: &TestServer, delivery: &str) -> Answer {
    server.call(Method::POST, &format!("{delivery}/retry"), "").await
}

async fn old_deliveries_go_and_pending_ones_stay(database: Database) {
    let (server, receiver) = server(&database, Retention::default()).await;
    let (id, _) = server.webhook(&receiver.url(), &["content.ready"]).await;
    assert_eq!(server.publish("export.ready", "{}").await, 0, "an event for nobody");
    for _ in 0..3 {
        publish(&server, r#"{"is":"ok"}"#).await;
    }
    fail(&server, &id).await;
    fail(&server, &id).await;
    publish(&server, r#"{"is":"held"}"#).await;
    age(&database, 40).await;
    publish(&server, r#"{"is":"ok"}"#).await;
    fail(&server, &id).await;
    let before = stats(&server, &id).await;

    remove_old(&database, retain(Some(41), None, None)).await;
    assert_eq!(listed(&server, &id, "").await, 8, "nothing is old enough");
    remove_old(&database, retain(Some(30), None, None)).await;
    for (status, left) in [("success", 1), ("failed", 1), ("pending", 1)] {
        assert_eq!(listed(&server, &id, &format!("&status={status}")).await, left, "{status}");
    }
    assert_eq!(listed(&server, &id, "").await, 3);
    let held = server.get(&format!("/v1/webhooks/{id}/deliveries?status=pending")).await.data();
    assert_eq!(held[0]["payload"]["data"]["is"], "held");
    assert_eq!(number(&database, "SELECT count(*) FROM events").await, 3);
    assert_eq!(number(&database, "SELECT count(*) FROM attempts").await, 2, "one of the held, one of the failed");
    assert_eq!(stats(&server, &id).await, before);
    assert_eq!(before["totalDeliveries"], 8);
    assert_eq!((&before["successfulDeliveries"], &before["failedDeliveries"]), (&4.into(), &3.into()));

    // Now it is due, and once it is finished it is not old: it just ended.
    database.execute("UPDATE deliveries SET next_attempt_at_ms = 1 WHERE status = 'pending'").await;
    server.patch(&format!("/v1/webhooks/{id}"), r#"{"description":"wakes the engine"}"#).await.data();
    let got = receiver.wait_for(9).await;
    assert!(got[8].body.contains("held"));
    server.stop().await;
    remove_old(&database, retain(Some(30), None, None)).await;
    assert_eq!(number(&database, "SELECT count(*) FROM deliveries").await, 3);
}

async fn a_payload_goes_when_nothing_needs_it(database: Database) {
    let (server, receiver) = server(&database, Retention::default()).await;
    let accepting = Receiver::start().await;
    let (id, _) = server.webhook(&receiver.url(), &["content.ready"]).await;
    let failed = fail(&server, &id).await;
    let (other, _) = server.webhook(&accepting.url(), &["content.ready"]).await;
    publish(&server, r#"{"is":"taken by one, and due again for the other"}"#).await;
    publish(&server, r#"{"is":"ok"}"#).await;
    age(&database, 8).await;
    let failed = aged(&failed, 8);
    let fresh = fail(&server, &id).await;
    remove_old(&database, retain(None, Some(7), None)).await;

    let payload =
        |delivery: &Value| delivery["payload"].get("data").and_then(|data| data["is"].as_str().map(str::to_owned));
    let of = async |id: &str, status: &str| {
        server.get(&format!("/v1/webhooks/{id}/deliveries?status={status}")).await.data().as_array().unwrap().clone()
    };
    let shared = Some("taken by one, and due again for the other".to_owned());
    assert_eq!(payload(&of(&id, "pending").await[0]), shared);
    let taken = of(&other, "success").await;
    assert_eq!((taken[0].get("payload"), payload(&taken[1])), (None, shared), "the newest first");
    let gone = server.get(&failed).await.data();
    assert!(gone.get("payload").is_none() && gone["status"] == "failed", "{gone}");
    assert_eq!(gone["attemptLog"].as_array().unwrap().len(), 1);

    let (before, sent) = (stats(&server, &id).await, receiver.received().len());
    let refused = retry(&server, &failed).await;
    assert_eq!((refused.status, refused.json()["error"]["code"].as_str()), (409, Some("CONFLICT")), "{refused:?}");
    assert!(refused.text.contains("payload") && refused.text.contains("retention"), "{refused:?}");
    let delivery_id = failed.rsplit('/').next().unwrap().to_owned();
    let request = proto::RetryDeliveryRequest { webhook_id: id.clone(), delivery_id };
    assert_eq!(server.deliveries().retry_delivery(request).await.unwrap_err().code(), Code::FailedPrecondition);
    assert_eq!(server.get(&failed).await.data(), gone);
    assert_eq!(stats(&server, &id).await, before);
    // One whose payload is there goes out, and nothing else has.
    assert_eq!(retry(&server, &fresh).await.status, 200);
    assert_eq!(receiver.wait_for(sent + 1).await.len(), sent + 1);
    server.stop().await;
}

async fn a_retry_keeps_its_payload(database: Database) {
    let (server, receiver) = server(&database, Retention::default()).await;
    let (id, _) = server.webhook(&receiver.url(), &["content.ready"]).await;
    let retried = fail(&server, &id).await;
    let reading = fail(&server, &id).await;
    age(&database, 8).await;
    let [retried, reading] = [retried, reading].map(|path| aged(&path, 8));
    let mut watch = server.watch().await;
    assert_eq!(retry(&server, &retried).await.status, 200);
    watch.until(1, |change| change.response_time.is_some()).await;
    // As if somebody retried it after it was read as one that nobody needs.
    let event = format!("(SELECT event_id FROM deliveries WHERE id = '{}')", reading.rsplit('/').next().unwrap());
    let now = clock::now().millis();
    assert_eq!(database.execute(&format!("UPDATE events SET retried_at_ms = {now} WHERE id = {event}")).await, 1);
    remove_old(&database, retain(None, Some(7), None)).await;
    for delivery in [&retried, &reading] {
        assert!(server.get(delivery).await.data().get("payload").is_some());
        assert_eq!(retry(&server, delivery).await.status, 200);
    }
    server.stop().await;
}

async fn attempts_go_by_when_the_delivery_ended(database: Database) {
    let (first, receiver) = server(&database, Retention::default()).await;
    let (id, _) = first.webhook(&receiver.url(), &["content.ready"]).await;
    let failed = fail(&first, &id).await;
    let late = fail(&first, &id).await;
    publish(&first, r#"{"is":"ok"}"#).await;
    publish(&first, r#"{"is":"held"}"#).await;
    age(&database, 10).await;
    let [failed, late] = [failed, late].map(|path| aged(&path, 10));
    let late_id = late.rsplit('/').next().unwrap();
    // It ended three days ago, as the last of many retries would.
    let days = (DAY * 7).as_millis();
    let later =
        format!("UPDATE deliveries SET last_attempt_at_ms = last_attempt_at_ms + {days} WHERE id = '{late_id}'");
    assert_eq!(database.execute(&later).await, 1);
    let fresh = fail(&first, &id).await;
    first.stop().await;
    remove_old(&database, retain(None, None, Some(7))).await;

    let (server, _) = server(&database, retain(None, None, Some(7))).await;
    let log =
        async |path: &str| server.get(path).await.data().get("attemptLog").map(|log| log.as_array().unwrap().len());
    let list = async |status: &str| {
        let list = server.get(&format!("/v1/webhooks/{id}/deliveries?status={status}")).await.data();
        format!("/v1/webhooks/{id}/deliveries/{}", list[0]["id"].as_str().unwrap())
    };
    let (success, held) = (list("success").await, list("pending").await);
    let logs =
        async || [log(&failed).await, log(&late).await, log(&fresh).await, log(&success).await, log(&held).await];
    assert_eq!(logs().await, [None, Some(1), Some(1), None, Some(1)]);
    assert_eq!(number(&database, "SELECT count(*) FROM attempts").await, 3);
    assert_eq!(number(&database, "SELECT count(*) FROM deliveries WHERE response IS NOT NULL").await, 0);
    let shown = server.get(&success).await.data();
    assert!(shown.get("payload").is_some() && shown["statusCode"] == 200, "the rest of it stays: {shown}");

    // Five days later the late one is old too.
    server.stop().await;
    age(&database, 5).await;
    let late_id = older(late_id, 5);
    remove_old(&database, retain(None, None, Some(7))).await;
    let left = number(&database, &format!("SELECT count(*) FROM attempts WHERE delivery_id = '{late_id}'")).await;
    assert_eq!((left, number(&database, "SELECT count(*) FROM attempts").await), (0, 2));
}

/// Fills in successful deliveries from `days` ago.
async fn fill(database: &Database, webhook_id: &str, count: usize, days: u32) {
    let at = clock::now().before(DAY * days);
    let time = clock::first_id("x", at)[2..12].to_owned();
    let millis = Timestamp::millis(at);
    for numbers in (0..count).collect::<Vec<_>>().chunks(1_000) {
        let rows =
            |row: &dyn Fn(usize) -> String| numbers.iter().map(|number| row(*number)).collect::<Vec<_>>().join(",");
        let event = |number| format!("('evt_{time}{number:016}', 'content.ready', '{{}}', {millis})");
        let delivery = |number| {
            format!(
                "('{webhook_id}', 'del_{time}{number:016}', 'acme', 'test', 'evt_{time}{number:016}', 'content.ready', \
                 'success', 1, FALSE, FALSE, 0, 200, 1, {millis}, {millis})"
            )
        };
        let columns = "id, event_type, data, created_at_ms";
        database.execute(&format!("INSERT INTO events ({columns}) VALUES {}", rows(&event))).await;
        let columns = "webhook_id, id, organization, environment, event_id, event_type, status, attempts, granted, once, \
                       lost_leases, status_code, response_time_ms, last_attempt_at_ms, created_at_ms";
        database.execute(&format!("INSERT INTO deliveries ({columns}) VALUES {}", rows(&delivery))).await;
    }
    let columns = "webhook_id, event_type, status, total, last_attempt_at_ms";
    let row = format!("('{webhook_id}', 'content.ready', 'success', {count}, {millis})");
    database.execute(&format!("INSERT INTO delivery_counts ({columns}) VALUES {row}")).await;
}

/// However many deliveries were made between its first and its last one.
async fn a_payload_stays_when_one_of_many_needs_it(database: Database) {
    let (server, receiver) = server(&database, Retention::default()).await;
    let (id, _) = server.webhook(&receiver.url(), &["content.ready"]).await;
    server.stop().await;
    // All in the same millisecond, and more than one look finds.
    fill(&database, &id, 5_200, 40).await;
    let pending = "UPDATE deliveries SET status = 'pending', next_attempt_at_ms = 4102444800000 \
                   WHERE id = (SELECT max(id) FROM deliveries)";
    assert_eq!(database.execute(pending).await, 1);
    remove_old(&database, retain(None, Some(30), None)).await;
    let needed = "SELECT count(*) FROM events JOIN deliveries ON event_id = events.id WHERE status = 'pending'";
    let left = (number(&database, "SELECT count(*) FROM events").await, number(&database, needed).await);
    assert_eq!(left, (1, 1));
}

async fn publishing_goes_on_meanwhile(database: Database) {
    let (server, receiver) = server(&database, Retention::default()).await;
    let (id, _) = server.webhook(&receiver.url(), &["content.ready"]).await;
    fill(&database, &id, 8_000, 40).await;
    let removing = remove_old(&database, retain(Some(30), None, None));
    let mut removing = std::pin::pin!(removing);
    let (mut published, mut meanwhile) = (0, None);
    while meanwhile.is_none() || published < 20 {
        let event = server.publish("content.ready", r#"{"is":"ok"}"#);
        tokio::pin!(event);
        tokio::select! {
            () = &mut removing, if meanwhile.is_none() => {
                meanwhile = Some(published);
                event.await;
            }
            _ = &mut event => {}
        }
        published += 1;
    }
    // There are 63 steps for the deliveries and 63 for the events: it waited for some of them, and never for all.
    assert!(meanwhile > Some(10), "{meanwhile:?}");
    assert_eq!(receiver.wait_for(published).await.len(), published);
    server.stop().await;
    let old = format!("created_at_ms < {}", clock::now().before(DAY).millis());
    for table in ["deliveries", "events"] {
        assert_eq!(number(&database, &format!("SELECT count(*) FROM {table} WHERE {old}")).await, 0, "{table}");
        assert_eq!(
            number(&database, &format!("SELECT count(*) FROM {table}")).await,
            i64::try_from(published).unwrap()
        );
    }
}

async fn nodes_count_what_they_remove_once(database: Database) {
    let (server, receiver) = server(&database, Retention::default()).await;
    let (id, _) = server.webhook(&receiver.url(), &["content.ready"]).await;
    fill(&database, &id, 3_000, 40).await;
    let before = stats(&server, &id).await;
    let retention = retain(Some(30), None, None);
    let nodes = [(); 3].map(|()| remove_old(&database, retention));
    futures_util::future::join_all(nodes).await;
    remove_old(&database, retention).await;
    assert_eq!(listed(&server, &id, "").await, 0);
    assert_eq!(stats(&server, &id).await, before);
    assert_eq!(number(&database, "SELECT removed FROM delivery_counts").await, 3_000);
    assert_eq!(number(&database, "SELECT count(*) FROM events").await, 0);
    server.stop().await;
}

async fn the_service_removes_what_is_old(database: Database) {
    let (first, receiver) = server(&database, Retention::default()).await;
    let (id, _) = first.webhook(&receiver.url(), &["content.ready"]).await;
    let failed = fail(&first, &id).await;
    age(&database, 2).await;
    let failed = aged(&failed, 2);
    assert_eq!(first.get(&failed).await.status, 200);
    first.stop().await;
    let (server, _) = server(&database, retain(Some(1), None, None)).await;
    let removed = async {
        while server.get(&failed).await.status != 404 {
            tokio::task::yield_now().await;
        }
    };
    soon("the removal", removed).await;
    assert_eq!(stats(&server, &id).await["failedDeliveries"], 1);
    server.stop().await;
}

async fn what_deleted_webhooks_left_goes(database: Database) {
    let (server, receiver) = server(&database, Retention::default()).await;
    let mut ids = Vec::new();
    for _ in 0..3 {
        ids.push(server.webhook(&receiver.url(), &["content.ready"]).await.0);
    }
    // More than one look finds, in several ranges of the index.
    fill(&database, &ids[0], 5_200, 1).await;
    for (set, which) in [("event_type = 'export.ready'", "id LIKE '%3'"), ("status = 'failed'", "id LIKE '%7'")] {
        database.execute(&format!("UPDATE deliveries SET {set} WHERE {which}")).await;
    }
    for data in [r#"{"is":"ok"}"#, r#"{"is":"held"}"#] {
        publish(&server, data).await;
    }
    fail(&server, &ids[0]).await;
    for id in &ids[..2] {
        server.delete(&format!("/v1/webhooks/{id}")).await.data();
    }
    let left = async |id: &str| {
        let mut left = Vec::new();
        for of in ["webhooks WHERE id", "deliveries WHERE webhook_id", "delivery_counts WHERE webhook_id"] {
            left.push(number(&database, &format!("SELECT count(*) FROM {of} = '{id}'")).await);
        }
        left
    };
    let all = left(&ids[0]).await;
    // It would remove as well.
    server.stop().await;
    let store = Store::connect(&database.url).await.unwrap();
    store.remove_deleted().await.unwrap();
    assert_eq!(left(&ids[0]).await, all, "nodes may still publish to what was deleted just now");

    database.execute("UPDATE webhooks SET deleted_at_ms = deleted_at_ms - 61000").await;
    let far = "4102444800000";
    let lease = |node: &str, until: &str, due: &str| {
        let set = format!("lease_node = {node}, lease_expires_at_ms = {until}, next_attempt_at_ms = {due}");
        format!("UPDATE deliveries SET {set} WHERE webhook_id = '{}' AND status = 'pending'", ids[1])
    };
    database.execute(&lease("'elsewhere'", far, "NULL")).await;
    store.remove_deleted().await.unwrap();
    assert_eq!(left(&ids[0]).await, [0, 0, 0]);
    assert_eq!(left(&ids[1]).await[..2], [1, 1], "an attempt is on the wire");
    assert_eq!(left(&ids[2]).await[..2], [1, 2]);
    assert_eq!(number(&database, "SELECT count(*) FROM attempts").await, 2, "of what is pending");

    database.execute(&lease("NULL", "NULL", far)).await;
    store.remove_deleted().await.unwrap();
    assert_eq!(left(&ids[1]).await, [0, 0, 0]);
    assert_eq!(left(&ids[2]).await[..2], [1, 2]);
}
