//! Lists: totals, filters and pages that hold still while rows arrive.

use std::collections::BTreeSet;

use sea_orm::{ConnectOptions, ConnectionTrait, DatabaseConnection, DbBackend, Statement};
use serde_json::{Value, json};
use shortkit_webhooks::{
    config::Config,
    webhook::{EventTypes, RetrySchedule},
};

use crate::support::{Database, Kind, PATIENCE, Receiver, Reply, TestServer, config, on_both_databases, soon};

on_both_databases!(
    totals_agree_and_pages_hold_still,
    webhooks_are_paged,
    cursors_are_bound,
    a_page_ends_at_its_bytes_and_reads_no_data_that_it_does_not_show,
    a_database_of_before_the_smaller_indexes_is_brought_up_to_date,
    a_database_of_before_the_key_by_time_is_brought_up_to_date,
    a_webhook_of_as_many_event_types_as_it_may_have_is_listed,
);

/// Every id on the pages of a list, and the total that each page named.
async fn pages(server: &TestServer, path: &str, mut between: impl AsyncFnMut()) -> (Vec<String>, Vec<i64>) {
    let (mut ids, mut totals) = (Vec::new(), Vec::new());
    let mut next = path.to_owned();
    loop {
        let page = server.get(&next).await.json();
        ids.extend(page["data"].as_array().unwrap().iter().map(|item| item["id"].as_str().unwrap().to_owned()));
        totals.push(page["meta"]["total"].as_i64().unwrap());
        let Some(cursor) = page["meta"].get("nextCursor").and_then(Value::as_str) else { return (ids, totals) };
        next = format!("{path}&cursor={cursor}");
        between().await;
    }
}

/// 45 deliveries: 20 succeed, 15 fail, 10 wait for their next attempt; a third of each is `export.ready`.
async fn totals_agree_and_pages_hold_still(database: Database) {
    let config = Config {
        // One attempt only, except where the receiver asks for more.
        retry_schedule: RetrySchedule::parse("0s,1h").unwrap(),
        ..config(&database)
    };
    let server = TestServer::with(config).await;
    let receiver =
        Receiver::scripted(|_, got| Reply::status(if got.body.contains("\"ok\"") { 200 } else { 500 })).await;
    let (id, _) = server.webhook(&receiver.url(), &["content.ready", "export.ready"]).await;
    let mut watch = server.watch().await;
    for number in 0..45 {
        let event = if number % 3 == 0 { "export.ready" } else { "content.ready" };
        let kind = if number % 9 < 4 { "ok" } else { "bad" };
        if number % 9 < 7 && kind == "bad" {
            // A test event is never retried, so it ends as failed.
            server.post(&format!("/v1/webhooks/{id}/test"), &json!({ "event": event }).to_string()).await.data();
        } else {
            server.publish(event, &format!("{{\"kind\":\"{kind}\"}}")).await;
        }
    }
    watch.until(45, |change| change.response_time.is_some()).await;

    let expected = [("success", 20, 10), ("failed", 15, 5), ("pending", 10, 0)];
    let base = format!("/v1/webhooks/{id}/deliveries?limit=7");
    let mut all = BTreeSet::new();
    for (status, count, exports) in expected {
        let (ids, totals) = pages(&server, &format!("{base}&status={status}"), async || {}).await;
        assert_eq!((ids.len(), totals[0]), (count, i64::try_from(count).unwrap()), "{status}");
        assert!(ids.is_sorted_by(|newer, older| newer > older));
        all.extend(ids);
        let export = server.get(&format!("{base}&status={status}&event=export.ready")).await;
        assert_eq!(export.json()["meta"]["total"], exports, "{status}");
        assert!(export.data().as_array().unwrap().iter().all(|item| item["event"] == "export.ready"));
    }
    let export = server.get(&format!("{base}&event=export.ready")).await;
    assert_eq!(export.json()["meta"]["total"], 15);
    assert_eq!(all.len(), 45);

    // New rows arrive while the pages are read: none of the old ones is skipped or repeated, none of the new ones appears.
    let publish = async || {
        server.publish("content.ready", "{\"kind\":\"ok\"}").await;
    };
    let (ids, _) = pages(&server, &base, publish).await;
    assert_eq!(ids.iter().cloned().collect::<BTreeSet<_>>(), all);
    assert_eq!(ids.len(), 45);
    server.stop().await;
}

