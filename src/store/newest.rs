//! The query of a list of deliveries, the newest first, which costs the same however many there are.

use sea_orm::DbBackend;

use super::{
    deliveries::{DeliveryFilter, listed},
    sql::Sql,
};
use crate::webhook::DeliveryStatus;

/// How long the data of an event is, which both databases know without reading it: SQLite from the head of the row,
/// PostgreSQL from the pointer to where long values are.
const DATA_BYTES: &str = "(SELECT CAST(octet_length(data) AS BIGINT) FROM events WHERE events.id = deliveries.event_id) \
    AS data_bytes";

const LISTED: &str = listed!();

/// The key of the index of what has ended, but for the id.
const ENDED: &str = "d.webhook_id, d.event_type, d.status";

/// The newest deliveries of a webhook that a filter selects and that are older than `after`, with the lengths of their data.
///
/// Each state and type is a range of an index that is already in order, and the counts name those where something is. Of each
/// state, as many ranges as the page may have rows, those with the newest heads, have all that is on it. So a page costs a
/// look-up for each range, and no more than its square, however long they are and however rare what is asked for. What is
/// pending comes last, and is not looked for before where the page is full already: there, PostgreSQL goes through all that
/// was pending since it was vacuumed, as it does when nothing else is asked for.
pub(super) fn newest(
    backend: DbBackend,
    webhook_id: &str,
    filter: &DeliveryFilter,
    after: Option<&str>,
    most: u64,
) -> Sql {
    const STATES: [DeliveryStatus; 3] = [DeliveryStatus::Success, DeliveryStatus::Failed, DeliveryStatus::Pending];
    let most = i64::try_from(most).unwrap_or(i64::MAX);
    let mut sql = Sql::new("WITH ");
    let mut found: Vec<String> = Vec::new();
    for status in STATES.into_iter().filter(|status| filter.status.is_none_or(|wanted| wanted == *status)) {
        let word = status.as_str();
        let range =
            Range { backend, status, webhook_id, after, above: (!found.is_empty()).then(|| format!("floor_{word}")) };
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
    backend: DbBackend,
    status: DeliveryStatus,
    webhook_id: &'a str,
    /// Only older ones than this.
    after: Option<&'a str>,
    /// Only newer ones than what this names.
    above: Option<String>,
}

impl Range<'_> {
    /// Adds the query of its newest ids. Only by literals do planners see that a partial index has all of it, SQLite only by
    /// those of the index.
    fn newest<'a>(&self, sql: &'a mut Sql, most: i64) -> &'a mut Sql {
        let (literals, key, status) = match self.status {
            DeliveryStatus::Pending => ("d.status = 'pending'", "d.webhook_id, d.event_type", ""),
            DeliveryStatus::Success => ("d.status <> 'pending' AND d.status = 'success'", ENDED, ", 'success'"),
            DeliveryStatus::Failed => ("d.status <> 'pending' AND d.status = 'failed'", ENDED, ", 'failed'"),
        };
        sql.text(&format!("SELECT d.id FROM deliveries AS d WHERE {literals} AND "));
        if self.backend == DbBackend::Sqlite {
            sql.text("d.event_type = ranges.event_type AND d.webhook_id = ").value(self.webhook_id);
            if let Some(id) = self.after {
                sql.text(" AND d.id < ").value(id);
            }
            if let Some(floor) = &self.above {
                sql.text(&format!(" AND d.id > (SELECT id FROM {floor})"));
            }
            return sql.text(" ORDER BY d.id DESC LIMIT ").value(most);
        }
        // Differs from SQLite because PostgreSQL would go back through all deliveries by their key until it met enough of a
        // webhook that had a good part of them, which may all be old. What is not said to be equal, only the index has in order.
        let bound = |sql: &mut Sql, comparison: &str, id: &str| {
            let comma = if id.is_empty() { "" } else { ", d.id" };
            sql.text(&format!("({key}{comma}) {comparison} (")).value(self.webhook_id);
            sql.text(&format!(", ranges.event_type{status}{id}"));
        };
        match &self.above {
            Some(floor) => bound(sql, ">", &format!(", (SELECT id FROM {floor})")),
            None => bound(sql, ">=", ""),
        }
        sql.text(") AND ");
        match self.after {
            Some(id) => {
                bound(sql, "<", ", ");
                sql.value(id);
            }
            None => bound(sql, "<=", ""),
        }
        let order = key.replace(',', " DESC,");
        sql.text(&format!(") ORDER BY {order} DESC, d.id DESC LIMIT ")).value(most)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::Store;

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
