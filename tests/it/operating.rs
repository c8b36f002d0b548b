//! What those who run a node see of it: health, metrics, and how it ends.

use std::time::Duration;

use http::Method;
use shortkit_webhooks::config::Config;
use tonic::transport::{Channel, Endpoint};
use tonic_health::pb::{HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient};

use crate::support::{Database, Kind, Receiver, Reply, TestServer, Way, config, on_both_databases, soon};

const DELIVERIES: &str = "shortkit.webhooks.v1.DeliveryService";
const SERVING: i32 = ServingStatus::Serving as i32;
const NOT_SERVING: i32 = ServingStatus::NotServing as i32;

/// With a port for those who run it.
async fn open_inside(config: Config) -> TestServer {
    TestServer::with(Config { internal_listen: Some("127.0.0.1:0".parse().unwrap()), ..config }).await
}

/// What a port answers to a GET without a key.
async fn fetch(address: impl std::fmt::Display, path: &str) -> (u16, String) {
    let client = reqwest::Client::builder().no_proxy().build().unwrap();
    let response = soon("an answer", client.get(format!("http://{address}{path}")).send()).await.unwrap();
    (response.status().as_u16(), response.text().await.unwrap())
}

async fn metrics(server: &TestServer) -> String {
    let (status, text) = fetch(server.internal.unwrap(), "/metrics").await;
    assert_eq!(status, 200, "{text}");
    text
}

fn health(address: impl std::fmt::Display) -> HealthClient<Channel> {
    HealthClient::new(Endpoint::from_shared(format!("http://{address}")).unwrap().connect_lazy())
}

fn of(service: &str) -> HealthCheckRequest {
    HealthCheckRequest { service: service.to_owned() }
}

async fn check(client: &mut HealthClient<Channel>, service: &str) -> i32 {
    soon("an answer", client.check(of(service))).await.unwrap().into_inner().status
}

/// Waits until readiness is told with this status.
async fn until_ready_says(address: impl std::fmt::Display + Copy, wanted: u16) -> String {
    soon("another readiness", async {
        loop {
            let (status, text) = fetch(address, "/readyz").await;
            if status == wanted {
                return text;
            }
        }
    })
    .await
}

on_both_databases! { what_happened_is_counted }

