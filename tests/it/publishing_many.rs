//! Many events in one call: all of them, or none.

use http::Method;
use serde_json::{Value, json};
use shortkit_webhooks::{
    grpc::proto::{DeliveryStatus, PublishEventRequest, PublishEventsRequest},
    store::KeyKind,
    webhook::Environment,
};
use tonic::Code;
use tonic_types::StatusExt;

use crate::support::{Database, Kind, Receiver, TestServer, on_both_databases, soon};

on_both_databases!(
    all_in_the_order_given,
    none_when_one_is_wrong,
    done_once_for_a_key,
    beside_others_as_well,
    a_stop_gives_back_what_a_caller_left,
    what_cannot_be_read_is_set_aside_until_it_is_mended,
    refused_as_a_whole,
    not_more_deliveries_than_one_commit_should_have,
);

/// More events than one commit otherwise takes.
const MANY: usize = 1_000;

fn events(count: usize) -> Value {
    let event = |number: usize| {
        let event = if number.is_multiple_of(2) { "content.ready" } else { "export.ready" };
        json!({ "event": event, "data": { "number": number } })
    };
    json!({ "events": (0..count).map(event).collect::<Vec<_>>() })
}

async fn all_in_the_order_given(database: Database) {
    let server = TestServer::start(&database).await;
    let receiver = Receiver::start().await;
    let (webhook, _) = server.webhook(&receiver.url(), &["content.ready"]).await;
    let (both, _) = server.webhook(&receiver.url(), &["content.ready", "export.ready"]).await;
    let answer = server.post("/v1/events/batch", &events(MANY).to_string()).await;
    assert_eq!(answer.status, 202, "{}", answer.text);
    let accepted = answer.data()["events"].as_array().unwrap().clone();
    let ids: Vec<&str> = accepted.iter().map(|event| event["id"].as_str().unwrap()).collect();
    assert!(ids.len() == MANY && ids.is_sorted() && ids.iter().all(|id| id.starts_with("evt_")));
    let deliveries = accepted.iter().map(|event| event["deliveries"].as_i64().unwrap());
    assert!(deliveries.eq((0..MANY).map(|number| if number.is_multiple_of(2) { 2 } else { 1 })));

    let got = receiver.wait_for(MANY + MANY / 2).await;
    let mut numbers: Vec<(String, u64)> = got
        .iter()
        .map(|got| {
            let body: Value = serde_json::from_str(&got.body).unwrap();
            (body["webhookId"].as_str().unwrap().to_owned(), body["data"]["number"].as_u64().unwrap())
        })
        .collect();
    numbers.sort();
    let mut expected: Vec<_> = (0..MANY as u64).map(|number| (both.clone(), number)).collect();
    expected.extend((0..MANY as u64).filter(|number| number.is_multiple_of(2)).map(|number| (webhook.clone(), number)));
    expected.sort();
    assert_eq!(numbers, expected);
    server.stop().await;
}

async fn none_when_one_is_wrong(database: Database) {
    let server = TestServer::start(&database).await;
    let receiver = Receiver::start().await;
    let (webhook, _) = server.webhook(&receiver.url(), &["content.ready"]).await;
    let mut deliveries = server.deliveries();
    let event = |event: &str, data: &str| PublishEventRequest { event: event.to_owned(), data: data.to_owned() };
    for (before, wrong, field) in [
        (1, event("nope", "{}"), "events[1].event"),
        (1, event("content.ready", "[]"), "events[1].data"),
        (150, event("content.ready", "[]"), "events[150].data"),
    ] {
        let mut events = vec![event("content.ready", "{}"); before];
        events.push(wrong);
        let message = PublishEventsRequest { events };
        let status = deliveries.publish_events(message).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument);
        let details = status.get_error_details();
        assert_eq!(details.bad_request().unwrap().field_violations[0].field, field);
        assert!(status.message().starts_with(field), "{}", status.message());
    }
    let listed = server.get(&format!("/v1/webhooks/{webhook}/deliveries")).await;
    assert_eq!(listed.json()["meta"]["total"], 0);
    server.stop().await;
}

async fn done_once_for_a_key(database: Database) {
    let server = TestServer::start(&database).await;
    let (webhook, _) = server.webhook("https://example.com/", &["content.ready"]).await;
    let body = events(MANY).to_string();
    let mut answers = Vec::new();
    for _ in 0..2 {
        let request = server.request(Method::POST, "/v1/events/batch").header("content-type", "application/json");
        answers.push(server.send(request.header("idempotency-key", "k").body(body.clone())).await);
    }
    assert_eq!(answers[0].status, 202, "{}", answers[0].text);
    assert_eq!(answers[0].text, answers[1].text);
    assert_eq!(answers[1].headers["idempotency-replayed"], "true");
    let listed = server.get(&format!("/v1/webhooks/{webhook}/deliveries")).await;
    assert_eq!(listed.json()["meta"]["total"], MANY / 2);
    server.stop().await;
}

