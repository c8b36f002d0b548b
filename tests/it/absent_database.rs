//! A PostgreSQL that nobody can reach: what is published meanwhile is refused, however many do.

use std::time::Duration;

use futures_util::future::join_all;
use http::Method;
use shortkit_webhooks::{clock, config::Config, store::KeyKind, webhook::Environment};

use crate::support::{Database, Kind, Receiver, TestServer, Way, config};

/// A publish without a database is refused within this time.
const REFUSED: Duration = Duration::from_secs(5);
/// Publishes that wait at the same time: more than a commit has while several organisations write.
const PUBLISHERS: usize = 64;
const EVENT: &str = r#"{"event":"content.ready","data":{}}"#;

#[tokio::test(flavor = "multi_thread")]
async fn whoever_publishes_while_the_database_is_away_is_refused_in_time() {
    let database = Database::fresh(Kind::Postgres).await;
    let way = Way::to(&database).await;
    let config = Config { database_url: way.url.clone(), ..config(&database) };
    let receiver = Receiver::start().await;
    let server = TestServer::with(config).await;
    server.webhook(&receiver.url(), &["content.ready"]).await;
    let mut keys = Vec::new();
    for number in 0..PUBLISHERS {
        // Several of each of them: they take turns.
        let organization = format!("organization{}", number % 4);
        keys.push(server.new_key(Some(&organization), KeyKind::Secret, Environment::Test).await);
    }
    let publish = async |key: &String| {
        let request = server.anonymous(Method::POST, "/v1/events").bearer_auth(key);
        let began = clock::stopwatch();
        let answer = server.send(request.header("content-type", "application/json").body(EVENT)).await;
        (answer.status, began.elapsed())
    };
    let before = join_all(keys.iter().map(&publish)).await;
    assert!(before.iter().all(|(status, _)| *status == 202), "{before:?}");
    drop(way);
    let refused = join_all(keys.iter().map(&publish)).await;
    assert!(refused.iter().all(|(status, took)| *status == 503 && *took < REFUSED), "{refused:?}");
    server.stop().await;
}
