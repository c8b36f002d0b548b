//! What was acknowledged arrives, whatever happens to the process.

use std::{
    collections::BTreeSet,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use http::Method;
use serde_json::json;
use tokio::process::Command;

use crate::support::{
    Database, Kind, Process, Received, Receiver, Reply, TestServer, lie_about_time, on_both_databases, soon,
};

on_both_databases!(
    killed_in_the_middle,
    stopped_in_the_middle,
    a_stop_begins_no_attempts,
    a_long_outage_repeats_nothing
);

#[tokio::test]
async fn a_restart_loop_fails_nothing() {
    // On SQLite every start finds the leases of the one before; on PostgreSQL they run out in their own time.
    killed_again_and_again(Database::fresh(Kind::Sqlite).await).await;
}

/// How many events are published before the process ends.
const EVENTS: usize = 50;

async fn start(database: &Database, directory: &Path) -> Process {
    let command = Command::new(env!("CARGO_BIN_EXE_shortkit-webhooks"));
    Process::start(command, &["--database-url", &database.url, "--request-timeout", "5s"], directory).await
}

/// Publishes [`EVENTS`] events; all are acknowledged.
async fn publish(process: &Process) {
    for number in 0..EVENTS {
        assert_eq!(process.publish(&format!(r#"{{"number":{number}}}"#)).await, 1);
    }
}

/// A receiver that holds its first answers back until it is told to give them.
async fn hesitant() -> (Receiver, Arc<AtomicBool>) {
    let open = Arc::new(AtomicBool::new(false));
    let opened = Arc::clone(&open);
    let receiver = Receiver::scripted(move |index, _| match index {
        10.. if !opened.load(Ordering::SeqCst) => Reply { delay: Duration::from_secs(20), ..Reply::status(200) },
        _ => Reply::status(200),
    })
    .await;
    (receiver, open)
}

fn ids(receiver: &Receiver) -> Vec<String> {
    receiver.received().iter().map(|got| got.header("x-shortform-delivery-id").to_owned()).collect()
}

/// Waits until every event has come at least once.
async fn all_arrive(receiver: &Receiver) {
    let mut count = EVENTS;
    loop {
        receiver.wait_for(count).await;
        let numbers: BTreeSet<String> = receiver.received().into_iter().map(|got| got.body).collect();
        if numbers.len() >= EVENTS {
            break;
        }
        count = receiver.received().len() + 1;
    }
    assert_eq!(ids(receiver).into_iter().collect::<BTreeSet<_>>().len(), EVENTS, "a repeat carries the same id");
}

async fn killed_in_the_middle(database: Database) {
    let directory = tempfile::tempdir().unwrap();
    let (receiver, open) = hesitant().await;
    let mut first = start(&database, directory.path()).await;
    first.webhook(&receiver.url()).await;
    publish(&first).await;
    // Ten are answered, and of one that has been heard of so little eight may be under way.
    receiver.wait_for(18).await;
    first.child.start_kill().unwrap();
    first.child.wait().await.unwrap();
    let seen = receiver.received().len();
    assert!(seen < EVENTS, "some had not even begun");

    open.store(true, Ordering::SeqCst);
    let mut second = start(&database, directory.path()).await;
    all_arrive(&receiver).await;
    // At most those that were under way come twice.
    assert!(receiver.received().len() <= EVENTS + 32, "{} requests", receiver.received().len());
    second.child.start_kill().unwrap();
    second.child.wait().await.unwrap();
}

async fn stopped_in_the_middle(database: Database) {
    let directory = tempfile::tempdir().unwrap();
    let receiver = Receiver::scripted(|_, _| Reply { delay: Duration::from_millis(100), ..Reply::status(200) }).await;
    let mut first = start(&database, directory.path()).await;
    first.webhook(&receiver.url()).await;
    publish(&first).await;
    let pid = first.child.id().unwrap().to_string();
    assert!(Command::new("kill").args(["-TERM", &pid]).status().await.unwrap().success());
    let ended = soon("the end", first.child.wait()).await.unwrap();
    assert!(ended.success(), "{ended}");

    let mut second = start(&database, directory.path()).await;
    all_arrive(&receiver).await;
    assert_eq!(receiver.received().len(), EVENTS, "no repeats after an orderly stop");
    second.child.start_kill().unwrap();
    second.child.wait().await.unwrap();
}

/// A node that restarts in a loop: what was never sent must not fail for it.
async fn killed_again_and_again(database: Database) {
    let directory = tempfile::tempdir().unwrap();
    let open = Arc::new(AtomicBool::new(false));
    let opened = Arc::clone(&open);
    let receiver = Receiver::scripted(move |_, _| match opened.load(Ordering::SeqCst) {
        true => Reply::status(200),
        false => Reply { delay: Duration::from_secs(20), ..Reply::status(200) },
    })
    .await;
    let mut process = start(&database, directory.path()).await;
    process.webhook(&receiver.url()).await;
    publish(&process).await;
    for _ in 0..4 {
        process.child.start_kill().unwrap();
        process.child.wait().await.unwrap();
        process = start(&database, directory.path()).await;
    }
    let webhooks = process.call(Method::GET, "/v1/webhooks", String::new()).await.data();
    let id = webhooks[0]["id"].as_str().unwrap();
    let stats = process.call(Method::GET, &format!("/v1/webhooks/{id}"), String::new()).await.data();
    assert_eq!(stats["stats"]["failedDeliveries"], 0, "{stats}");
    open.store(true, Ordering::SeqCst);
    process.child.start_kill().unwrap();
    process.child.wait().await.unwrap();
}

/// From the signal on nothing new goes out, also while a call is still open; and it is over within the grace.
async fn a_stop_begins_no_attempts(database: Database) {
    let directory = tempfile::tempdir().unwrap();
    let receiver = Receiver::scripted(|_, _| Reply { delay: Duration::from_secs(4), ..Reply::status(200) }).await;
    let mut process = start(&database, directory.path()).await;
    process.webhook(&receiver.url()).await;
    // Eight may be under way to a webhook that is new, for four seconds each: most of these are still waiting at the end.
    publish(&process).await;
    publish(&process).await;
    publish(&process).await;
    let webhooks = process.call(Method::GET, "/v1/webhooks", String::new()).await.data();
    let id = webhooks[0]["id"].as_str().unwrap().to_owned();
    let pid = process.child.id().unwrap().to_string();
    let path = format!("/v1/webhooks/{id}/test");
    let test = process.call(Method::POST, &path, "{}".to_owned());
    let stop = async {
        while !receiver.received().iter().any(|got| got.body.contains("cnt_test123")) {
            receiver.wait_for(receiver.received().len() + 1).await;
        }
        assert!(Command::new("kill").args(["-TERM", &pid]).status().await.unwrap().success());
        receiver.received().len()
    };
    let (test, before) = tokio::join!(test, stop);
    assert_eq!(test.data()["status"], "success", "the open call gets its answer");
    assert!(soon("the end", process.child.wait()).await.unwrap().success());
    // Those that began in the moment of the signal may still have come.
    let after = receiver.received().len() - before;
    assert!(after <= 32 && receiver.received().len() < 3 * EVENTS, "{after} went out after the signal");
}

/// On PostgreSQL, where a sequence counts also what is rolled back.
#[tokio::test]
async fn leases_are_given_back_though_a_commit_fails() {
    let database = Database::fresh(Kind::Postgres).await;
    let server = TestServer::start(&database).await;
    let receiver = Receiver::scripted(|_, _| Reply { delay: Duration::from_secs(2), ..Reply::status(200) }).await;
    server.webhook(&receiver.url(), &["content.ready"]).await;
    database
        .execute(
            "CREATE SEQUENCE tries;
            CREATE FUNCTION refuse_once() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
                IF nextval('tries') = 1 THEN RAISE EXCEPTION 'not this time'; END IF;
                RETURN NEW;
            END $$;
            CREATE TRIGGER refuse_once BEFORE UPDATE ON deliveries FOR EACH ROW WHEN (NEW.granted)
                EXECUTE FUNCTION refuse_once();",
        )
        .await;
    // In one commit: all but eight wait behind the first, for seconds.
    let events = vec![json!({ "event": "content.ready", "data": {} }); EVENTS];
    server.post("/v1/events/batch", &json!({ "events": events }).to_string()).await.data();
    receiver.wait_for(1).await;
    server.stop().await;
    let count = async |condition: &str| {
        let counted = format!("SELECT count(*) FROM deliveries WHERE {condition}");
        database.rows(&counted).await[0].try_get_by_index::<i64>(0).unwrap()
    };
    assert_eq!(count("lease_node IS NOT NULL").await, 0, "leases are left to run out");
    assert!(count("granted AND attempts = 1").await > 0, "some had not begun");
    assert_eq!(count("(SELECT last_value FROM tries) > 1").await, EVENTS as i64, "the first commit failed");
}

/// The clock of the machine is set forward while a request is on the wire. Nodes on PostgreSQL go by the database's.
#[tokio::test]
async fn a_clock_that_is_set_forward_repeats_nothing() {
    let database = Database::fresh(Kind::Sqlite).await;
    let directory = tempfile::tempdir().unwrap();
    let clock = directory.path().join("clock");
    let set = |offset: &str| std::fs::write(&clock, offset).unwrap();
    set("+0");
    let mut command = Command::new(env!("CARGO_BIN_EXE_shortkit-webhooks"));
    lie_about_time(&mut command).env("FAKETIME_TIMESTAMP_FILE", &clock).env("FAKETIME_NO_CACHE", "1");
    let arguments = ["--database-url", &database.url, "--rate-limit", "off"];
    let process = Process::start(command, &arguments, directory.path()).await;
    // Long enough for a few looks at what has run out.
    let receiver = Receiver::scripted(|_, _| Reply { delay: Duration::from_secs(4), ..Reply::status(200) }).await;
    process.webhook(&receiver.url()).await;
    process.publish("{}").await;
    receiver.wait_for(1).await;
    set("+7200");
    let webhooks = process.call(Method::GET, "/v1/webhooks", String::new()).await.data();
    let path = format!("/v1/webhooks/{}/deliveries", webhooks[0]["id"].as_str().unwrap());
    let ended = async {
        loop {
            let delivery = process.call(Method::GET, &path, String::new()).await.data()[0].clone();
            if delivery["status"] != "pending" {
                break delivery;
            }
        }
    };
    let delivery = soon("the end of the delivery", ended).await;
    assert_eq!((delivery["status"].as_str(), delivery["attempts"].as_i64()), (Some("success"), Some(1)));
    assert_eq!(receiver.received().len(), 1);
}

/// Nothing can be written for longer than a lease lasts, while receivers accept: their answers are kept until they can be
/// recorded, since nobody else can have taken the deliveries over meanwhile.
async fn a_long_outage_repeats_nothing(database: Database) {
    let (directory, count) = (tempfile::tempdir().unwrap(), 5);
    // The answers come when nothing can be written any more.
    let slow = |_, _: &Received| Reply { delay: Duration::from_secs(1), ..Reply::status(200) };
    let receiver = Receiver::scripted(slow).await;
    let command = Command::new(env!("CARGO_BIN_EXE_shortkit-webhooks"));
    let arguments = ["--database-url", &database.url, "--request-timeout", "2s"];
    let process = Process::start(command, &arguments, directory.path()).await;
    process.webhook(&receiver.url()).await;
    for number in 0..count {
        process.publish(&format!(r#"{{"number":{number}}}"#)).await;
    }
    receiver.wait_for(count).await;
    let writing = database.let_nobody_write().await;
    let lease = Duration::from_secs(2 + 30);
    tokio::time::sleep(lease + Duration::from_secs(2)).await;
    writing.rollback().await.unwrap();
    soon("the results", async {
        loop {
            let left = database.rows("SELECT 1 FROM deliveries WHERE status = 'pending'").await;
            if left.is_empty() {
                break;
            }
        }
    })
    .await;
    assert_eq!(ids(&receiver).len(), count, "each is sent once");
}
