//! What a receiver gets, and what becomes of its answers.

use std::time::Duration;

use base64::{Engine, engine::general_purpose::STANDARD};
use ring::hmac;
use serde_json::json;
use shortkit_webhooks::{
    config::Config,
    grpc::proto::{DeliveryChange, DeliveryStatus},
    webhook::RetrySchedule,
};

use crate::support::{Database, Received, Receiver, Reply, TestServer, config, on_both_databases};

on_both_databases!(
    signed_and_untouched,
    retried_by_the_schedule_until_it_fails,
    retry_after_lengthens_a_wait,
    both_secrets_sign_after_a_rotation,
    test_events_go_to_disabled_webhooks_and_are_not_retried,
    disabled_webhooks_hold_their_deliveries,
    what_is_due_sooner_than_was_known_is_found,
    what_cannot_be_rescued_holds_up_nothing,
    a_lease_of_no_tenant_holds_up_no_other,
    deleted_webhooks_take_their_deliveries_along,
    a_retry_by_hand_is_one_attempt,
    the_answer_is_capped_and_kept,
    redirects_are_not_followed,
);

/// Data that a parser would change.
const TOUCHY: &str =
    r#"{ "z":1e400,"a" : 12345678901234567890, "price":45.20,"e":"\u00e9\/\ud83d\ude00 é","n":{"b":-0.0,"a":[ ]} }"#;

fn hmac_sha256(key: &[u8], message: &[u8]) -> Vec<u8> {
    hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, key), message).as_ref().to_vec()
}

pub(crate) fn shortform(secret: &str, body: &str) -> String {
    let hex: String =
        hmac_sha256(secret.as_bytes(), body.as_bytes()).iter().map(|byte| format!("{byte:02x}")).collect();
    format!("sha256={hex}")
}

fn standard(secret: &str, received: &Received) -> String {
    let key = STANDARD.decode(secret.strip_prefix("whsec_").unwrap()).unwrap();
    let (id, timestamp) = (received.header("webhook-id"), received.header("webhook-timestamp"));
    format!("v1,{}", STANDARD.encode(hmac_sha256(&key, format!("{id}.{timestamp}.{}", received.body).as_bytes())))
}

