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
