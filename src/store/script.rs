//! Several statements, each with rows of its own, in one trip to PostgreSQL: when little is going on the trips, and not the
//! work, are what a publish waits for. SQLite is in the same process, where it gains nothing that could be measured.

use std::fmt::Write;

use sea_orm::{ConnectionTrait, DatabaseTransaction, DbBackend, Statement};

use super::{
    Error,
    counts::{self, Deltas},
    log::{self, Log},
    rows::Rows,
};

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

    /// Runs them; how many rows of the database the last one concerned.
    pub(super) async fn run(self, transaction: &DatabaseTransaction) -> Result<u64, Error> {
        if transaction.get_database_backend() == DbBackend::Postgres {
            let Some(statement) = self.into_one() else { return Ok(0) };
            return Ok(transaction.execute_raw(statement).await?.rows_affected());
        }
        let mut concerned = 0;
        for (statement, rows) in self.steps {
            concerned = rows.execute(transaction, statement).await?;
        }
        Ok(concerned)
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
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::rows::{Cell, Column, int_or_null, text};

    const COLUMNS: &[Column] = &[text("id"), int_or_null("at")];
    const INSERT: &str = "INSERT INTO t (id, at) SELECT id, at FROM {rows}";
    const UPDATE: &str = "UPDATE t SET at = rows.at FROM {rows} WHERE t.id = rows.id";

    fn script(counts: [usize; 3]) -> Script {
        counts.into_iter().zip([INSERT, INSERT, UPDATE]).fold(Script::default(), |script, (count, text)| {
            let mut rows = Rows::new(DbBackend::Postgres, COLUMNS);
            (0..count).for_each(|_| rows.push(["a".into(), Cell::Null]));
            script.with(text, rows)
        })
    }

    #[test]
    fn postgres_gets_one_statement() {
        let statement = script([300, 0, 7]).into_one().unwrap();
        assert_eq!(
            statement.sql,
            "WITH step0 AS (INSERT INTO t (id, at) SELECT id, at FROM (SELECT id, NULLIF(at, -1) AS at FROM \
             unnest($1::text[], $2::bigint[]) AS given (id, at)) AS rows) UPDATE t SET at = rows.at FROM \
             (SELECT id, NULLIF(at, -1) AS at FROM unnest($3::text[], $4::bigint[]) AS given (id, at)) AS rows \
             WHERE t.id = rows.id"
        );
        assert_eq!(statement.values.map(|values| values.0.len()), Some(4));
        assert!(script([0, 0, 0]).into_one().is_none());
    }
}
