//! Deliveries as people see them: lists, one with its attempts, and the retry by hand.

use std::collections::HashMap;

use sea_orm::{
    ColumnTrait, ConnectionTrait, DbBackend, EntityTrait, FromQueryResult, QueryFilter, QueryOrder, QueryResult, Value,
};

use super::{
    Error, Store,
    audit::{Actor, AuditAction, Record},
    counts::Deltas,
    entity::{attempt, delivery, delivery_count, event},
    log::{Entry, Log},
    script::Script,
    sql::Sql,
    waiting::Waiting,
};
use crate::{
    clock,
    webhook::{Answer, Attempt, ChangeKind, Delivery, DeliveryStatus, EventData, Tenant, Timestamp},
};

/// The data of the deliveries on a page is at most this long together, unless it is that of one; then the page ends early,
/// and another follows. What is left out is not read: a page costs this much memory, however long the data of the next is.
const MAX_PAGE_BYTES: usize = 4 * 1024 * 1024;

/// The columns of a list, or of what was written: all but `response`, which may be long and is shown by
/// [`Store::get_delivery`] only. By their names: PostgreSQL refuses what a connection has prepared as soon as it would have one
/// more, which a later version may add while this one runs.
macro_rules! listed {
    () => {
        "webhook_id, id, organization, environment, event_id, event_type, status, attempts, granted, once, lost_leases, \
         next_attempt_at_ms, lease_node, lease_expires_at_ms, status_code, response_time_ms, last_error, \
         last_attempt_at_ms, created_at_ms, NULL AS response"
    };
}
pub(super) use listed;

const LISTED: &str = listed!();

/// How long the data of an event is, which both databases know without reading it: SQLite from the head of the row,
/// PostgreSQL from the pointer to where long values are.
const DATA_BYTES: &str = "(SELECT CAST(octet_length(data) AS BIGINT) FROM events WHERE events.id = deliveries.event_id) \
    AS data_bytes";

/// Which deliveries of a webhook to list.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DeliveryFilter {
    /// Only those in this state.
    pub status: Option<DeliveryStatus>,
    /// Only those of this event type.
    pub event_type: Option<String>,
}

/// Part of a list.
#[derive(Debug, Clone)]
pub struct Page<T> {
    /// The items.
    pub items: Vec<T>,
    /// How many there are on all pages.
    pub total: i64,
    /// Whether another page follows.
    pub more: bool,
}

/// A delivery and what it carries; no data once retention removed it.
#[derive(Debug, Clone)]
pub struct ListedDelivery {
    /// The delivery.
    pub delivery: Delivery,
    /// What the publisher said.
    pub data: Option<EventData>,
}

/// A delivery with its log.
#[derive(Debug, Clone)]
pub struct DeliveryDetail {
    /// The delivery.
    pub listed: ListedDelivery,
    /// The attempts that ended, the first one first.
    pub attempts: Vec<Attempt>,
}

/// A delivery whose data has not been read.
struct Found {
    row: delivery::Model,
    /// How long its data is; 0 once retention removed it.
    data_bytes: usize,
}

/// Why a delivery cannot be retried by hand.
#[derive(Debug, thiserror::Error)]
pub enum RetryError {
    /// There is none of that id.
    #[error("no such delivery")]
    NotFound,
    /// It is pending or has succeeded.
    #[error("only a failed delivery can be retried; this one is {}", .0.as_str())]
    NotFailed(DeliveryStatus),
    /// What it sent is gone.
    #[error("the payload of this delivery was removed by retention, so there is nothing to send again")]
    PayloadRemoved,
    /// The database failed.
    #[error(transparent)]
    Store(#[from] Error),
}

impl<T> Page<T> {
    /// A page of `limit` items from a read of one more.
    pub(super) fn cut(mut items: Vec<T>, limit: u64, total: i64) -> Self {
        let limit = usize::try_from(limit).unwrap_or(usize::MAX);
        let more = items.len() > limit;
        items.truncate(limit);
        Self { items, total, more }
    }
}

impl Store {
    /// A page of the deliveries of a tenant's webhook, the newest first, after the one with id `after`.
    pub async fn list_deliveries(
        &self,
        tenant: &Tenant,
        webhook_id: &str,
        filter: &DeliveryFilter,
        after: Option<&str>,
        limit: u64,
    ) -> Result<Page<ListedDelivery>, Error> {
        let _turn = self.0.lanes.turn_to_read(tenant.shared_organization()).await?;
        let selected = |count: &delivery_count::Model| {
            filter.status.is_none_or(|status| status.as_str() == count.status)
                && filter.event_type.as_ref().is_none_or(|wanted| *wanted == count.event_type)
        };
        let counts = self.counts(webhook_id).await?;
        let total = counts.iter().filter(|count| selected(count)).map(|count| count.total).sum();
        if total == 0 {
            return Ok(Page { items: Vec::new(), total, more: false });
        }
        let backend = self.0.read.get_database_backend();
        let statement = newest(backend, webhook_id, filter, after, limit + 1).build(backend);
        let found = self.0.read.query_all_raw(statement).await?;
        let found = found.iter().map(Found::read).collect::<Result<_, Error>>()?;
        let Page { items: mut found, total, mut more } = Page::cut(found, limit, total);
        more |= cut_to_bytes(&mut found);
        let items = self.with_data(found.into_iter().map(|found| found.row).collect()).await?;
        Ok(Page { items, total, more })
    }

