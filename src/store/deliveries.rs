//! Deliveries as people see them: lists, one with its attempts, and the retry by hand.

use std::collections::HashMap;

use sea_orm::{
    ColumnTrait, ConnectionTrait, EntityTrait, FromQueryResult, QueryFilter, QueryOrder, QueryResult, Value,
};

use super::{
    Error, Store,
    audit::{Actor, AuditAction, Record},
    counts::Deltas,
    entity::{attempt, delivery, delivery_count, event},
    log::{Entry, Log},
    newest::newest,
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
}