async fn webhooks_are_paged(database: Database) {
    let server = TestServer::start(&database).await;
    let mut made = Vec::new();
    for _ in 0..5 {
        made.insert(0, server.webhook("https://example.com/", &["content.ready"]).await.0);
    }
    let (ids, totals) = pages(&server, "/v1/webhooks?limit=2", async || {}).await;
    assert_eq!(ids, made);
    assert_eq!(totals, [5, 5, 5]);
    server.stop().await;
}

async fn cursors_are_bound(database: Database) {
    let server = TestServer::start(&database).await;
    let receiver = Receiver::start().await;
    let (id, _) = server.webhook(&receiver.url(), &["content.ready"]).await;
    let (other, _) = server.webhook(&receiver.url(), &["export.ready"]).await;
    for _ in 0..2 {
        server.publish("content.ready", "{}").await;
    }
    let path = format!("/v1/webhooks/{id}/deliveries?limit=1");
    let cursor = server.get(&path).await.json()["meta"]["nextCursor"].as_str().unwrap().to_owned();
    assert_eq!(server.get(&format!("{path}&cursor={cursor}")).await.status, 200);
    let mut changed = cursor.clone().into_bytes();
    let middle = changed.len() / 2;
    changed[middle] = if changed[middle] == b'A' { b'B' } else { b'A' };
    let changed = String::from_utf8(changed).unwrap();
    for path in [
        format!("{path}&status=success&cursor={cursor}"),
        format!("/v1/webhooks/{other}/deliveries?cursor={cursor}"),
        format!("/v1/webhooks?cursor={cursor}"),
        format!("{path}&cursor={changed}"),
        format!("{path}&cursor=x"),
    ] {
        let refused = server.get(&path).await;
        assert_eq!(refused.status, 400, "{path}");
        assert_eq!(refused.json()["error"]["code"], "INVALID_PARAMETER");
        assert_eq!(refused.json()["error"]["details"]["field"], "cursor");
    }
    server.stop().await;
}

/// How many [`fill`] makes of each.
const FILLED: [(&str, usize); 3] = [("pending", 20), ("failed", 180), ("success", 19_800)];

/// Fills in deliveries of a webhook.
async fn fill(database: &Database, webhook_id: &str) {
    database
        .execute(&format!(
            "INSERT INTO deliveries (webhook_id, id, organization, environment, event_id, event_type, status, attempts, \
             granted, once, lost_leases, next_attempt_at_ms, created_at_ms) \
             WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 20000) \
             SELECT '{webhook_id}', 'del_' || (100000 + i), 'acme', 'test', \
             'evt_' || i, 'content.ready', CASE WHEN i % 1000 = 0 THEN 'pending' WHEN i % 100 = 0 THEN 'failed' ELSE \
             'success' END, 1, FALSE, FALSE, 0, CASE WHEN i % 1000 = 0 THEN 4102444800000 END, 1 FROM n"
        ))
        .await;
    for (status, count) in FILLED {
        let row = format!("('{webhook_id}', 'content.ready', '{status}', {count})");
        database
            .execute(&format!("INSERT INTO delivery_counts (webhook_id, event_type, status, total) VALUES {row}"))
            .await;
    }
}

