//! Several statements, each with rows of its own, in one trip to the database. The trips, and not the work, are most of what
//! a commit takes, to PostgreSQL over the network as to SQLite, whose driver has a thread of its own: while everything is
//! busy, each thread that is woken waits for a processor. So what publishing and sending write goes there whole, from the
//! beginning of the transaction to its commit: see [`super::commits`].

use std::{borrow::Cow, fmt::Write};

use sea_orm::{ConnectionTrait, DatabaseTransaction, DbBackend, DbErr, RuntimeErr, Statement, Value, sqlx};

use super::{
    Error,
    counts::{self, Deltas},
    log::{self, Log},
    parameter::Parameter,
    rows::{MAX_ROWS, Rows},
};

/// Fails as [`Expected::missed`] knows it, unless the statement before has concerned as many rows as were expected.
const EXPECT_ON_SQLITE: &str = "INSERT INTO expectations (what, expected, found) SELECT ?, ?, changes();";
/// Identifies, among PostgreSQL's advisory locks, the one that orders changes.
const ORDER: u32 = 1_936_422_760;

/// Statements to run together. None may depend on what another one writes, nor on which comes first: PostgreSQL keeps no
/// order. What must come later is in a later script.
#[derive(Default)]
pub(super) struct Script {
    steps: Vec<Step>,
}

struct Step {
    statement: Cow<'static, str>,
    rows: Rows,
    expected: Option<Expected>,
}

/// What a statement has to find for each of its rows, or the script is not done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Expected {
    /// A lease that holds.
    Lease,
    /// A name that no request has.
    Name,
    /// A part, or a draft, of what was published, that is this node's.
    Part,
}

/// What became of a script.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// It is done.
    Done,
    /// None of it is, since this was not found for each row.
    Missed(Expected),
}

impl Expected {
    const ALL: [Self; 3] = [Self::Lease, Self::Name, Self::Part];

    /// The migration has it in an error of its own.
    const fn as_str(self) -> &'static str {
        match self {
            Self::Lease => "lease",
            Self::Name => "name",
            Self::Part => "part",
        }
    }

    /// Which one was not met, if that is what the error says.
    pub(super) fn missed(error: &sqlx::Error) -> Option<Self> {
        let sqlx::Error::Database(error) = error else { return None };
        let what = error.message().strip_prefix("not found for each row: ")?;
        Self::ALL.into_iter().find(|expected| expected.as_str() == what)
    }
}

impl Script {
    /// Adds a statement that names its rows as [`super::rows`] says; without rows there is nothing to do.
    pub(super) fn with(self, statement: impl Into<Cow<'static, str>>, rows: Rows) -> Self {
        self.step(statement.into(), rows, None)
    }

    /// The same for a statement that has to concern one row of the database for each of its own.
    pub(super) fn with_each(self, statement: impl Into<Cow<'static, str>>, rows: Rows, expected: Expected) -> Self {
        self.step(statement.into(), rows, Some(expected))
    }

    fn step(mut self, statement: Cow<'static, str>, rows: Rows, expected: Option<Expected>) -> Self {
        if !rows.is_empty() {
            self.steps.push(Step { statement, rows, expected });
        }
        self
    }

    /// Adds counts and changes, which come last in every transaction.
    pub(super) fn tell(self, backend: DbBackend, deltas: Deltas<'_>, log: Log) -> Result<Self, Error> {
        Ok(self.with(counts::ADD, deltas.rows(backend)).with(log::INSERT, log.rows(backend)?))
    }

    pub(super) fn is_empty(&self) -> bool {
        self.steps.is_empty()
    }

    /// Whether SQLite gets each statement once, in a text that comes again.
    pub(super) fn is_common(&self) -> bool {
        self.steps.iter().all(|step| step.rows.len() <= MAX_ROWS)
    }

    /// Runs them in a transaction that goes on, unless something was missed.
    pub(super) async fn run(self, transaction: &DatabaseTransaction) -> Result<Outcome, Error> {
        if self.is_empty() {
            return Ok(Outcome::Done);
        }
        let backend = transaction.get_database_backend();
        let (text, parameters) = if backend == DbBackend::Postgres { self.on_postgres() } else { self.on_sqlite() };
        let values = parameters.into_iter().map(Value::from);
        outcome(transaction.execute_raw(Statement::from_sql_and_values(backend, text, values)).await)
    }