async fn signed_and_untouched(database: Database) {
    let server = TestServer::start(&database).await;
    let receiver = Receiver::start().await;
    let (id, secret) = server.webhook(&receiver.url(), &["content.ready"]).await;
    let mut watch = server.watch().await;
    assert_eq!(server.publish("content.ready", TOUCHY).await, 1);

    let got = receiver.wait_for(1).await.remove(0);
    let timestamp = got.header("x-shortform-timestamp");
    assert_eq!(
        got.body,
        format!(r#"{{"event":"content.ready","data":{TOUCHY},"timestamp":"{timestamp}","webhookId":"{id}"}}"#)
    );
    assert_eq!(got.header("content-type"), "application/json");
    assert_eq!(got.header("x-shortform-signature"), shortform(&secret, &got.body));
    assert_eq!(got.header("webhook-signature"), standard(&secret, &got));
    assert_eq!(got.header("x-shortform-webhook-id"), id);
    assert_eq!(got.header("x-shortform-delivery-id"), got.header("webhook-id"));
    assert_eq!(got.header("x-shortform-delivery-attempt"), "1");
    assert!(got.header("user-agent").starts_with("Shortkit-Webhooks/"));

    watch.until(1, |change| change.status() == DeliveryStatus::Success).await;
    let listed = server.get(&format!("/v1/webhooks/{id}/deliveries")).await;
    assert!(
        listed.text.contains(&format!(r#""payload":{{"event":"content.ready","data":{TOUCHY}}}"#)),
        "{}",
        listed.text
    );
    server.stop().await;
}

async fn retried_by_the_schedule_until_it_fails(database: Database) {
    let server = TestServer::start(&database).await;
    let receiver = Receiver::scripted(|_, _| Reply::status(500)).await;
    let (id, _) = server.webhook(&receiver.url(), &["content.ready"]).await;
    let mut watch = server.watch().await;
    server.publish("content.ready", "{}").await;

    let changes = watch.until(1, |change| change.status() == DeliveryStatus::Failed).await;
    assert_eq!((changes[0].attempts, changes[0].last_error.as_deref()), (6, Some("HTTP 500")));
    let received = receiver.wait_for(6).await;
    let ids: Vec<&str> = received.iter().map(|got| got.header("x-shortform-delivery-id")).collect();
    assert!(ids.iter().all(|id| *id == ids[0]));
    let attempts: Vec<&str> = received.iter().map(|got| got.header("x-shortform-delivery-attempt")).collect();
    assert_eq!(attempts, ["1", "2", "3", "4", "5", "6"]);

    let delivery = server.get(&format!("/v1/webhooks/{id}/deliveries/{}", ids[0])).await.data();
    assert_eq!(delivery["status"], "failed");
    let log = delivery["attemptLog"].as_array().unwrap();
    let numbers: Vec<i64> = log.iter().map(|attempt| attempt["number"].as_i64().unwrap()).collect();
    assert_eq!(numbers, [1, 2, 3, 4, 5, 6]);
    assert!(log.iter().all(|attempt| attempt["statusCode"] == 500 && attempt["error"] == "HTTP 500"));
    assert!(log.iter().all(|attempt| attempt["response"] == "OK" && attempt["responseTime"].is_i64()));
    server.stop().await;
}

async fn retry_after_lengthens_a_wait(database: Database) {
    let server = TestServer::start(&database).await;
    let receiver =
        Receiver::scripted(|_, _| Reply { headers: vec![("retry-after", "3600".to_owned())], ..Reply::status(429) })
            .await;
    server.webhook(&receiver.url(), &["content.ready"]).await;
    let mut watch = server.watch().await;
    server.publish("content.ready", "{}").await;
    let change = watch.until(1, |change| change.change() == DeliveryChange::Attempted).await.remove(0);
    assert_eq!(change.status(), DeliveryStatus::Pending);
    let (next, at) = (change.next_attempt_at.unwrap().seconds, change.occurred_at.unwrap().seconds);
    assert!((3599..=3601).contains(&(next - at)), "{}", next - at);
    server.stop().await;
}

async fn both_secrets_sign_after_a_rotation(database: Database) {
    let server = TestServer::start(&database).await;
    let receiver = Receiver::start().await;
    let (id, oldest) = server.webhook(&receiver.url(), &["content.ready"]).await;
    let mut secrets = vec![oldest];
    for _ in 0..2 {
        let rotated = server.post(&format!("/v1/webhooks/{id}/rotate-secret"), "{}").await.data();
        secrets.insert(0, rotated["secret"].as_str().unwrap().to_owned());
        server.publish("content.ready", "{}").await;
        let got = receiver.wait_for(secrets.len() - 1).await.pop().unwrap();
        // The one before the last is dropped by the second rotation.
        let (new, old) = (&secrets[0], &secrets[1]);
        let both = format!("{},{}", shortform(new, &got.body), shortform(old, &got.body));
        assert_eq!(got.header("x-shortform-signature"), both);
        assert_eq!(got.header("webhook-signature"), format!("{} {}", standard(new, &got), standard(old, &got)));
    }
    server.stop().await;
}

async fn test_events_go_to_disabled_webhooks_and_are_not_retried(database: Database) {
    let server = TestServer::start(&database).await;
    let receiver = Receiver::scripted(|_, _| Reply { body: "no".to_owned(), ..Reply::status(503) }).await;
    let (id, _) = server.webhook(&receiver.url(), &["export.ready", "content.ready"]).await;
    server.patch(&format!("/v1/webhooks/{id}"), r#"{"status":"disabled"}"#).await.data();
    let test = server.call(http::Method::POST, &format!("/v1/webhooks/{id}/test"), "").await.data();
    assert_eq!(
        (&test["status"], &test["statusCode"], &test["response"]),
        (&json!("failed"), &json!(503), &json!("no"))
    );
    assert!(receiver.received()[0].body.starts_with(r#"{"event":"export.ready","data":{"#));
    let delivery = test["deliveryId"].as_str().unwrap();
    let recorded = server.get(&format!("/v1/webhooks/{id}/deliveries/{delivery}")).await.data();
    assert_eq!((&recorded["status"], &recorded["attempts"]), (&json!("failed"), &json!(1)));
    assert_eq!(recorded.get("nextAttemptAt"), None);
    server.stop().await;
}

async fn disabled_webhooks_hold_their_deliveries(database: Database) {
    let config = shortkit_webhooks::config::Config {
        retry_schedule: RetrySchedule::parse("0s,100ms").unwrap(),
        ..config(&database)
    };
    let server = TestServer::with(config).await;
    let receiver = Receiver::scripted(|index, _| Reply::status(if index == 0 { 500 } else { 200 })).await;
    let (id, _) = server.webhook(&receiver.url(), &["content.ready"]).await;
    let (other, _) = server.webhook(&receiver.url(), &["export.ready"]).await;
    let mut watch = server.watch().await;
    server.publish("content.ready", "{}").await;
    watch.until(1, |change| change.change() == DeliveryChange::Attempted).await;
    server.patch(&format!("/v1/webhooks/{id}"), r#"{"status":"disabled"}"#).await.data();
    assert_eq!(server.publish("content.ready", "{}").await, 0, "no new deliveries");

    // By the time that a delivery planned later has been made again, the held one would have been, too.
    let held = server.get(&format!("/v1/webhooks/{id}/deliveries")).await.data();
    let due = held[0]["nextAttemptAt"].as_str().unwrap().to_owned();
    loop {
        server.post(&format!("/v1/webhooks/{other}/test"), r#"{"event":"export.ready"}"#).await.data();
        let last = receiver.received().pop().unwrap();
        if last.header("x-shortform-timestamp") > due.as_str() {
            break;
        }
    }
    let held = server.get(&format!("/v1/webhooks/{id}/deliveries?status=pending")).await;
    assert_eq!((&held.json()["meta"]["total"], &held.data()[0]["attempts"]), (&json!(1), &json!(1)));

    server.patch(&format!("/v1/webhooks/{id}"), r#"{"status":"active"}"#).await.data();
    let done = watch.until(1, |change| change.webhook_id == id && change.status() == DeliveryStatus::Success).await;
    assert_eq!(done[0].attempts, 2);
    server.stop().await;
}

/// The engine remembers when it has something to do next; it looks again all the same.
async fn what_is_due_sooner_than_was_known_is_found(database: Database) {
    let schedule = RetrySchedule::parse("0s,1h").unwrap();
    let server = TestServer::with(Config { retry_schedule: schedule, ..config(&database) }).await;
    let receiver = Receiver::scripted(|_, _| Reply::status(500)).await;
    server.webhook(&receiver.url(), &["content.ready"]).await;
    let mut watch = server.watch().await;
    for _ in 0..2 {
        server.publish("content.ready", "{}").await;
    }
    watch.until(2, |change| change.attempts == 1 && change.next_attempt_at.is_some()).await;
    for expected in 3..5 {
        let one = "SELECT id FROM deliveries WHERE attempts = 1 LIMIT 1";
        database.execute(&format!("UPDATE deliveries SET next_attempt_at_ms = 1 WHERE id = ({one})")).await;
        receiver.wait_for(expected).await;
        watch.until(1, |change| change.attempts == 2).await;
    }
    server.stop().await;
}

/// A delivery that a node has leased which is gone.
async fn lose_lease(database: &Database, environment: &str) {
    let insert = format!(
        "INSERT INTO deliveries (webhook_id, id, organization, environment, event_id, event_type, status, attempts, granted, \
         once, lost_leases, lease_node, lease_expires_at_ms, created_at_ms) VALUES ('whk_1', 'del_1', 'acme', \
         '{environment}', 'evt_1', 'content.ready', 'pending', 1, FALSE, FALSE, 0, 'node_1', 1, 1)"
    );
    assert_eq!(database.execute(&insert).await, 1);
}

/// Every second it is tried in vain; what is due goes out.
async fn what_cannot_be_rescued_holds_up_nothing(database: Database) {
    let schedule = RetrySchedule::parse("0s,2s").unwrap();
    let server = TestServer::with(Config { retry_schedule: schedule, ..config(&database) }).await;
    let receiver = Receiver::scripted(|index, _| Reply::status(if index == 0 { 500 } else { 200 })).await;
    server.webhook(&receiver.url(), &["content.ready"]).await;
    // The attempt that was lost cannot be recorded beside this one.
    database
        .execute("INSERT INTO attempts (delivery_id, number, started_at_ms, duration_ms) VALUES ('del_1', 9, 1, 0)")
        .await;
    database.execute("CREATE UNIQUE INDEX one_only ON attempts (delivery_id) WHERE delivery_id = 'del_1'").await;
    lose_lease(&database, "test").await;
    let mut watch = server.watch().await;
    server.publish("content.ready", "{}").await;
    let sent = watch.until(1, |change| change.status() == DeliveryStatus::Success).await.remove(0);
    assert_eq!(sent.attempts, 2);
    let left = "SELECT 1 FROM deliveries WHERE lease_node = 'node_1'";
    assert_eq!(database.rows(left).await.len(), 1, "it could not be rescued");
    server.stop().await;
}

/// Neither while a node works nor when it starts.
async fn a_lease_of_no_tenant_holds_up_no_other(database: Database) {
    let schedule = || RetrySchedule::parse("0s,1h").unwrap();
    let receiver = Receiver::scripted(|index, _| Reply::status(if index == 0 { 500 } else { 200 })).await;
    let server = TestServer::with(Config { retry_schedule: schedule(), ..config(&database) }).await;
    server.webhook(&receiver.url(), &["content.ready"]).await;
    let mut watch = server.watch().await;
    server.publish("content.ready", "{}").await;
    watch.until(1, |change| change.attempts == 1 && change.next_attempt_at.is_some()).await;
    lose_lease(&database, "nowhere").await;
    let lose_other = "UPDATE deliveries SET next_attempt_at_ms = NULL, lease_node = 'node_1', lease_expires_at_ms = 2 \
        WHERE environment = 'test'";
    assert_eq!(database.execute(lose_other).await, 1);
    watch.until(1, |change| change.status() == DeliveryStatus::Success).await;
    server.stop().await;

    let lost_again = "UPDATE deliveries SET status = 'pending', next_attempt_at_ms = NULL, lease_node = 'node_1', \
        lost_leases = 0, lease_expires_at_ms = CASE environment WHEN 'nowhere' THEN 1 ELSE 2 END";
    assert_eq!(database.execute(lost_again).await, 2);
    let server = TestServer::with(Config { retry_schedule: schedule(), ..config(&database) }).await;
    receiver.wait_for(3).await;
    let left = "SELECT 1 FROM deliveries WHERE lease_node = 'node_1'";
    assert_eq!(database.rows(left).await.len(), 0, "all were rescued");
    server.stop().await;
}

async fn deleted_webhooks_take_their_deliveries_along(database: Database) {
    let server = TestServer::start(&database).await;
    let receiver = Receiver::scripted(|_, _| Reply { delay: Duration::from_millis(200), ..Reply::status(500) }).await;
    let (id, _) = server.webhook(&receiver.url(), &["content.ready"]).await;
    server.publish("content.ready", "{}").await;
    receiver.wait_for(1).await;
    server.delete(&format!("/v1/webhooks/{id}")).await.data();
    assert_eq!(server.get(&format!("/v1/webhooks/{id}/deliveries")).await.status, 404);
    assert_eq!(server.publish("content.ready", "{}").await, 0);
    assert_eq!(server.get("/v1/webhooks").await.json()["meta"]["total"], 0);
    // Stopping waits for the attempt on the wire; it was not made again.
    server.stop().await;
    assert_eq!(receiver.received().len(), 1);
}

async fn a_retry_by_hand_is_one_attempt(database: Database) {
    let server = TestServer::start(&database).await;
    let receiver = Receiver::scripted(|index, _| Reply::status(if index < 7 { 500 } else { 200 })).await;
    let (id, _) = server.webhook(&receiver.url(), &["content.ready"]).await;
    let mut watch = server.watch().await;
    server.publish("content.ready", "{}").await;
    let failed = watch.until(1, |change| change.status() == DeliveryStatus::Failed).await.remove(0);
    let path = format!("/v1/webhooks/{id}/deliveries/{}/retry", failed.delivery_id);

    let retried = server.post(&path, "{}").await.data();
    assert_eq!((&retried["status"], &retried["attempts"]), (&json!("pending"), &json!(7)));
    let change = watch.until(1, |change| change.change() == DeliveryChange::Retried).await.remove(0);
    assert_eq!((change.status(), change.attempts), (DeliveryStatus::Pending, 7));
    let again = watch.until(1, |change| change.status() == DeliveryStatus::Failed).await.remove(0);
    assert_eq!(again.attempts, 7);

    assert_eq!(server.post(&path, "{}").await.data()["attempts"], 8);
    let success = watch.until(1, |change| change.status() == DeliveryStatus::Success).await.remove(0);
    assert_eq!(success.attempts, 8);
    let refused = server.post(&path, "{}").await;
    assert_eq!((refused.status, &refused.json()["error"]["code"]), (409, &json!("CONFLICT")));
    server.stop().await;
}

async fn the_answer_is_capped_and_kept(database: Database) {
    let server = TestServer::start(&database).await;
    let receiver = Receiver::scripted(|_, _| Reply { body: "é".repeat(100_000), ..Reply::status(200) }).await;
    let (id, _) = server.webhook(&receiver.url(), &["content.ready"]).await;
    let test = server.post(&format!("/v1/webhooks/{id}/test"), "{}").await.data();
    assert_eq!(test["status"], "success");
    assert_eq!(test["response"].as_str().unwrap(), "é".repeat(8 * 1024));
    server.stop().await;
}

async fn redirects_are_not_followed(database: Database) {
    let server = TestServer::start(&database).await;
    let target = Receiver::start().await;
    let location = target.url();
    let receiver =
        Receiver::scripted(move |_, _| Reply { headers: vec![("location", location.clone())], ..Reply::status(307) })
            .await;
    let (id, _) = server.webhook(&receiver.url(), &["content.ready"]).await;
    let test = server.post(&format!("/v1/webhooks/{id}/test"), "{}").await.data();
    assert_eq!((&test["status"], &test["lastError"]), (&json!("failed"), &json!("Redirects are not followed")));
    assert_eq!(target.received().len(), 0);
    server.stop().await;
}
