//! Nobody slows the others down. How much is measured by `cargo bench --bench fairness`.

use std::time::Duration;

use http::Method;
use sea_orm::{ConnectionTrait, TransactionTrait};
use shortkit_webhooks::{config::Config, store::KeyKind, webhook::Environment};
use tokio::{net::TcpListener, task::JoinSet};

use crate::support::{Database, Kind, Receiver, TestServer, config, on_both_databases, soon};

on_both_databases!(
    receivers_that_never_answer_leave_room_for_the_others,
    who_publishes_much_leaves_room_for_the_others,
);

/// 80 receivers that never answer, each with more waiting than it may have under way: no more than one that has not been
/// heard of, for two minutes.
async fn receivers_that_never_answer_leave_room_for_the_others(database: Database) {
    let server = TestServer::with(Config { request_timeout: Duration::from_secs(120), ..config(&database) }).await;
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/", silent.local_addr().unwrap());
    // Connections are taken, kept and never answered.
    let (count, mut taken) = tokio::sync::watch::channel(0);
    let accepting = tokio::spawn(async move {
        let mut kept = Vec::new();
        loop {
            kept.push(silent.accept().await.unwrap());
            count.send_replace(kept.len());
        }
    });
    let mut ids = Vec::new();
    for _ in 0..80 {
        ids.push(server.webhook(&url, &["export.ready"]).await.0);
    }
    for _ in 0..32 {
        assert_eq!(server.publish("export.ready", "{}").await, 80);
    }
    soon("the silent receivers have what they may have", taken.wait_for(|taken| *taken >= 80 * 8)).await.unwrap();

    let receiver = Receiver::start().await;
    server.webhook(&receiver.url(), &["content.ready"]).await;
    for _ in 0..100 {
        server.publish("content.ready", "{}").await;
    }
    receiver.wait_for(100).await;
    let dead = server.get(&format!("/v1/webhooks/{}", ids[0])).await.data();
    assert_eq!(dead["stats"].get("lastDeliveryAt"), None, "none of the silent ones has given up its place: {dead}");
    assert_eq!(*taken.borrow(), 80 * 8, "attempts under way to those that never answer");
    accepting.abort();
    server.stop().await;
}

/// More data than may wait for its commit, all of one organisation, while the database is busy.
async fn who_publishes_much_leaves_room_for_the_others(database: Database) {
    let server = TestServer::start(&database).await;
    let quiet = server.new_key(Some("quiet"), KeyKind::Secret, Environment::Test).await;
    let publish = |key: &str, bytes: usize| {
        let body = format!(r#"{{"event":"content.ready","data":{{"a":"{}"}}}}"#, "x".repeat(bytes));
        let request = server.anonymous(Method::POST, "/v1/events").bearer_auth(key);
        request.header("content-type", "application/json").body(body)
    };
    for key in [&server.key, &quiet] {
        assert_eq!(server.send(publish(key, 1)).await.status, 202);
    }
    let connection = database.open().await;
    let busy = connection.begin().await.unwrap();
    let is_sqlite = database.url.starts_with("sqlite:");
    let hold = if is_sqlite { "UPDATE settings SET value = value" } else { "LOCK TABLE events IN SHARE MODE" };
    busy.execute_unprepared(hold).await.unwrap();
    let mut loud = JoinSet::new();
    for _ in 0..70 {
        loud.spawn(publish(&server.key, 1_000_000).send());
    }
    let mut answers = Vec::new();
    while let Some(answer) = soon("an answer", loud.join_next()).await {
        let answer = answer.unwrap().unwrap();
        let wait = answer.headers().get("retry-after").map(|wait| wait.to_str().unwrap().to_owned());
        answers.push((answer.status().as_u16(), wait));
        if answer.status() == 429 {
            break;
        }
    }
    assert_eq!(answers.last(), Some(&(429, Some("1".to_owned()))), "{answers:?}");
    let waits = tokio::spawn(publish(&quiet, 1).send());
    busy.rollback().await.unwrap();
    assert_eq!(soon("an answer", waits).await.unwrap().unwrap().status(), 202);
    server.stop().await;
}

/// More lists of one organisation than there are connections, none of which comes to an end; where the others need a look-up
/// of a key that nobody has used before.
#[tokio::test]
async fn who_reads_much_leaves_connections_to_the_others() {
    let database = Database::fresh(Kind::Postgres).await;
    let server = TestServer::start(&database).await;
    let (webhook, _) = server.webhook("https://example.com/", &["content.ready"]).await;
    let quiet = server.new_key(Some("quiet"), KeyKind::Secret, Environment::Test).await;
    let connection = database.open().await;
    let busy = connection.begin().await.unwrap();
    busy.execute_unprepared("LOCK TABLE delivery_counts").await.unwrap();
    let mut loud = JoinSet::new();
    for _ in 0..20 {
        loud.spawn(server.request(Method::GET, &format!("/v1/webhooks/{webhook}/deliveries")).send());
    }
    // The first that ends is one that has waited for its turn.
    let refused = soon("a list too many", loud.join_next()).await.unwrap().unwrap().unwrap();
    let listed = server.send(server.anonymous(Method::GET, "/v1/webhooks").bearer_auth(&quiet)).await;
    assert_eq!((refused.status().as_u16(), listed.status), (429, 200));
    assert_eq!(refused.headers()["retry-after"], "1");
    busy.rollback().await.unwrap();
    assert_eq!(server.get(&format!("/v1/webhooks/{webhook}/deliveries")).await.status, 200);
    server.stop().await;
}
