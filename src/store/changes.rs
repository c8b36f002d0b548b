//! The log of changes: written with what it tells of, read by watchers.

use std::{collections::VecDeque, time::Duration};

use sea_orm::{ColumnTrait, ConnectionTrait, EntityTrait, FromQueryResult, QueryFilter, QueryOrder, QuerySelect};
use tokio::sync::broadcast;

use super::{Error, Store, entity::change, keys::tenant, log, sql::Sql};
use crate::{
    feed::Watching,
    webhook::{Change, DeliveryStatus, Tenant},
};

/// A watcher that reads the log takes at most this many rows of it, each of a bounded number of changes, and holds no more.
const MAX_READ: i64 = 2;
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
    /// The log no longer has all that the tenant's would continue with.
    #[error("the resume token is too old")]
    TooOld,
    /// The reader fell behind further than the feed remembers.
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
}

impl Store {
    /// Watches changes from now on, or right after number `after`.
    pub async fn watch(&self, filter: ChangeFilter, after: Option<i64>) -> Result<Watch, WatchError> {
        // First the feed, then the log: what is committed in between is in both, and skipped the second time.
        let live = self.0.feed.subscribe(filter.tenant.clone());
        let position = match after {
            Some(position) => position,
            None => self.end().await?,
        };
        let (store, pending) = (self.clone(), VecDeque::new());
        let mut watch = Watch { store, filter, position, caught_up: false, behind: 0, live, pending };
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
            } else if self.sqlite() {
                self.0.feed.announced().await;
            } else {
                let _ = polled.await;
            }
            if !self.0.feed.is_watched() {
                continue;
            }
            let mut after = match position {
                Some(after) => after,
                // Says where the feed begins, so that a watcher who saw less reads the log.
                None => {
                    let newest = self.end().await?;
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
    async fn end(&self) -> Result<i64, Error> {
        let sql = Sql::new("SELECT max(seq) FROM changes");
        let row = self.0.read.query_one_raw(sql.build(self.0.read.get_database_backend())).await?;
        let newest = row.map(|row| row.try_get_by_index::<Option<i64>>(0)).transpose()?.flatten();
        Ok(newest.map_or(0, log::end))
    }

    /// The first rows with changes after a place, and perhaps some before it.
    async fn read_changes(&self, after: i64) -> Result<Vec<change::Model>, Error> {
        // The place after the last change of a row may be that of a row read to its end.
        let rows = change::Entity::find().filter(change::Column::Seq.gte(log::row(after + 1)));
        Ok(rows.order_by_asc(change::Column::Seq).limit(MAX_FOLLOWED).all(&self.0.read).await?)
    }

    /// The same of one tenant, and the place of the last change of its that was removed, as it was at that moment.
    async fn read_log(&self, tenant: &Tenant, after: i64) -> Result<(Option<i64>, Vec<change::Model>), Error> {
        let (organization, environment) = (tenant.organization(), tenant.environment().as_str());
        let mut sql = Sql::new(
            "SELECT forgotten.place, log.seq, log.organization, log.environment, log.entries, log.occurred_at_ms \
             FROM (SELECT max(place) AS place FROM forgotten_changes WHERE organization IN ('', ",
        );
        sql.value(organization).text(") AND environment IN ('', ").value(environment);
        sql.text(")) AS forgotten LEFT JOIN (SELECT * FROM changes WHERE organization = ").value(organization);
        sql.text(" AND environment = ").value(environment).text(" AND seq >= ").value(log::row(after + 1));
        sql.text(" ORDER BY seq LIMIT ").value(MAX_READ).text(") AS log ON TRUE ORDER BY log.seq");
        let (mut forgotten, mut rows) = (None, Vec::new());
        for row in self.0.read.query_all_raw(sql.build(self.0.read.get_database_backend())).await? {
            forgotten = row.try_get_by_index(0)?;
            rows.extend(change::Model::from_query_result_optional(&row, "")?);
        }
        Ok((forgotten, rows))
    }
}

impl Watch {
    /// The next change, when there is one. Dropping the call in the middle loses nothing.
    pub async fn next(&mut self) -> Result<Change, WatchError> {
        loop {
            if let Some(change) = self.pending.pop_front() {
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
        let (forgotten, rows) = self.store.read_log(&self.filter.tenant, self.position).await?;
        if forgotten.is_some_and(|place| place > self.position) {
            return Err(WatchError::TooOld);
        }
        self.caught_up = rows.is_empty();
        if self.caught_up {
            // What the log was read for is of other tenants: it need not be read for again.
            self.position = self.position.max(self.behind);
        }
        for row in rows {
            log::changes(&row, self.position)?.into_iter().for_each(|change| self.take(&change));
            self.position = log::end(row.seq);
        }
        Ok(())
    }

    async fn read_live(&mut self) -> Result<(), WatchError> {
        let batch = match self.live.next().await {
            Ok(batch) => batch,
            Err(broadcast::error::RecvError::Lagged(_)) => return Err(WatchError::TooSlow),
            Err(broadcast::error::RecvError::Closed) => return Err(Error::Closed.into()),
        };
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
        let filter = &self.filter;
        if filter.webhook_id.as_ref().is_none_or(|id| *id == change.webhook_id)
            && filter.status.is_none_or(|status| status == change.status)
            && filter.event_type.as_ref().is_none_or(|event_type| *event_type == change.event_type)
        {
            self.pending.push_back(change.clone());
        }
    }
}