async fn a_database_of_before_the_smaller_indexes_is_brought_up_to_date(database: Database) {
    let server = TestServer::start(&database).await;
    let (id, _) = server.webhook("https://example.com/", &["content.ready"]).await;
    server.stop().await;
    fill(&database, &id).await;
    for undo in [
        "DROP INDEX deliveries_pending",
        "DROP INDEX deliveries_ended",
        "CREATE INDEX deliveries_filter ON deliveries (webhook_id, event_type, status, id)",
        "DELETE FROM seaql_migrations WHERE version = 'm0009_smaller_indexes'",
    ] {
        database.execute(undo).await;
    }
    let server = TestServer::start(&database).await;
    let indexes = if database.url.starts_with("sqlite:") {
        "SELECT name FROM pragma_index_list('deliveries')"
    } else {
        "SELECT indexname::text FROM pg_indexes WHERE tablename = 'deliveries'"
    };
    let indexes = database.rows(indexes).await;
    let indexes: BTreeSet<String> = indexes.iter().map(|row| row.try_get_by_index(0).unwrap()).collect();
    let has = ["deliveries_pending", "deliveries_ended", "deliveries_filter"].map(|name| indexes.contains(name));
    assert_eq!(has, [true, true, false], "{indexes:?}");
    for (status, count) in FILLED {
        let list = server.get(&format!("/v1/webhooks/{id}/deliveries?limit=100&status={status}")).await;
        assert_eq!(list.json()["meta"]["total"], count, "{status}");
        assert_eq!(list.data().as_array().unwrap().len(), count.min(100), "{status}");
    }
    server.stop().await;
}

/// The table of deliveries and its indexes, as the database describes them.
async fn described(database: &Database) -> Vec<String> {
    let described = if database.url.starts_with("sqlite:") {
        "SELECT sql FROM sqlite_master WHERE tbl_name = 'deliveries' AND sql IS NOT NULL ORDER BY name"
    } else {
        "SELECT indexdef FROM pg_indexes WHERE tablename = 'deliveries' ORDER BY indexname"
    };
    database.rows(described).await.iter().map(|row| row.try_get_by_index(0).unwrap()).collect()
}

async fn a_database_of_before_the_key_by_time_is_brought_up_to_date(database: Database) {
    const KEY: &str = "PRIMARY KEY (id, webhook_id)";
    const KEY_BEFORE: &str = "PRIMARY KEY (webhook_id, id)";
    let server = TestServer::start(&database).await;
    let (id, _) = server.webhook("https://example.com/", &["content.ready"]).await;
    server.stop().await;
    fill(&database, &id).await;
    // One has a value of its own in each column.
    let full = "INSERT INTO deliveries (webhook_id, id, organization, environment, event_id, event_type, status, attempts, \
                granted, once, lost_leases, status_code, response_time_ms, last_error, last_attempt_at_ms, created_at_ms, \
                response) VALUES ('whk_other', 'del_1', 'other', 'live', 'evt_other', 'a.b', 'failed', 11, TRUE, FALSE, 12, \
                13, 14, 'no', 15, 16, 'what it said')";
    database.execute(full).await;
    let expected = described(&database).await;
    if database.url.starts_with("sqlite:") {
        let table = expected.iter().find(|sql| sql.starts_with("CREATE TABLE")).unwrap();
        assert!(table.contains(KEY), "{table}");
        database.execute(&table.replacen("deliveries", "before", 1).replace(KEY, KEY_BEFORE)).await;
        database.execute("INSERT INTO before SELECT * FROM deliveries").await;
        database.execute("DROP TABLE deliveries").await;
        database.execute("ALTER TABLE before RENAME TO deliveries").await;
        for index in expected.iter().filter(|sql| *sql != table) {
            database.execute(index).await;
        }
    } else {
        database.execute(&format!("ALTER TABLE deliveries DROP CONSTRAINT deliveries_pkey, ADD {KEY_BEFORE}")).await;
    }
    assert_ne!(described(&database).await, expected);
    database.execute("DELETE FROM seaql_migrations WHERE version = 'm0015_deliveries_by_time'").await;
    // All columns of each row, by name.
    let columns = [
        ["webhook_id", "id", "organization", "environment", "event_id"],
        ["event_type", "status", "attempts", "granted", "once"],
        ["lost_leases", "next_attempt_at_ms", "lease_node", "lease_expires_at_ms", "status_code"],
        ["response_time_ms", "last_error", "last_attempt_at_ms", "created_at_ms", "response"],
    ];
    let columns = columns.as_flattened().iter().map(|column| format!("COALESCE(CAST({column} AS TEXT), '-')"));
    let rows = format!("SELECT {} FROM deliveries ORDER BY id", columns.collect::<Vec<_>>().join(" || ' ' || "));
    let rows = async || -> Vec<String> {
        database.rows(&rows).await.iter().map(|row| row.try_get_by_index(0).unwrap()).collect()
    };
    let before = rows().await;
    let server = TestServer::start(&database).await;
    assert_eq!(described(&database).await, expected);
    assert!(rows().await == before, "not one is lost, or another");
    let list = server.get(&format!("/v1/webhooks/{id}/deliveries?limit=100")).await;
    assert_eq!((&list.json()["meta"]["total"], &list.data()[0]["id"]), (&json!(20_000), &json!("del_120000")));
    server.stop().await;
}

