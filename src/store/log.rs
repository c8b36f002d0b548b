//! The log of changes as it is stored: one row for the changes of a tenant in a commit, so that keeping it costs little.

use std::{borrow::Cow, collections::HashMap};

use sea_orm::DbBackend;
use serde::{Deserialize, Serialize, de::IgnoredAny};

use super::{
    Error,
    deliveries::status,
    entity::{change, delivery},
    rows::{Column, Rows, int, text},
};
use crate::webhook::{Change, ChangeKind, Tenant, Timestamp};

/// A row holds at most this many changes; more are in another. A power of two: see [`place`].
const MAX_ENTRIES: usize = 128;

const COLUMNS: &[Column] = &[text("organization"), text("environment"), text("entries"), int("occurred_at_ms")];
pub(super) const INSERT: &str = "INSERT INTO changes (organization, environment, entries, occurred_at_ms) \
    SELECT organization, environment, entries, occurred_at_ms FROM {rows}{ordered}";

/// A change as it stands in a row. The names are short because there are so many of them.
#[derive(Serialize, Deserialize)]
pub(super) struct Entry<'a> {
    #[serde(rename = "k", borrow)]
    pub(super) kind: Cow<'a, str>,
    #[serde(rename = "w", borrow)]
    pub(super) webhook_id: Cow<'a, str>,
    #[serde(rename = "d", borrow)]
    pub(super) delivery_id: Cow<'a, str>,
    #[serde(rename = "e", borrow)]
    pub(super) event_type: Cow<'a, str>,
    #[serde(rename = "s", borrow)]
    pub(super) status: Cow<'a, str>,
    #[serde(rename = "n")]
    pub(super) attempts: i32,
    #[serde(rename = "t")]
    pub(super) occurred_at_ms: i64,
    #[serde(rename = "c", skip_serializing_if = "Option::is_none")]
    pub(super) status_code: Option<u16>,
    #[serde(rename = "ms", skip_serializing_if = "Option::is_none")]
    pub(super) response_time_ms: Option<i32>,
    #[serde(rename = "x", borrow, skip_serializing_if = "Option::is_none")]
    pub(super) last_error: Option<Cow<'a, str>>,
    #[serde(rename = "next", skip_serializing_if = "Option::is_none")]
    pub(super) next_attempt_at_ms: Option<i64>,
}

/// Changes of one commit, not yet written.
#[derive(Default)]
pub(super) struct Log {
    rows: Vec<Row>,
    /// The row that has room, by tenant.
    open: HashMap<Tenant, usize>,
}

struct Row {
    tenant: Tenant,
    /// A JSON array without its last bracket.
    entries: Vec<u8>,
    count: usize,
    occurred_at_ms: i64,
}

impl<'a> Entry<'a> {
    /// The change that left a delivery as `row` has it.
    pub(super) fn of(row: &'a delivery::Model, kind: ChangeKind, at: Timestamp) -> Self {
        let last_error = row.last_error.as_deref().filter(|_| kind == ChangeKind::Attempted);
        Self {
            kind: kind.as_str().into(),
            webhook_id: row.webhook_id.as_str().into(),
            delivery_id: row.id.as_str().into(),
            event_type: row.event_type.as_str().into(),
            status: row.status.as_str().into(),
            attempts: row.attempts,
            occurred_at_ms: at.millis(),
            status_code: None,
            response_time_ms: None,
            last_error: last_error.map(Cow::from),
            next_attempt_at_ms: row.next_attempt_at_ms,
        }
    }

    fn change(self, seq: i64) -> Result<Change, Error> {
        Ok(Change {
            seq,
            kind: ChangeKind::parse(&self.kind).ok_or(Error::Corrupt("kind of change"))?,
            status: status(&self.status)?,
            webhook_id: self.webhook_id.into_owned(),
            delivery_id: self.delivery_id.into_owned(),
            event_type: self.event_type.into_owned(),
            attempts: self.attempts,
            status_code: self.status_code,
            response_time_ms: self.response_time_ms,
            last_error: self.last_error.map(Cow::into_owned),
            next_attempt_at: self.next_attempt_at_ms.map(Timestamp::from_millis),
            occurred_at: Timestamp::from_millis(self.occurred_at_ms),
        })
    }
}

