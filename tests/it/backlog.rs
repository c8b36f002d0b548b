//! What happens when too much is pending.

use std::time::Duration;

use serde_json::json;
use shortkit_webhooks::{
    config::Config,
    grpc::proto::PublishEventRequest,
    store::KeyKind,
    webhook::{Environment, RetrySchedule},
};
use tonic::Code;
use tonic_types::StatusExt;

use crate::support::{Answer, Database, Receiver, Reply, TestServer, config, on_both_databases, soon};

on_both_databases!(
    an_organisation_with_too_much_pending_is_refused_until_it_has_less,
    too_much_in_all_is_refused_to_everybody_and_reads_go_on,
    organisations_with_much_pending_leave_room_for_the_others,
);

const EVENT: &str = r#"{"event":"content.ready","data":{}}"#;

/// What failed stays pending for the rest of the test.
fn limited(database: &Database, max_backlog: u64, max_backlog_per_organization: u64) -> Config {
    let retry_schedule = RetrySchedule::parse("0s,24h").unwrap();
    Config { retry_schedule, max_backlog, max_backlog_per_organization, ..config(database) }
}

/// Two deliveries an event that nobody takes.
async fn two_webhooks(server: &TestServer) -> (Receiver, [String; 2]) {
    let receiver = Receiver::scripted(|_, _| Reply::status(500)).await;
    let (one, _) = server.webhook(&receiver.url(), &["content.ready"]).await;
    let (two, _) = server.webhook(&receiver.url(), &["content.ready"]).await;
    (receiver, [one, two])
}

fn assert_refused(answer: &Answer, status: u16, code: &str) {
    assert_eq!((answer.status, &answer.json()["error"]["code"]), (status, &json!(code)), "{}", answer.text);
    let wait: u64 = answer.headers["retry-after"].to_str().unwrap().parse().unwrap();
    assert!((1..=60).contains(&wait), "{wait}");
}

async fn an_organisation_with_too_much_pending_is_refused_until_it_has_less(database: Database) {
    let server = TestServer::with(limited(&database, 1_000, 3)).await;
    let (_receiver, ids) = two_webhooks(&server).await;
    // The second is let in, since there is room for some of its deliveries.
    assert_eq!(server.publish("content.ready", "{}").await, 2);
    assert_eq!(server.publish("content.ready", "{}").await, 2);
    assert_refused(&server.post("/v1/events", EVENT).await, 429, "RATE_LIMITED");
    let message = PublishEventRequest { event: "content.ready".to_owned(), data: "{}".to_owned() };
    let status = server.deliveries().publish_event(message).await.unwrap_err();
    let details = status.get_error_details();
    assert_eq!(
        (status.code(), details.error_info().unwrap().reason.as_str()),
        (Code::ResourceExhausted, "RATE_LIMITED")
    );
    assert!(details.retry_info().unwrap().retry_delay > Some(Duration::ZERO));

    // What was refused was not stored, the others publish, and what is there can be seen and tested.
    let listed = server.get(&format!("/v1/webhooks/{}/deliveries", ids[0])).await;
    assert_eq!(listed.json()["meta"]["total"], 2);
    let other = server.new_key(Some("other"), KeyKind::Secret, Environment::Test).await;
    let request = server.anonymous(http::Method::POST, "/v1/events").bearer_auth(other);
    let request = request.header("content-type", "application/json").body(EVENT);
    assert_eq!(server.send(request).await.status, 202);
    server.post(&format!("/v1/webhooks/{}/test", ids[0]), "{}").await.data();
    server.stop().await;

    // It is known after a restart, before anything was counted by accepting it.
    let server = TestServer::with(limited(&database, 1_000, 3)).await;
    assert_refused(&server.post("/v1/events", EVENT).await, 429, "RATE_LIMITED");
    server.delete(&format!("/v1/webhooks/{}", ids[0])).await.data();
    let accepted = async {
        while server.post("/v1/events", EVENT).await.status != 202 {
            tokio::task::yield_now().await;
        }
    };
    soon("room in the backlog", accepted).await;
    server.stop().await;
}

