//! How fast an organisation may call.

use http::{HeaderMap, Method};
use shortkit_webhooks::{
    clock,
    config::Config,
    grpc::proto,
    store::KeyKind,
    webhook::{Environment, RateLimit},
};
use tonic::{Code, Request};
use tonic_types::StatusExt;

use crate::support::{Answer, Database, Kind, TestServer, config};

/// So few calls an hour that none comes back while a test runs.
async fn server(calls: u32) -> (TestServer, Database) {
    let database = Database::fresh(Kind::Sqlite).await;
    let rate_limit = Some(RateLimit::parse(&format!("{calls}/h")).unwrap());
    (TestServer::with(Config { rate_limit, ..config(&database) }).await, database)
}

fn number(headers: &HeaderMap, name: &str) -> i64 {
    headers.get(name).unwrap_or_else(|| panic!("header {name}")).to_str().unwrap().parse().unwrap()
}

/// Limit and what is left of it, as the headers of an answer say; the whole is there again after now.
fn left(headers: &HeaderMap) -> (i64, i64) {
    assert!(number(headers, "x-ratelimit-reset") > clock::now().secs(), "{headers:?}");
    (number(headers, "x-ratelimit-limit"), number(headers, "x-ratelimit-remaining"))
}

async fn with_key(server: &TestServer, key: &str) -> Answer {
    server.send(server.anonymous(Method::GET, "/v1/webhooks").bearer_auth(key)).await
}

#[tokio::test]
async fn an_organisation_has_so_many_calls() {
    let (server, _database) = server(5).await;
    assert_eq!(left(&server.get("/v1/webhooks").await.headers), (5, 4));
    // Errors count and say so as well.
    let missing = server.get("/v1/webhooks/whk_none").await;
    assert_eq!((missing.status, left(&missing.headers)), (404, (5, 3)));
    // Also those of a body that cannot be read.
    let wrong = server.post("/v1/events", "{").await;
    assert_eq!((wrong.status, left(&wrong.headers)), (400, (5, 2)));
    // Another key of the organisation, another protocol, and a stream: all from the same allowance.
    let second = server.new_key(Some("acme"), KeyKind::Secret, Environment::Test).await;
    assert_eq!(left(&with_key(&server, &second).await.headers), (5, 1));
    let stream = server.deliveries().watch_deliveries(proto::WatchDeliveriesRequest::default()).await.unwrap();
    assert_eq!(left(&stream.metadata().clone().into_headers()), (5, 0));

    let refused = server.get("/v1/webhooks").await;
    assert_eq!((refused.status, refused.json()["error"]["code"].as_str()), (429, Some("RATE_LIMITED")));
    assert_eq!(left(&refused.headers), (5, 0));
    let retry_after = number(&refused.headers, "retry-after");
    // A fifth of an hour, less what this test has taken.
    assert!((600..=720).contains(&retry_after), "{retry_after}");
    let refused = server.webhooks().list_webhooks(proto::ListWebhooksRequest::default()).await.unwrap_err();
    assert_eq!((refused.code(), left(&refused.metadata().clone().into_headers())), (Code::ResourceExhausted, (5, 0)));
    let details = refused.get_error_details();
    assert_eq!(details.error_info().expect("ErrorInfo").reason, "RATE_LIMITED");
    assert!(details.retry_info().expect("RetryInfo").retry_delay.unwrap().as_secs() >= 600);
    server.stop().await;
}

/// Also what there is not: a caller that has a bug uses up its allowance as any other, and sees it.
#[tokio::test]
async fn paths_that_there_are_not_count() {
    let (server, _database) = server(4).await;
    for (method, path, status, remaining) in [
        (Method::GET, "/v1/nowhere", 404, 3),
        (Method::PUT, "/v1/webhooks", 405, 2),
        (Method::GET, "/v1/webhooks/%zz", 400, 1),
        (Method::OPTIONS, "/v1/webhooks", 204, 0),
        (Method::GET, "/v1/nowhere", 404, 0),
    ] {
        let answer = server.send(server.anonymous(method, path).bearer_auth(&server.key)).await;
        assert_eq!((answer.status, left(&answer.headers)), (status, (4, remaining)), "{path}");
        assert_eq!(answer.headers.contains_key("allow"), [204, 405].contains(&status), "{path}");
    }
    for key in ["", "sk_test_nobody"] {
        let answer = server.send(server.anonymous(Method::GET, "/v1/nowhere").bearer_auth(key)).await;
        assert_eq!(answer.status, 404);
    }
    server.stop().await;
}

#[tokio::test]
async fn nobody_uses_up_what_is_another_s() {
    let (mut server, _database) = server(1).await;
    assert_eq!(server.get("/v1/webhooks").await.status, 200);
    assert_eq!(server.get("/v1/webhooks").await.status, 429);
    let live = server.new_key(Some("acme"), KeyKind::Secret, Environment::Live).await;
    assert_eq!(with_key(&server, &live).await.status, 200, "another environment");
    let other = server.new_key(Some("other"), KeyKind::Secret, Environment::Test).await;
    assert_eq!(with_key(&server, &other).await.status, 200, "another organisation");
    let nobody = with_key(&server, "sk_test_none").await;
    assert!(nobody.status == 401 && !nobody.headers.contains_key("x-ratelimit-limit"));

    // Those who act for others are trusted not to.
    server.key = server.new_key(None, KeyKind::Service, Environment::Test).await;
    for _ in 0..3 {
        let mut request = Request::new(proto::ListWebhooksRequest::default());
        request.metadata_mut().insert("x-shortkit-organization", "acme".parse().unwrap());
        let answer = server.webhooks().list_webhooks(request).await.unwrap();
        assert!(!answer.metadata().contains_key("x-ratelimit-limit"));
    }
    server.stop().await;
}