    /// One delivery with every attempt.
    pub async fn get_delivery(
        &self,
        tenant: &Tenant,
        webhook_id: &str,
        id: &str,
    ) -> Result<Option<DeliveryDetail>, Error> {
        let _turn = self.0.lanes.turn_to_read(tenant.shared_organization()).await?;
        let key = (id.to_owned(), webhook_id.to_owned());
        let Some(row) = delivery::Entity::find_by_id(key).one(&self.0.read).await? else { return Ok(None) };
        if self.has_forgotten_attempts(&row) {
            let listed = self.with_data(vec![row]).await?.pop();
            return Ok(listed.map(|listed| DeliveryDetail { listed, attempts: Vec::new() }));
        }
        let accepted = accepted(&row);
        let listed = self.with_data(vec![row]).await?.pop();
        let failed = attempt::Entity::find()
            .filter(attempt::Column::DeliveryId.eq(id))
            .order_by_asc(attempt::Column::Number)
            .all(&self.0.read)
            .await?;
        let attempts = failed.into_iter().map(attempt).chain(accepted).collect();
        Ok(listed.map(|listed| DeliveryDetail { listed, attempts }))
    }

    /// Grants a failed delivery one more attempt, due now.
    pub async fn retry_delivery(
        &self,
        tenant: &Tenant,
        webhook_id: &str,
        id: &str,
        by: &Actor,
    ) -> Result<Delivery, RetryError> {
        let now = clock::now();
        let mut sql = Sql::new(
            "UPDATE deliveries SET status = 'pending', attempts = attempts + 1, granted = TRUE, once = TRUE, \
             lost_leases = 0, next_attempt_at_ms = ",
        );
        sql.value(now.millis()).text(" WHERE webhook_id = ").value(webhook_id);
        sql.text(" AND id = ").value(id).text(concat!(" AND status = 'failed' RETURNING ", listed!()));
        let _turn = self.0.lanes.turn_to_change(tenant.shared_organization()).await?;
        let transaction = self.write().await?;
        let statement = sql.build(transaction.get_database_backend());
        let updated = delivery::Entity::find().from_raw_sql(statement).one(&transaction).await.map_err(Error::from)?;
        let Some(row) = updated else {
            let key = (id.to_owned(), webhook_id.to_owned());
            let found = delivery::Entity::find_by_id(key).one(&transaction).await.map_err(Error::from)?;
            return match found {
                Some(row) => Err(RetryError::NotFailed(status(&row.status)?)),
                None => Err(RetryError::NotFound),
            };
        };
        // From now on it is needed again, which retention sees when it comes to remove it.
        let mut need = Sql::new("UPDATE events SET retried_at_ms = ");
        need.value(now.millis()).text(" WHERE id = ").value(row.event_id.as_str());
        let needed = transaction.execute_raw(need.build(transaction.get_database_backend())).await;
        if needed.map_err(Error::from)?.rows_affected() == 0 {
            return Err(RetryError::PayloadRemoved);
        }
        let record = Record::of_webhook(AuditAction::DeliveryRetried, tenant, webhook_id);
        Record { resource_id: id, ..record }.write(&transaction, by).await?;
        let (mut deltas, mut log) = (Deltas::default(), Log::default());
        deltas.add(webhook_id, &row.event_type, DeliveryStatus::Failed, -1);
        deltas.add(webhook_id, &row.event_type, DeliveryStatus::Pending, 1);
        log.push(tenant, &Entry::of(&row, ChangeKind::Retried, now));
        Script::default().tell(transaction.get_database_backend(), deltas, log)?.run(&transaction).await?;
        transaction.commit().await.map_err(Error::from)?;
        self.0.feed.announce();
        self.0.handoff.tell(Waiting::of(&row));
        Ok(delivery(row)?)
    }