async fn what_happened_is_counted(database: Database) {
    let receiver = Receiver::scripted(|number, _| Reply::status(if number == 0 { 503 } else { 200 })).await;
    let server = open_inside(config(&database)).await;
    let (id, _) = server.webhook(&receiver.url(), &["content.ready"]).await;
    let _watch = server.watch().await;
    server.publish("content.ready", r#"{"secret":"canary"}"#).await;
    receiver.wait_for(2).await;
    assert_eq!(server.post("/v1/events", "{}").await.status, 400);
    assert_eq!(fetch(server.address, "/v1/webhooks").await.0, 401);
    let has = |text: &str, lines: &[&str]| lines.iter().all(|line| text.lines().any(|found| found == *line));
    let lines = [
        r#"shortkit_attempts_total{kind="first",result="http_5xx"} 1"#,
        r#"shortkit_attempts_total{kind="retry",result="success"} 1"#,
        "shortkit_attempt_duration_seconds_count 2",
        "shortkit_first_attempt_delay_seconds_count 1",
        "shortkit_attempts_in_flight 0",
        "shortkit_deliveries_created_total 1",
        r#"shortkit_deliveries_ended_total{status="success"} 1"#,
        "shortkit_deliveries_pending 0",
        "shortkit_deliveries_held 0",
        "shortkit_publish_waiting_bytes 0",
        "shortkit_streams_open 1",
        "shortkit_database_available 1",
        "shortkit_results_dropped_total 0",
        "shortkit_commits_failed_total 0",
        &format!(
            r#"grpc_server_handled_total{{grpc_service="{DELIVERIES}",grpc_method="PublishEvent",grpc_code="OK"}} 1"#
        ),
        &format!(
            r#"grpc_server_handled_total{{grpc_service="{DELIVERIES}",grpc_method="PublishEvent",grpc_code="InvalidArgument"}} 1"#
        ),
        r#"grpc_server_handled_total{grpc_service="shortkit.webhooks.v1.WebhookService",grpc_method="ListWebhooks",grpc_code="Unauthenticated"} 1"#,
        &format!(r#"grpc_server_handling_seconds_count{{grpc_service="{DELIVERIES}",grpc_method="PublishEvent"}} 2"#),
    ];
    // The second result is recorded after it arrived, and what is pending is counted each second.
    soon("the numbers", async { while !has(&metrics(&server).await, &lines) {} }).await;
    let text = metrics(&server).await;
    assert!(!["acme", "canary", &id, "127.0.0.1"].iter().any(|word| text.contains(word)), "{text}");
    let commits = text.lines().find_map(|line| line.strip_prefix("shortkit_commit_duration_seconds_count "));
    assert!(commits.is_some_and(|count| count != "0"), "{text}");
    server.stop().await;
}

#[tokio::test]
async fn what_is_inside_is_nowhere_else() {
    let database = Database::fresh(Kind::Sqlite).await;
    let server = open_inside(config(&database)).await;
    let inside = server.internal.unwrap();
    for path in ["/livez", "/readyz"] {
        assert_eq!(fetch(inside, path).await, (200, "ok\n".to_owned()));
    }
    assert_eq!(check(&mut health(inside), DELIVERIES).await, SERVING);
    let (status, text) = fetch(inside, "/v1/webhooks").await;
    assert!(status == 404 && text.contains("/metrics"), "{status} {text}");
    for path in ["/livez", "/readyz", "/metrics"] {
        assert_eq!(fetch(server.address, path).await.0, 404, "{path}");
    }
    let refused = health(server.address).check(of("")).await.unwrap_err();
    assert_eq!(refused.code(), tonic::Code::Unimplemented, "{refused}");
    server.stop().await;

    // Without a port of its own, health is where calls are, and metrics are not.
    let server = TestServer::with(config(&database)).await;
    assert_eq!(fetch(server.address, "/readyz").await, (200, "ok\n".to_owned()));
    assert_eq!(server.send(server.anonymous(Method::POST, "/readyz")).await.status, 405);
    let head = server.send(server.anonymous(Method::HEAD, "/readyz")).await;
    assert_eq!((head.status, head.text.as_str()), (200, ""));
    assert_eq!(fetch(server.address, "/metrics").await.0, 404);
    server.stop().await;
    let server = TestServer::with(Config { health: false, ..config(&database) }).await;
    assert_eq!(fetch(server.address, "/readyz").await.0, 404);
    server.stop().await;
}

/// A balancer that goes by readiness has time to look away before anybody is turned away.
#[tokio::test]
async fn a_node_says_that_it_stops_before_it_does() {
    let database = Database::fresh(Kind::Sqlite).await;
    let (shutdown_delay, shutdown_grace) = (Duration::from_secs(2), Duration::from_secs(600));
    let server = TestServer::with(Config { shutdown_delay, shutdown_grace, ..config(&database) }).await;
    server.tell_to_stop();
    assert_eq!(until_ready_says(server.address, 503).await, "shutting down\n");
    assert_eq!(fetch(server.address, "/livez").await.0, 200);
    assert_eq!(server.get("/v1/webhooks").await.status, 200, "it still serves");
    let mut watched = health(server.address).watch(of(DELIVERIES)).await.unwrap().into_inner();
    let mut next = async || soon("what is told", watched.message()).await.unwrap().map(|told| told.status);
    assert_eq!(next().await, Some(NOT_SERVING));
    while next().await.is_some() {}
    server.stop().await;
}

/// Whoever watches the health of a node, which needs no key, does not hold up its end.
#[tokio::test]
async fn those_who_watch_health_are_told_and_let_go() {
    let database = Database::fresh(Kind::Sqlite).await;
    let server = TestServer::with(Config { shutdown_grace: Duration::from_secs(600), ..config(&database) }).await;
    let mut watched = health(server.address).watch(of(DELIVERIES)).await.unwrap().into_inner();
    let mut next = async || soon("what is told", watched.message()).await.unwrap().map(|told| told.status);
    assert_eq!(next().await, Some(SERVING));
    server.tell_to_stop();
    assert_eq!(next().await, Some(NOT_SERVING));
    assert_eq!(next().await, None);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_without_its_database_is_not_ready() {
    let database = Database::fresh(Kind::Postgres).await;
    let way = Way::to(&database).await;
    let server = open_inside(Config { database_url: way.url.clone(), ..config(&database) }).await;
    let inside = server.internal.unwrap();
    let mut client = health(inside);
    assert_eq!(check(&mut client, DELIVERIES).await, SERVING);
    way.close(true);
    way.go_silent();
    assert_eq!(until_ready_says(inside, 503).await, "the database does not answer\n");
    assert_eq!(fetch(inside, "/livez").await.0, 200, "nothing gets better by starting it again");
    assert_eq!((check(&mut client, DELIVERIES).await, check(&mut client, "").await), (NOT_SERVING, SERVING));
    assert!(metrics(&server).await.contains("\nshortkit_database_available 0\n"));
    way.close(false);
    assert_eq!(until_ready_says(inside, 200).await, "ok\n");
    assert_eq!(check(&mut client, DELIVERIES).await, SERVING);
    server.stop().await;
}