    /// One text of several statements, which SQLite's driver runs one after the other. All get places for the same number of
    /// rows: each mixture of sizes would be a text of its own, to be prepared and kept.
    pub(super) fn on_sqlite(self) -> (String, Vec<Parameter>) {
        let (mut text, mut values) = (String::new(), Vec::new());
        let most = self.steps.iter().map(|step| step.rows.len()).max().unwrap_or(0);
        let places = most.min(MAX_ROWS).next_power_of_two();
        for Step { statement, rows, expected } in self.steps {
            for piece in rows.pieces(places) {
                let count = piece.len();
                piece.append_places(&statement, places, &mut text, &mut values);
                text.push(';');
                if let Some(expected) = expected {
                    text.push_str(EXPECT_ON_SQLITE);
                    values.extend([Parameter::Text(expected.as_str().into()), count_of(count)]);
                }
            }
        }
        (text, values)
    }

    /// One statement, in which all stand as expressions that PostgreSQL runs to their end. Those that are in the order of
    /// commits wait, before they write, for the lock, which is taken when all others are done and have found what they should.
    pub(super) fn on_postgres(self) -> (String, Vec<Parameter>) {
        let (mut text, mut values) = (String::from("WITH "), Vec::new());
        let (ordered, free): (Vec<Step>, Vec<Step>) =
            self.steps.into_iter().partition(|step| step.statement.contains("{ordered}"));
        let mut checks = String::from("TRUE");
        for (index, Step { statement, rows, expected }) in free.into_iter().enumerate() {
            let count = rows.len();
            let _ = write!(text, "step{index} AS (");
            rows.append(&statement, &mut text, &mut values);
            text.push_str(" RETURNING 1), ");
            let _ = match expected {
                Some(expected) => {
                    values.push(count_of(count));
                    let (what, wanted) = (expected.as_str(), values.len());
                    write!(checks, " AND found_for_each('{what}', (SELECT count(*) FROM step{index}), ${wanted})")
                }
                // Counting it runs it to its end.
                None => write!(checks, " AND (SELECT count(*) FROM step{index}) >= 0"),
            };
        }
        let lock = if ordered.is_empty() { "1" } else { &format!("pg_advisory_xact_lock({ORDER})") };
        // PostgreSQL would look at conditions outside of CASE in an order of its own.
        let _ = write!(text, "ordered AS MATERIALIZED (SELECT {lock} WHERE CASE WHEN {checks} THEN TRUE END)");
        for (index, Step { statement, rows, .. }) in ordered.into_iter().enumerate() {
            let _ = write!(text, ", last{index} AS (");
            rows.append(&statement, &mut text, &mut values);
            text.push(')');
        }
        text.push_str(" SELECT count(*) FROM ordered");
        (text, values)
    }
}

fn count_of(rows: usize) -> Parameter {
    Parameter::Int(i64::try_from(rows).unwrap_or(i64::MAX))
}