    /// Reads the data of all events of a page in one query, each once.
    async fn with_data(&self, rows: Vec<delivery::Model>) -> Result<Vec<ListedDelivery>, Error> {
        let ids = rows.iter().map(|row| Value::from(row.event_id.clone()));
        let events = event::Entity::find().filter(event::Column::Id.is_in(ids)).all(&self.0.read).await?;
        let data: HashMap<String, EventData> =
            events.into_iter().map(|event| (event.id, EventData::trusted(event.data))).collect();
        rows.into_iter()
            .map(|row| {
                let delivery = delivery(row)?;
                Ok(ListedDelivery { data: data.get(&delivery.event_id).cloned(), delivery })
            })
            .collect()
    }
}

impl Found {
    fn read(row: &QueryResult) -> Result<Self, Error> {
        let bytes: Option<i64> = row.try_get("", "data_bytes")?;
        let data_bytes = usize::try_from(bytes.unwrap_or(0)).unwrap_or(usize::MAX);
        Ok(Self { row: delivery::Model::from_query_result(row, "")?, data_bytes })
    }
}

/// The newest deliveries of a webhook that a filter selects and that are older than `after`, with the lengths of their data.
///
/// Each state and type is a range of an index that is already in order, and the counts name those where something is. Of each
/// state, as many ranges as the page may have rows, those with the newest heads, have all that is on it. So a page costs a
/// look-up for each range, and no more than its square, however long they are and however rare what is asked for. What is
/// pending comes last, and is not looked for before where the page is full already: there, PostgreSQL goes through all that
/// was pending since it was vacuumed, as it does when nothing else is asked for.
fn newest(backend: DbBackend, webhook_id: &str, filter: &DeliveryFilter, after: Option<&str>, most: u64) -> Sql {
    const STATES: [DeliveryStatus; 3] = [DeliveryStatus::Success, DeliveryStatus::Failed, DeliveryStatus::Pending];
    let most = i64::try_from(most).unwrap_or(i64::MAX);
    let mut sql = Sql::new("WITH ");
    let mut found: Vec<String> = Vec::new();
    for status in STATES.into_iter().filter(|status| filter.status.is_none_or(|wanted| wanted == *status)) {
        let word = status.as_str();
        let range = Range { status, webhook_id, after, above: (!found.is_empty()).then(|| format!("floor_{word}")) };
        if let Some(floor) = &range.above {
            sql.text(&format!(
                "{floor} AS MATERIALIZED (SELECT COALESCE((SELECT id FROM ({}) AS f ",
                found.join(" UNION ALL ")
            ));
            sql.text("ORDER BY id DESC LIMIT 1 OFFSET ").value(most - 1).text("), '') AS id), ");
        }
        sql.text(&format!("heads_{word} AS MATERIALIZED (SELECT event_type, ("));
        range
            .newest(&mut sql, 1)
            .text(") AS head FROM delivery_counts AS ranges WHERE webhook_id = ")
            .value(webhook_id);
        sql.text(" AND total > 0 AND status = ").value(word);
        if let Some(event_type) = &filter.event_type {
            sql.text(" AND event_type = ").value(event_type.as_str());
        }
        sql.text(&format!(
            "), ranges_{word} AS MATERIALIZED (SELECT event_type FROM heads_{word} WHERE head IS NOT NULL "
        ));
        sql.text("ORDER BY head DESC LIMIT ").value(most);
        sql.text(&format!(
            "), found_{word} AS MATERIALIZED (SELECT f.value AS id FROM ranges_{word} AS ranges CROSS JOIN "
        ));
        if backend == DbBackend::Postgres {
            range.newest(sql.text("LATERAL ("), most).text(") AS f (value)");
        } else {
            // Differs from PostgreSQL because SQLite knows no LATERAL but for what a function makes of its arguments.
            range.newest(sql.text("json_each((SELECT json_group_array(id) FROM ("), most).text("))) AS f");
        }
        sql.text(" ORDER BY 1 DESC LIMIT ").value(most).text("), ");
        found.push(format!("SELECT id FROM found_{word}"));
    }
    // Cut first, so that no length is looked up for what is not on the page.
    sql.text(&format!("page AS MATERIALIZED (SELECT f.id AS page_id FROM ({}) AS f ", found.join(" UNION ALL ")));
    sql.text("ORDER BY f.id DESC LIMIT ").value(most);
    sql.text(&format!(
        ") SELECT {LISTED}, {DATA_BYTES} FROM page CROSS JOIN deliveries WHERE id = page_id AND webhook_id = "
    ));
    sql.value(webhook_id).text(" ORDER BY id DESC");
    sql
}

/// Deliveries of a webhook in a state, of the type that `ranges` names.
struct Range<'a> {
    status: DeliveryStatus,
    webhook_id: &'a str,
    /// Only older ones than this.
    after: Option<&'a str>,
    /// Only newer ones than what this names.
    above: Option<String>,
}

