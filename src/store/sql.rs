//! Statements that carry many rows.

use std::fmt::Write;

use sea_orm::{DbBackend, Statement, Value};

/// Text and values of a statement, put together piece by piece.
#[derive(Default)]
pub(super) struct Sql {
    text: String,
    values: Vec<Value>,
}

impl Sql {
    pub(super) fn new(text: &str) -> Self {
        Self { text: text.to_owned(), values: Vec::new() }
    }

    /// Adds text as it stands.
    pub(super) fn text(&mut self, text: &str) -> &mut Self {
        self.text.push_str(text);
        self
    }

    /// Adds a value, by its place: both databases read `$1`.
    pub(super) fn value(&mut self, value: impl Into<Value>) -> &mut Self {
        self.values.push(value.into());
        let _ = write!(self.text, "${}", self.values.len());
        self
    }

    /// Adds a row of values in parentheses.
    pub(super) fn row(&mut self, values: impl IntoIterator<Item = Value>) -> &mut Self {
        self.list("(", values.into_iter(), ")")
    }

    /// Adds values with commas between them.
    pub(super) fn list(&mut self, open: &str, values: impl Iterator<Item = Value>, close: &str) -> &mut Self {
        self.text.push_str(open);
        for (index, value) in values.enumerate() {
            if index > 0 {
                self.text.push(',');
            }
            self.value(value);
        }
        self.text(close)
    }

    /// The statement for `backend`.
    pub(super) fn build(self, backend: DbBackend) -> Statement {
        Statement::from_sql_and_values(backend, self.text, self.values)
    }
}
