//! How the database is reached.

use std::{
    future::Future,
    sync::{Arc, Once},
    time::Duration,
};

use sea_orm::{
    ConnectOptions, Database, DatabaseConnection, DbErr, RuntimeErr,
    sqlx::{self, Connection, PgConnection},
};

use super::{
    error::code,
    silence::{Silence, Trust},
};
use crate::clock;

/// Of all connections, one is for commits, so many for what else the engine needs to go on, whatever tenants ask for …
const ENGINE_CONNECTIONS: u32 = 4;
/// … and so many for the revisions, since one that goes silent as its pool asks it is of no use for a quarter of an hour; the
/// others are for what tenants do.
const REVISIONS_CONNECTIONS: u32 = 2;
/// There are at least so many …
const MIN_CONNECTIONS: u32 = ENGINE_CONNECTIONS + REVISIONS_CONNECTIONS + 2;
/// … and so many, when nobody says otherwise.
pub const DEFAULT_CONNECTIONS: u32 = 16;
/// A call waits this long for a connection, then ends with [`super::Error::Unavailable`]. A publish may wait behind another that
/// waits, and is to be refused within five seconds.
pub(super) const MAX_WAIT_FOR_CONNECTION: Duration = Duration::from_secs(2);
/// What is not used for this long is closed: other nodes may need it, and firewalls forget connections in silence.
const MAX_IDLE: Duration = Duration::from_secs(60);
/// A connection that comes back, perhaps from somebody who gave up, is closed unless it answers within this time that it is
/// in no transaction.
const MAX_PING: Duration = Duration::from_secs(1);
/// SQLite's log is cut to so many bytes, 64 MiB, when it begins anew. It is used again, so a smaller one would be cut and made
/// longer again and again; usually it has 4 MiB.
const MAX_LOG_BYTES: u64 = 64 * 1024 * 1024;

/// Who finds a new SQLite file busy tries again after this time …
const BUSY: Duration = Duration::from_millis(20);
/// … for so long, as others wait for each other there.
const MAX_BUSY: Duration = Duration::from_secs(5);

/// The ways to one database.
pub(super) struct Connections {
    pub(super) read: DatabaseConnection,
    /// How many connections `read` has at most.
    pub(super) readers: u32,
    /// On SQLite the one connection that writes; on PostgreSQL the same pool.
    pub(super) write: DatabaseConnection,
    /// As `read` and `write`, for the engine.
    pub(super) engine_read: DatabaseConnection,
    pub(super) engine_write: DatabaseConnection,
    /// For the revisions alone, since the database is judged by them.
    pub(super) revisions: DatabaseConnection,
    /// For one commit after another: on SQLite the one that writes, on PostgreSQL one whose plans are kept.
    pub(super) commits: DatabaseConnection,
}

impl Connections {
    pub(super) async fn open(url: &str, most: u32, silence: &Silence) -> Result<Self, DbErr> {
        let readers = most.max(MIN_CONNECTIONS) - ENGINE_CONNECTIONS - REVISIONS_CONNECTIONS - 1;
        let connect = |connections, plans| Database::connect(options(url, connections, plans, silence.clone()));
        if url.starts_with("sqlite:") {
            // The writer first: it makes the file.
            let write = unless_busy(|| connect(1, Plans::New)).await?;
            let read = connect(readers, Plans::New).await?;
            let engine_read = connect(ENGINE_CONNECTIONS, Plans::New).await?;
            let (revisions, commits) = (engine_read.clone(), write.clone());
            Ok(Self { read, readers, engine_read, engine_write: write.clone(), revisions, commits, write })
        } else {
            let pool = match connect(readers, Plans::New).await {
                Ok(pool) => pool,
                Err(error) => return Err(why_not(url).await.unwrap_or(error)),
            };
            let engine = connect(ENGINE_CONNECTIONS, Plans::New).await?;
            let revisions = connect(REVISIONS_CONNECTIONS, Plans::New).await?;
            let commits = connect(1, Plans::Kept).await?;
            let (read, engine_read) = (pool.clone(), engine.clone());
            Ok(Self { read, readers, write: pool, engine_read, engine_write: engine, revisions, commits })
        }
    }
}

