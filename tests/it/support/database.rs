//! A fresh database for each test.

use std::{process::Stdio, time::Duration};

use sea_orm::{
    ConnectionTrait, Database as SeaOrm, DatabaseConnection, DatabaseTransaction, DbBackend, QueryResult, Statement,
    TransactionTrait,
};
use shortkit_webhooks::clock;
use tempfile::TempDir;
use tokio::process::Command;

/// Migrations that tests undo.
pub(crate) const PUBLISH_DRAFTS: &str = "m0014_publish_drafts";
pub(crate) const FILED_CHANGES: &str = "m0016_filed_changes";

/// Which database.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Sqlite,
    Postgres,
}

/// An empty database; a file is gone when this is dropped, a PostgreSQL database with its server.
pub(crate) struct Database {
    pub(crate) url: String,
    directory: Option<TempDir>,
}

impl Database {
    pub(crate) async fn fresh(kind: Kind) -> Self {
        match kind {
            Kind::Sqlite => {
                let directory = tempfile::tempdir().unwrap();
                let url = format!("sqlite://{}?mode=rwc", directory.path().join("test.db").display());
                Self { url, directory: Some(directory) }
            }
            Kind::Postgres => {
                let server = std::env::var("SHORTKIT_TEST_POSTGRES")
                    .expect("SHORTKIT_TEST_POSTGRES names a PostgreSQL server for tests; tests/run starts one");
                let name = clock::new_id("t");
                let admin = SeaOrm::connect(format!("{server}/postgres")).await.unwrap();
                admin.execute_unprepared(&format!("CREATE DATABASE {name}")).await.unwrap();
                admin.close().await.unwrap();
                Self { url: format!("{server}/{name}"), directory: None }
            }
        }
    }

    /// A connection beside those of the service, for whoever works on the database by other means.
    pub(crate) async fn open(&self) -> DatabaseConnection {
        SeaOrm::connect(&self.url).await.unwrap()
    }

    /// The rows that a statement finds.
    pub(crate) async fn rows(&self, sql: &str) -> Vec<QueryResult> {
        let connection = self.open().await;
        let backend = connection.get_database_backend();
        connection.query_all_raw(Statement::from_string(backend, sql)).await.unwrap()
    }

    /// How many rows a statement changed.
    pub(crate) async fn execute(&self, sql: &str) -> u64 {
        self.open().await.execute_unprepared(sql).await.unwrap().rows_affected()
    }

    /// Until this ends, nobody else writes to deliveries.
    pub(crate) async fn let_nobody_write(&self) -> DatabaseTransaction {
        let transaction = self.open().await.begin().await.unwrap();
        let lock = match transaction.get_database_backend() {
            DbBackend::Postgres => "LOCK TABLE deliveries IN EXCLUSIVE MODE",
            _ => "UPDATE settings SET value = value",
        };
        transaction.execute_unprepared(lock).await.unwrap();
        transaction
    }

    /// A copy, made as README says while the service works.
    pub(crate) async fn backup(&self) -> Self {
        if self.url.starts_with("sqlite:") {
            let backup = Self::fresh(Kind::Sqlite).await;
            let path = backup.url.trim_start_matches("sqlite://").trim_end_matches("?mode=rwc");
            self.execute(&format!("VACUUM INTO '{path}'")).await;
            return backup;
        }
        let backup = Self::fresh(Kind::Postgres).await;
        let copy = format!("pg_dump '{}' | psql --quiet --set ON_ERROR_STOP=1 '{}'", self.url, backup.url);
        let done = Command::new("bash").args(["-o", "pipefail", "-c", &copy]).stdout(Stdio::null()).status().await;
        assert!(done.unwrap().success(), "{copy}");
        backup
    }

    /// Leaves the schema as it was before a migration, which statements undo.
    pub(crate) async fn undo(&self, migration: &str, statements: &[&str]) {
        for statement in statements {
            self.execute(statement).await;
        }
        assert_eq!(self.execute(&format!("DELETE FROM seaql_migrations WHERE version = '{migration}'")).await, 1);
    }

    /// Leaves it without a table that a migration makes.
    pub(crate) async fn undo_publish_drafts(&self) {
        self.undo(PUBLISH_DRAFTS, &["DROP TABLE publish_drafts"]).await;
    }

    /// Leaves the log of changes as it was before it was filed.
    pub(crate) async fn undo_filed_changes(&self) {
        let statements: &[&str] = match self.url.starts_with("sqlite:") {
            true => &[
                "DROP TABLE changes_of_tenants",
                "DROP TABLE changes_filed",
                "CREATE INDEX changes_tenant ON changes (organization, environment, seq)",
            ],
            false => &[],
        };
        self.undo(FILED_CHANGES, statements).await;
    }

    /// Adds `count` rows to the log of changes, each with the failure of a delivery of the organisation's that is numbered
    /// from 1, from so long ago.
    pub(crate) async fn log_failures(&self, organization: &str, count: usize, age: Duration) {
        let at = clock::now().before(age).millis();
        let sql = format!(
            r#"INSERT INTO changes (organization, environment, entries, occurred_at_ms)
            WITH RECURSIVE numbers (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM numbers WHERE i < {count})
            SELECT '{organization}', 'test', '[{{"k":"attempted","w":"whk_1","d":"del_' || CAST(i AS TEXT)
            || '","e":"content.ready","s":"failed","n":1,"t":{at}}}]', {at} FROM numbers"#
        );
        assert_eq!(self.execute(&sql).await, count as u64);
    }

    /// All that a thief of the database gets: its files, or every row of every table.
    pub(crate) async fn contents(&self) -> Vec<u8> {
        if let Some(directory) = &self.directory {
            let read = || -> std::io::Result<Vec<_>> {
                std::fs::read_dir(directory.path())?.map(|file| std::fs::read(file?.path())).collect()
            };
            loop {
                match read() {
                    Ok(files) => return files.concat(),
                    // The last connection of a service that has just stopped takes its log away, once that is in the
                    // database: which then has to be read again.
                    Err(gone) if gone.kind() == std::io::ErrorKind::NotFound => {}
                    Err(error) => panic!("{error}"),
                }
            }
        }
        let connection = self.open().await;
        let all = async |sql: String| -> Vec<String> {
            let rows = connection.query_all_raw(Statement::from_string(DbBackend::Postgres, sql)).await.unwrap();
            rows.iter().map(|row| row.try_get_by_index(0).unwrap()).collect()
        };
        let tables = "SELECT table_name::text FROM information_schema.tables WHERE table_schema = 'public'";
        let mut contents = Vec::new();
        for table in all(tables.to_owned()).await {
            contents.extend(all(format!("SELECT t::text FROM {table} t")).await);
        }
        contents.join("\n").into_bytes()
    }
}
