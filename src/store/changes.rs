//! The log of changes: written with what it tells of, read by watchers.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

use sea_orm::{
    ColumnTrait, ConnectionTrait, DatabaseConnection, DbBackend, EntityTrait, FromQueryResult, QueryFilter, QueryOrder,
    QuerySelect,
};
use tokio::{sync::broadcast, task::JoinSet};

use super::{Error, Store, entity::change, filing, keys::tenant, log, sql::Sql};
use crate::{
    clock,
    feed::{Tail, Watching},
    webhook::{Change, DeliveryStatus, Tenant},
};

/// A watcher that reads the log takes at most this many rows of it at a time …
const MAX_READ: usize = 64;
/// … and none after so many bytes, which are some 300 changes; what follows is in the next read. It holds no more than that
/// and the last row, which has 128 changes at most.
const MAX_READ_BYTES: usize = 64 * 1024;
/// A reader that took nothing for so long, while more came than the feed remembers, is too slow: its stream ends. Whoever is
/// behind for another reason reads on in the log.
const MAX_PAUSE: Duration = Duration::from_secs(5);
/// Who reads it for all watchers takes so many: there is a row for each organisation in a commit.
const MAX_FOLLOWED: u64 = 64;
/// How often the log is looked at for changes of other nodes, while somebody watches.
const POLL: Duration = Duration::from_millis(200);

/// Which changes to watch.
#[derive(Debug, Clone)]
pub struct ChangeFilter {
    /// Whose.
    pub tenant: Tenant,
    /// Only of this webhook.
    pub webhook_id: Option<String>,
    /// Only into this state.
    pub status: Option<DeliveryStatus>,
    /// Only of this event type.
    pub event_type: Option<String>,
}

/// Why watching ends.
#[derive(Debug, thiserror::Error)]
pub enum WatchError {
    /// Something of the tenant's was removed from the log after where it should continue.
    #[error("the resume token is too old")]
    TooOld,
    /// The log does not reach to where it should continue: the database was replaced by a backup of before.
    #[error("the resume token is of changes that are lost: the database was restored to a time before them")]
    Lost,
    /// The organisation has as many streams on this node as it may.
    #[error("too many streams of the organization are open")]
    TooMany,
    /// The reader paused, and fell behind further than the feed remembers.
    #[error("the stream is read too slowly; resume with the last token")]
    TooSlow,
    /// The database failed.
    #[error(transparent)]
    Store(#[from] Error),
}

/// A place in the log that moves on.
pub struct Watch {
    store: Store,
    filter: ChangeFilter,
    /// Everything up to here was seen.
    position: i64,
    caught_up: bool,
    /// The feed has gone on from here.
    behind: i64,
    live: Watching,
    pending: VecDeque<Change>,
    /// When the reader was given the last change, until it comes for the next.
    given_at: Option<Instant>,
    /// How long it took at most to come, since something was read for it.
    paused: Duration,
}

/// How far the log reaches, as it was at one moment.
pub(super) struct Reach {
    /// The place of the last change of the tenant that was removed.
    forgotten: Option<i64>,
    /// The number of the newest row, whosever it is; the newest is never removed.
    newest: Option<i64>,
}

/// What was found in the log.
struct LogRead {
    reach: Reach,
    changes: Vec<Change>,
    /// The place after what was read.
    end: i64,
    /// Whether that was all there was.
    is_all: bool,
    /// What has come since then.
    tail: Tail,
}

impl Store {
    /// Watches changes from now on, or right after number `after`.
    pub async fn watch(&self, filter: ChangeFilter, after: Option<i64>) -> Result<Watch, WatchError> {
        // First the feed, then the log: what is committed in between is in both, and skipped the second time.
        let live = self.0.feed.subscribe(filter.tenant.clone()).ok_or(WatchError::TooMany)?;
        let position = match after {
            Some(position) => position,
            None => {
                let _turn = self.0.lanes.turn_of_stream(filter.tenant.shared_organization()).await;
                self.end(&self.0.read).await?
            }
        };
        let mut watch = Watch {
            store: self.clone(),
            filter,
            position,
            caught_up: false,
            behind: 0,
            live,
            pending: VecDeque::new(),
            given_at: None,
            paused: Duration::ZERO,
        };
        if after.is_some() {
            // So that the call itself is refused when something is missing.
            watch.read_log().await?;
        }
        Ok(watch)
    }

