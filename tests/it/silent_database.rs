//! A PostgreSQL whose connections go silent: nobody says that they have ended.

use std::time::{Duration, Instant};

use crate::support::{Answer, Database, Kind, Receiver, TestServer, Way, config};
use futures_util::future::{join, join_all};
use http::Method;
use shortkit_webhooks::{
    clock,
    config::Config,
    store::{KeyKind, Store},
    webhook::Environment,
};

/// A call that meets the silence is refused within this time, and one is accepted after twice as long.
const REFUSED: Duration = Duration::from_secs(12);
/// Calls that are under way when it begins: more than there are connections for tenants.
const CALLS: usize = 16;

const EVENT: &str = r#"{"event":"content.ready","data":{}}"#;

async fn list(server: &TestServer, key: &str) -> Answer {
    server.send(server.anonymous(Method::GET, "/v1/webhooks").bearer_auth(key)).await
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_that_go_silent_are_given_up() {
    let database = Database::fresh(Kind::Postgres).await;
    let way = Way::to(&database).await;
    let config = Config { database_url: way.url.clone(), ..config(&database) };
    let receiver = Receiver::start().await;
    let server = TestServer::with(config).await;
    server.webhook(&receiver.url(), &["content.ready"]).await;
    // Of as many organizations, since one does not get all connections.
    let mut readers = Vec::new();
    for number in 0..CALLS {
        let key = server.new_key(Some(&format!("reader{number}")), KeyKind::Secret, Environment::Test).await;
        assert_eq!(list(&server, &key).await.status, 200);
        readers.push(key);
    }
    let publish = async || {
        let began = clock::stopwatch();
        let answer = server.post("/v1/events", EVENT).await;
        assert!(began.elapsed() < REFUSED, "{} after {:?}", answer.status, began.elapsed());
        assert!(matches!(answer.status, 202 | 503), "{}", answer.text);
        answer.status == 202
    };
    let accepted_after = async |moment: Instant| {
        while !publish().await {
            assert!(moment.elapsed() < 2 * REFUSED, "refused for {:?}", moment.elapsed());
        }
    };
    for turn in 1..=2 {
        assert!(publish().await);
        receiver.wait_for(2 * turn - 1).await;
        way.go_silent();
        let silent = clock::stopwatch();
        if turn == 1 {
            // All connections are silent, also that of the revisions; the second time, it is one that is new.
            let named = server.request(Method::POST, "/v1/events").header("idempotency-key", "1").body(EVENT);
            let named = server.send(named.header("content-type", "application/json"));
            let calls = join_all(readers.iter().map(|key| list(&server, key)));
            let (named, calls) = join(named, calls).await;
            assert!(silent.elapsed() < REFUSED, "{:?}", silent.elapsed());
            assert!(
                calls.iter().chain([&named]).all(|answer| matches!(answer.status, 200 | 503)),
                "{named:?} {calls:?}"
            );
        }
        accepted_after(silent).await;
        receiver.wait_for(2 * turn).await;
        assert_eq!(server.get("/v1/webhooks").await.status, 200);
    }
    server.stop().await;
}

/// As a primary that has just become a replica does, while its name still leads there.
#[tokio::test]
async fn a_database_that_takes_no_writes_is_refused() {
    let database = Database::fresh(Kind::Postgres).await;
    let (_, name) = database.url.rsplit_once('/').unwrap();
    database.execute(&format!("ALTER DATABASE {name} SET default_transaction_read_only = on")).await;
    let refused = Store::connect(&database.url).await.err().expect("it is refused");
    assert!(refused.to_string().contains("takes no writes: is it a replica?"), "{refused}");
}