/// While others write, it is stored in parts.
async fn beside_others_as_well(database: Database) {
    let server = TestServer::start(&database).await;
    let receiver = Receiver::start().await;
    let (webhook, _) = server.webhook(&receiver.url(), &["content.ready", "export.ready"]).await;
    let quiet = server.new_key(Some("quiet"), KeyKind::Secret, Environment::Test).await;
    let body = events(MANY).to_string();
    let batch = async || {
        let request = server.request(Method::POST, "/v1/events/batch").header("content-type", "application/json");
        server.send(request.header("idempotency-key", "k").body(body.clone())).await
    };
    write_with_others(&server, &quiet).await;
    let (one, other) = (batch().await, batch().await);
    assert_eq!((one.status, other.status), (202, 202), "{}", one.text);
    assert_eq!(one.text, other.text);
    let listed = server.get(&format!("/v1/webhooks/{webhook}/deliveries")).await;
    assert_eq!(listed.json()["meta"]["total"], MANY + 2, "what is answered is there");
    let got = receiver.wait_for(MANY + 2).await;
    let number = |body: &str| serde_json::from_str::<Value>(body).unwrap()["data"]["number"].as_u64();
    let mut numbers: Vec<u64> = got.iter().filter_map(|got| number(&got.body)).collect();
    numbers.sort_unstable();
    assert!(numbers.into_iter().eq(0..MANY as u64), "each once");
    assert!(database.rows("SELECT id FROM publish_parts").await.is_empty());
    server.stop().await;
}

