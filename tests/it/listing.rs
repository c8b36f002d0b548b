//! Lists: totals, filters and pages that hold still while rows arrive.

use std::collections::BTreeSet;

use sea_orm::{ConnectionTrait, DbBackend, Statement};
use serde_json::{Value, json};

use crate::support::{Database, Kind, Receiver, Reply, TestServer, config, on_both_databases, soon};

on_both_databases!(
    totals_agree_and_pages_hold_still,
    webhooks_are_paged,
    cursors_are_bound,
    a_database_of_before_the_smaller_indexes_is_brought_up_to_date,
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
    let config = shortkit_webhooks::config::Config {
        // One attempt only, except where the receiver asks for more.
        retry_schedule: shortkit_webhooks::webhook::RetrySchedule::parse("0s,1h").unwrap(),
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

/// However much there is, what is rare is not looked for among all the rest.
#[tokio::test]
async fn postgres_finds_by_an_index_what_a_filter_asks_for() {
    const LISTS: i64 = 20;
    let database = Database::fresh(Kind::Postgres).await;
    let server = TestServer::start(&database).await;
    let (id, _) = server.webhook("https://example.com/", &["content.ready"]).await;
    fill(&database, &id).await;
    let mut expected = [("deliveries_ended", 0), ("deliveries_pending", 0)];
    for (status, count) in FILLED {
        for _ in 0..LISTS {
            let list = server.get(&format!("/v1/webhooks/{id}/deliveries?limit=19&status={status}")).await;
            assert_eq!((&list.json()["meta"]["total"], list.data().as_array().unwrap().len()), (&json!(count), 19));
        }
        expected[usize::from(status == "pending")].1 += LISTS;
    }
    server.stop().await;
    let connection = database.open().await;
    let counted = soon("that all lists are counted, each at its index, with a row more than it shows", async {
        let statistics = "SELECT indexrelname::text, idx_scan, idx_tup_read FROM pg_stat_user_indexes \
                          WHERE indexrelname IN ('deliveries_ended', 'deliveries_pending') ORDER BY 1";
        let expected = expected.map(|(index, scans)| (index.to_owned(), scans, 20 * scans));
        loop {
            let statement = Statement::from_string(DbBackend::Postgres, statistics);
            let rows = connection.query_all_raw(statement).await.unwrap();
            let found: Vec<(String, i64, i64)> = rows.iter().map(|row| row.try_get_many_by_index().unwrap()).collect();
            if found == expected {
                return;
            }
        }
    });
    counted.await;
}
