//! What goes after a fixed time, and what is noted from time to time.

use std::time::Duration;

use sea_orm::{ConnectionTrait, TransactionTrait};
use shortkit_webhooks::{
    clock,
    grpc::proto::WatchDeliveriesRequest,
    store::{KeyKind, NewKey, Store},
    webhook::Environment,
};
use tonic::Code;

use crate::support::{Database, Kind, Receiver, TestServer, Watch, on_both_databases};

on_both_databases!(
    one_round_removes_all_that_is_old,
    a_token_is_refused_when_something_of_its_own_is_gone,
    uses_of_keys_are_noted_together,
);

const DAY: Duration = Duration::from_secs(24 * 60 * 60);

async fn migrated(database: &Database) -> Store {
    let store = Store::connect(&database.url).await.unwrap();
    store.migrate().await.unwrap();
    store
}

async fn number(database: &Database, sql: &str) -> i64 {
    database.rows(sql).await[0].try_get_by_index(0).unwrap()
}

async fn one_round_removes_all_that_is_old(database: Database) {
    let store = migrated(&database).await;
    let (changes, answers) = ("SELECT count(*) FROM changes", "SELECT count(*) FROM idempotency_keys");
    database.log_failures("acme", 3_000, 4 * DAY).await;
    database.log_failures("acme", 5, 2 * DAY).await;
    // Twenty at a time expire together; one does not yet.
    let now = clock::now().millis();
    let sql = format!(
        "INSERT INTO idempotency_keys (organization, environment, call, idempotency_key, fingerprint, claim, expires_at_ms)
        WITH RECURSIVE numbers (i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM numbers WHERE i < 2999)
        SELECT 'acme', 'test', 'call', CAST(i AS TEXT), '', 'run', {now} - i / 20 FROM numbers
        UNION ALL SELECT 'acme', 'test', 'call', 'later', '', 'run', {now} + 60000"
    );
    assert_eq!(database.execute(&sql).await, 3_001);
    store.purge().await.unwrap();
    assert_eq!((number(&database, changes).await, number(&database, answers).await), (5, 1));

    let newest = "SELECT max(seq) FROM changes";
    let before = number(&database, newest).await;
    database.execute("UPDATE changes SET occurred_at_ms = 0").await;
    store.purge().await.unwrap();
    assert_eq!((number(&database, changes).await, number(&database, newest).await), (1, before));
}

async fn resume(server: &TestServer, token: &str) -> Result<Watch, tonic::Status> {
    let request = WatchDeliveriesRequest { resume_token: Some(token.to_owned()), ..Default::default() };
    Ok(Watch(server.deliveries().watch_deliveries(request).await?.into_inner()))
}

async fn a_token_is_refused_when_something_of_its_own_is_gone(database: Database) {
    let server = TestServer::start(&database).await;
    let receiver = Receiver::start().await;
    server.webhook(&receiver.url(), &["content.ready"]).await;
    let mut watch = server.watch().await;
    // Both of a call have a row of the log together.
    let event = r#"{"event":"content.ready","data":{}}"#;
    server.post("/v1/events/batch", &format!(r#"{{"events":[{event},{event}]}}"#)).await.data();
    let mut tokens = Vec::new();
    for _ in 0..4 {
        tokens.push(watch.next().await.resume_token);
    }
    database.log_failures("other", 10, Duration::ZERO).await;
    database.execute("UPDATE changes SET occurred_at_ms = 0").await;
    database.log_failures("acme", 3, 2 * DAY).await;
    server.store.purge().await.unwrap();
    assert_eq!(number(&database, "SELECT count(*) FROM changes").await, 3);

    // What was removed after its last one is another's.
    let last = tokens.pop().unwrap();
    let mut resumed = resume(&server, &last).await.unwrap();
    for number in 1..=3 {
        let change = resumed.next().await;
        assert_eq!(change.delivery_id, format!("del_{number}"));
        tokens.extend((number == 1).then_some(change.resume_token));
    }
    let first_left = tokens.pop().unwrap();
    let refused = async |token: &str| {
        let refused = resume(&server, token).await.err().unwrap();
        assert_eq!(refused.code(), Code::InvalidArgument);
        assert!(refused.message().contains("too old"), "{refused}");
    };
    for token in &tokens {
        refused(token).await;
    }

    // Before it was noted whose changes were removed, they may have been anybody's.
    database.execute("DROP TABLE forgotten_changes").await;
    database.execute("DELETE FROM seaql_migrations WHERE version = 'm0010_forgotten_changes'").await;
    server.store.migrate().await.unwrap();
    refused(&last).await;
    assert_eq!(resume(&server, &first_left).await.unwrap().next().await.delivery_id, "del_2");
    server.stop().await;
}

#[tokio::test]
async fn one_node_forgets_at_a_time() {
    let database = Database::fresh(Kind::Postgres).await;
    let store = migrated(&database).await;
    database.log_failures("acme", 10, 4 * DAY).await;
    let connection = database.open().await;
    let other = connection.begin().await.unwrap();
    // The lock of `store/retention/janitor.rs`.
    other.execute_unprepared(&format!("SELECT pg_advisory_xact_lock({})", 0x736b_776c)).await.unwrap();
    store.purge().await.unwrap();
    assert_eq!(number(&database, "SELECT count(*) FROM changes").await, 10);
    other.rollback().await.unwrap();
    store.purge().await.unwrap();
    assert_eq!(number(&database, "SELECT count(*) FROM changes").await, 1);
}

async fn uses_of_keys_are_noted_together(database: Database) {
    let store = migrated(&database).await;
    let mut ids = Vec::new();
    for _ in 0..600 {
        let (organization, environment) = (Some("acme".to_owned()), Environment::Test);
        let new = NewKey { organization, environment, kind: KeyKind::Secret, expires_at: None };
        ids.push(store.create_key(new).await.unwrap().info.id);
    }
    let later = clock::now().after(DAY).millis();
    database.execute(&format!("UPDATE api_keys SET last_used_at_ms = {later} WHERE id = '{}'", ids[0])).await;
    let (unused, began) = (ids.pop().unwrap(), clock::now().millis());
    ids.iter().for_each(|id| store.key_used(id));
    store.write_used_keys().await.unwrap();
    for key in store.list_keys().await.unwrap() {
        let at = key.last_used_at.map(|at| at.millis());
        if key.id == ids[0] {
            assert_eq!(at, Some(later), "another node saw it later");
        } else if key.id == unused {
            assert_eq!(at, None);
        } else {
            assert!(at >= Some(began), "{at:?}");
        }
    }
    if database.url.starts_with("postgres") {
        // Each transaction leaves its number.
        let sql = format!("SELECT count(DISTINCT xmin::text) FROM api_keys WHERE last_used_at_ms < {later}");
        assert_eq!(number(&database, &sql).await, 3);
    }
}
