//! Many rows in one statement whose text hardly ever changes, so that the database has it prepared already.
//!
//! A statement names its rows `{rows}` and uses them like a table: `INSERT INTO t (a) SELECT a FROM {rows}`. With
//! `FROM {rows}{ordered}` it waits, in a [`super::script`] and before it writes the first of them, until its transaction is
//! the only one on all nodes that may do so.
//!
//! That is for the log of changes: PostgreSQL gives out sequence numbers in the order of asking but shows them in the
//! order of commits; a reader that saw number 8 could find a 7 later. SQLite has one writer anyway.

use std::{fmt::Write, sync::Arc};

use sea_orm::{DbBackend, Statement, Value};

use super::parameter::Parameter;

/// SQLite takes at most this many rows in a statement; more go in several. Each size is a text of its own, and a power of
/// two: what is left of it stays NULL.
pub(super) const MAX_ROWS: usize = 256;

/// PostgreSQL's arrays are given without NULL. These stand for it in columns that never have them otherwise.
const NULL_TEXT: &str = "";
const NULL_INT: i64 = -1;

/// Type of a column.
#[derive(Clone, Copy)]
pub(super) enum Type {
    /// Text.
    Text,
    /// A number.
    Int,
}

/// A column of the rows.
pub(super) struct Column {
    name: &'static str,
    kind: Type,
    nullable: bool,
}

/// A column that always has text.
pub(super) const fn text(name: &'static str) -> Column {
    Column { name, kind: Type::Text, nullable: false }
}

/// A column whose text is never empty, or NULL.
pub(super) const fn text_or_null(name: &'static str) -> Column {
    Column { name, kind: Type::Text, nullable: true }
}

/// A column that always has a number.
pub(super) const fn int(name: &'static str) -> Column {
    Column { name, kind: Type::Int, nullable: false }
}

/// A column whose number is never −1, or NULL.
pub(super) const fn int_or_null(name: &'static str) -> Column {
    Column { name, kind: Type::Int, nullable: true }
}

/// A value for a column.
pub(super) enum Cell<'a> {
    /// For [`Type::Text`].
    Text(&'a str),
    /// The same, and not copied.
    Shared(&'a Arc<str>),
    /// For [`Type::Int`].
    Int(i64),
    /// For a column that may be NULL.
    Null,
}

/// Rows on their way into a statement.
pub(super) struct Rows {
    columns: &'static [Column],
    /// Row by row, as SQLite takes them.
    values: Vec<Parameter>,
    backend: DbBackend,
}

impl<'a> From<&'a str> for Cell<'a> {
    fn from(text: &'a str) -> Self {
        Self::Text(text)
    }
}

impl<'a> From<&'a Arc<str>> for Cell<'a> {
    fn from(text: &'a Arc<str>) -> Self {
        Self::Shared(text)
    }
}

impl<'a> From<&'a String> for Cell<'a> {
    fn from(text: &'a String) -> Self {
        Self::Text(text)
    }
}

impl From<i64> for Cell<'_> {
    fn from(number: i64) -> Self {
        Self::Int(number)
    }
}

impl From<i32> for Cell<'_> {
    fn from(number: i32) -> Self {
        Self::Int(number.into())
    }
}

impl<'a, T: Into<Cell<'a>>> From<Option<T>> for Cell<'a> {
    fn from(value: Option<T>) -> Self {
        value.map_or(Self::Null, Into::into)
    }
}

impl Rows {
    pub(super) fn new(backend: DbBackend, columns: &'static [Column]) -> Self {
        Self { columns, values: Vec::new(), backend }
    }

