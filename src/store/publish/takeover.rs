//! What a node that is gone had accepted and not stored (see [`super::parts`]) is taken over when its lease has run out, and
//! stored in turns with all else.

use std::{
    collections::{BTreeSet, HashSet},
    time::Duration,
};

use sea_orm::ConnectionTrait;
use tokio::sync::oneshot;

use super::{Draft, parts::Done};
use crate::{
    clock,
    store::{Error, Store, sql::Sql, writer::Write},
};

/// So many parts of nodes that are gone are taken over at a time, and wait in memory for their turn; then the next ones.
pub(super) const MAX_TAKEN_OVER: usize = 64;
/// The end of the lease of a part that cannot be read. It was accepted, so it stays; but nobody takes it over, or waits for it,
/// before a node starts, which may be of a version that can read it, or somebody who has mended it gives it another one.
pub(in crate::store) const SET_ASIDE: i64 = i64::MAX;

/// What one step came to.
struct Step {
    stored: usize,
    set_aside: usize,
}

/// Parts that this node now has.
struct TakenOver {
    parts: Vec<Draft>,
    set_aside: usize,
}

impl Draft {
    fn webhook_ids(&self) -> impl Iterator<Item = &str> {
        self.deliveries().map(|(_, new)| &*new.webhook_id)
    }

    fn leave_out(&mut self, goes: impl Fn(&str) -> bool) {
        self.events.iter_mut().for_each(|new| new.deliveries.retain(|delivery| !goes(&delivery.webhook_id)));
    }
}

impl Store {
    /// Stores what a process that is gone had accepted, and discards what it had not. On SQLite no other node can be storing
    /// it, so that is all; on PostgreSQL its leases run out in their own time. What was set aside is tried once more.
    pub(in crate::store) async fn store_kept_parts_at_start(&self, lease: Duration) -> Result<(), Error> {
        if self.sqlite() {
            self.discard_drafts(true).await?;
        }
        let mut sql = Sql::new("UPDATE publish_parts SET lease_expires_at_ms = 0 WHERE lease_expires_at_ms = ");
        sql.value(SET_ASIDE);
        self.heard(self.run(sql)).await?;
        while self.sqlite() {
            let Step { stored, set_aside } = self.store_some_parts(true, lease).await?;
            if stored + set_aside == 0 {
                break;
            }
        }
        Ok(())
    }

    /// Takes parts over whose lease has run out, and stores them, as long as `leases_end`. Answers how many. What was not
    /// accepted before its lease ran out is discarded.
    pub async fn store_kept_parts(
        &self,
        lease: Duration,
        mut leases_end: impl FnMut() -> bool,
    ) -> Result<usize, Error> {
        let mut all = 0;
        while leases_end() {
            let Step { stored, set_aside } = self.store_some_parts(false, lease).await?;
            if stored + set_aside == 0 {
                break;
            }
            all += stored;
        }
        if leases_end() {
            self.discard_drafts(false).await?;
        }
        Ok(all)
    }

    /// Stores what one step takes over. One that failed is found again when its lease has run out.
    async fn store_some_parts(&self, all: bool, lease: Duration) -> Result<Step, Error> {
        let TakenOver { mut parts, set_aside } = self.take_parts_over(all, lease).await?;
        self.leave_out_removed(&mut parts).await?;
        let mut waiting = Vec::with_capacity(parts.len());
        for part in parts {
            let (organization, deliveries) = part.backlog();
            self.0.backlog.let_in(organization, deliveries);
            let (done, stored) = oneshot::channel();
            self.writer()?.send(Write::Draft(Box::new(part), Done::TakenOver(done)))?;
            waiting.push(stored);
        }
        let (mut stored, mut failed) = (0, None);
        for part in waiting {
            match part.await.unwrap_or(Err(Error::Closed)) {
                Ok(()) => stored += 1,
                Err(error) => failed = Some(error),
            }
        }
        if let Some(error) = failed {
            tracing::warn!(%error, again_in = ?lease, "parts of what was published could not be stored; trying again");
        }
        Ok(Step { stored, set_aside })
    }

    /// Takes some parts over whose lease has run out, or any when `all`.
    async fn take_parts_over(&self, all: bool, lease: Duration) -> Result<TakenOver, Error> {
        let now = clock::now();
        // Materialized as in a claim, so that a plan that looks twice does not take more.
        let mut sql = Sql::new("WITH due AS MATERIALIZED (SELECT id FROM publish_parts WHERE lease_expires_at_ms <= ");
        sql.value(if all { SET_ASIDE - 1 } else { now.millis() });
        // Not of those that are still being kept.
        sql.text(
            " AND NOT EXISTS (SELECT 1 FROM publish_drafts d WHERE d.id = substr(publish_parts.id, 1, length(d.id)))",
        );
        sql.text(&format!(" ORDER BY lease_expires_at_ms LIMIT {MAX_TAKEN_OVER}"));
        sql.text(if self.sqlite() { "" } else { " FOR UPDATE SKIP LOCKED" });
        sql.text(") UPDATE publish_parts SET node = ").value(self.0.node.as_str());
        sql.text(", lease_expires_at_ms = ").value(now.after(lease).millis());
        sql.text(" WHERE id IN (SELECT id FROM due) RETURNING id, content");
        let writer = &self.0.engine_write;
        let statement = sql.build(writer.get_database_backend());
        let rows = self.heard(async { Ok(writer.query_all_raw(statement).await?) }).await?;
        let (mut parts, mut unreadable) = (Vec::new(), Vec::new());
        for row in rows {
            let id: String = row.try_get_by_index(0)?;
            // SQLite may also hold what is no text.
            let content = row.try_get_by_index::<String>(1).map_err(|_| Error::Corrupt("part"));
            match content.and_then(|content| Draft::taken_over(id.clone(), &content, lease)) {
                Ok(part) => parts.push(part),
                Err(error) => {
                    tracing::error!(part = id, %error, "a part of what was accepted cannot be read; it is set aside");
                    unreadable.push(id);
                }
            }
        }
        let set_aside = unreadable.len();
        if set_aside > 0 {
            let mut sql = Sql::new("UPDATE publish_parts SET lease_expires_at_ms = ");
            sql.value(SET_ASIDE).text(" WHERE node = ").value(self.0.node.as_str());
            sql.text(" AND id IN ").list("(", unreadable.into_iter().map(Into::into), ")");
            self.heard(self.run(sql)).await?;
        }
        Ok(TakenOver { parts, set_aside })
    }

    /// What was set aside for long may have deliveries of webhooks that were deleted and removed meanwhile. With them those
    /// would have gone; now they would stay for ever, since nobody looks for what belongs to nothing.
    async fn leave_out_removed(&self, parts: &mut [Draft]) -> Result<(), Error> {
        let named: BTreeSet<&str> = parts.iter().flat_map(Draft::webhook_ids).collect();
        if named.is_empty() {
            return Ok(());
        }
        let mut sql = Sql::new("SELECT id FROM webhooks WHERE id IN ");
        sql.list("(", named.into_iter().map(Into::into), ")");
        let writer = &self.0.engine_write;
        let statement = sql.build(writer.get_database_backend());
        let rows = self.heard(async { Ok(writer.query_all_raw(statement).await?) }).await?;
        let there: HashSet<String> = rows.iter().map(|row| row.try_get_by_index(0)).collect::<Result<_, _>>()?;
        parts.iter_mut().for_each(|part| part.leave_out(|id| !there.contains(id)));
        Ok(())
    }
}
