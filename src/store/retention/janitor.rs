//! What is kept for a fixed time, whatever the operator says: the log of changes, and the answers to named requests.

use std::{collections::BTreeMap, time::Duration};

use sea_orm::{ConnectionTrait, QueryResult};

use super::{Round, Step, Stop, pages, steps};
use crate::{
    clock,
    store::{
        Error, Store, filing, log,
        rows::{Column, Rows, int, text},
        script::Script,
        sql::Sql,
    },
    webhook::Timestamp,
};

/// How far the log of changes reaches back; a resume token after which something of its tenant was removed is refused.
const KEEP_CHANGES: Duration = Duration::from_secs(3 * 24 * 60 * 60);
/// One read looks at no more than this many rows; what follows is in the next.
const MAX_READ: i64 = 1_024;
/// There, a step is mostly trips, and nobody waits for it.
const STEP: Step = Step { most: 512, rest: 1 };
/// A few milliseconds there too, since these rows are smaller than those of deliveries and have fewer indexes: 16,000 small
/// ones a second, of a thousand tenants in turns, when nobody writes.
const STEP_ON_SQLITE: Step = Step { most: 256, rest: 2 };
/// Identifies, among PostgreSQL's advisory locks, the one of whoever removes this.
const LOCK: i64 = 0x736b_776c;

const FORGOTTEN: &[Column] = &[text("organization"), text("environment"), int("place")];
const NOTE_FORGOTTEN: &str = "INSERT INTO forgotten_changes (organization, environment, place) \
    SELECT organization, environment, place FROM {rows} WHERE TRUE \
    ON CONFLICT (organization, environment) DO UPDATE SET place = excluded.place \
    WHERE excluded.place > forgotten_changes.place";

/// A row of the log.
struct Row {
    seq: i64,
    tenant: (String, String),
}

impl Store {
    /// Forgets changes and answers that are older than they are kept, in as many steps as it takes.
    pub async fn purge(&self) -> Result<(), Error> {
        self.heard(self.forget_webhook_changes()).await?;
        self.heard(self.forget_given_back()).await?;
        let step = if self.sqlite() { STEP_ON_SQLITE } else { STEP };
        let round = Round { step, lock: LOCK, ..Round::new(self) };
        match round.purge(clock::now()).await {
            Ok(()) | Err(Stop::Elsewhere) => Ok(()),
            Err(Stop::Failed(error)) => Err(error),
        }
    }
}

impl Round<'_> {
    /// Some of both in turns, so that much of one makes the other wait no longer, and neither when one fails.
    async fn purge(&self, now: Timestamp) -> Result<(), Stop> {
        let mut places = (Some(0), Some(0));
        while places != (None, None) {
            let changes = self.forget_changes(places.0, now.before(KEEP_CHANGES)).await;
            let answers = self.forget_answers(places.1, now).await;
            places = (changes?, answers?);
        }
        Ok(())
    }

    /// Removes the next changes after a number that are from before `old`, and answers with where to go on; never the
    /// newest one, which says where the log stands.
    async fn forget_changes(&self, after: Option<i64>, old: Timestamp) -> Result<Option<i64>, Stop> {
        let Some(after) = after else { return Ok(None) };
        let mut sql = Sql::new(
            "SELECT seq, organization, environment, octet_length(entries), occurred_at_ms FROM changes WHERE seq > ",
        );
        sql.value(after).text(" AND seq < (SELECT max(seq) FROM changes) ORDER BY seq LIMIT ").value(MAX_READ);
        let (mut due, mut read) = (Vec::new(), None);
        for row in self.read(sql).await? {
            let (seq, organization, environment, bytes, occurred_at_ms): (i64, String, String, i32, i64) =
                row.try_get_many_by_index()?;
            if occurred_at_ms < old.millis() {
                due.push((Row { seq, tenant: (organization, environment) }, pages(bytes)));
            }
            read = Some(seq);
        }
        for step in steps(&due, self.step.most) {
            self.forget_changes_in(step, old).await?;
        }
        Ok(read.filter(|_| !due.is_empty()))
    }

    /// Removes changes as one step, and notes for each tenant how far that went: what was given out before can tell by it
    /// that something is missing.
    async fn forget_changes_in(&self, step: &[(Row, usize)], old: Timestamp) -> Result<(), Stop> {
        let forgotten = self.last_of_each_tenant(step).await?;
        self.step(async {
            let transaction = self.begin().await?;
            let backend = transaction.get_database_backend();
            let due = |mut sql: Sql| {
                sql.text(" FROM changes WHERE seq >= ").value(step[0].0.seq);
                sql.text(" AND seq <= ").value(step[step.len() - 1].0.seq);
                sql.text(" AND occurred_at_ms < ").value(old.millis());
                sql
            };
            if self.store.sqlite() {
                let mut sql = due(Sql::new(filing::REMOVE));
                sql.text(")");
                transaction.execute_raw(sql.build(backend)).await?;
            }
            transaction.execute_raw(due(Sql::new("DELETE")).build(backend)).await?;
            Script::default().with(NOTE_FORGOTTEN, forgotten).run(&transaction).await?;
            Ok(transaction.commit().await?)
        })
        .await
    }

    /// The places of the last changes of a step. A row that has gone meanwhile was noted by whoever removed it.
    async fn last_of_each_tenant(&self, step: &[(Row, usize)]) -> Result<Rows, Stop> {
        let last: BTreeMap<_, i64> = step.iter().map(|(row, _)| (&row.tenant, row.seq)).collect();
        let mut sql = Sql::new("SELECT organization, environment, seq, entries FROM changes WHERE seq IN ");
        sql.list("(", last.into_values().map(Into::into), ")");
        let mut rows = Rows::new(self.store.0.write.get_database_backend(), FORGOTTEN);
        for row in self.read(sql).await? {
            let (organization, environment, seq, entries): (String, String, i64, String) =
                row.try_get_many_by_index()?;
            rows.push([(&organization).into(), (&environment).into(), log::last(seq, &entries).into()]);
        }
        Ok(rows)
    }

    /// Removes the next answers that expired after a time and until `now`, and answers with where to go on. What expired
    /// in the same millisecond goes together: what has not is nowhere among it.
    async fn forget_answers(&self, after: Option<i64>, now: Timestamp) -> Result<Option<i64>, Stop> {
        let Some(after) = after else { return Ok(None) };
        let mut sql =
            Sql::new("SELECT expires_at_ms, octet_length(answer) FROM idempotency_keys WHERE expires_at_ms > ");
        sql.value(after).text(" AND expires_at_ms <= ").value(now.millis());
        sql.text(" ORDER BY expires_at_ms LIMIT ").value(MAX_READ);
        let found = self.read(sql).await?;
        let rows = found.iter().map(QueryResult::try_get_many_by_index);
        let rows = rows.collect::<Result<Vec<(i64, Option<i32>)>, _>>()?;
        let together = rows.chunk_by(|(one, _), (next, _)| one == next);
        let weight = |rows: &[(i64, Option<i32>)]| rows.iter().map(|(_, bytes)| pages(bytes.unwrap_or(0))).sum();
        let due: Vec<(i64, usize)> = together.map(|rows| (rows[0].0, weight(rows))).collect();
        for step in steps(&due, self.step.most) {
            let mut sql = Sql::new("DELETE FROM idempotency_keys WHERE expires_at_ms >= ");
            sql.value(step[0].0).text(" AND expires_at_ms <= ").value(step[step.len() - 1].0);
            self.remove_by(sql).await?;
        }
        Ok(due.last().map(|(expires_at_ms, _)| *expires_at_ms))
    }
}
