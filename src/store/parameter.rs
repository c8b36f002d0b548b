//! What statements with rows are given, on its way to the driver with as few copies as it takes.

use std::sync::Arc;

use sea_orm::{
    Value,
    sea_query::ArrayType,
    sqlx::{self, Arguments, postgres::PgArguments, sqlite::SqliteArguments},
};

/// One parameter of a statement.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Parameter {
    /// Text.
    Text(Arc<str>),
    /// A number.
    Int(i64),
    /// NULL of any type, only for SQLite.
    Null,
    /// Only for PostgreSQL.
    Texts(Vec<Arc<str>>),
    /// Only for PostgreSQL.
    Ints(Vec<i64>),
}

impl From<Parameter> for Value {
    fn from(parameter: Parameter) -> Self {
        let array = |kind, values| Self::Array(kind, Some(Box::new(values)));
        match parameter {
            Parameter::Text(text) => (*text).into(),
            Parameter::Int(number) => number.into(),
            Parameter::Null => Self::BigInt(None),
            Parameter::Texts(texts) => array(ArrayType::String, texts.into_iter().map(|text| (*text).into()).collect()),
            Parameter::Ints(numbers) => array(ArrayType::BigInt, numbers.into_iter().map(Into::into).collect()),
        }
    }
}

/// As the driver of SQLite takes them, which keeps texts until it has bound them.
pub(super) fn for_sqlite(parameters: Vec<Parameter>) -> Result<SqliteArguments, sqlx::Error> {
    let mut arguments = SqliteArguments::default();
    arguments.reserve(parameters.len(), 0);
    for parameter in parameters {
        match parameter {
            Parameter::Text(text) => arguments.add(text),
            Parameter::Int(number) => arguments.add(number),
            Parameter::Null => arguments.add(None::<i64>),
            Parameter::Texts(_) | Parameter::Ints(_) => Err("SQLite has no arrays".into()),
        }
        .map_err(sqlx::Error::Encode)?;
    }
    Ok(arguments)
}

/// As the driver of PostgreSQL takes them, which writes them down at once.
pub(super) fn for_postgres(parameters: &[Parameter]) -> Result<PgArguments, sqlx::Error> {
    let mut arguments = PgArguments::default();
    for parameter in parameters {
        match parameter {
            Parameter::Text(text) => arguments.add(&**text),
            Parameter::Int(number) => arguments.add(number),
            Parameter::Texts(texts) => arguments.add(texts.iter().map(|text| &**text).collect::<Vec<&str>>()),
            Parameter::Ints(numbers) => arguments.add(numbers),
            Parameter::Null => Err("PostgreSQL wants to know the type of NULL".into()),
        }
        .map_err(sqlx::Error::Encode)?;
    }
    Ok(arguments)
}