    /// Reads new changes into the feed, as long as the process runs and somebody watches.
    pub async fn follow_changes(&self) -> Result<(), Error> {
        let mut position = None;
        loop {
            let polled = tokio::time::timeout(POLL, self.0.feed.announced());
            if !self.0.feed.is_watched() {
                position = None;
                self.0.feed.announced().await;
            } else if position.is_some() {
                // At the beginning, and after an error, what was announced before is in the log.
                if self.sqlite() {
                    self.0.feed.announced().await;
                } else {
                    let _ = polled.await;
                }
            }
            if !self.0.feed.is_watched() {
                continue;
            }
            let mut after = match position {
                Some(after) => after,
                // Says where the feed begins, so that a watcher who saw less reads the log.
                None => {
                    let newest = self.end(&self.0.engine_read).await?;
                    self.0.feed.begin(newest);
                    newest
                }
            };
            loop {
                let rows = self.read_changes(after).await?;
                if rows.is_empty() {
                    break;
                }
                for row in rows {
                    let (before, tenant) = (after, tenant(&row.organization, &row.environment)?);
                    after = log::end(row.seq);
                    if self.0.feed.pass(after, &tenant) {
                        self.0.feed.show(&tenant, after, log::changes(&row, before)?);
                    }
                }
            }
            position = Some(after);
        }
    }

    /// The place after everything in the log.
    async fn end(&self, connection: &DatabaseConnection) -> Result<i64, Error> {
        let statement = Sql::new("SELECT max(seq) FROM changes").build(connection.get_database_backend());
        let row = self.heard(async { Ok(connection.query_one_raw(statement).await?) }).await?;
        let newest = row.map(|row| row.try_get_by_index::<Option<i64>>(0)).transpose()?.flatten();
        Ok(newest.map_or(0, log::end))
    }

    /// The first rows with changes after a place, and perhaps some before it.
    async fn read_changes(&self, after: i64) -> Result<Vec<change::Model>, Error> {
        // The place after the last change of a row may be that of a row read to its end.
        let rows = change::Entity::find().filter(change::Column::Seq.gte(log::row(after + 1)));
        let rows = rows.order_by_asc(change::Column::Seq).limit(MAX_FOLLOWED);
        self.heard(async { Ok(rows.all(&self.0.engine_read).await?) }).await
    }

    /// The same of one tenant, and how far the log reached at that moment.
    pub(super) async fn read_log(&self, tenant: &Tenant, after: i64) -> Result<(Reach, Vec<change::Model>), Error> {
        let backend = self.0.read.get_database_backend();
        let statement = log_after(tenant, after, backend).build(backend);
        let _turn = self.0.lanes.turn_of_stream(tenant.shared_organization()).await;
        let (mut reach, mut rows) = (Reach { forgotten: None, newest: None }, Vec::new());
        for row in self.heard(async { Ok(self.0.read.query_all_raw(statement).await?) }).await? {
            reach = Reach { forgotten: row.try_get_by_index(0)?, newest: row.try_get_by_index(1)? };
            rows.extend(change::Model::from_query_result_optional(&row, "")?);
        }
        Ok((reach, rows))
    }