/// The lists of a webhook merge what there is of each type and state, of which SQLite would take 500.
async fn a_webhook_of_as_many_event_types_as_it_may_have_is_listed(database: Database) {
    let types: Vec<String> = (0..1_000).map(|number| format!("type.{number}")).collect();
    let event_types = EventTypes::parse(&types.join(",")).unwrap();
    let server = TestServer::with(Config { event_types, ..config(&database) }).await;
    let types: Vec<&str> = types.iter().map(String::as_str).collect();
    let (id, _) = server.webhook("https://example.com/", &types).await;
    // Each type has one of each state, and the first has two more.
    let fill = format!(
        "INSERT INTO deliveries (webhook_id, id, organization, environment, event_id, event_type, status, attempts, \
         granted, once, lost_leases, next_attempt_at_ms, created_at_ms) \
         WITH RECURSIVE n (i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM n WHERE i < 3001) \
         SELECT '{id}', 'del_' || (100000 + i), 'acme', 'test', 'evt_' || i, \
         'type.' || CASE WHEN i < 3000 THEN i % 1000 ELSE 0 END, \
         CASE WHEN i < 1000 THEN 'pending' WHEN i < 2000 THEN 'failed' ELSE 'success' END, 1, FALSE, FALSE, 0, \
         CASE WHEN i < 1000 THEN 4102444800000 END, 1 FROM n"
    );
    database.execute(&fill).await;
    let count = "INSERT INTO delivery_counts (webhook_id, event_type, status, total) \
                 SELECT webhook_id, event_type, status, count(*) FROM deliveries GROUP BY webhook_id, event_type, status";
    database.execute(count).await;
    let newest_first = |numbers: std::ops::Range<usize>| -> Vec<String> {
        numbers.rev().map(|number| format!("del_{}", 100_000 + number)).collect()
    };
    for (filter, numbers) in [
        ("", 0..3_002),
        ("&status=pending", 0..1_000),
        ("&status=failed", 1_000..2_000),
        ("&status=success", 2_000..3_002),
    ] {
        let path = format!("/v1/webhooks/{id}/deliveries?limit=100{filter}");
        let (ids, totals) = pages(&server, &path, async || {}).await;
        assert!(totals.iter().all(|total| *total == numbers.len() as i64), "{filter}: {totals:?}");
        assert!(ids == newest_first(numbers), "{filter}");
    }
    let path = format!("/v1/webhooks/{id}/deliveries?limit=2&event=type.0");
    let (ids, _) = pages(&server, &path, async || {}).await;
    assert_eq!(ids, [3_001, 3_000, 2_000, 1_000, 0].map(|number| format!("del_{}", 100_000 + number)));
    server.stop().await;
}

/// Ten deliveries that succeeded, each of an event of its own with this data.
async fn fill_with_data(database: &Database, webhook_id: &str, data: &str) {
    const TEN: &str = "WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 10)";
    let insert = "INSERT INTO events (id, event_type, data, created_at_ms)";
    let events = format!("{insert} {TEN} SELECT 'evt_' || (100 + i), 'content.ready', '{data}', 1 FROM n");
    let deliveries = format!(
        "INSERT INTO deliveries (webhook_id, id, organization, environment, event_id, event_type, status, attempts, \
         granted, once, lost_leases, created_at_ms) {TEN} SELECT '{webhook_id}', 'del_' || (100 + i), 'acme', 'test', \
         'evt_' || (100 + i), 'content.ready', 'success', 1, FALSE, FALSE, 0, 1 FROM n"
    );
    let count = format!(
        "INSERT INTO delivery_counts (webhook_id, event_type, status, total) \
         VALUES ('{webhook_id}', 'content.ready', 'success', 10)"
    );
    for statement in [events, deliveries, count] {
        database.execute(&statement).await;
    }
}

