//! Several statements, each with rows of its own, in one trip to the database. The trips, and not the work, are most of what
//! a commit takes, to PostgreSQL over the network as to SQLite, whose driver has a thread of its own: while everything is
//! busy, each thread that is woken waits for a processor.

use std::fmt::Write;

use sea_orm::{ConnectionTrait, DatabaseTransaction, DbBackend, Statement, Value};

use super::{
    Error,
    counts::{self, Deltas},
    log::{self, Log},
    rows::{MAX_ROWS, Rows},
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

    /// Runs them; how many rows of the database the last one concerned, if the others are plain inserts.
    pub(super) async fn run(self, transaction: &DatabaseTransaction) -> Result<u64, Error> {
        if transaction.get_database_backend() == DbBackend::Postgres {
            let Some(statement) = self.into_one() else { return Ok(0) };
            return Ok(transaction.execute_raw(statement).await?.rows_affected());
        }
        let most = self.steps.iter().map(|(_, rows)| rows.len()).max().unwrap_or(0);
        if self.steps.len() > 1 && most <= MAX_ROWS {
            // SQLite's driver counts the rows of all statements.
            let others = self.steps.iter().rev().skip(1).map(|(_, rows)| rows.len() as u64).sum();
            let statement = self.into_text(most.next_power_of_two());
            return Ok(transaction.execute_raw(statement).await?.rows_affected().saturating_sub(others));
        }
        let mut concerned = 0;
        for (statement, rows) in self.steps {
            concerned = rows.execute(transaction, statement).await?;
        }
        Ok(concerned)
    }

    /// One text of several statements, which SQLite's driver runs one after the other. All get places for `count` rows:
    /// each mixture of sizes would be a text of its own, to be prepared and kept.
    fn into_text(self, count: usize) -> Statement {
        let (mut text, mut values) = (String::new(), Vec::<Value>::new());
        for (statement, rows) in self.steps {
            rows.append_places(statement, count, &mut text, &mut values);
            text.push(';');
        }
        Statement::from_sql_and_values(DbBackend::Sqlite, text, values)
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
    use sea_orm::TransactionTrait;

    use super::*;
    use crate::store::rows::{Cell, Column, int_or_null, text};

    const COLUMNS: &[Column] = &[text("id"), int_or_null("at")];
    const INSERT: &str = "INSERT INTO t (id, at) SELECT id, at FROM {rows}";
    const UPDATE: &str = "UPDATE t SET at = rows.at FROM {rows} WHERE t.id = rows.id";

    fn script(backend: DbBackend, counts: [usize; 3]) -> Script {
        counts.into_iter().zip([INSERT, INSERT, UPDATE]).fold(Script::default(), |script, (count, text)| {
            let mut rows = Rows::new(backend, COLUMNS);
            (0..count).for_each(|_| rows.push(["a".into(), Cell::Null]));
            script.with(text, rows)
        })
    }

    #[test]
    fn postgres_gets_one_statement() {
        let statement = script(DbBackend::Postgres, [300, 0, 7]).into_one().unwrap();
        assert_eq!(
            statement.sql,
            "WITH step0 AS (INSERT INTO t (id, at) SELECT id, at FROM (SELECT id, NULLIF(at, -1) AS at FROM \
             unnest($1::text[], $2::bigint[]) AS given (id, at)) AS rows) UPDATE t SET at = rows.at FROM \
             (SELECT id, NULLIF(at, -1) AS at FROM unnest($3::text[], $4::bigint[]) AS given (id, at)) AS rows \
             WHERE t.id = rows.id"
        );
        assert_eq!(statement.values.map(|values| values.0.len()), Some(4));
        assert!(script(DbBackend::Postgres, [0, 0, 0]).into_one().is_none());
    }

    #[test]
    fn sqlite_gets_one_text() {
        let statement = script(DbBackend::Sqlite, [1, 0, 2]).into_text(2);
        assert_eq!(
            statement.sql,
            "INSERT INTO t (id, at) SELECT id, at FROM (SELECT column1 AS id, column2 AS at FROM \
             (VALUES (?,?),(?,?)) WHERE column1 IS NOT NULL) AS rows;\
             UPDATE t SET at = rows.at FROM (SELECT column1 AS id, column2 AS at FROM \
             (VALUES (?,?),(?,?)) WHERE column1 IS NOT NULL) AS rows WHERE t.id = rows.id;"
        );
        // The places left over are filled, since the next statement's values follow.
        assert_eq!(statement.values.map(|values| values.0.len()), Some(8));
    }

    /// Whatever the sizes, what counts is how many rows the last statement has found.
    #[tokio::test]
    async fn the_last_statement_is_counted() {
        let directory = tempfile::tempdir().unwrap();
        let url = format!("sqlite://{}?mode=rwc", directory.path().join("test.db").display());
        let database = sea_orm::Database::connect(url).await.unwrap();
        database.execute_unprepared("CREATE TABLE t (id TEXT, at INTEGER)").await.unwrap();
        for (inserted, updated) in [(1, 0), (0, 1), (3, 1), (1, 3), (MAX_ROWS, 2), (MAX_ROWS + 1, 2), (2, 300), (0, 0)]
        {
            let transaction = database.begin().await.unwrap();
            let mut insert = Rows::new(DbBackend::Sqlite, COLUMNS);
            (0..inserted).for_each(|index| insert.push([(&index.to_string()).into(), Cell::Null]));
            let mut update = Rows::new(DbBackend::Sqlite, COLUMNS);
            (0..updated).for_each(|index| update.push([(&index.to_string()).into(), 7.into()]));
            let script = Script::default().with(INSERT, insert).with(UPDATE, update);
            let found = if updated == 0 { inserted } else { updated.min(inserted) };
            assert_eq!(script.run(&transaction).await.unwrap(), found as u64, "{inserted} {updated}");
            transaction.rollback().await.unwrap();
        }
    }
}