    /// What there is in the log for a stream after a place, in its organisation's turn.
    async fn select_log(self, filter: ChangeFilter, after: i64, tail: Tail) -> Result<LogRead, Error> {
        let turn = self.0.lanes.turn_at_log(filter.tenant.shared_organization()).await;
        let began = clock::stopwatch();
        // First the feed, then the log. However long the turn was in coming, no more has come since than the feed remembers.
        let tail = tail.now();
        let (reach, rows) = self.read_log(&filter.tenant, after).await?;
        let is_all = rows.len() < MAX_READ && rows.iter().map(|row| row.entries.len()).sum::<usize>() < MAX_READ_BYTES;
        let mut read = LogRead { reach, changes: Vec::new(), end: after, is_all, tail };
        for row in rows {
            read.changes.extend(log::changes(&row, read.end)?.into_iter().filter(|change| filter.selects(change)));
            read.end = log::end(row.seq);
        }
        if read.changes.is_empty() && !read.is_all {
            turn.rest(began.elapsed()).await;
        }
        Ok(read)
    }
}

/// The query for [`Store::read_log`].
fn log_after(tenant: &Tenant, after: i64, backend: DbBackend) -> Sql {
    let (organization, environment) = (tenant.organization(), tenant.environment().as_str());
    let mut sql = Sql::new(
        "SELECT reach.forgotten, reach.newest, log.seq, log.organization, log.environment, log.entries, \
         log.occurred_at_ms FROM (SELECT max(place) AS forgotten, (SELECT max(seq) FROM changes) AS newest \
         FROM forgotten_changes WHERE organization IN ('', ",
    );
    sql.value(organization).text(") AND environment IN ('', ").value(environment);
    // Only lengths are read of the rows that there is no room for.
    sql.text(")) AS reach LEFT JOIN (SELECT seq, sum(bytes) OVER (ORDER BY seq) - bytes AS before FROM (");
    let from = log::row(after + 1);
    if backend == DbBackend::Sqlite {
        filing::lengths(&mut sql, tenant, from);
    } else {
        sql.text("SELECT seq, octet_length(entries) AS bytes FROM changes WHERE organization = ").value(organization);
        sql.text(" AND environment = ").value(environment).text(" AND seq >= ").value(from);
    }
    sql.text(" ORDER BY seq LIMIT ").value(MAX_READ as i64);
    sql.text(") AS first) AS sized ON sized.before < ").value(MAX_READ_BYTES as i64);
    sql.text(" LEFT JOIN changes AS log ON log.seq = sized.seq ORDER BY log.seq");
    sql
}

impl ChangeFilter {
    fn selects(&self, change: &Change) -> bool {
        self.webhook_id.as_ref().is_none_or(|id| *id == change.webhook_id)
            && self.status.is_none_or(|status| status == change.status)
            && self.event_type.as_ref().is_none_or(|event_type| *event_type == change.event_type)
    }
}

impl Watch {
    /// The next change, when there is one. Dropping the call in the middle loses nothing.
    pub async fn next(&mut self) -> Result<Change, WatchError> {
        if let Some(given_at) = self.given_at.take() {
            self.paused = self.paused.max(given_at.elapsed());
        }
        loop {
            if let Some(change) = self.pending.pop_front() {
                self.given_at = Some(clock::stopwatch());
                return Ok(change);
            }
            if self.caught_up {
                self.read_live().await?;
            } else {
                self.read_log().await?;
            }
        }
    }

    async fn read_log(&mut self) -> Result<(), WatchError> {
        // A task of its own, which ends with the stream: one whose reader takes nothing is not asked for more, and would keep
        // its turn, and a connection, for as long.
        let mut reading = JoinSet::new();
        reading.spawn(self.store.clone().select_log(self.filter.clone(), self.position, self.live.tail()));
        let read = reading.join_next().await.and_then(Result::ok).unwrap_or(Err(Error::Closed))?;
        if read.reach.forgotten.is_some_and(|place| place > self.position) {
            return Err(WatchError::TooOld);
        }
        if read.reach.newest.map_or(0, log::end) < self.position {
            return Err(WatchError::Lost);
        }
        self.paused = Duration::ZERO;
        self.caught_up = read.is_all;
        self.live.go_on_from(read.tail);
        // What the log was read for may be of other tenants: it need not be read for again.
        self.position = if read.is_all { read.end.max(self.behind) } else { read.end };
        self.pending.extend(read.changes);
        Ok(())
    }

    async fn read_live(&mut self) -> Result<(), WatchError> {
        let batch = match self.live.next().await {
            Ok(batch) => batch,
            Err(broadcast::error::RecvError::Lagged(_)) if self.paused < MAX_PAUSE => {
                // It was busy with the log, or very much came at once.
                self.caught_up = false;
                return Ok(());
            }
            Err(broadcast::error::RecvError::Lagged(_)) => return Err(WatchError::TooSlow),
            Err(broadcast::error::RecvError::Closed) => return Err(Error::Closed.into()),
        };
        self.paused = Duration::ZERO;
        if batch.after > self.position {
            // Something came between the log as read and the feed's beginning.
            self.caught_up = false;
            self.behind = batch.after;
        }
        let before = self.position;
        if batch.after <= before {
            batch.changes.iter().filter(|change| change.seq > before).for_each(|change| self.take(change));
            self.position = before.max(batch.upto);
        }
        Ok(())
    }

