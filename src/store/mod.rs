//! The only place with sea_orm: SQLite and PostgreSQL behind one interface.
//!
//! A write that changes deliveries goes through [`Store::write`], or is one [`script::Script`], in this order: rows of
//! `deliveries` first, then counts and changes ([`script::Script::tell`]). That keeps the order of `changes` the order of commits on both databases, and no
//! two transactions wait for each other in a circle.

mod audit;
mod backlog;
mod batch;
mod changes;
mod checkpoints;
mod commit_size;
mod commits;
mod connections;
mod counts;
mod deliveries;
mod entity;
mod error;
mod filing;
mod given_back;
mod handoff;
mod holdings;
mod idempotency;
mod keys;
mod known_keys;
mod lanes;
mod leases;
mod log;
mod newest;
mod parameter;
mod publish;
mod record;
mod rescue;
mod rests;
mod retention;
mod revisions;
mod room;
mod rows;
mod schema;
mod script;
mod secrets;
mod silence;
mod sql;
mod targets;
mod test_events;
mod time;
mod turns;
mod waiting;
mod webhooks;
mod writer;
mod writes;

use std::{future::Future, sync::Arc};

use sea_orm::{
    ConnectionTrait, DatabaseConnection, DatabaseTransaction, DbBackend, EntityTrait, Set, SqliteTransactionMode,
    TransactionOptions, TransactionTrait,
};
use tokio::sync::mpsc;

pub use self::{
    audit::{Actor, AuditAction, AuditEntry, AuditFilter},
    backlog::BacklogLimits,
    changes::{ChangeFilter, Watch, WatchError},
    connections::{DEFAULT_CONNECTIONS, sqlite_path},
    counts::Stats,
    deliveries::{DeliveryDetail, DeliveryFilter, ListedDelivery, Page, RetryError},
    error::Error,
    handoff::News,
    idempotency::{Claim, Keep, NamedRequest, Remembered},
    keys::{ApiKey, CreatedKey, KeyHash, KeyInfo, KeyKind, NewKey},
    leases::{Claimed, Lease, Leased},
    publish::{NewEvent, Published},
    record::Finished,
    secrets::Resealed,
    targets::Target,
    test_events::TestCaller,
    waiting::{Waiting, Waitlist},
    webhooks::Rotated,
};
use self::{
    backlog::Backlog,
    commits::Commits,
    connections::Connections,
    filing::Filing,
    handoff::Handoff,
    silence::{MAX_LOOK_UP, MAX_WAIT, Silence},
    targets::Targets,
    test_events::TestEvents,
    writer::Writer,
};
use crate::{
    clock,
    feed::Feed,
    telemetry::{Levels, Metrics},
    vault::Vault,
    webhook::{DeliveryStatus, Plan, Retention},
};

/// The database and what this node holds of it in memory. Cheap to clone.
#[derive(Clone)]
pub struct Store(Arc<Inner>);

struct Inner {
    /// SQLite's file.
    path: Option<String>,
    read: DatabaseConnection,
    /// On SQLite the one connection that writes; on PostgreSQL the same pool.
    write: DatabaseConnection,
    /// The same for the engine.
    engine_read: DatabaseConnection,
    engine_write: DatabaseConnection,
    /// For the revisions alone.
    revisions_read: DatabaseConnection,
    silence: Silence,
    /// For what publishing and sending write, one commit after another: on SQLite the same; on PostgreSQL a connection whose
    /// plans are kept.
    commits: Commits,
    filing: Filing,
    /// Names this run of this process in leases.
    node: String,
    feed: Feed,
    handoff: Handoff,
    backlog: Backlog,
    test_events: TestEvents,
    targets: Targets,
    target_reader: std::sync::OnceLock<targets::TargetReader>,
    writer: std::sync::OnceLock<Writer>,
    known_keys: known_keys::KnownKeys,
    revisions: revisions::Revisions,
    publishing: room::Rooms,
    lanes: lanes::CallLanes,
    /// Deliveries leased to this node, on their way to `dispatch`.
    ready: mpsc::UnboundedSender<Leased>,
    ready_out: std::sync::Mutex<Option<mpsc::UnboundedReceiver<Leased>>>,
    used_keys: keys::UsedKeys,
    retention: std::sync::OnceLock<Retention>,
    /// The master keys, once [`Store::unlock`] has them.
    vault: std::sync::RwLock<Option<Vault>>,
    exclusive: std::sync::Mutex<Option<std::fs::File>>,
    followed: time::Followed,
    metrics: Metrics,
}