/// Who writes alone would not notice.
async fn write_with_others(server: &TestServer, other: &str) {
    for _ in 0..2 {
        server.publish("content.ready", "{}").await;
        let request = server.anonymous(Method::POST, "/v1/events").bearer_auth(other);
        let request = request.header("content-type", "application/json").body(r#"{"event":"content.ready","data":{}}"#);
        assert_eq!(server.send(request).await.status, 202);
    }
}

/// Parts that are stored when no call is open any more are no reason to leave leases behind.
async fn a_stop_gives_back_what_a_caller_left(database: Database) {
    let server = TestServer::start(&database).await;
    let receiver = Receiver::start().await;
    server.webhook(&receiver.url(), &["content.ready", "export.ready"]).await;
    let quiet = server.new_key(Some("quiet"), KeyKind::Secret, Environment::Test).await;
    write_with_others(&server, &quiet).await;
    let request = server.request(Method::POST, "/v1/events/batch").header("content-type", "application/json");
    let caller = tokio::spawn(request.body(events(MANY).to_string()).send());
    // Kept, of which the first parts are stored now.
    let kept = "SELECT 1 FROM publish_parts WHERE NOT EXISTS (SELECT 1 FROM publish_drafts)";
    soon("parts", async { while database.rows(kept).await.is_empty() {} }).await;
    caller.abort();
    server.stop().await;
    assert!(database.rows("SELECT 1 FROM publish_parts").await.is_empty(), "all of it was accepted, and is stored");
    let leased = database.rows("SELECT 1 FROM deliveries WHERE lease_node IS NOT NULL").await;
    assert_eq!(leased.len(), 0, "an attempt of each would be used up");
}

/// As the README says.
async fn what_cannot_be_read_is_set_aside_until_it_is_mended(database: Database) {
    let server = TestServer::start(&database).await;
    let receiver = Receiver::start().await;
    let (webhook, _) = server.webhook(&receiver.url(), &["content.ready"]).await;
    let insert =
        "INSERT INTO publish_parts (id, node, lease_expires_at_ms, content) VALUES ('prt_1', 'node_gone', 1, '{')";
    database.execute(insert).await;
    let aside = "SELECT id, content FROM publish_parts WHERE lease_expires_at_ms = 9223372036854775807";
    soon("its being set aside", async { while database.rows(aside).await.is_empty() {} }).await;
    let content = json!({
        "organization": "acme",
        "environment": "test",
        "first_attempt_at_ms": 1,
        "events": [{
            "id": "evt_1",
            "event_type": "content.ready",
            "data": r#"{"of":"old"}"#,
            "created_at_ms": 1,
            "deliveries": [["del_1", webhook]],
        }],
    });
    database.execute(&format!("UPDATE publish_parts SET content = '{content}', lease_expires_at_ms = 0")).await;
    let got = receiver.wait_for(1).await.remove(0);
    assert_eq!(got.header("x-shortform-delivery-id"), "del_1");
    assert!(got.body.contains(r#""data":{"of":"old"}"#), "{}", got.body);
    assert!(database.rows("SELECT id FROM publish_parts").await.is_empty());
    server.stop().await;
}

async fn refused_as_a_whole(database: Database) {
    let server = TestServer::start(&database).await;
    for (count, reason) in [(0, "required"), (MANY + 1, "too_many")] {
        let answer = server.post("/v1/events/batch", &events(count).to_string()).await;
        assert_eq!((answer.status, answer.json()["error"]["code"].as_str()), (400, Some("VALIDATION_ERROR")));
        assert!(answer.text.contains("\"events\""), "{}", answer.text);
        let message = PublishEventsRequest {
            events: vec![PublishEventRequest { event: "content.ready".to_owned(), data: "{}".to_owned() }; count],
        };
        let status = server.deliveries().publish_events(message).await.unwrap_err();
        assert_eq!(status.get_error_details().bad_request().unwrap().field_violations[0].reason, reason);
    }
    server.stop().await;
}

async fn not_more_deliveries_than_one_commit_should_have(database: Database) {
    let server = TestServer::start(&database).await;
    for _ in 0..21 {
        server.webhook("https://example.com/", &["content.ready"]).await;
    }
    // 500 of them are of that type: 10,500 deliveries.
    let answer = server.post("/v1/events/batch", &events(MANY).to_string()).await;
    assert_eq!(answer.status, 400, "{}", answer.text);
    assert!(answer.text.contains("10000 deliveries"), "{}", answer.text);
    let answer = server.post("/v1/events/batch", &events(MANY / 10).to_string()).await;
    assert_eq!(answer.status, 202, "{}", answer.text);
    server.stop().await;
}

/// PostgreSQL makes the plans that it keeps while there is nothing, when all cost the same. One that goes through what a
/// webhook has, instead of to a delivery, shows once it has much.
#[tokio::test]
async fn what_a_result_costs_does_not_grow() {
    const FEW: i64 = 100;
    const BLOCKS: i64 = 100;
    let database = Database::fresh(Kind::Postgres).await;
    let server = TestServer::start(&database).await;
    let receiver = Receiver::start().await;
    let (webhook, _) = server.webhook(&receiver.url(), &["content.ready"]).await;
    let mut watch = server.watch().await;
    assert_eq!(server.publish("content.ready", "{}").await, 1);
    watch.until(1, |change| change.status() == DeliveryStatus::Success).await;
    let old = format!(
        "INSERT INTO deliveries (webhook_id, id, organization, environment, event_id, event_type, status, attempts, \
         granted, once, lost_leases, next_attempt_at_ms, created_at_ms) \
         SELECT '{webhook}', 'del_' || i, 'acme', 'test', 'evt_' || i, 'content.ready', \
         CASE WHEN i % 2 = 0 THEN 'success' ELSE 'pending' END, 1, FALSE, FALSE, 0, \
         CASE WHEN i % 2 = 0 THEN NULL ELSE 4102444800000 END, 1 FROM generate_series(1, 50000) AS n (i)"
    );
    database.execute(&old).await;
    // What its connection has done is counted a moment later, and is not to be counted after the reset.
    soon("the old ones are counted", async {
        let inserted = "SELECT n_tup_ins FROM pg_stat_user_tables WHERE relname = 'deliveries'";
        while database.rows(inserted).await[0].try_get_by_index::<i64>(0).unwrap() < 50_000 {}
    })
    .await;
    database.rows("SELECT pg_stat_reset()").await;
    for number in 0..FEW as usize {
        assert_eq!(server.publish("content.ready", "{}").await, 1);
        receiver.wait_for(number + 2).await;
    }
    server.stop().await;
    let blocks = soon("all that was recorded is counted", async {
        loop {
            let rows = database
                .rows(
                    "SELECT n_tup_upd, (SELECT sum(idx_blks_hit + idx_blks_read)::bigint FROM pg_statio_user_indexes \
                     WHERE relname = 'deliveries') FROM pg_stat_user_tables WHERE relname = 'deliveries'",
                )
                .await;
            let (updated, blocks): (i64, i64) = rows[0].try_get_many_by_index().unwrap();
            if updated >= FEW {
                return blocks;
            }
        }
    });
    let blocks = blocks.await / FEW;
    assert!(blocks < BLOCKS, "{blocks} blocks of indexes were read for each delivery");
}

/// Commits have a connection to themselves. When PostgreSQL ends it, that is found out once.
#[tokio::test]
async fn a_lost_connection_costs_one_publish() {
    let database = Database::fresh(Kind::Postgres).await;
    let server = TestServer::start(&database).await;
    let receiver = Receiver::start().await;
    server.webhook(&receiver.url(), &["content.ready"]).await;
    let event = json!({ "event": "content.ready", "data": {} }).to_string();
    for round in 1..4 {
        assert_eq!(server.post("/v1/events", &event).await.status, 202, "the connection is new");
        receiver.wait_for(2 * round - 1).await;
        database
            .rows(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity \
                 WHERE datname = current_database() AND query LIKE 'WITH step0%' AND pid <> pg_backend_pid()",
            )
            .await;
        let mut answer = server.post("/v1/events", &event).await;
        if answer.status == 503 {
            answer = server.post("/v1/events", &event).await;
        }
        assert_eq!(answer.status, 202, "{}", answer.text);
        receiver.wait_for(2 * round).await;
    }
    server.stop().await;
}
