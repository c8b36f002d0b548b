//! The connections by which scripts are committed, each as a transaction of its own and one trip.

use std::{
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use sea_orm::{
    DatabaseConnection, DbBackend, DbErr, RuntimeErr,
    sqlx::{self, Postgres, pool::PoolConnection},
};

use super::{
    Error, filing,
    parameter::{for_postgres, for_sqlite},
    script::{Expected, Outcome, Script, outcome},
    silence::{MAX_COMMIT, Silence, Trust},
};
use crate::clock;

/// PostgreSQL's connection is made anew after this time …
const MAX_KEPT: Duration = Duration::from_secs(10 * 60);
/// … and after this in which it was not used: firewalls forget connections in silence.
const MAX_IDLE: Duration = Duration::from_secs(60);

/// A checkpoint waits no longer than this for the connection, which the pool has back a moment after a commit.
const MAX_WAIT_FOR_CHECKPOINT: Duration = Duration::from_millis(10);

/// Where transactions are committed that are a script each, one after the other.
pub(super) enum Commits {
    /// The connection that all write by.
    Sqlite(sqlx::SqlitePool),
    /// A pool of one, and its connection between two commits: the pool would ask the database about it each time.
    Postgres(sqlx::PgPool, Idle, Silence),
}

type Idle = Mutex<Option<Kept>>;

/// A connection that is out of its pool.
pub(super) struct Kept {
    connection: PoolConnection<Postgres>,
    since: Instant,
    used_at: Instant,
}

impl Commits {
    pub(super) fn new(connection: &DatabaseConnection, silence: Silence) -> Self {
        match connection.get_database_backend() {
            DbBackend::Postgres => {
                Self::Postgres(connection.get_postgres_connection_pool().clone(), Mutex::default(), silence)
            }
            _ => Self::Sqlite(connection.get_sqlite_connection_pool().clone()),
        }
    }

    pub(super) fn backend(&self) -> DbBackend {
        if matches!(self, Self::Postgres(..)) { DbBackend::Postgres } else { DbBackend::Sqlite }
    }

    /// Runs a script as a transaction of its own, unless something was missed.
    pub(super) async fn run(&self, script: Script) -> Result<Outcome, Error> {
        if script.is_empty() {
            return Ok(Outcome::Done);
        }
        let failed = |error: sqlx::Error| DbErr::Exec(RuntimeErr::SqlxError(error.into()));
        let no_connection = |error: sqlx::Error| DbErr::Conn(RuntimeErr::SqlxError(error.into()));
        let ended = |done: Result<(), sqlx::Error>| outcome(done.map_err(failed));
        match self {
            Self::Sqlite(pool) => ended(on_sqlite(pool, script).await),
            Self::Postgres(pool, idle, silence) => {
                let kept = idle.lock().unwrap_or_else(PoisonError::into_inner).take();
                let (connection, since) = match kept.and_then(|kept| kept.usable(silence)) {
                    Some(kept) => (kept.connection, kept.since),
                    None => (pool.acquire().await.map_err(no_connection)?, clock::stopwatch()),
                };
                let commit = async { ended(on_postgres(connection, since, idle, script).await) };
                silence.heard(MAX_COMMIT, commit).await
            }
        }
    }

    /// Brings what is in SQLite's log into the database, as far as nobody reads what it replaces, unless somebody else is
    /// writing: whoever comes in the meantime is not to wait for both.
    pub(super) async fn checkpoint(&self) {
        if let Self::Sqlite(pool) = self
            && let Ok(Ok(mut connection)) = tokio::time::timeout(MAX_WAIT_FOR_CHECKPOINT, pool.acquire()).await
            && let Err(error) = sqlx::query("PRAGMA wal_checkpoint(PASSIVE)").execute(&mut *connection).await
        {
            tracing::warn!(%error, "SQLite's log could not be brought into the database; a commit will have to do it");
        }
    }

    /// Makes a step of filing the log of changes, and answers with how many rows are left; none on PostgreSQL.
    ///
    /// It waits for no flush: it is on disk with the next commit at the latest, and lost with no other. Whatever goes wrong,
    /// the connection is not used again, since its next commit might not wait for one either.
    pub(super) async fn file(&self, step: filing::Step) -> Result<i64, Error> {
        let Self::Sqlite(pool) = self else { return Ok(0) };
        let (text, parameters) = step.on_sqlite();
        let text = sqlx::AssertSqlSafe(format!("PRAGMA synchronous = NORMAL;{text};PRAGMA synchronous = FULL"));
        let filed = async {
            let mut connection = Unfinished(Some(pool.acquire().await?));
            let left = sqlx::query_scalar_with(text, for_sqlite(parameters)?).fetch_all(connection.get()?).await?;
            drop(connection.0.take());
            Ok(left.first().copied().unwrap_or(0))
        };
        filed.await.map_err(|error: sqlx::Error| DbErr::Exec(RuntimeErr::SqlxError(error.into())).into())
    }
}

async fn on_sqlite(pool: &sqlx::SqlitePool, script: Script) -> Result<(), sqlx::Error> {
    // Texts for one piece of each step come again; what is longer would fill the cache with what hardly does.
    let kept = script.is_common();
    let (text, parameters) = script.on_sqlite();
    let text = sqlx::AssertSqlSafe(format!("BEGIN IMMEDIATE;{text}COMMIT"));
    let mut connection = Unfinished(Some(pool.acquire().await?));
    let all = sqlx::query_with(text, for_sqlite(parameters)?).persistent(kept);
    let done = all.execute(connection.get()?).await;
    // An error ends some transactions and leaves others open.
    if done.is_ok() || sqlx::query("ROLLBACK").execute(connection.get()?).await.is_ok() {
        drop(connection.0.take());
    }
    done.map(drop)
}

/// A statement is a transaction.
async fn on_postgres(
    connection: PoolConnection<Postgres>,
    since: Instant,
    idle: &Idle,
    script: Script,
) -> Result<(), sqlx::Error> {
    let (text, parameters) = script.on_postgres();
    let arguments = for_postgres(&parameters)?;
    let mut connection = Unfinished(Some(connection));
    let done = sqlx::query_with(sqlx::AssertSqlSafe(text), arguments).execute(connection.get()?).await;
    // After any other error it may be one that has just ended, or one of a server that no longer takes writes.
    if done.as_ref().map_or_else(|error| Expected::missed(error).is_some(), |_| true) {
        let kept = connection.0.take().map(|connection| Kept { connection, since, used_at: clock::stopwatch() });
        *idle.lock().unwrap_or_else(PoisonError::into_inner) = kept;
    }
    done.map(drop)
}

impl Kept {
    /// The same, unless it is to be made anew. It is closed then: its pool would ask it whether it is there, without an end.
    fn usable(self, silence: &Silence) -> Option<Self> {
        let age = self.since.elapsed();
        if age < MAX_KEPT && self.used_at.elapsed() < MAX_IDLE && silence.trust(age) == Trust::Use {
            return Some(self);
        }
        drop(Unfinished(Some(self.connection)));
        None
    }
}

/// A connection that something is under way on. Should that never be heard of, it is closed, and not used again.
struct Unfinished<DB: sqlx::Database>(Option<PoolConnection<DB>>);

impl<DB: sqlx::Database> Unfinished<DB> {
    fn get(&mut self) -> Result<&mut DB::Connection, sqlx::Error> {
        self.0.as_deref_mut().ok_or(sqlx::Error::WorkerCrashed)
    }
}

impl<DB: sqlx::Database> Drop for Unfinished<DB> {
    fn drop(&mut self) {
        if let Some(mut connection) = self.0.take() {
            connection.close_on_drop();
        }
    }
}