impl Store {
    /// Opens `sqlite://…` or `postgres://…`; the schema is brought up to date by [`Store::migrate`].
    pub async fn connect(url: &str) -> Result<Self, Error> {
        Self::connect_with(url, DEFAULT_CONNECTIONS).await
    }

    /// The same with at most so many connections, and at least eight.
    pub async fn connect_with(url: &str, connections: u32) -> Result<Self, Error> {
        let silence = Silence::of(url);
        let opened = Connections::open(url, connections, &silence).await?;
        let Connections { read, readers, write, engine_read, engine_write, revisions, commits } = opened;
        let (ready, ready_out) = mpsc::unbounded_channel();
        let store = Self(Arc::new(Inner {
            path: sqlite_path(url).map(str::to_owned),
            read,
            write,
            engine_read,
            engine_write,
            revisions_read: revisions,
            commits: Commits::new(&commits, silence.clone()),
            filing: Filing::default(),
            silence,
            node: clock::new_id("node"),
            feed: Feed::default(),
            handoff: Handoff::default(),
            backlog: Backlog::default(),
            test_events: TestEvents::default(),
            targets: Targets::default(),
            target_reader: std::sync::OnceLock::new(),
            writer: std::sync::OnceLock::new(),
            known_keys: known_keys::KnownKeys::default(),
            revisions: revisions::Revisions::default(),
            publishing: room::Rooms::default(),
            lanes: lanes::CallLanes::over(readers),
            ready,
            ready_out: std::sync::Mutex::new(Some(ready_out)),
            used_keys: keys::UsedKeys::default(),
            retention: std::sync::OnceLock::new(),
            vault: std::sync::RwLock::default(),
            exclusive: std::sync::Mutex::new(None),
            followed: time::Followed::default(),
            metrics: Metrics::default(),
        }));
        let _ = store.0.writer.set(Writer::start(Arc::downgrade(&store.0)));
        Ok(store)
    }

    /// Has SQLite put what it works with into files, for steps that go through all there is, or into memory.
    async fn work_in_files(&self, files: bool) -> Result<(), Error> {
        if self.sqlite() {
            let place = if files { "FILE" } else { "MEMORY" };
            self.0.write.execute_unprepared(&format!("PRAGMA temp_store = {place}")).await?;
        }
        Ok(())
    }

    /// An empty SQLite, brought up to date, and where it is.
    #[cfg(test)]
    async fn fresh() -> (tempfile::TempDir, Self) {
        let directory = tempfile::tempdir().unwrap();
        let url = format!("sqlite://{}?mode=rwc", directory.path().join("test.db").display());
        let store = Self::connect(&url).await.unwrap();
        store.migrate().await.unwrap();
        (directory, store)
    }

    /// The steps by which SQLite would go about a statement.
    #[cfg(test)]
    async fn plan(&self, mut statement: sea_orm::Statement) -> Vec<String> {
        statement.sql.insert_str(0, "EXPLAIN QUERY PLAN ");
        let steps = self.0.read.query_all_raw(statement).await.unwrap();
        steps.iter().map(|step| step.try_get("", "detail").unwrap()).collect()
    }

    /// Makes sure, until the last clone is gone, that no other process serves the same SQLite database, or migrates it;
    /// several may share a PostgreSQL.
    pub fn take_exclusively(&self) -> Result<(), Error> {
        if let Some(file) = self.exclusively()? {
            *self.0.exclusive.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = Some(file);
        }
        Ok(())
    }

    /// The same for as long as the file is kept that it answers with; none where it is this store's already.
    fn exclusively(&self) -> Result<Option<std::fs::File>, Error> {
        let Some(path) = self.0.path.as_deref() else { return Ok(None) };
        if self.0.exclusive.lock().unwrap_or_else(std::sync::PoisonError::into_inner).is_some() {
            return Ok(None);
        }
        let failed = |error: std::io::Error| Error::Lock(path.to_owned(), Arc::new(error));
        let file = std::fs::File::create(format!("{path}.lock")).map_err(failed)?;
        file.try_lock().map_err(|error| match error {
            std::fs::TryLockError::WouldBlock => Error::Taken(path.to_owned()),
            std::fs::TryLockError::Error(error) => failed(error),
        })?;
        Ok(Some(file))
    }