    /// Adds a row. A text that the row before has in its place as well is not copied again.
    pub(super) fn push<const N: usize>(&mut self, row: [Cell<'_>; N]) {
        debug_assert_eq!(N, self.columns.len());
        for cell in row {
            let above = self.values.len().checked_sub(N).map(|place| &self.values[place]);
            let value = match (cell, above) {
                (Cell::Text(text), Some(Parameter::Text(above))) if **above == *text => Parameter::Text(above.clone()),
                (Cell::Text(text), _) => Parameter::Text(text.into()),
                (Cell::Shared(text), _) => Parameter::Text(text.clone()),
                (Cell::Int(number), _) => Parameter::Int(number),
                (Cell::Null, _) => Parameter::Null,
            };
            self.values.push(value);
        }
    }

    pub(super) fn len(&self) -> usize {
        self.values.len() / self.columns.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.values.is_empty()
    }

    /// The statements that carry the rows.
    pub(super) fn statements(self, statement: &str) -> Vec<Statement> {
        if self.is_empty() {
            return Vec::new();
        }
        if self.backend == DbBackend::Postgres {
            let (backend, mut text, mut values) = (self.backend, String::new(), Vec::new());
            self.append(statement, &mut text, &mut values);
            return vec![Statement::from_sql_and_values(backend, text, values.into_iter().map(Value::from))];
        }
        let of = |piece: Self| {
            let (backend, mut text, mut values) = (piece.backend, String::new(), Vec::new());
            let places = piece.len().next_power_of_two();
            piece.append_places(statement, places, &mut text, &mut values);
            Statement::from_sql_and_values(backend, text, values.into_iter().map(Value::from))
        };
        self.pieces(MAX_ROWS).map(of).collect()
    }

    /// At most `count` of the rows at a time.
    pub(super) fn pieces(self, count: usize) -> impl Iterator<Item = Self> {
        let Self { columns, values, backend } = self;
        let mut values = values.into_iter();
        std::iter::from_fn(move || {
            let values: Vec<Parameter> = values.by_ref().take(count * columns.len()).collect();
            (!values.is_empty()).then_some(Self { columns, values, backend })
        })
    }

    /// Adds `statement` for the rows to a text for PostgreSQL that already takes `values`.
    pub(super) fn append(self, statement: &str, text: &mut String, values: &mut Vec<Parameter>) {
        text.push_str(
            &statement.replace("{ordered}", " CROSS JOIN ordered").replace("{rows}", &self.arrays(values.len())),
        );
        values.extend(self.transposed());
    }

    /// Adds `statement`, with places for `count` rows, to a text for SQLite that already takes `values`.
    pub(super) fn append_places(self, statement: &str, count: usize, text: &mut String, values: &mut Vec<Parameter>) {
        text.push_str(&on_sqlite(statement, self.columns, count));
        let end = values.len() + count * self.columns.len();
        values.extend(self.values);
        values.resize(end, Parameter::Null);
    }

    /// One array for each column.
    fn transposed(self) -> impl Iterator<Item = Parameter> {
        let count = self.len();
        let empty = |column: &Column| match column.kind {
            Type::Text => Parameter::Texts(Vec::with_capacity(count)),
            Type::Int => Parameter::Ints(Vec::with_capacity(count)),
        };
        let mut arrays: Vec<Parameter> = self.columns.iter().map(empty).collect();
        let width = arrays.len();
        let null: Arc<str> = NULL_TEXT.into();
        for (index, value) in self.values.into_iter().enumerate() {
            match (&mut arrays[index % width], value) {
                (Parameter::Texts(texts), Parameter::Text(text)) => texts.push(text),
                (Parameter::Texts(texts), _) => texts.push(Arc::clone(&null)),
                (Parameter::Ints(numbers), Parameter::Int(number)) => numbers.push(number),
                (Parameter::Ints(numbers), _) => numbers.push(NULL_INT),
                _ => {}
            }
        }
        arrays.into_iter()
    }

    /// The rows as PostgreSQL reads them from arrays, which come after `before` other parameters.
    fn arrays(&self, before: usize) -> String {
        let (mut names, mut outs, mut arrays) = (String::new(), String::new(), String::new());
        for (index, column) in self.columns.iter().enumerate() {
            let comma = if index > 0 { ", " } else { "" };
            let (kind, null) = match column.kind {
                Type::Text => ("text", format!("'{NULL_TEXT}'")),
                Type::Int => ("bigint", NULL_INT.to_string()),
            };
            let name = column.name;
            let _ = write!(names, "{comma}{name}");
            let _ = write!(arrays, "{comma}${}::{kind}[]", before + index + 1);
            let _ = match column.nullable {
                true => write!(outs, "{comma}NULLIF({name}, {null}) AS {name}"),
                false => write!(outs, "{comma}{name}"),
            };
        }
        format!("(SELECT {outs} FROM unnest({arrays}) AS given ({names})) AS rows")
    }
}

fn on_sqlite(statement: &str, columns: &[Column], count: usize) -> String {
    statement.replace("{ordered}", "").replace("{rows}", &table(columns, count))
}

/// The rows as SQLite reads them from parameters; those that are left over begin with NULL.
fn table(columns: &[Column], count: usize) -> String {
    let mut table = String::with_capacity(64 + count * columns.len() * 2);
    table.push_str("(SELECT ");
    for (index, column) in columns.iter().enumerate() {
        let comma = if index > 0 { ", " } else { "" };
        let _ = write!(table, "{comma}column{} AS {}", index + 1, column.name);
    }
    table.push_str(" FROM (VALUES ");
    let row = format!("({})", vec!["?"; columns.len()].join(","));
    for index in 0..count {
        table.push_str(if index > 0 { "," } else { "" });
        table.push_str(&row);
    }
    table.push_str(") WHERE column1 IS NOT NULL) AS rows");
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    const COLUMNS: &[Column] = &[text("id"), int_or_null("at")];
    const INSERT: &str = "INSERT INTO t (id, at) SELECT id, at FROM {rows}";

    fn rows(backend: DbBackend, count: usize) -> Rows {
        let mut rows = Rows::new(backend, COLUMNS);
        (0..count).for_each(|_| rows.push(["a".into(), Cell::Null]));
        rows
    }

    #[test]
    fn postgres_reads_arrays() {
        let statements = rows(DbBackend::Postgres, 1_000).statements(INSERT);
        assert_eq!(statements.len(), 1);
        assert_eq!(
            statements[0].sql,
            "INSERT INTO t (id, at) SELECT id, at FROM (SELECT id, NULLIF(at, -1) AS at FROM \
             unnest($1::text[], $2::bigint[]) AS given (id, at)) AS rows"
        );
        assert_eq!(statements[0].values.as_ref().map(|values| values.0.len()), Some(2));
    }

    #[test]
    fn sqlite_reads_parameters_in_a_few_sizes() {
        let statements = rows(DbBackend::Sqlite, 259).statements(INSERT);
        assert_eq!(statements.len(), 2);
        assert_eq!(
            statements[1].sql,
            "INSERT INTO t (id, at) SELECT id, at FROM (SELECT column1 AS id, column2 AS at FROM \
             (VALUES (?,?),(?,?),(?,?),(?,?)) WHERE column1 IS NOT NULL) AS rows"
        );
        assert_eq!(statements[1].values.as_ref().map(|values| values.0.len()), Some(8));
    }

    #[test]
    fn nothing_is_said_about_no_rows() {
        assert!(rows(DbBackend::Sqlite, 0).statements(INSERT).is_empty());
    }
}
