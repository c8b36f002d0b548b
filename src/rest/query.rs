//! Text of paths and queries, appended as fields.

use std::borrow::Cow;

use super::{
    MAX_DEPTH,
    error::Failure,
    routes::{BodyRule, Route},
    scalar::{number, time},
    tables::{Field, FieldPath, Kind, Shape, Tables},
    template::unescape,
    wire::{self, Value},
};

/// Appends the query; every parameter must be known, and one that is not a list given once.
pub(super) fn append(out: &mut Vec<u8>, query: &str, route: &Route) -> Result<(), Failure> {
    let mut given: Vec<FieldPath> = Vec::new();
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
        let (name, value) = (text(name)?, text(value)?);
        let (path, field) = find(route, &name)
            .ok_or_else(|| Failure::parameter(&name, "unknown", "is not a parameter of this call"))?;
        if matches!(field.shape, Shape::Single) && given.contains(&path) {
            return Err(Failure::parameter(&name, "duplicate", "is given twice"));
        }
        set(out, route, &path, &name, &value)?;
        given.push(path);
    }
    Ok(())
}

/// Appends the field at the end of a path, within the messages on the way to it.
pub(super) fn set(out: &mut Vec<u8>, route: &Route, path: &[usize], shown: &str, text: &str) -> Result<(), Failure> {
    within(out, &route.tables, route.input, path, &mut |out, field| append_text(out, &route.tables, field, shown, text))
}

type Append<'a> = dyn FnMut(&mut Vec<u8>, &Field) -> Result<(), Failure> + 'a;

fn within(
    out: &mut Vec<u8>,
    tables: &Tables,
    message: usize,
    path: &[usize],
    append: &mut Append<'_>,
) -> Result<(), Failure> {
    let Some((first, rest)) = path.split_first() else { return Ok(()) };
    let field = &tables.message(message).fields[*first];
    match field.kind {
        Kind::Message(inner) if !rest.is_empty() => {
            wire::nested(out, field.number, |out| within(out, tables, inner, rest, append))
        }
        _ => append(out, field),
    }
}

fn append_text(out: &mut Vec<u8>, tables: &Tables, field: &Field, name: &str, text: &str) -> Result<(), Failure> {
    let wrong = |expected: &str| Failure::parameter(name, "invalid", &format!("must be {expected}"));
    let moment;
    let value = match field.kind {
        Kind::String | Kind::RawJson => Value::Bytes(text.as_bytes()),
        Kind::Bool => Value::Varint(text.parse::<bool>().map_err(|_| wrong("true or false"))?.into()),
        Kind::Enum(index) => {
            let words = tables.enumeration(index);
            let unknown = || Failure::parameter(name, "unknown", &format!("must be one of {}", words.allowed));
            Value::Varint(i64::from(words.number(text).ok_or_else(unknown)?) as u64)
        }
        Kind::Time => {
            moment = time(text).ok_or_else(|| wrong("an RFC 3339 time"))?;
            Value::Bytes(&moment)
        }
        Kind::Bytes | Kind::Message(_) => return Err(wrong("given in a body")),
        kind => number(kind, text).map_err(|(reason, problem)| Failure::parameter(name, reason, &problem))?,
    };
    wire::field(out, field.number, value);
    Ok(())
}

/// The field of a dotted name of JSON or proto names; only what text can express and nothing else fills.
fn find<'r>(route: &'r Route, name: &str) -> Option<(FieldPath, &'r Field)> {
    let path = route.tables.path(route.input, name)?;
    let field = route.tables.last(route.input, &path)?;
    let is_text = !matches!(field.shape, Shape::Map(_)) && !matches!(field.kind, Kind::Message(_));
    // What is deeper than a body may be, the service would not read.
    let free = path.len() <= MAX_DEPTH && !route.variables.contains(&path) && !in_body(path[0], route);
    (is_text && free).then_some((path, field))
}

fn in_body(first: usize, route: &Route) -> bool {
    match route.body {
        BodyRule::None => false,
        BodyRule::Whole => true,
        BodyRule::Field { field, .. } => field == first || route.update_mask == Some(first),
    }
}

fn text(escaped: &str) -> Result<Cow<'_, str>, Failure> {
    if !escaped.contains(['+', '%']) {
        return Ok(Cow::Borrowed(escaped));
    }
    let spaced = escaped.replace('+', " ");
    let text = unescape(&spaced, false);
    text.map(Cow::Owned).map_err(|_| Failure::new("INVALID_PARAMETER", "the query has a broken escape"))
}