impl Range<'_> {
    /// Adds the query of its newest ids.
    fn newest<'a>(&self, sql: &'a mut Sql, most: i64) -> &'a mut Sql {
        sql.text("SELECT d.id FROM deliveries AS d WHERE d.webhook_id = ").value(self.webhook_id);
        // Only by literals do planners see that a partial index has all of it, SQLite only by those of the index, and
        // PostgreSQL how rare it is.
        sql.text(" AND d.event_type = ranges.event_type").text(match self.status {
            DeliveryStatus::Pending => " AND d.status = 'pending'",
            DeliveryStatus::Success => " AND d.status <> 'pending' AND d.status = 'success'",
            DeliveryStatus::Failed => " AND d.status <> 'pending' AND d.status = 'failed'",
        });
        if let Some(id) = self.after {
            sql.text(" AND d.id < ").value(id);
        }
        if let Some(floor) = &self.above {
            sql.text(&format!(" AND d.id > (SELECT id FROM {floor})"));
        }
        sql.text(" ORDER BY d.id DESC LIMIT ").value(most)
    }
}

/// Keeps as many deliveries as fit with their data into [`MAX_PAGE_BYTES`], at least one; true when some did not.
fn cut_to_bytes(found: &mut Vec<Found>) -> bool {
    let mut bytes = 0_usize;
    let fits = |found: &Found| {
        bytes = bytes.saturating_add(found.data_bytes);
        bytes <= MAX_PAGE_BYTES
    };
    let kept = found.iter().map(fits).take_while(|fits| *fits).count().max(1);
    let cut = found.len() > kept;
    found.truncate(kept);
    cut
}

/// The state that a column names.
pub(super) fn status(word: &str) -> Result<DeliveryStatus, Error> {
    DeliveryStatus::parse(word).ok_or(Error::Corrupt("delivery status"))
}

fn delivery(row: delivery::Model) -> Result<Delivery, Error> {
    Ok(Delivery {
        status: status(&row.status)?,
        id: row.id,
        event_id: row.event_id,
        event_type: row.event_type,
        attempts: row.attempts,
        status_code: status_code(row.status_code),
        response_time_ms: row.response_time_ms,
        last_error: row.last_error,
        last_attempt_at: row.last_attempt_at_ms.map(Timestamp::from_millis),
        next_attempt_at: row.next_attempt_at_ms.map(Timestamp::from_millis),
        created_at: Timestamp::from_millis(row.created_at_ms),
    })
}

/// The attempt that a receiver accepted: it is the last one, and stands in the delivery itself.
fn accepted(row: &delivery::Model) -> Option<Attempt> {
    let answered = status_code(row.status_code).filter(|_| row.status == DeliveryStatus::Success.as_str());
    let status_code = answered?;
    Some(Attempt {
        number: row.attempts,
        started_at: Timestamp::from_millis(row.last_attempt_at_ms.unwrap_or(row.created_at_ms)),
        duration_ms: row.response_time_ms.unwrap_or_default(),
        answer: Some(Answer { status_code, body: row.response.clone().unwrap_or_default() }),
        error: None,
    })
}