impl Log {
    /// Adds a change after all others of its tenant.
    pub(super) fn push(&mut self, tenant: &Tenant, entry: &Entry<'_>) {
        let open = self.open.get(tenant).copied().filter(|index| self.rows[*index].count < MAX_ENTRIES);
        let index = open.unwrap_or_else(|| {
            self.open.insert(tenant.clone(), self.rows.len());
            let occurred_at_ms = entry.occurred_at_ms;
            self.rows.push(Row { tenant: tenant.clone(), entries: Vec::new(), count: 0, occurred_at_ms });
            self.rows.len() - 1
        });
        let row = &mut self.rows[index];
        row.entries.push(if row.count == 0 { b'[' } else { b',' });
        // Writing text and numbers into memory cannot fail.
        let _ = serde_json::to_writer(&mut row.entries, entry);
        row.count += 1;
        row.occurred_at_ms = entry.occurred_at_ms;
    }

    /// How many rows it has.
    pub(super) fn len(&self) -> usize {
        self.rows.len()
    }

    /// The rows for [`INSERT`].
    pub(super) fn rows(self, backend: DbBackend) -> Result<Rows, Error> {
        let mut rows = Rows::new(backend, COLUMNS);
        for Row { tenant, mut entries, occurred_at_ms, .. } in self.rows {
            entries.push(b']');
            let entries = String::from_utf8(entries).map_err(|_| Error::Corrupt("log of changes"))?;
            let environment = tenant.environment().as_str();
            rows.push([tenant.organization().into(), environment.into(), (&entries).into(), occurred_at_ms.into()]);
        }
        Ok(rows)
    }
}

/// The changes of a row that come after `after`.
pub(super) fn changes(row: &change::Model, after: i64) -> Result<Vec<Change>, Error> {
    let entries: Vec<Entry<'_>> = serde_json::from_str(&row.entries).map_err(|_| Error::Corrupt("log of changes"))?;
    let placed = entries.into_iter().enumerate().map(|(index, entry)| (place(row.seq, index), entry));
    placed.filter(|(place, _)| *place > after).map(|(place, entry)| entry.change(place)).collect()
}

/// The place in the order of commits of the change at `index` in row `seq`.
fn place(seq: i64, index: usize) -> i64 {
    let index = i64::try_from(index.min(MAX_ENTRIES - 1)).unwrap_or(0);
    seq.saturating_mul(MAX_ENTRIES as i64).saturating_add(index)
}

/// The place of the last change of a row; of the last that it could have, when it cannot be read.
pub(super) fn last(seq: i64, entries: &str) -> i64 {
    let count = serde_json::from_str::<Vec<IgnoredAny>>(entries).map_or(MAX_ENTRIES, |entries| entries.len());
    place(seq, count.saturating_sub(1))
}

/// The place after which row `seq` is read to its end.
pub(super) fn end(seq: i64) -> i64 {
    place(seq, MAX_ENTRIES - 1)
}

/// The row that a place is in.
pub(super) fn row(place: i64) -> i64 {
    place.div_euclid(MAX_ENTRIES as i64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::webhook::Environment;

    fn entry(number: i64) -> Entry<'static> {
        Entry {
            kind: "attempted".into(),
            webhook_id: "whk_1".into(),
            delivery_id: format!("del_{number}").into(),
            event_type: "content.ready".into(),
            status: "failed".into(),
            attempts: 6,
            occurred_at_ms: number,
            status_code: Some(503),
            response_time_ms: None,
            last_error: Some("said \"no\"".into()),
            next_attempt_at_ms: None,
        }
    }

    #[test]
    fn what_was_written_is_read_in_order() {
        let tenant = Tenant::new("acme", Environment::Live).unwrap();
        let mut log = Log::default();
        (0..300).for_each(|number| log.push(&tenant, &entry(number)));
        let rows: Vec<change::Model> = (1..)
            .zip(log.rows)
            .map(|(seq, row)| change::Model {
                seq,
                organization: "acme".to_owned(),
                environment: "live".to_owned(),
                entries: String::from_utf8(row.entries).unwrap() + "]",
                occurred_at_ms: row.occurred_at_ms,
            })
            .collect();
        let read = |after| -> Vec<Change> { rows.iter().flat_map(|row| changes(row, after).unwrap()).collect() };
        let all = read(0);
        assert!(all.iter().map(|change| change.delivery_id.clone()).eq((0..300).map(|number| format!("del_{number}"))));
        assert!(all.is_sorted_by(|earlier, later| earlier.seq < later.seq));
        assert_eq!(all[0].last_error.as_deref(), Some("said \"no\""));
        for row in &rows {
            let places = all.iter().map(|change| change.seq).filter(|place| super::row(*place) == row.seq);
            assert_eq!(Some(last(row.seq, &row.entries)), places.max());
        }
        assert_eq!(last(1, "?"), end(1));
        for (index, change) in all.iter().enumerate() {
            assert_eq!(read(change.seq), all[index + 1..]);
            assert!(change.seq <= end(row(change.seq)));
        }
    }
}