/// How often PostgreSQL has fetched a long value of an event, once nobody else is connected, which is when all is counted.
async fn long_values_read(database: &Database) -> i64 {
    const OTHERS: &str = "SELECT pid FROM pg_stat_activity WHERE datname = current_database() \
        AND backend_type = 'client backend' AND pid <> pg_backend_pid()";
    const READ: &str = "SELECT CAST(sum(idx_scan) AS BIGINT) FROM pg_stat_all_indexes \
        WHERE relid = (SELECT reltoastrelid FROM pg_class WHERE relname = 'events')";
    // One connection, which is not among the others.
    let mut alone = ConnectOptions::new(&database.url);
    alone.max_connections(1);
    let connection = sea_orm::Database::connect(alone).await.unwrap();
    let rows =
        async |sql: &str| connection.query_all_raw(Statement::from_string(DbBackend::Postgres, sql)).await.unwrap();
    soon("that all others have gone", async { while !rows(OTHERS).await.is_empty() {} }).await;
    rows(READ).await[0].try_get_by_index(0).unwrap()
}

async fn a_page_ends_at_its_bytes_and_reads_no_data_that_it_does_not_show(database: Database) {
    let server = TestServer::start(&database).await;
    let (id, _) = server.webhook("https://example.com/", &["content.ready"]).await;
    server.stop().await;
    let data = format!("{{\"x\":\"{}\"}}", "x".repeat(1_000_000));
    fill_with_data(&database, &id, &data).await;
    let sqlite = database.url.starts_with("sqlite:");
    let read_before = if sqlite { 0 } else { long_values_read(&database).await };

    let server = TestServer::start(&database).await;
    let path = format!("/v1/webhooks/{id}/deliveries?limit=100");
    if sqlite {
        // What is on other pages is no text, so reading it would fail.
        let spoil = "UPDATE events SET data = CAST(replace(data, 'x', x'ff') AS TEXT) WHERE id <= 'evt_106'";
        assert_eq!(database.execute(spoil).await, 6);
        let page = server.get(&path).await;
        assert_eq!((page.data().as_array().unwrap().len(), &page.json()["meta"]["total"]), (4, &json!(10)));
        database.execute(&format!("UPDATE events SET data = '{data}'")).await;
    }
    let mut on_pages = Vec::new();
    let mut next = path.clone();
    loop {
        let page = server.get(&next).await.json();
        let items = page["data"].as_array().unwrap();
        assert!(items.iter().all(|item| item["payload"]["data"]["x"].as_str().unwrap().len() == 1_000_000));
        on_pages.push(items.iter().map(|item| item["id"].as_str().unwrap().to_owned()).collect::<Vec<_>>());
        let Some(cursor) = page["meta"].get("nextCursor").and_then(Value::as_str) else { break };
        next = format!("{path}&cursor={cursor}");
    }
    let expected = [107..=110, 103..=106, 101..=102]
        .map(|ids| ids.rev().map(|number| format!("del_{number}")).collect::<Vec<_>>());
    assert_eq!(on_pages, expected, "four of a megabyte fit into four MiB");
    server.stop().await;
    if !sqlite {
        assert_eq!(long_values_read(&database).await - read_before, 10, "each once, for the page that shows it");
    }
}

/// Counted by PostgreSQL: how often an index was gone through, and how many entries that returned.
async fn entries_read(connection: &DatabaseConnection, index: &str) -> (i64, i64) {
    let statistics = format!("SELECT idx_scan, idx_tup_read FROM pg_stat_user_indexes WHERE indexrelname = '{index}'");
    let rows = connection.query_all_raw(Statement::from_string(DbBackend::Postgres, statistics)).await.unwrap();
    rows[0].try_get_many_by_index().unwrap()
}

