//! The connections to PostgreSQL: what one call leaves to the next, what is asked of the server, and several nodes at once.

use std::{
    collections::BTreeSet,
    process::Stdio,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use futures_util::future::join_all;
use sea_orm::{ConnectionTrait, DatabaseTransaction, TransactionTrait};
use shortkit_webhooks::{
    clock,
    store::{Actor, Store, Waiting, Waitlist},
    webhook::{Environment, Tenant, Timestamp},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    join,
    net::{
        TcpListener, TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    process::Command,
    sync::Notify,
};

use crate::{
    command_line::binary,
    support::{Database, Kind, Process, TestServer, lie_about_time, soon},
};

/// A way to the database that can be held up at the next beginning of a transaction.
#[derive(Default)]
struct Way {
    /// How long it takes in each direction.
    length: Duration,
    /// How many connections were made.
    connections: AtomicUsize,
    armed: AtomicBool,
    /// It is held up.
    held: Notify,
    /// It is to go on.
    go_on: Notify,
}

impl Way {
    /// One that is so long, and the URL of the database over it.
    async fn to(database: &Database, length: Duration) -> (Arc<Self>, String) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (server, name) = database.url["postgres://postgres@".len()..].split_once('/').unwrap();
        let url = format!("postgres://postgres@{}/{name}", listener.local_addr().unwrap());
        let server = server.to_owned();
        let way = Arc::new(Self { length, ..Self::default() });
        let its = Arc::clone(&way);
        tokio::spawn(async move {
            while let Ok((from, _)) = listener.accept().await {
                its.connections.fetch_add(1, Ordering::SeqCst);
                let (asks, hears) = from.into_split();
                let (answers, asked) = TcpStream::connect(&server).await.unwrap().into_split();
                tokio::spawn(Arc::clone(&its).carry(asks, asked));
                tokio::spawn(Arc::clone(&its).carry(answers, hears));
            }
        });
        (way, url)
    }

    async fn carry(self: Arc<Self>, mut from: OwnedReadHalf, mut to: OwnedWriteHalf) {
        let mut buffer = [0; 16 * 1024];
        while let Ok(count @ 1..) = from.read(&mut buffer).await {
            let begins = buffer[..count].windows(5).any(|word| word == b"BEGIN");
            if begins && self.armed.swap(false, Ordering::SeqCst) {
                self.held.notify_one();
                self.go_on.notified().await;
            }
            tokio::time::sleep(self.length).await;
            if to.write_all(&buffer[..count]).await.is_err() {
                return;
            }
        }
    }
}

/// The next call would be part of the transaction, and undone with it.
#[tokio::test]
async fn a_transaction_that_nobody_waited_for_does_not_stay_open() {
    const CALLS: usize = 16;
    let database = Database::fresh(Kind::Postgres).await;
    let (way, url) = Way::to(&database, Duration::ZERO).await;
    // So few that what tenants do shares one.
    let store = Store::connect_with(&url, 8).await.unwrap();
    store.migrate().await.unwrap();
    let before = way.connections.load(Ordering::SeqCst);

    way.armed.store(true, Ordering::SeqCst);
    tokio::select! {
        _ = store.revoke_key("key_1") => panic!("it is held up"),
        () = soon("the beginning of a transaction", way.held.notified()) => {}
    }
    way.go_on.notify_one();

    store.token_key().await.unwrap();
    let kept = database.rows("SELECT 1 FROM settings WHERE name = 'token_key'").await;
    assert_eq!(kept.len(), 1, "what was acknowledged is not in the database");
    for _ in 0..CALLS {
        assert!(!store.revoke_key("key_1").await.unwrap());
        store.token_key().await.unwrap();
    }
    // The others go from call to call, unless a slow machine is late to hear that they are fine.
    let new = way.connections.load(Ordering::SeqCst) - before;
    assert!((1..CALLS).contains(&new), "{new}");
}

#[tokio::test(flavor = "multi_thread")]
async fn nodes_that_start_together_migrate_one_after_another() {
    let database = Database::fresh(Kind::Postgres).await;
    let nodes = join_all((0..8).map(|_| Store::connect(&database.url))).await;
    for _ in 0..2 {
        let migrated = join_all(nodes.iter().map(|node| node.as_ref().unwrap().migrate())).await;
        assert!(migrated.iter().all(Result::is_ok), "{migrated:?}");
        // Once more, with a schema of before.
        database.undo_publish_drafts().await;
    }
}

/// One serves it, say, and another makes its keys.
#[tokio::test(flavor = "multi_thread")]
async fn processes_that_start_together_on_a_new_file_make_its_schema_once() {
    let database = Database::fresh(Kind::Sqlite).await;
    let stores = join_all((0..4).map(|_| Store::connect(&database.url))).await;
    let [first, second, third, fourth] = [0, 1, 2, 3].map(|index| stores[index].as_ref().unwrap());
    let migrated = join!(first.migrate(), second.expect_schema(), third.migrate(), fourth.expect_schema());
    assert!(matches!(migrated, (Ok(()), Ok(()), Ok(()), Ok(()))), "{migrated:?}");
}

/// Another role has brought it up to date.
#[tokio::test]
async fn a_role_that_may_change_no_schema_finds_it_up_to_date() {
    let database = Database::fresh(Kind::Postgres).await;
    Store::connect(&database.url).await.unwrap().migrate().await.unwrap();
    let role = clock::new_id("role");
    for statement in ["CREATE ROLE {role} LOGIN", "GRANT SELECT ON seaql_migrations TO {role}"] {
        database.execute(&statement.replace("{role}", &role)).await;
    }
    let store = Store::connect(&database.url.replace("postgres@", &format!("{role}@"))).await.unwrap();
    store.migrate().await.unwrap();
    store.expect_schema().await.unwrap();
}

/// When those began that wait for a table now.
const WAIT_FOR_A_TABLE: &str = "SELECT CAST(query_start AS TEXT) FROM pg_stat_activity, pg_sleep(0.05) \
    WHERE datname = current_database() AND wait_event_type = 'Lock'";

/// Leaves deliveries with their key of before, to be migrated, and somebody who reads them until that transaction ends.
async fn reads_what_is_to_be_migrated(database: &Database) -> DatabaseTransaction {
    Store::connect(&database.url).await.unwrap().migrate().await.unwrap();
    let key = "ALTER TABLE deliveries DROP CONSTRAINT deliveries_pkey, ADD PRIMARY KEY (webhook_id, id)";
    database.undo("m0015_deliveries_by_time", &[key]).await;
    let reader = database.open().await.begin().await.unwrap();
    reader.execute_unprepared("SELECT 1 FROM deliveries").await.unwrap();
    reader
}

/// However long those who use its table take.
#[tokio::test]
async fn a_migration_waits_for_those_who_use_its_table() {
    let database = Database::fresh(Kind::Postgres).await;
    let reader = reads_what_is_to_be_migrated(&database).await;
    let waits_again = async {
        let mut began = BTreeSet::<String>::new();
        while began.len() < 2 {
            let waiting = database.rows(WAIT_FOR_A_TABLE).await;
            began.extend(waiting.iter().map(|row| row.try_get_by_index::<String>(0).unwrap()));
        }
        reader.rollback().await.unwrap();
    };
    let store = Store::connect(&database.url).await.unwrap();
    let (migrated, ()) = join!(store.migrate(), soon("that it waits once more", waits_again));
    migrated.unwrap();
}

#[tokio::test]
async fn a_signal_ends_a_migration_that_waits() {
    let database = Database::fresh(Kind::Postgres).await;
    let _reader = reads_what_is_to_be_migrated(&database).await;
    let directory = tempfile::tempdir().unwrap();
    let mut command = binary(&["migrate", "--database-url", &database.url], directory.path());
    let child = command.stderr(Stdio::piped()).spawn().unwrap();
    soon("that it waits", async { while database.rows(WAIT_FOR_A_TABLE).await.is_empty() {} }).await;
    let id = child.id().unwrap().to_string();
    assert!(Command::new("kill").args(["-TERM", &id]).status().await.unwrap().success());
    let ended = soon("the end", child.wait_with_output()).await.unwrap();
    let said = String::from_utf8(ended.stderr).unwrap();
    assert!(ended.status.code() == Some(1) && said.contains("stopped by a signal"), "{said}");
}

/// Unless it only says whose disks are waited for.
#[tokio::test]
async fn what_is_acknowledged_is_on_disk_whatever_the_database_is_set_to() {
    for (set, expected) in [("off", "on"), ("on", "on"), ("local", "local"), ("remote_apply", "remote_apply")] {
        let database = Database::fresh(Kind::Postgres).await;
        Store::connect(&database.url).await.unwrap().migrate().await.unwrap();
        let (_, name) = database.url.rsplit_once('/').unwrap();
        database
            .execute(&format!(
                "ALTER DATABASE {name} SET synchronous_commit = {set};
                CREATE TABLE seen (value TEXT);
                CREATE FUNCTION see() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
                    INSERT INTO seen VALUES (current_setting('synchronous_commit')); RETURN NULL; END $$;
                CREATE TRIGGER see AFTER INSERT ON settings EXECUTE FUNCTION see();"
            ))
            .await;
        Store::connect(&database.url).await.unwrap().token_key().await.unwrap();
        let seen = database.rows("SELECT value FROM seen").await;
        assert_eq!(seen.len(), 1);
        assert_eq!(seen[0].try_get_by_index::<String>(0).unwrap(), expected, "{set}");
    }
}

/// The clock of its machine is two hours ahead, and the database never answers fast enough to be sure of its own.
#[tokio::test(flavor = "multi_thread")]
async fn a_slow_database_tells_the_time_as_well() {
    let database = Database::fresh(Kind::Postgres).await;
    Store::connect(&database.url).await.unwrap().migrate().await.unwrap();
    let (_way, url) = Way::to(&database, Duration::from_millis(130)).await;
    let mut command = Command::new(env!("CARGO_BIN_EXE_shortkit-webhooks"));
    lie_about_time(&mut command).env("FAKETIME", "+2h");
    let directory = tempfile::tempdir().unwrap();
    let process = Process::start(command, &["--database-url", &url], directory.path()).await;
    process.webhook("http://127.0.0.1:9009/").await;
    let made: i64 = database.rows("SELECT created_at_ms FROM webhooks").await[0].try_get_by_index(0).unwrap();
    let ahead = made - clock::now().millis();
    assert!(ahead.abs() < 60_000, "{ahead} ms ahead");
}

#[tokio::test]
async fn a_node_starts_when_the_backlog_cannot_be_counted() {
    let database = Database::fresh(Kind::Postgres).await;
    Store::connect(&database.url).await.unwrap().migrate().await.unwrap();
    let elsewhere = database.open().await;
    let locked = elsewhere.begin().await.unwrap();
    locked.execute_unprepared("LOCK TABLE delivery_counts IN ACCESS EXCLUSIVE MODE").await.unwrap();
    let server = TestServer::start(&database).await;
    assert_eq!(server.get("/v1/webhooks").await.status, 200);
    locked.rollback().await.unwrap();
    server.stop().await;
}

/// A later version may do so before all nodes of this one have stopped.
#[tokio::test]
async fn a_column_more_does_not_stop_those_who_do_not_know_it() {
    const TURNS: usize = 16;
    let database = Database::fresh(Kind::Postgres).await;
    let store = Store::connect_with(&database.url, 8).await.unwrap();
    store.migrate().await.unwrap();
    database
        .execute(
            "INSERT INTO webhooks (id, organization, environment, url, description, events, status, secret, created_at_ms)
             VALUES ('whk_1', 'acme', 'live', 'https://example.com/', '', '[]', 'active', '', 1);
             INSERT INTO events (id, event_type, data, created_at_ms) VALUES ('evt_1', 'content.ready', '{}', 1);
             INSERT INTO deliveries (webhook_id, id, organization, environment, event_id, event_type, status, attempts,
             granted, once, lost_leases, next_attempt_at_ms, created_at_ms)
             VALUES ('whk_1', 'del_1', 'acme', 'live', 'evt_1', 'content.ready', 'pending', 0, FALSE, FALSE, 0, 1, 1)",
        )
        .await;
    let tenant = Tenant::new("acme", Environment::Live).unwrap();
    for turn in 0..TURNS {
        // Until then, every connection has prepared what it runs.
        if turn == TURNS / 2 {
            database.execute("ALTER TABLE deliveries ADD COLUMN later TEXT").await;
        }
        let mut list = Waitlist::default();
        let due_at = Timestamp::from_millis(1);
        list.add(Waiting { webhook_id: "whk_1".into(), organization: "acme".into(), due_at });
        let claimed = store.claim(&mut list, clock::now(), Duration::from_secs(60)).await.unwrap();
        assert_eq!(claimed.count, 1, "{turn}");
        let fail = "UPDATE deliveries SET status = 'failed', lease_node = NULL, lease_expires_at_ms = NULL";
        assert_eq!(database.execute(fail).await, 1);
        store.retry_delivery(&tenant, "whk_1", "del_1", &Actor::command_line()).await.unwrap();
        store.get_delivery(&tenant, "whk_1", "del_1").await.unwrap().unwrap();
    }
}