    /// 32 random bytes that all nodes on this database share, made by the first: they authenticate cursors and tokens.
    pub async fn token_key(&self) -> Result<[u8; 32], Error> {
        use base64::{Engine, engine::general_purpose::STANDARD};
        use entity::setting::{ActiveModel, Column, Entity};
        let fresh =
            ActiveModel { name: Set("token_key".to_owned()), value: Set(STANDARD.encode(clock::random::<32>())) };
        let keep = sea_orm::sea_query::OnConflict::column(Column::Name).do_nothing().to_owned();
        Entity::insert(fresh).on_conflict(keep).exec_without_returning(&self.0.write).await?;
        let stored = Entity::find_by_id("token_key").one(&self.0.write).await?;
        let bytes = stored.and_then(|setting| STANDARD.decode(setting.value).ok());
        bytes.and_then(|bytes| bytes.try_into().ok()).ok_or(Error::Corrupt("token key"))
    }

    /// Rung when there is news, or room for something that is due.
    pub async fn due(&self) {
        self.0.handoff.due.notified().await;
    }

    /// What has come to wait in the database since the last time, and for whom there is room again.
    pub fn news(&self) -> News {
        self.0.handoff.news()
    }

    /// The deliveries leased to this node, for the one engine that works on them; none the second time.
    pub fn ready(&self) -> Option<mpsc::UnboundedReceiver<Leased>> {
        self.0.ready_out.lock().unwrap_or_else(std::sync::PoisonError::into_inner).take()
    }

    /// Ends when no event waits any more to be stored that was published here, also of callers that did not wait for it. Test
    /// events are not among them.
    pub async fn all_published(&self) {
        self.0.publishing.none().await;
    }

    /// Whether several organisations had something to write when somebody last had.
    pub fn is_shared(&self) -> bool {
        self.0.writer.get().is_some_and(Writer::is_shared)
    }

    /// Ends when nothing is written any more because of a fault in the code.
    pub async fn writer_died(&self) {
        match self.0.writer.get() {
            Some(writer) => writer.died().await,
            None => std::future::pending().await,
        }
    }

    fn writer(&self) -> Result<&Writer, Error> {
        self.0.writer.get().ok_or(Error::Closed)
    }

    fn sqlite(&self) -> bool {
        self.0.write.get_database_backend() == DbBackend::Sqlite
    }

    /// Whether the database answers, and every change of that.
    pub(crate) fn available(&self) -> tokio::sync::watch::Receiver<bool> {
        self.0.silence.available()
    }

    /// What this node counts of itself.
    pub(crate) fn metrics(&self) -> &Metrics {
        &self.0.metrics
    }

    /// Counts a delivery that has this state now, if it has ended by the schedule: what ends by one attempt alone is a test, or
    /// has ended before.
    pub(crate) fn count_end(&self, status: DeliveryStatus, plan: Plan) {
        if status != DeliveryStatus::Pending && plan != Plan::Once {
            self.0.metrics.ended(status.as_str());
        }
    }

    /// What it would have to count if it were not known here.
    pub(crate) fn levels(&self) -> Levels {
        Levels {
            pending: self.0.backlog.pending(),
            held: self.0.handoff.held(),
            publish_bytes: self.0.publishing.taken(),
            streams: self.0.feed.streams(),
            database_available: *self.available().borrow(),
        }
    }

    /// This run of this process, as leases name it.
    pub(crate) fn node(&self) -> &str {
        &self.0.node
    }

    /// Ends when the database is found to have gone without a word: what waits for it is to be given up.
    pub async fn silent(&self) {
        self.0.silence.found().await;
    }

    /// What `work` comes to, which asks the database, unless that has gone without a word.
    async fn heard<T>(&self, work: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
        self.0.silence.heard(MAX_WAIT, work).await
    }

    /// The same for a look-up by key.
    async fn looked_up<T>(&self, work: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
        self.0.silence.heard(MAX_LOOK_UP, work).await
    }

    /// Runs a statement of its own; how many rows it changed.
    async fn run(&self, sql: sql::Sql) -> Result<u64, Error> {
        Ok(self.0.write.execute_raw(sql.build(self.0.write.get_database_backend())).await?.rows_affected())
    }

    /// Begins a transaction that will write.
    async fn write(&self) -> Result<DatabaseTransaction, Error> {
        self.write_by(&self.0.write).await
    }

    async fn write_by(&self, connection: &DatabaseConnection) -> Result<DatabaseTransaction, Error> {
        // A SQLite transaction that reads before it writes would be refused when another one wrote in between.
        let mode = self.sqlite().then_some(SqliteTransactionMode::Immediate);
        let options = TransactionOptions { sqlite_transaction_mode: mode, ..Default::default() };
        Ok(connection.begin_with_options(options).await?)
    }
}