fn attempt(row: attempt::Model) -> Attempt {
    let answer =
        status_code(row.status_code).map(|status_code| Answer { status_code, body: row.response.unwrap_or_default() });
    Attempt {
        number: row.number,
        started_at: Timestamp::from_millis(row.started_at_ms),
        duration_ms: row.duration_ms,
        answer,
        error: row.error,
    }
}

pub(super) fn status_code(column: Option<i32>) -> Option<u16> {
    column.and_then(|code| u16::try_from(code).ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Which of the deliveries with data of these lengths are on the page, and whether some are not.
    fn cut(bytes: &[usize]) -> (usize, bool) {
        let row = |id: usize| delivery::Model {
            webhook_id: "whk_1".into(),
            id: format!("del_{id}"),
            organization: "acme".into(),
            environment: "test".into(),
            event_id: "evt_1".into(),
            event_type: "content.ready".into(),
            status: "success".into(),
            attempts: 1,
            granted: false,
            once: false,
            lost_leases: 0,
            next_attempt_at_ms: None,
            lease_node: None,
            lease_expires_at_ms: None,
            status_code: None,
            response_time_ms: None,
            last_error: None,
            last_attempt_at_ms: None,
            created_at_ms: 0,
            response: None,
        };
        let mut found: Vec<_> =
            bytes.iter().enumerate().map(|(id, bytes)| Found { row: row(id), data_bytes: *bytes }).collect();
        let cut = cut_to_bytes(&mut found);
        assert!(found.iter().enumerate().all(|(id, found)| found.row.id == format!("del_{id}")), "the first ones");
        (found.len(), cut)
    }

    #[test]
    fn a_page_has_what_fits_and_at_least_one() {
        assert_eq!(cut(&[]), (0, false));
        assert_eq!(cut(&[MAX_PAGE_BYTES + 1]), (1, false));
        assert_eq!(cut(&[MAX_PAGE_BYTES + 1, 0]), (1, true));
        assert_eq!(cut(&[MAX_PAGE_BYTES - 2, 0, 2, 0]), (4, false));
        assert_eq!(cut(&[MAX_PAGE_BYTES - 2, 3, 0, 0]), (1, true), "none after one that does not fit");
        assert_eq!(cut(&[1, usize::MAX, 1]), (1, true));
    }

    /// However rare a state is, it has a range of an index; what is listed is read by its key.
    #[tokio::test]
    async fn sqlite_finds_by_an_index_what_a_filter_asks_for() {
        const PENDING: &str = "deliveries_pending (webhook_id=? AND event_type=?";
        const ENDED: &str = "deliveries_ended (webhook_id=? AND event_type=? AND status=?";
        let (_directory, store) = Store::fresh().await;
        let older = " AND id<?)";
        let both = " AND id>? AND id<?)";
        for (status, after, ranges) in [
            (None, None, vec![(ENDED, ")"), (ENDED, " AND id>?)"), (PENDING, " AND id>?)")]),
            (None, Some("del_1"), vec![(ENDED, older), (ENDED, both), (PENDING, both)]),
            (Some(DeliveryStatus::Pending), Some("del_1"), vec![(PENDING, older)]),
            (Some(DeliveryStatus::Success), Some("del_1"), vec![(ENDED, older)]),
            (Some(DeliveryStatus::Failed), Some("del_1"), vec![(ENDED, older)]),
        ] {
            let filter = DeliveryFilter { status, event_type: None };
            let statement = newest(DbBackend::Sqlite, "whk_1", &filter, after, 20).build(DbBackend::Sqlite);
            let plan = store.plan(statement).await;
            let searches = plan.iter().filter(|step| step.starts_with("SEARCH "));
            let mut searches: Vec<&str> =
                searches.filter_map(|step| step.split_once(" INDEX ")).map(|(_, index)| index).collect();
            // Each once for its head and once for the page.
            let mut expected: Vec<String> =
                ranges.iter().flat_map(|(index, bounds)| vec![format!("{index}{bounds}"); 2]).collect();
            expected.extend(ranges.iter().map(|_| "sqlite_autoindex_delivery_counts_1 (webhook_id=?)".to_owned()));
            expected.push("sqlite_autoindex_deliveries_1 (id=? AND webhook_id=?)".to_owned());
            expected.push("sqlite_autoindex_events_1 (id=?)".to_owned());
            searches.sort_unstable();
            expected.sort_unstable();
            assert!(searches == expected, "{status:?}: {plan:#?}");
        }
    }
}