/// What was pending stays in the index until it is vacuumed, and a list does not go through it.
#[tokio::test]
async fn postgres_lists_without_what_was_pending() {
    let database = Database::fresh(Kind::Postgres).await;
    let server = TestServer::start(&database).await;
    let (id, _) = server.webhook("https://example.com/", &["content.ready"]).await;
    server.stop().await;
    database.execute("ALTER TABLE deliveries SET (autovacuum_enabled = off)").await;
    fill(&database, &id).await;
    for change in [
        "UPDATE deliveries SET status = 'pending', next_attempt_at_ms = 1 WHERE status = 'success'",
        "UPDATE deliveries SET status = 'success', next_attempt_at_ms = NULL WHERE next_attempt_at_ms = 1",
    ] {
        assert_eq!(database.execute(change).await, 19_800);
    }
    let connection = database.open().await;
    let (scans, entries) = entries_read(&connection, "deliveries_pending").await;
    let server = TestServer::start(&database).await;
    let list = server.get(&format!("/v1/webhooks/{id}/deliveries?limit=20")).await;
    assert_eq!(list.data().as_array().unwrap().len(), 20);
    server.stop().await;
    let read = soon("that the list is counted", async {
        loop {
            match entries_read(&connection, "deliveries_pending").await {
                (now, _) if now < scans + 2 => {}
                (_, now) => return now - entries,
            }
        }
    });
    let read = read.await;
    assert!(read <= 2 * 21, "{read} entries for 21 rows, twice");
}

/// However much there is, what is rare is not looked for among all the rest.
#[tokio::test]
async fn postgres_finds_by_an_index_what_a_filter_asks_for() {
    const LISTS: i64 = 20;
    let database = Database::fresh(Kind::Postgres).await;
    let server = TestServer::start(&database).await;
    let (id, _) = server.webhook("https://example.com/", &["content.ready"]).await;
    fill(&database, &id).await;
    // All that is newer is another's, and PostgreSQL knows of each that it has about half.
    database
        .execute("INSERT INTO deliveries (webhook_id, id, organization, environment, event_id, event_type, status, attempts, \
                 granted, once, lost_leases, created_at_ms) SELECT 'whk_other', 'del_' || (500000 + i), 'acme', 'test', \
                 'evt_' || i, 'content.ready', 'success', 1, FALSE, FALSE, 0, 1 FROM generate_series(1, 20000) AS i")
        .await;
    database.execute("ANALYZE deliveries").await;
    let mut expected = [("deliveries_ended", 0), ("deliveries_pending", 0)];
    for (status, count) in FILLED {
        for _ in 0..LISTS {
            let list = server.get(&format!("/v1/webhooks/{id}/deliveries?limit=19&status={status}")).await;
            assert_eq!((&list.json()["meta"]["total"], list.data().as_array().unwrap().len()), (&json!(count), 19));
        }
        // Once for the head of the range, and once for the page.
        expected[usize::from(status == "pending")].1 += 2 * LISTS;
    }
    server.stop().await;
    let connection = database.open().await;
    let statistics = "SELECT indexrelname::text, idx_scan, idx_tup_read FROM pg_stat_user_indexes \
                      WHERE indexrelname IN ('deliveries_ended', 'deliveries_pending') ORDER BY 1";
    let expected = expected.map(|(index, scans)| (index.to_owned(), scans, (20 + 1) * scans / 2));
    let mut found: Vec<(String, i64, i64)> = Vec::new();
    let counted = async {
        while found != expected {
            let statement = Statement::from_string(DbBackend::Postgres, statistics);
            let rows = connection.query_all_raw(statement).await.unwrap();
            found = rows.iter().map(|row| row.try_get_many_by_index().unwrap()).collect();
        }
    };
    if tokio::time::timeout(PATIENCE, counted).await.is_err() {
        panic!("each list is counted at its index, with a row more than it shows: {found:?} instead of {expected:?}");
    }
}