    fn take(&mut self, change: &Change) {
        if self.filter.selects(change) {
            self.pending.push_back(change.clone());
        }
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;
    use crate::webhook::Environment;

    fn tenant() -> Tenant {
        Tenant::new("acme", Environment::Test).unwrap()
    }

    /// Adds rows with so many changes each to the log.
    async fn log(store: &Store, rows: usize, changes: usize) {
        log_of(store, "acme", rows, changes).await;
    }

    async fn log_of(store: &Store, organization: &str, rows: usize, changes: usize) {
        let entry = concat!(
            r#"{"k":"attempted","w":"whk_1","d":"del_1","e":"content.ready","s":"failed","n":1,"t":0,"#,
            r#""x":"Connection timeout"}"#
        );
        let entries = format!("[{}]", vec![entry; changes].join(","));
        for _ in 0..rows {
            let mut sql = Sql::new("INSERT INTO changes (organization, environment, entries, occurred_at_ms) VALUES ");
            sql.row([organization.into(), "test".into(), entries.as_str().into(), 0.into()]);
            store.0.write.execute_raw(sql.build(store.0.write.get_database_backend())).await.unwrap();
        }
    }

    /// Does what [`Store::follow_changes`] does with all there is after a place.
    async fn show(store: &Store, mut after: i64) {
        loop {
            let rows = store.read_changes(after).await.unwrap();
            let Some(last) = rows.last() else { return };
            for row in &rows {
                assert!(store.0.feed.pass(log::end(row.seq), &tenant()));
                store.0.feed.show(&tenant(), log::end(row.seq), log::changes(row, 0).unwrap());
            }
            after = log::end(last.seq);
        }
    }

    async fn watch(store: &Store, after: Option<i64>) -> Watch {
        store.watch(filter(None), after).await.unwrap()
    }

    fn filter(webhook_id: Option<&str>) -> ChangeFilter {
        ChangeFilter { tenant: tenant(), webhook_id: webhook_id.map(str::to_owned), status: None, event_type: None }
    }

    /// Reads the next changes, which are those of rows `from` to `to`.
    async fn read(watch: &mut Watch, from: i64, to: i64) {
        for row in from..=to {
            assert_eq!(log::row(watch.next().await.unwrap().seq), row);
        }
    }

    #[tokio::test]
    async fn a_read_of_the_log_is_bounded() {
        let (_directory, store) = Store::fresh().await;
        log(&store, 100, 1).await;
        log(&store, 20, 128).await;
        let (mut after, mut reads) = (0, Vec::new());
        while let (_, rows) = store.read_log(&tenant(), after).await.unwrap()
            && let Some(last) = rows.last()
        {
            after = log::end(last.seq);
            let bytes = rows[..rows.len() - 1].iter().map(|row| row.entries.len()).sum::<usize>();
            assert!(bytes < MAX_READ_BYTES);
            reads.push(rows.len());
        }
        assert_eq!((reads.iter().sum::<usize>(), reads[0], log::row(after)), (120, 64, 120));
        assert!(reads[2..reads.len() - 1].iter().all(|rows| (3..=6).contains(rows)), "{reads:?}");
    }

    /// However long the log is, a tenant's rows are found by key, and of the rest only what is not filed yet is gone through.
    #[tokio::test]
    async fn sqlite_finds_by_key_what_is_filed() {
        let (_directory, store) = Store::fresh().await;
        let plan = store.plan(log_after(&tenant(), 0, DbBackend::Sqlite).build(DbBackend::Sqlite)).await;
        for step in [
            "SEARCH filed USING PRIMARY KEY (organization=? AND environment=? AND seq>?)",
            "SEARCH changes USING INTEGER PRIMARY KEY (rowid>?)",
        ] {
            assert!(plan.iter().any(|found| found == step), "{step}: {plan:?}");
        }
        let scans = |table: &str| plan.iter().any(|step| step.split(' ').take(2).eq(["SCAN", table]));
        assert!(!["filed", "changes", "log"].into_iter().any(scans), "{plan:?}");
    }

    /// A watcher that reads the log is not too slow because much comes meanwhile, however far it is.
    #[tokio::test]
    async fn who_reads_the_log_catches_up() {
        let (_directory, store) = Store::fresh().await;
        store.0.feed.begin(0);
        log(&store, 100, 1).await;
        let mut watch = watch(&store, Some(0)).await;
        read(&mut watch, 1, 1).await;
        show(&store, 0).await;
        log(&store, 400, 1).await;
        show(&store, log::end(100)).await;
        read(&mut watch, 2, 500).await;
        assert!(watch.caught_up);
    }

    /// Two streams read the log at a time: however long its turn is in coming, a stream is live again behind one read that
    /// found all there was.
    #[tokio::test]
    async fn who_waits_for_its_turn_is_live_behind_it() {
        let (_directory, store) = Store::fresh().await;
        store.0.feed.begin(0);
        let mut watch = watch(&store, None).await;
        watch.read_log().await.unwrap();
        let organization = tenant().shared_organization().clone();
        let turns =
            async || [store.0.lanes.turn_at_log(&organization).await, store.0.lanes.turn_at_log(&organization).await];
        let held = turns().await;
        // More than the feed remembers, and while it waits for that reason, as much again.
        log(&store, 40, 1).await;
        show(&store, 0).await;
        let mut next = Box::pin(watch.next());
        assert!(next.as_mut().now_or_never().is_none());
        (0..40).for_each(|_| store.0.feed.show(&tenant(), log::end(40), Vec::new()));
        drop(held);
        assert_eq!(log::row(next.await.unwrap().seq), 1);
        read(&mut watch, 2, 40).await;
        let _held = turns().await;
        log(&store, 1, 1).await;
        show(&store, log::end(40)).await;
        assert!(watch.next().now_or_never().is_some(), "it does not read the log");
    }

    #[tokio::test]
    async fn only_who_takes_nothing_is_too_slow() {
        let (_directory, store) = Store::fresh().await;
        store.0.feed.begin(0);
        let mut slow = watch(&store, None).await;
        let mut quick = watch(&store, None).await;
        for watch in [&mut slow, &mut quick] {
            // As it is while nothing comes.
            watch.read_log().await.unwrap();
            assert!(watch.caught_up);
        }
        log(&store, 1, 2).await;
        show(&store, 0).await;
        for watch in [&mut slow, &mut quick] {
            read(watch, 1, 1).await;
        }
        log(&store, 400, 1).await;
        show(&store, log::end(1)).await;
        slow.given_at = slow.given_at.map(|at| at - MAX_PAUSE);
        read(&mut slow, 1, 1).await;
        assert!(matches!(slow.next().await, Err(WatchError::TooSlow)));
        read(&mut quick, 1, 401).await;
    }

    #[tokio::test]
    async fn an_organisation_reads_the_log_for_two_streams_at_a_time() {
        let (_directory, store) = Store::fresh().await;
        let of = |name| ChangeFilter { tenant: Tenant::new(name, Environment::Test).unwrap(), ..filter(None) };
        let [mut third, mut other] = [watch(&store, None).await, store.watch(of("other"), None).await.unwrap()];
        let organization = tenant().shared_organization().clone();
        let lanes = &store.0.lanes;
        let two = [lanes.turn_at_log(&organization).await, lanes.turn_at_log(&organization).await];
        log(&store, 1, 1).await;
        log_of(&store, "other", 1, 1).await;
        tokio::select! {
            biased;
            _ = third.next() => panic!("a third one reads"),
            () = read(&mut other, 2, 2) => {}
        }
        drop(two);
        read(&mut third, 1, 1).await;
    }

    /// A stream is asked for no more while its reader takes nothing, in the middle of whatever it does.
    #[tokio::test]
    async fn who_is_not_asked_for_more_keeps_no_turn() {
        let (_directory, store) = Store::fresh().await;
        let mut stalled = Vec::new();
        for _ in 0..4 {
            stalled.push(watch(&store, None).await);
        }
        let mut reader = watch(&store, None).await;
        log(&store, 1, 1).await;
        // They wait for their turn, which comes when they are not asked any more.
        let organization = tenant().shared_organization().clone();
        let turns = [store.0.lanes.turn_at_log(&organization).await, store.0.lanes.turn_at_log(&organization).await];
        let mut asked: Vec<_> = stalled.iter_mut().map(|watch| Box::pin(watch.next())).collect();
        assert!(asked.iter_mut().all(|next| next.as_mut().now_or_never().is_none()));
        drop(turns);
        let next = tokio::time::timeout(Duration::from_secs(20), read(&mut reader, 1, 1)).await;
        assert!(next.is_ok(), "another stream reads on");
    }

    #[tokio::test]
    async fn who_reads_the_log_in_vain_rests_in_its_turn() {
        let (_directory, store) = Store::fresh().await;
        store.0.feed.begin(0);
        log(&store, 100, 1).await;
        let organization = tenant().shared_organization().clone();
        for (webhook_id, in_vain) in [("whk_1", false), ("whk_2", true)] {
            let rests = async {
                // All that happens here between two looks is what the stream waits for.
                while store.0.lanes.under_way(&organization) != [0, 1] {
                    tokio::task::yield_now().await;
                }
            };
            let rested = tokio::select! {
                watch = store.watch(filter(Some(webhook_id)), Some(0)) => watch.is_err(),
                () = rests => true,
            };
            assert_eq!(rested, in_vain, "{webhook_id}");
        }
    }
}
