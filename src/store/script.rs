//! Several statements, each with rows of its own, in few trips to the database: at a quiet hour the trips, and not the
//! work, are what a publish waits for.

use std::fmt::Write;

use sea_orm::{ConnectionTrait, DatabaseTransaction, DbBackend, Statement, Value};

use super::{
    Error,
    counts::{self, Deltas},
    log::{self, Log},
    rows::Rows,
};

/// SQLite gets statements with at most this many rows each in one trip. Those with more make trips of their own, which are
/// short against their work: each mixture of sizes is a text of its own, and a long one takes memory for as long as it is
/// prepared.
const MAX_ROWS_TOGETHER: usize = 4;

/// Statements to run together. None may depend on what another one writes, nor on which comes first: PostgreSQL keeps no
/// order. What must come later is in a later script.
#[derive(Default)]
pub(super) struct Script {
    steps: Vec<(&'static str, Rows)>,
}

impl Script {
    /// Adds a statement that names its rows as [`super::rows`] says; without rows there is nothing to do.
    pub(super) fn with(mut self, statement: &'static str, rows: Rows) -> Self {
        if !rows.is_empty() {
            self.steps.push((statement, rows));
        }
        self
    }

    /// Adds counts and changes, which come last in every transaction.
    pub(super) fn tell(self, backend: DbBackend, deltas: Deltas<'_>, log: Log) -> Result<Self, Error> {
        Ok(self.with(counts::ADD, deltas.rows(backend)).with(log::INSERT, log.rows(backend)?))
    }

    /// Runs them; how many rows of the database the last one concerned, if the others are plain inserts.
    pub(super) async fn run(self, transaction: &DatabaseTransaction) -> Result<u64, Error> {
        let backend = transaction.get_database_backend();
        // PostgreSQL counts the rows of the last statement, SQLite's driver those of all.
        let others = match (backend, self.steps.split_last()) {
            (DbBackend::Sqlite, Some((_, others))) => others.iter().map(|(_, rows)| rows.len() as u64).sum(),
            _ => 0,
        };
        let mut concerned = 0;
        for statement in self.statements(backend) {
            concerned += transaction.execute_raw(statement).await?.rows_affected();
        }
        Ok(concerned.saturating_sub(others))
    }

    fn statements(self, backend: DbBackend) -> Vec<Statement> {
        match backend {
            DbBackend::Postgres => self.into_one().into_iter().collect(),
            _ if self.steps.iter().all(|(_, rows)| rows.len() <= MAX_ROWS_TOGETHER) => self.into_text(backend),
            _ => self.steps.into_iter().flat_map(|(statement, rows)| rows.statements(statement)).collect(),
        }
    }

    /// One statement, in which all but the last stand as expressions that PostgreSQL runs to their end, whether or not
    /// something reads them.
    fn into_one(mut self) -> Option<Statement> {
        let last = self.steps.pop()?;
        let (mut text, mut values) = (String::new(), Vec::new());
        for (index, (statement, rows)) in self.steps.into_iter().enumerate() {
            let _ = write!(text, "{} step{index} AS (", if index == 0 { "WITH" } else { "," });
            rows.append(statement, &mut text, &mut values);
            text.push(')');
        }
        text.push(' ');
        last.1.append(last.0, &mut text, &mut values);
        Some(Statement::from_sql_and_values(DbBackend::Postgres, text, values))
    }

    /// One text of several statements, which SQLite's driver runs one after the other.
    fn into_text(self, backend: DbBackend) -> Vec<Statement> {
        let (mut text, mut values) = (String::new(), Vec::<Value>::new());
        for (statement, rows) in self.steps {
            rows.append(statement, &mut text, &mut values);
            text.push(';');
        }
        if text.is_empty() { Vec::new() } else { vec![Statement::from_sql_and_values(backend, text, values)] }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::rows::{Cell, Column, int_or_null, text};

    const COLUMNS: &[Column] = &[text("id"), int_or_null("at")];
    const INSERT: &str = "INSERT INTO t (id, at) SELECT id, at FROM {rows}";
    const UPDATE: &str = "UPDATE t SET at = rows.at FROM {rows} WHERE t.id = rows.id";

    fn script(backend: DbBackend, counts: [usize; 3]) -> Vec<Statement> {
        let script =
            counts.into_iter().zip([INSERT, INSERT, UPDATE]).fold(Script::default(), |script, (count, text)| {
                let mut rows = Rows::new(backend, COLUMNS);
                (0..count).for_each(|_| rows.push(["a".into(), Cell::Null]));
                script.with(text, rows)
            });
        script.statements(backend)
    }

    fn values(statement: &Statement) -> usize {
        statement.values.as_ref().map_or(0, |values| values.0.len())
    }

    #[test]
    fn postgres_gets_one_statement() {
        let statements = script(DbBackend::Postgres, [300, 0, 7]);
        assert_eq!(statements.len(), 1);
        assert_eq!(
            statements[0].sql,
            "WITH step0 AS (INSERT INTO t (id, at) SELECT id, at FROM (SELECT id, NULLIF(at, -1) AS at FROM \
             unnest($1::text[], $2::bigint[]) AS given (id, at)) AS rows) UPDATE t SET at = rows.at FROM \
             (SELECT id, NULLIF(at, -1) AS at FROM unnest($3::text[], $4::bigint[]) AS given (id, at)) AS rows \
             WHERE t.id = rows.id"
        );
        assert_eq!(values(&statements[0]), 4);
        assert!(script(DbBackend::Postgres, [0, 0, 0]).is_empty());
    }

    #[test]
    fn sqlite_gets_a_few_rows_in_one_text() {
        let statements = script(DbBackend::Sqlite, [3, 1, 0]);
        assert_eq!(statements.len(), 1);
        assert_eq!(
            statements[0].sql,
            "INSERT INTO t (id, at) SELECT id, at FROM (SELECT column1 AS id, column2 AS at FROM \
             (VALUES (?,?),(?,?),(?,?),(?,?)) WHERE column1 IS NOT NULL) AS rows;\
             INSERT INTO t (id, at) SELECT id, at FROM (SELECT column1 AS id, column2 AS at FROM \
             (VALUES (?,?)) WHERE column1 IS NOT NULL) AS rows;"
        );
        // The places left over are filled, since the next statement's values follow.
        assert_eq!(values(&statements[0]), 10);
    }

    #[test]
    fn sqlite_gets_many_rows_statement_by_statement() {
        assert_eq!(script(DbBackend::Sqlite, [300, 1, 5]).len(), 4);
    }
}