/// What became of a script that ended like this.
pub(super) fn outcome<T>(done: Result<T, DbErr>) -> Result<Outcome, Error> {
    match done {
        Ok(_) => Ok(Outcome::Done),
        Err(DbErr::Exec(RuntimeErr::SqlxError(error))) if let Some(expected) = Expected::missed(&error) => {
            Ok(Outcome::Missed(expected))
        }
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use sea_orm::TransactionTrait;

    use super::*;
    use crate::store::{
        commits::Commits,
        rows::{Cell, Column, int_or_null, text},
        silence::Silence,
    };

    const COLUMNS: &[Column] = &[text("id"), int_or_null("at")];
    const INSERT: &str = "INSERT INTO t (id, at) SELECT id, at FROM {rows}";
    const UPDATE: &str = "UPDATE t SET at = rows.at FROM {rows} WHERE t.id = rows.id";
    const ORDERED: &str = "INSERT INTO log (id) SELECT id FROM {rows}{ordered}";

    fn script(backend: DbBackend, counts: [usize; 3]) -> Script {
        let [one, none, found] = counts.map(|count| {
            let mut rows = Rows::new(backend, COLUMNS);
            (0..count).for_each(|_| rows.push(["a".into(), Cell::Null]));
            rows
        });
        Script::default().with(INSERT, one).with(INSERT, none).with_each(UPDATE, found, Expected::Lease)
    }

    #[test]
    fn postgres_gets_one_statement() {
        let mut rows = Rows::new(DbBackend::Postgres, COLUMNS);
        rows.push(["a".into(), Cell::Null]);
        let (text, values) = script(DbBackend::Postgres, [300, 0, 7]).with(ORDERED, rows).on_postgres();
        assert_eq!(
            text,
            "WITH step0 AS (INSERT INTO t (id, at) SELECT id, at FROM (SELECT id, NULLIF(at, -1) AS at FROM \
             unnest($1::text[], $2::bigint[]) AS given (id, at)) AS rows RETURNING 1), \
             step1 AS (UPDATE t SET at = rows.at FROM (SELECT id, NULLIF(at, -1) AS at FROM \
             unnest($3::text[], $4::bigint[]) AS given (id, at)) AS rows WHERE t.id = rows.id RETURNING 1), \
             ordered AS MATERIALIZED (SELECT pg_advisory_xact_lock(1936422760) WHERE CASE WHEN TRUE \
             AND (SELECT count(*) FROM step0) >= 0 \
             AND found_for_each('lease', (SELECT count(*) FROM step1), $5) THEN TRUE END), \
             last0 AS (INSERT INTO log (id) SELECT id FROM (SELECT id, NULLIF(at, -1) AS at FROM \
             unnest($6::text[], $7::bigint[]) AS given (id, at)) AS rows CROSS JOIN ordered) \
             SELECT count(*) FROM ordered"
        );
        assert_eq!((values.len(), &values[4]), (7, &Parameter::Int(7)));
    }

    #[test]
    fn sqlite_gets_one_text() {
        let (text, values) = script(DbBackend::Sqlite, [1, 0, 2]).on_sqlite();
        assert_eq!(
            text,
            "INSERT INTO t (id, at) SELECT id, at FROM (SELECT column1 AS id, column2 AS at FROM \
             (VALUES (?,?),(?,?)) WHERE column1 IS NOT NULL) AS rows;\
             UPDATE t SET at = rows.at FROM (SELECT column1 AS id, column2 AS at FROM \
             (VALUES (?,?),(?,?)) WHERE column1 IS NOT NULL) AS rows WHERE t.id = rows.id;\
             INSERT INTO expectations (what, expected, found) SELECT ?, ?, changes();"
        );
        // The places left over are filled, since the next statement's values follow.
        assert_eq!(values.len(), 10);
    }

    /// Whatever the sizes, all is done when each row was found, and nothing otherwise.
    #[tokio::test]
    async fn all_or_nothing() {
        let (_directory, store) = crate::store::Store::fresh().await;
        let (database, commits) = (&store.0.write, &store.0.commits);
        database.execute_unprepared("CREATE TABLE t (id TEXT PRIMARY KEY, at INTEGER)").await.unwrap();
        for (inserted, updated) in
            [(1, 0), (0, 1), (3, 1), (1, 3), (MAX_ROWS, 2), (MAX_ROWS + 1, 2), (600, 600), (2, 300)]
        {
            let rows = |count: usize| {
                let mut rows = Rows::new(DbBackend::Sqlite, COLUMNS);
                (0..count).for_each(|index| rows.push([(&index.to_string()).into(), 7.into()]));
                rows
            };
            let script =
                || Script::default().with(INSERT, rows(inserted)).with_each(UPDATE, rows(updated), Expected::Lease);
            let expected = if updated > inserted { Outcome::Missed(Expected::Lease) } else { Outcome::Done };
            let transaction = database.begin().await.unwrap();
            assert_eq!(script().run(&transaction).await.unwrap(), expected, "{inserted} {updated}");
            transaction.rollback().await.unwrap();
            assert_eq!(commits.run(script()).await.unwrap(), expected, "{inserted} {updated}");
            let removed = database.execute_unprepared("DELETE FROM t").await.unwrap().rows_affected();
            assert_eq!(removed, if expected == Outcome::Done { inserted as u64 } else { 0 });
        }
    }

    /// A statement that fails leaves no transaction behind, and nothing of what came before it.
    #[tokio::test]
    async fn what_fails_ends() {
        let directory = tempfile::tempdir().unwrap();
        let url = format!("sqlite://{}?mode=rwc", directory.path().join("test.db").display());
        let mut options = sea_orm::ConnectOptions::new(url);
        options.max_connections(1);
        let database = sea_orm::Database::connect(options).await.unwrap();
        database.execute_unprepared("CREATE TABLE t (id TEXT PRIMARY KEY, at INTEGER)").await.unwrap();
        let commits = Commits::new(&database, Silence::of("sqlite:"));
        let twice = script(DbBackend::Sqlite, [1, 0, 0]).with(INSERT, {
            let mut rows = Rows::new(DbBackend::Sqlite, COLUMNS);
            rows.push(["a".into(), Cell::Null]);
            rows
        });
        assert!(matches!(commits.run(twice).await, Err(Error::Failed(_))));
        let once = script(DbBackend::Sqlite, [1, 0, 0]);
        assert_eq!(commits.run(once).await.unwrap(), Outcome::Done);
    }

    #[test]
    fn the_migration_has_the_same_words() {
        let migration = include_str!("../../migrations/m0013_publish_parts.rs");
        for expected in Expected::ALL {
            assert!(migration.contains(&format!("'not found for each row: {}'", expected.as_str())));
        }
    }
}
