//! Payloads: events that no delivery needs any more.

use std::{collections::HashSet, time::Duration};

use sea_orm::QueryResult;

use super::{MAX_READ, Round, Stop, ended_before, pages, steps};
use crate::{
    clock,
    store::{Error, publish::takeover::SET_ASIDE, sql::Sql},
    webhook::Timestamp,
};

/// Far more than there is between the time in the id of an event and that in the ids of its deliveries, which are made
/// together.
const SPREAD: Duration = Duration::from_secs(1);

impl Round<'_> {
    /// Removes events from before `old` that no delivery needs: each that there still is ended before `old`.
    pub(super) async fn remove_events(&mut self, old: Timestamp) -> Result<(), Stop> {
        if self.waits_for_parts(old.after(SPREAD)).await? {
            return Ok(());
        }
        let (mut after, end) = (String::new(), clock::first_id("evt", old));
        loop {
            let mut sql = Sql::new("SELECT id, octet_length(data) FROM events WHERE id > ");
            sql.value(after.as_str())
                .text(" AND id < ")
                .value(end.as_str())
                .text(" ORDER BY id LIMIT ")
                .value(MAX_READ);
            let found = self.read(sql).await?;
            let rows = found.iter().map(QueryResult::try_get_many_by_index);
            let rows = rows.collect::<Result<Vec<(String, i32)>, _>>()?;
            for run in rows.chunk_by(|(one, _), (next, _)| are_close(one, next)) {
                self.remove_unneeded(run, old).await?;
            }
            match rows.last() {
                Some((last, _)) if rows.len() as i64 == MAX_READ => after.clone_from(last),
                _ => return Ok(()),
            }
        }
    }

    /// Whether something that was published before `at` still is to be stored (see [`crate::store::publish::parts`]): what
    /// that needs, or belongs to, is not removed before. For what is set aside nothing can wait: it may be for ever.
    pub(super) async fn waits_for_parts(&self, at: Timestamp) -> Result<bool, Stop> {
        let mut sql = Sql::new("SELECT 1 FROM publish_parts WHERE id < ");
        sql.value(clock::first_id("prt", at).as_str()).text(" AND lease_expires_at_ms < ").value(SET_ASIDE);
        sql.text(" LIMIT 1");
        Ok(!self.read(sql).await?.is_empty())
    }

    /// Of events that were made soon after one another, those that no delivery needs.
    async fn remove_unneeded(&mut self, run: &[(String, i32)], old: Timestamp) -> Result<(), Stop> {
        let began = clock::stopwatch();
        let needed = self.needed(&run[0].0, &run[run.len() - 1].0, old).await?;
        let due = run.iter().filter(|(id, _)| !needed.contains(id));
        let due: Vec<(&str, usize)> = due.map(|(id, bytes)| (id.as_str(), pages(*bytes))).collect();
        self.looked(began.elapsed(), run.len() - due.len(), run.len());
        for step in steps(&due, self.step.most) {
            self.remove_events_in(step, old).await?;
        }
        Ok(())
    }

    /// The events from one to another whose data a delivery still needs: it is pending, or ended since `old`.
    async fn needed(&self, first: &str, last: &str, old: Timestamp) -> Result<HashSet<String>, Stop> {
        let [first, last] = [first, last].map(|id| clock::made_at(id).ok_or(Error::Corrupt("id of an event")));
        let (from, to) = (clock::first_id("del", first?.before(SPREAD)), clock::first_id("del", last?.after(SPREAD)));
        let (mut needed, mut after) = (HashSet::new(), from);
        loop {
            let mut sql = Sql::new("SELECT id, CASE WHEN ");
            ended_before(&mut sql, old).text(" THEN NULL ELSE event_id END FROM deliveries WHERE id >= ");
            sql.value(after.as_str()).text(" AND id < ").value(to.as_str()).text(" ORDER BY id LIMIT ").value(MAX_READ);
            let found = self.read(sql).await?;
            let rows = found.iter().map(QueryResult::try_get_many_by_index);
            let rows = rows.collect::<Result<Vec<(String, Option<String>)>, _>>()?;
            let last = rows.last().filter(|_| rows.len() as i64 == MAX_READ).map(|(id, _)| format!("{id}0"));
            needed.extend(rows.into_iter().filter_map(|(_, event_id)| event_id));
            match last {
                Some(last) => after = last,
                None => return Ok(needed),
            }
        }
    }

    async fn remove_events_in(&self, step: &[(&str, usize)], old: Timestamp) -> Result<(), Stop> {
        let mut sql = Sql::new("DELETE FROM events WHERE id IN ");
        sql.list("(", step.iter().map(|(id, _)| (*id).into()), ")");
        // A retry by hand needs what nobody needed when this was read.
        sql.text(" AND (retried_at_ms IS NULL OR retried_at_ms < ").value(old.millis()).text(")");
        self.remove_by(sql).await
    }
}

/// Whether so little was made between two events that it costs less to read past it than to look twice: those that stay,
/// because something is pending, may be days apart.
fn are_close(one: &str, next: &str) -> bool {
    let [one, next] = [one, next].map(clock::made_at);
    one.zip(next).is_some_and(|(one, next)| next.before(2 * SPREAD) <= one)
}