async fn too_much_in_all_is_refused_to_everybody_and_reads_go_on(database: Database) {
    let server = TestServer::with(limited(&database, 2, 1_000)).await;
    let (_receiver, [id, _]) = two_webhooks(&server).await;
    assert_eq!(server.publish("content.ready", "{}").await, 2);
    let other = server.new_key(Some("other"), KeyKind::Secret, Environment::Test).await;
    for key in [&server.key, &other] {
        let request = server.anonymous(http::Method::POST, "/v1/events").bearer_auth(key);
        let refused = server.send(request.header("content-type", "application/json").body(EVENT)).await;
        assert_refused(&refused, 503, "SERVICE_UNAVAILABLE");
    }
    let message = PublishEventRequest { event: "content.ready".to_owned(), data: "{}".to_owned() };
    assert_eq!(server.deliveries().publish_event(message).await.unwrap_err().code(), Code::Unavailable);
    assert_eq!(server.get(&format!("/v1/webhooks/{id}/deliveries?status=pending")).await.json()["meta"]["total"], 1);
    server.stop().await;
}

/// A key of an organisation with a webhook, and the webhook's id.
async fn organization(server: &TestServer, name: &str, receiver: &Receiver) -> (String, String) {
    let key = server.new_key(Some(name), KeyKind::Secret, Environment::Test).await;
    let body = json!({ "url": receiver.url(), "events": ["content.ready"] }).to_string();
    let made = server.send(as_json(server, &key, "/v1/webhooks", body)).await.data();
    (key, made["id"].as_str().unwrap().to_owned())
}

fn as_json(server: &TestServer, key: &str, path: &str, body: String) -> reqwest::RequestBuilder {
    let request = server.anonymous(http::Method::POST, path).bearer_auth(key);
    request.header("content-type", "application/json").body(body)
}

/// Publishes so many events; what is counted twice during a look at the counts is refused for a moment.
async fn publish_as(server: &TestServer, key: &str, count: usize) {
    for number in 0..count {
        let accepted = async {
            while server.send(as_json(server, key, "/v1/events", EVENT.to_owned())).await.status != 202 {
                tokio::task::yield_now().await;
            }
        };
        soon(&format!("that event number {number} is accepted"), accepted).await;
    }
}

/// Of 20, the first organisation gets the 10 that are its limit; others get less the less is free, and the last two places
/// are for those that have nothing.
async fn organisations_with_much_pending_leave_room_for_the_others(database: Database) {
    let server = TestServer::with(limited(&database, 20, 10)).await;
    let receiver = Receiver::scripted(|_, _| Reply::status(500)).await;
    let mut keys = Vec::new();
    for (name, room) in [("first", 10), ("second", 6), ("third", 2), ("fourth", 1), ("fifth", 1)] {
        let (key, id) = organization(&server, name, &receiver).await;
        publish_as(&server, &key, room).await;
        if name != "fifth" {
            assert_refused(
                &server.send(as_json(&server, &key, "/v1/events", EVENT.to_owned())).await,
                429,
                "RATE_LIMITED",
            );
        }
        keys.push((key, id));
    }
    let (late, _) = organization(&server, "late", &receiver).await;
    let refused = server.send(as_json(&server, &late, "/v1/events", EVENT.to_owned())).await;
    assert_refused(&refused, 503, "SERVICE_UNAVAILABLE");

    // Only what is free counts: when the first has nothing any more, there is room for all, and for it.
    let (first, id) = &keys[0];
    let delete = server.anonymous(http::Method::DELETE, &format!("/v1/webhooks/{id}")).bearer_auth(first);
    server.send(delete).await.data();
    publish_as(&server, &late, 3).await;
    publish_as(&server, &keys[3].0, 2).await;
    server.stop().await;
}
