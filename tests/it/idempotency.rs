//! A request with an idempotency key is done once, however often it is asked.

mod lossy_proxy;

use std::time::Duration;

use futures_util::future::join_all;
use http::Method;
use sea_orm::{ConnectionTrait, Database as SeaOrm, DatabaseConnection};
use serde_json::json;
use shortkit_webhooks::{config::Config, grpc::proto, store::KeyKind, webhook::Environment};
use tonic::{Code, Request};
use tonic_types::StatusExt;

use self::lossy_proxy::LossyProxy;
use crate::support::{Answer, Database, Kind, Receiver, Reply, TestServer, config, on_both_databases, soon};

on_both_databases!(
    the_first_answer_again,
    one_key_for_both_protocols,
    another_body_is_a_conflict,
    what_was_refused_may_be_asked_again,
    racing_requests_are_done_once,
    a_restart_forgets_nothing,
    answers_are_kept_for_a_day,
    keys_are_printable_and_short,
    tenants_have_keys_of_their_own,
    a_run_that_died_is_taken_over,
);

const EVENT: &str = r#"{"event":"content.ready","data":{"contentId":"cnt_1"}}"#;

async fn keyed(server: &TestServer, path: &str, body: &str, key: &str) -> Answer {
    let request = server.request(Method::POST, path).header("content-type", "application/json");
    server.send(request.header("idempotency-key", key).body(body.to_owned())).await
}

fn replayed(answer: &Answer) -> bool {
    answer.headers.get("idempotency-replayed").is_some_and(|value| value == "true")
}

/// Asks twice; the second answer is the first one again.
async fn twice(server: &TestServer, path: &str, body: &str, key: &str) -> Answer {
    let first = keyed(server, path, body, key).await;
    assert!((200..300).contains(&first.status) && !replayed(&first), "{first:?}");
    let again = keyed(server, path, body, key).await;
    assert_eq!((again.status, &again.text, replayed(&again)), (first.status, &first.text, true));
    first
}

async fn database(database: &Database) -> DatabaseConnection {
    SeaOrm::connect(&database.url).await.unwrap()
}

async fn count(connection: &DatabaseConnection, table: &str) -> i64 {
    let statement = format!("SELECT count(*) FROM {table}");
    let statement = sea_orm::Statement::from_string(connection.get_database_backend(), statement);
    connection.query_one_raw(statement).await.unwrap().unwrap().try_get_by_index(0).unwrap()
}

async fn the_first_answer_again(database: Database) {
    let server = TestServer::start(&database).await;
    let receiver = Receiver::scripted(|_, _| Reply::status(500)).await;
    let body = json!({ "url": receiver.url(), "events": ["content.ready"] }).to_string();
    let id = twice(&server, "/v1/webhooks", &body, "k").await.data()["id"].as_str().unwrap().to_owned();
    assert_eq!(server.get("/v1/webhooks").await.json()["meta"]["total"], 1);
    let path = format!("/v1/webhooks/{id}");
    twice(&server, &format!("{path}/rotate-secret"), "", "k").await;
    let test = twice(&server, &format!("{path}/test"), "{}", "k").await.data();
    assert_eq!(receiver.wait_for(1).await.len(), 1);
    let retry = format!("{path}/deliveries/{}/retry", test["deliveryId"].as_str().unwrap());
    assert_eq!(twice(&server, &retry, "", "k").await.data()["attempts"], 2);
    twice(&server, "/v1/events", EVENT, "k").await;
    // Another key is another request.
    let other = keyed(&server, "/v1/events", EVENT, "other").await;
    assert!(other.status == 202 && !replayed(&other));

    // The answers of two of them carry a secret.
    let connection = self::database(&database).await;
    let sql = "SELECT answer FROM idempotency_keys";
    let sql = sea_orm::Statement::from_string(connection.get_database_backend(), sql);
    for row in connection.query_all_raw(sql).await.unwrap() {
        use base64::{Engine, engine::general_purpose::STANDARD};
        let answer = STANDARD.decode(row.try_get_by_index::<String>(0).unwrap()).unwrap();
        let shows = |text: &[u8]| answer.windows(text.len()).any(|window| window == text);
        assert!(!shows(b"whsec_") && !shows(id.as_bytes()), "it is sealed");
    }
    server.stop().await;
}

