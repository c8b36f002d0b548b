//! How the database is reached.

use std::time::Duration;

use sea_orm::{ConnectOptions, Database, DatabaseConnection, DbErr};

/// Connections for reading, and on PostgreSQL, less one for commits, for everything.
const MAX_CONNECTIONS: u32 = 16;
/// A call waits this long for a connection, then ends with [`super::Error::Unavailable`]. A publish may wait behind another that
/// waits, and is to be refused within five seconds.
const MAX_WAIT_FOR_CONNECTION: Duration = Duration::from_secs(2);

/// The ways to one database.
pub(super) struct Connections {
    pub(super) read: DatabaseConnection,
    /// On SQLite the one connection that writes; on PostgreSQL the same pool.
    pub(super) write: DatabaseConnection,
    /// For one commit after another: on SQLite the one that writes, on PostgreSQL one whose plans are kept.
    pub(super) commits: DatabaseConnection,
}

impl Connections {
    pub(super) async fn open(url: &str) -> Result<Self, DbErr> {
        if url.starts_with("sqlite:") {
            // The writer first: it makes the file.
            let write = Database::connect(options(url, 1, Plans::New)).await?;
            let read = Database::connect(options(url, MAX_CONNECTIONS, Plans::New)).await?;
            Ok(Self { read, commits: write.clone(), write })
        } else {
            let pool = Database::connect(options(url, MAX_CONNECTIONS - 1, Plans::New)).await?;
            let commits = Database::connect(options(url, 1, Plans::Kept)).await?;
            Ok(Self { read: pool.clone(), write: pool, commits })
        }
    }
}

/// Which plans PostgreSQL follows.
#[derive(Clone, Copy)]
enum Plans {
    /// One that is made for each statement. Kept from when a table was small, some would lead row by row through all of it
    /// until its statistics are renewed.
    New,
    /// One that is kept for each text of a statement that says no more than the whole of a primary key: then no index can
    /// lead astray. It saves a tenth of a millisecond a commit.
    Kept,
}

fn options(url: &str, connections: u32, plans: Plans) -> ConnectOptions {
    let mut options = ConnectOptions::new(url);
    options
        .max_connections(connections)
        .acquire_timeout(MAX_WAIT_FOR_CONNECTION)
        .test_before_acquire(false)
        .sqlx_logging(false)
        // A node that freezes with a transaction open must not hold up the others for longer than this.
        .map_sqlx_postgres_opts(move |postgres| {
            postgres.options([
                ("idle_in_transaction_session_timeout", "5s"),
                ("lock_timeout", "5s"),
                ("statement_timeout", "30s"),
                // Every statement is made for an index. PostgreSQL would plan some otherwise while tables are small or
                // their statistics old, and keep such a plan while they grow.
                ("enable_seqscan", "off"),
                ("enable_hashjoin", "off"),
                ("enable_mergejoin", "off"),
                ("jit", "off"),
                (
                    "plan_cache_mode",
                    match plans {
                        Plans::New => "force_custom_plan",
                        Plans::Kept => "force_generic_plan",
                    },
                ),
            ])
        })
        .map_sqlx_sqlite_opts(|sqlite| {
            sqlite
                .pragma("journal_mode", "WAL")
                // What is acknowledged is on disk, also when the machine loses power.
                .pragma("synchronous", "FULL")
                .pragma("busy_timeout", "5000")
                // What a statement would have to undo is otherwise a file of its own in each commit.
                .pragma("temp_store", "MEMORY")
        })
        // When a disk is full, SQLite may end a transaction by itself. The pool does not notice, its next "transaction"
        // would be a savepoint in one that never ends, and what is acknowledged would not be on disk.
        .map_sqlx_sqlite_before_acquire(|connection, _| {
            let clean = !sea_orm::sqlx::Connection::is_in_transaction(connection);
            Box::pin(std::future::ready(Ok(clean)))
        });
    options
}

/// The file of a SQLite URL; none for PostgreSQL and for a database in memory.
pub fn sqlite_path(url: &str) -> Option<&str> {
    let path = url.strip_prefix("sqlite:")?;
    let path = path.strip_prefix("//").unwrap_or(path).split('?').next()?;
    (!path.is_empty() && path != ":memory:").then_some(path)
}
