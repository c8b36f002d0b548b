//! A database of the service, empty or filled, and what is asked of it beside the service.

use std::time::Duration;

use sea_orm::{ConnectOptions, ConnectionTrait, Database, DatabaseConnection, DbBackend, Statement};
use shortkit_webhooks::{clock, webhook::Timestamp};
use tempfile::TempDir;

use super::support::server::Server;

/// Webhooks of each store, which what is filled in is spread over. One of them gets what is published.
pub(crate) const WEBHOOKS: usize = 100;
/// One of so many deliveries has failed, with six attempts.
const FAILED: usize = 20;
/// What is filled in, was published from so long ago …
const OLDEST: Duration = Duration::from_secs(40 * 24 * 60 * 60);
/// … to so long ago.
const NEWEST: Duration = Duration::from_secs(30 * 24 * 60 * 60);
/// Deliveries filled in by one transaction.
const CHUNK: usize = 50_000;

/// Where the service keeps its data, and what it makes itself beside it.
pub(crate) struct Store {
    pub(crate) directory: TempDir,
    /// The PostgreSQL database, which is dropped by [`Store::remove`]; none for a SQLite file in the directory.
    pub(crate) database_url: Option<String>,
}

impl Store {
    /// A new one: a SQLite file, or a database of a server.
    pub(crate) async fn new(server: Option<&Server>) -> Self {
        Self { directory: tempfile::tempdir().expect("a directory"), database_url: Server::database(server).await }
    }

    /// Removes a PostgreSQL database; a file goes with its directory.
    pub(crate) async fn remove(self, server: Option<&Server>) {
        if let (Some(server), Some(url)) = (server, &self.database_url) {
            server.remove(url).await;
        }
    }

    async fn open(&self) -> DatabaseConnection {
        let file = self.directory.path().join("shortkit.db");
        let url = self.database_url.clone().unwrap_or_else(|| format!("sqlite://{}", file.display()));
        let mut options = ConnectOptions::new(url);
        // Nothing is lost that could not be filled in again.
        options.max_connections(1).sqlx_logging(false).map_sqlx_sqlite_opts(|sqlite| {
            sqlite.pragma("journal_mode", "WAL").pragma("synchronous", "OFF").pragma("cache_size", "-500000")
        });
        Database::connect(options).await.expect("the database")
    }

    async fn number(&self, sql: &str) -> i64 {
        let connection = self.open().await;
        let statement = Statement::from_string(connection.get_database_backend(), sql);
        let row = connection.query_one_raw(statement).await.expect("an answer").expect("a row");
        row.try_get_by_index(0).expect("a number")
    }

    /// Bytes on disk.
    pub(crate) async fn bytes(&self) -> u64 {
        if self.database_url.is_some() {
            return self.number("SELECT pg_database_size(current_database())").await.unsigned_abs();
        }
        let files = std::fs::read_dir(self.directory.path()).expect("its directory");
        files.flatten().filter_map(|file| file.metadata().ok()).map(|metadata| metadata.len()).sum()
    }

    /// How many deliveries retention has removed.
    pub(crate) async fn removed(&self) -> u64 {
        self.number("SELECT CAST(COALESCE(sum(removed), 0) AS BIGINT) FROM delivery_counts").await.unsigned_abs()
    }

    /// Fills in finished deliveries, with their events of 500 bytes; the service, which has made the webhooks, must not run.
    pub(crate) async fn fill(&self, count: usize) {
        let connection = self.open().await;
        let postgres = connection.get_database_backend() == DbBackend::Postgres;
        let now = clock::now();
        let (first, span) = (now.before(OLDEST).millis(), (OLDEST - NEWEST).as_millis());
        for from in (0..count).step_by(CHUNK) {
            let to = (from + CHUNK).min(count) - 1;
            let at = first + i64::try_from(span * from as u128 / count as u128).expect("it is small");
            connection.execute_unprepared(&chunk(postgres, from, to, at)).await.expect("rows");
            if (to + 1) % 1_000_000 < CHUNK {
                eprintln!("{} of {count} filled in", to + 1);
            }
        }
        connection
            .execute_unprepared(
                "INSERT INTO delivery_counts (webhook_id, event_type, status, total, last_attempt_at_ms) \
                 SELECT webhook_id, event_type, status, count(*), max(last_attempt_at_ms) FROM deliveries \
                 GROUP BY webhook_id, event_type, status",
            )
            .await
            .expect("counts");
        // So that what the database puts off does not fall into a measurement.
        let settle: &[&str] =
            if postgres { &["VACUUM ANALYZE", "CHECKPOINT"] } else { &["PRAGMA wal_checkpoint(TRUNCATE)"] };
        for statement in settle {
            connection.execute_unprepared(statement).await.expect("rest");
        }
        connection.close().await.expect("it closes");
    }
}

/// The statements that fill in deliveries number `from` to `to`, made at `at`.
fn chunk(postgres: bool, from: usize, to: usize, at: i64) -> String {
    let time = &clock::first_id("x", Timestamp::from_millis(at))[2..12];
    let (numbers, id) = if postgres {
        (format!("generate_series({from}, {to}) AS n (i)"), "lpad(i::text, 16, '0')")
    } else {
        let numbers =
            "WITH RECURSIVE n (i) AS (VALUES ({from}) UNION ALL SELECT i + 1 FROM n WHERE i < {to}) SELECT i FROM n";
        let numbers = numbers.replace("{from}", &from.to_string()).replace("{to}", &to.to_string());
        (format!("({numbers}) AS n"), "printf('%016d', i)")
    };
    let begin = if postgres { "BEGIN; SET LOCAL synchronous_commit TO off" } else { "BEGIN" };
    let filler = "x".repeat(480);
    format!(
        "{begin};
         INSERT INTO events (id, event_type, data, created_at_ms)
             SELECT 'evt_{time}' || {id}, 'export.ready', '{{\"filler\":\"{filler}\"}}', {at} FROM {numbers};
         INSERT INTO deliveries (webhook_id, id, organization, environment, event_id, event_type, status, attempts, granted,
             once, lost_leases, status_code, response_time_ms, last_error, last_attempt_at_ms, created_at_ms, response)
             SELECT w.id, 'del_{time}' || {id}, w.organization, w.environment, 'evt_{time}' || {id}, 'export.ready',
             CASE WHEN i % {FAILED} = 0 THEN 'failed' ELSE 'success' END, CASE WHEN i % {FAILED} = 0 THEN 6 ELSE 1 END,
             FALSE, FALSE, 0, CASE WHEN i % {FAILED} = 0 THEN 503 ELSE 200 END, 12,
             CASE WHEN i % {FAILED} = 0 THEN 'HTTP 503' END, {at} + 20, {at},
             CASE WHEN i % {FAILED} > 0 THEN 'OK' END
             FROM {numbers} JOIN (SELECT id, organization, environment, row_number() OVER (ORDER BY id) - 1 AS place
                 FROM webhooks) AS w ON w.place = i % {WEBHOOKS};
         INSERT INTO attempts (delivery_id, number, started_at_ms, duration_ms, status_code, response, error)
             SELECT 'del_{time}' || {id}, a.number, {at}, 12, 503, 'Service Unavailable', 'HTTP 503'
             FROM {numbers} CROSS JOIN (SELECT 1 AS number UNION ALL SELECT 2 UNION ALL SELECT 3 UNION ALL SELECT 4
                 UNION ALL SELECT 5 UNION ALL SELECT 6) AS a WHERE i % {FAILED} = 0;
         COMMIT"
    )
}