async fn one_key_for_both_protocols(database: Database) {
    let server = TestServer::start(&database).await;
    let first = keyed(&server, "/v1/events", EVENT, "k").await.data();
    let publish = |data: &str| {
        let message = proto::PublishEventRequest { event: "content.ready".to_owned(), data: data.to_owned() };
        let mut request = Request::new(message);
        request.metadata_mut().insert("idempotency-key", "k".parse().unwrap());
        request
    };
    let again = server.deliveries().publish_event(publish(r#"{"contentId":"cnt_1"}"#)).await.unwrap();
    assert_eq!(again.metadata().get("idempotency-replayed").unwrap(), "true");
    assert_eq!(again.into_inner().id, first["id"].as_str().unwrap());
    let other = server.deliveries().publish_event(publish("{}")).await.unwrap_err();
    assert_eq!(other.code(), Code::FailedPrecondition);
    assert_eq!(other.get_error_details().error_info().expect("ErrorInfo").reason, "CONFLICT");
    server.stop().await;
}

async fn another_body_is_a_conflict(database: Database) {
    let server = TestServer::start(&database).await;
    let (one, _) = server.webhook("https://example.com/", &["content.ready"]).await;
    let (other, _) = server.webhook("https://example.com/", &["content.ready"]).await;
    assert_eq!(keyed(&server, "/v1/events", EVENT, "k").await.status, 202);
    let conflict = keyed(&server, "/v1/events", r#"{"event":"content.ready","data":{}}"#, "k").await;
    assert_eq!((conflict.status, conflict.json()["error"]["code"].as_str()), (409, Some("CONFLICT")));
    // What the path says belongs to the request.
    assert_eq!(keyed(&server, &format!("/v1/webhooks/{one}/rotate-secret"), "", "k").await.status, 200);
    assert_eq!(keyed(&server, &format!("/v1/webhooks/{other}/rotate-secret"), "", "k").await.status, 409);
    server.stop().await;
}

async fn what_was_refused_may_be_asked_again(database: Database) {
    let server = TestServer::start(&database).await;
    let refused = keyed(&server, "/v1/events", r#"{"event":"nope","data":{}}"#, "k").await;
    assert_eq!(refused.status, 400);
    assert_eq!(keyed(&server, "/v1/events", EVENT, "k").await.status, 202);
    assert_eq!(keyed(&server, "/v1/webhooks/whk_none/test", "", "k").await.status, 404);
    assert_eq!(keyed(&server, "/v1/webhooks/whk_none/test", "", "k").await.status, 404);
    assert_eq!(count(&self::database(&database).await, "idempotency_keys").await, 1);
    server.stop().await;
}

/// Asks 50 times at once; every answer is the same, and one of them is the first.
async fn race(servers: &[&TestServer], path: &str, body: &str) -> String {
    let asked = (0..50).map(|number| keyed(servers[number % servers.len()], path, body, "race"));
    let answers = soon("50 answers", join_all(asked)).await;
    assert!(answers.iter().all(|answer| (200..300).contains(&answer.status)), "{answers:?}");
    assert!(answers.iter().all(|answer| answer.text == answers[0].text), "{answers:?}");
    assert_eq!(answers.iter().filter(|answer| !replayed(answer)).count(), 1, "{answers:?}");
    answers[0].data()["id"].as_str().unwrap_or_default().to_owned()
}

async fn racing_requests_are_done_once(database: Database) {
    let server = TestServer::start(&database).await;
    let receiver = Receiver::scripted(|_, _| Reply { delay: Duration::from_millis(200), ..Reply::status(200) }).await;
    let body = json!({ "url": receiver.url(), "events": ["content.ready"] }).to_string();
    let id = race(&[&server], "/v1/webhooks", &body).await;
    assert_eq!(server.get("/v1/webhooks").await.json()["meta"]["total"], 1);
    race(&[&server], &format!("/v1/webhooks/{id}/test"), "").await;
    assert_eq!(receiver.received().len(), 1);
    race(&[&server], "/v1/events", EVENT).await;
    // The test's and the one published.
    assert_eq!(count(&self::database(&database).await, "events").await, 2);
    server.stop().await;
}

#[tokio::test]
async fn nodes_share_their_keys() {
    let database = Database::fresh(Kind::Postgres).await;
    let one = TestServer::start(&database).await;
    let mut other = TestServer::start(&database).await;
    other.key.clone_from(&one.key);
    let first = keyed(&one, "/v1/events", EVENT, "k").await;
    let again = keyed(&other, "/v1/events", EVENT, "k").await;
    assert_eq!((again.text.as_str(), replayed(&again)), (first.text.as_str(), true));
    let receiver = Receiver::start().await;
    let (id, _) = one.webhook(&receiver.url(), &["content.ready"]).await;
    race(&[&one, &other], "/v1/events", EVENT).await;
    race(&[&one, &other], &format!("/v1/webhooks/{id}/rotate-secret"), "").await;
    race(&[&one, &other], &format!("/v1/webhooks/{id}/test"), "").await;
    let tests = receiver.received().iter().filter(|got| got.body.contains("cnt_test123")).count();
    assert_eq!(tests, 1);
    assert_eq!(count(&self::database(&database).await, "events").await, 3);
    one.stop().await;
    other.stop().await;
}

/// Whoever finds another at work tried to take it on once at most, however often it looks: it costs one write, and waiting
/// costs none.
#[tokio::test]
async fn who_waits_writes_nothing() {
    let database = Database::fresh(Kind::Sqlite).await;
    let server = TestServer::start(&database).await;
    let connection = self::database(&database).await;
    let counted = "CREATE TABLE tries (n); CREATE TRIGGER tried BEFORE INSERT ON idempotency_keys \
        BEGIN INSERT INTO tries VALUES (1); END;";
    connection.execute_unprepared(counted).await.unwrap();
    let receiver = Receiver::scripted(|_, _| Reply { delay: Duration::from_secs(1), ..Reply::status(200) }).await;
    let (id, _) = server.webhook(&receiver.url(), &["content.ready"]).await;
    race(&[&server], &format!("/v1/webhooks/{id}/test"), "").await;
    let tries = count(&connection, "tries").await;
    assert!((1..=50).contains(&tries), "{tries}");
    server.stop().await;
}

async fn a_restart_forgets_nothing(database: Database) {
    let server = TestServer::start(&database).await;
    let key = server.key.clone();
    let first = keyed(&server, "/v1/events", EVENT, "k").await;
    server.stop().await;
    let mut server = TestServer::start(&database).await;
    server.key = key;
    let again = keyed(&server, "/v1/events", EVENT, "k").await;
    assert_eq!((again.text.as_str(), replayed(&again)), (first.text.as_str(), true));
    server.stop().await;
}

async fn answers_are_kept_for_a_day(database: Database) {
    let server = TestServer::start(&database).await;
    let connection = self::database(&database).await;
    let age = async |hours: i64| {
        let sql = format!("UPDATE idempotency_keys SET expires_at_ms = expires_at_ms - {hours} * 3600000");
        connection.execute_unprepared(&sql).await.unwrap();
    };
    let first = twice(&server, "/v1/events", EVENT, "k").await;
    age(23).await;
    assert!(replayed(&keyed(&server, "/v1/events", EVENT, "k").await));
    server.store.purge().await.unwrap();
    assert_eq!(count(&connection, "idempotency_keys").await, 1);
    age(1).await;
    // The key may be used again, before the row is removed and after.
    let second = twice(&server, "/v1/events", r#"{"event":"content.ready","data":{}}"#, "k").await;
    age(24).await;
    server.store.purge().await.unwrap();
    assert_eq!(count(&connection, "idempotency_keys").await, 0);
    let third = twice(&server, "/v1/events", EVENT, "k").await;
    assert!(first.text != second.text && second.text != third.text && third.text != first.text);
    server.stop().await;
}

async fn keys_are_printable_and_short(database: Database) {
    let server = TestServer::start(&database).await;
    let long = "k".repeat(256);
    let refused = |answer: Answer| {
        let error = answer.json()["error"].clone();
        assert_eq!((answer.status, error["code"].as_str()), (400, Some("INVALID_PARAMETER")), "{error}");
        assert_eq!(error["details"], json!({ "field": "idempotency-key", "reason": "invalid" }));
    };
    for key in ["", "ké", "a\tb", long.as_str()] {
        let request = server.request(Method::POST, "/v1/events").header("content-type", "application/json");
        let value = http::HeaderValue::from_bytes(key.as_bytes()).unwrap();
        refused(server.send(request.header("idempotency-key", value).body(EVENT)).await);
    }
    let request = server.request(Method::POST, "/v1/events").header("content-type", "application/json");
    refused(server.send(request.header("idempotency-key", "a").header("idempotency-key", "b").body(EVENT)).await);
    for key in ["!", "a b~", &long[1..]] {
        assert_eq!(keyed(&server, "/v1/events", EVENT, key).await.status, 202, "{key}");
    }
    // Where asking twice does no harm, a key means nothing.
    let request = server.request(Method::GET, "/v1/webhooks").header("idempotency-key", &long);
    assert_eq!(server.send(request).await.status, 200);
    server.stop().await;
}

async fn tenants_have_keys_of_their_own(database: Database) {
    let mut server = TestServer::start(&database).await;
    let first = keyed(&server, "/v1/events", EVENT, "k").await;
    let own = server.key.clone();
    for (organization, environment) in [("other", Environment::Test), ("acme", Environment::Live)] {
        server.key = server.new_key(Some(organization), KeyKind::Secret, environment).await;
        let theirs = keyed(&server, "/v1/events", EVENT, "k").await;
        assert!(theirs.status == 202 && !replayed(&theirs) && theirs.text != first.text);
    }
    server.key = own;
    assert!(replayed(&keyed(&server, "/v1/events", EVENT, "k").await));
    server.stop().await;
}

/// A claim whose node is gone runs out, and what that node still says counts for nothing.
async fn a_run_that_died_is_taken_over(database: Database) {
    let server = TestServer::start(&database).await;
    let connection = self::database(&database).await;
    let receiver = Receiver::scripted(|index, _| Reply {
        body: index.to_string(),
        delay: if index == 0 { Duration::from_secs(3) } else { Duration::ZERO },
        ..Reply::status(200)
    })
    .await;
    let (id, _) = server.webhook(&receiver.url(), &["content.ready"]).await;
    let path = format!("/v1/webhooks/{id}/test");
    let take_over = async {
        receiver.wait_for(1).await;
        // As the end of the claim's time would.
        connection.execute_unprepared("UPDATE idempotency_keys SET expires_at_ms = 0").await.unwrap();
        keyed(&server, &path, "", "k").await
    };
    let (first, second) = tokio::join!(keyed(&server, &path, "", "k"), take_over);
    assert_eq!((first.data()["response"].as_str(), second.data()["response"].as_str()), (Some("0"), Some("1")));
    let third = keyed(&server, &path, "", "k").await;
    assert_eq!((third.text.as_str(), replayed(&third)), (second.text.as_str(), true));
    assert_eq!(receiver.received().len(), 2);
    server.stop().await;
}

/// The crucial case: the event is committed, and nobody was told.
#[tokio::test]
async fn a_commit_whose_reply_was_lost_is_found_again() {
    let database = Database::fresh(Kind::Postgres).await;
    let proxy = LossyProxy::start(&database.url, "cnt_1").await;
    let server = TestServer::with(Config { database_url: proxy.url(), ..config(&database) }).await;
    let connection = self::database(&database).await;
    proxy.lose_the_next_commit();
    let lost = keyed(&server, "/v1/events", EVENT, "k").await;
    assert_eq!((lost.status, count(&connection, "events").await), (503, 1), "{lost:?}");
    proxy.mend();
    // Connections that broke meanwhile are found out one by one.
    let mut again = keyed(&server, "/v1/events", EVENT, "k").await;
    while again.status == 503 {
        again = keyed(&server, "/v1/events", EVENT, "k").await;
    }
    assert_eq!((again.status, replayed(&again)), (202, true), "{again:?}");
    let sql = sea_orm::Statement::from_string(connection.get_database_backend(), "SELECT id FROM events");
    let stored: String = connection.query_one_raw(sql).await.unwrap().unwrap().try_get_by_index(0).unwrap();
    assert_eq!(again.data()["id"], stored);
    assert_eq!(count(&connection, "events").await, 1);
    server.stop().await;
}
