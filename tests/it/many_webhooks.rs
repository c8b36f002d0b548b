//! Many webhooks that have something waiting at the same time.

use std::collections::HashSet;

use shortkit_webhooks::{store::Store, webhook::Secret};

use crate::support::{Database, Receiver, TestServer, on_both_databases};

on_both_databases!(all_that_is_due_at_the_start_goes_out);

/// More than are looked for at a time, twice.
const WEBHOOKS: usize = 4_200;
/// One of so many is disabled.
const DISABLED: usize = 10;

async fn all_that_is_due_at_the_start_goes_out(database: Database) {
    let receiver = Receiver::start().await;
    Store::connect(&database.url).await.unwrap().migrate().await.unwrap();
    let numbers = format!(
        "WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {WEBHOOKS}) \
         SELECT 'whk_' || (10000 + i)"
    );
    let (secret, url) = (Secret::from_random(&[7; 32]), receiver.url());
    for insert in [
        "INSERT INTO events (id, event_type, data, created_at_ms) VALUES ('evt_1', 'content.ready', '{}', 1)"
            .to_owned(),
        format!(
            "INSERT INTO webhooks (id, organization, environment, url, events, status, secret, created_at_ms) {numbers}, \
             'org' || (i % 7), 'test', '{url}', '[\"content.ready\"]', \
             CASE WHEN i % {DISABLED} = 0 THEN 'disabled' ELSE 'active' END, '{}', 1 FROM n",
            secret.expose()
        ),
        format!(
            "INSERT INTO deliveries (webhook_id, id, organization, environment, event_id, event_type, status, attempts, \
             granted, once, lost_leases, next_attempt_at_ms, created_at_ms) {numbers}, 'del_' || i, 'org' || (i % 7), \
             'test', 'evt_1', 'content.ready', 'pending', 0, FALSE, FALSE, 0, 1 + i % 100, 1 FROM n"
        ),
    ] {
        database.execute(&insert).await;
    }
    let server = TestServer::start(&database).await;
    let active = WEBHOOKS - WEBHOOKS / DISABLED;
    let got = receiver.wait_for(active).await;
    let webhooks: HashSet<&str> = got.iter().map(|got| got.header("x-shortform-webhook-id")).collect();
    assert_eq!((got.len(), webhooks.len()), (active, active));
    let number = |webhook_id: &&str| webhook_id["whk_".len()..].parse::<usize>().unwrap();
    assert!(webhooks.iter().map(number).all(|number| number % DISABLED > 0));
    server.stop().await;
    if database.url.starts_with("postgres") {
        // Which has no statistics of them yet, and takes those that are not deleted for few.
        let read =
            "SELECT CAST(sum(idx_tup_read) AS BIGINT) FROM pg_stat_user_indexes WHERE indexrelname = 'webhooks_tenant'";
        let read: i64 = database.rows(read).await[0].try_get_by_index(0).unwrap();
        assert!(read < 10 * WEBHOOKS as i64, "all webhooks were gone through {} times", read / WEBHOOKS as i64);
    }
}