/// Connects to SQLite, also when another process does so for the first time as well: the change to a log of its own is not
/// waited for with `busy_timeout`.
async fn unless_busy<F>(connect: impl Fn() -> F) -> Result<DatabaseConnection, DbErr>
where
    F: Future<Output = Result<DatabaseConnection, DbErr>>,
{
    let began = clock::stopwatch();
    loop {
        match connect().await {
            Err(error) if code(&error).as_deref() == Some("5") && began.elapsed() < MAX_BUSY => {
                tokio::time::sleep(BUSY).await;
            }
            connected => return connected,
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

impl Plans {
    /// With which time limit for a statement: what is planned anew may go through much.
    const fn settings(self) -> (&'static str, &'static str) {
        match self {
            Self::New => ("force_custom_plan", "30s"),
            Self::Kept => ("force_generic_plan", "6s"),
        }
    }
}

fn options(url: &str, connections: u32, plans: Plans, silence: Silence) -> ConnectOptions {
    let (plan_cache_mode, statement_timeout) = plans.settings();
    let mut options = ConnectOptions::new(url);
    options
        .max_connections(connections)
        .acquire_timeout(MAX_WAIT_FOR_CONNECTION)
        .idle_timeout(MAX_IDLE)
        .test_before_acquire(false)
        .sqlx_logging(false)
        // A node that freezes with a transaction open must not hold up the others for longer than this.
        .map_sqlx_postgres_opts(move |postgres| {
            postgres.options([
                ("idle_in_transaction_session_timeout", "5s"),
                ("lock_timeout", "5s"),
                // Nor must the sessions of one that is gone without a word fill the server.
                ("tcp_keepalives_idle", "10"),
                ("tcp_keepalives_interval", "5"),
                ("tcp_keepalives_count", "3"),
                ("statement_timeout", statement_timeout),
                // Every statement is made for an index. PostgreSQL would plan some otherwise while tables are small or
                // their statistics old, and keep such a plan while they grow.
                ("enable_seqscan", "off"),
                ("enable_hashjoin", "off"),
                ("enable_mergejoin", "off"),
                ("jit", "off"),
                ("plan_cache_mode", plan_cache_mode),
            ])
        })
        .map_sqlx_postgres_pool_opts(|pool| {
            let pool = pool.after_connect(|connection, _| Box::pin(takes_writes(connection)));
            // The pool asks as well, but without an end, and not about transactions.
            pool.after_release(|connection, _| Box::pin(async { Ok(is_free(connection).await) }))
        })
        .map_sqlx_postgres_before_acquire(move |connection, its| {
            let trust = silence.trust(its.age);
            Box::pin(async move {
                Ok(match trust {
                    Trust::Gone => false,
                    Trust::Ask => is_free(connection).await,
                    Trust::Use => true,
                })
            })
        })
        .map_sqlx_sqlite_opts(|sqlite| {
            sqlite
                .pragma("journal_mode", "WAL")
                // What is acknowledged is on disk, also when the machine loses power.
                .pragma("synchronous", "FULL")
                .pragma("busy_timeout", "5000")
                // After a burst, or a long read, the log begins anew with no more than this; else it stays as it was.
                .pragma("journal_size_limit", MAX_LOG_BYTES.to_string())
                // What a statement would have to undo is otherwise a file of its own in each commit.
                .pragma("temp_store", "MEMORY")
        })
        // When a disk is full, SQLite may end a transaction by itself. The pool does not notice, its next "transaction"
        // would be a savepoint in one that never ends, and what is acknowledged would not be on disk.
        .map_sqlx_sqlite_before_acquire(|connection, _| {
            let clean = !Connection::is_in_transaction(connection);
            Box::pin(std::future::ready(Ok(clean)))
        });
    options
}

/// Refuses a server that only reads: a replica, or one that was the primary until a moment ago and still has its name. And
/// has what it acknowledges written to its disk, should the server, the role or the database be set to acknowledge it before.
/// Other settings, which say whose disks are waited for, stay as they are.
async fn takes_writes(connection: &mut PgConnection) -> Result<(), sqlx::Error> {
    const READS_ONLY: &str = "SELECT pg_is_in_recovery() OR current_setting('transaction_read_only')::boolean, \
        CASE WHEN current_setting('synchronous_commit') = 'off' THEN set_config('synchronous_commit', 'on', false) END";
    static WARNED: Once = Once::new();
    let (reads_only, set): (bool, Option<String>) = sqlx::query_as(READS_ONLY).fetch_one(connection).await?;
    if reads_only {
        return Err(sqlx::Error::Configuration("the database takes no writes: is it a replica?".into()));
    }
    if set.is_some() {
        WARNED.call_once(|| {
            tracing::warn!("synchronous_commit is off in the database, by which a crash loses commits; here it is on");
        });
    }
    Ok(())
}

/// Whether it answers, and is in no transaction. Whoever leaves before the answer to a BEGIN leaves one open that the driver
/// does not know of: what the next one writes would be acknowledged, and undone later.
async fn is_free(connection: &mut PgConnection) -> bool {
    // It begins nothing, so the driver finds that it did not, by what the server says of the connection; unless there was a
    // transaction before. In one that has failed, it fails as well.
    let asked = tokio::time::timeout(MAX_PING, connection.begin_with("SELECT 1")).await;
    matches!(asked, Ok(Err(sqlx::Error::BeginFailed)))
}

/// Why there is no connection, which a pool does not say.
async fn why_not(url: &str) -> Option<DbErr> {
    let connect = async { takes_writes(&mut PgConnection::connect(url).await?).await };
    let error = tokio::time::timeout(MAX_WAIT_FOR_CONNECTION, connect).await.ok()?.err()?;
    Some(DbErr::Conn(RuntimeErr::SqlxError(Arc::new(error))))
}

/// The file of a SQLite URL; none for PostgreSQL and for a database in memory.
pub fn sqlite_path(url: &str) -> Option<&str> {
    let path = url.strip_prefix("sqlite:")?;
    let path = path.strip_prefix("//").unwrap_or(path).split('?').next()?;
    (!path.is_empty() && path != ":memory:").then_some(path)
}

#[cfg(test)]
mod tests {
    use sea_orm::ConnectionTrait;

    use super::*;
    use crate::store::Store;

    /// A burst leaves no log behind that keeps its length for ever.
    #[tokio::test]
    async fn a_long_log_is_cut_when_it_begins_anew() {
        let (directory, store) = Store::fresh().await;
        let log = || std::fs::metadata(directory.path().join("test.db-wal")).unwrap().len();
        let write = async |sql: &str| store.0.write.execute_unprepared(sql).await.unwrap();
        write("CREATE TABLE t (b BLOB)").await;
        write(&format!("INSERT INTO t VALUES (zeroblob({}))", MAX_LOG_BYTES + MAX_LOG_BYTES / 4)).await;
        assert!(log() > MAX_LOG_BYTES, "{}", log());
        store.0.commits.checkpoint().await;
        write("INSERT INTO t VALUES ('')").await;
        assert!(log() <= MAX_LOG_BYTES, "{}", log());
    }
}
