//! Text of paths and queries into fields.

use prost_reflect::{DynamicMessage, FieldDescriptor, Kind, MessageDescriptor, ReflectMessage, Value};

use super::{
    decode::{enum_value, number, timestamp, words},
    error::Failure,
    routes::{BodyRule, Route},
    template::unescape,
};

/// Fills the message from the query; every parameter must be known, and one that is not a list given once.
pub(super) fn apply(message: &mut DynamicMessage, query: &str, route: &Route) -> Result<(), Failure> {
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
        let (name, value) = (text(name)?, text(value)?);
        let (path, field) = find(&message.descriptor(), &name)
            .filter(|(path, _)| !route.binds(path) && !in_body(path, route))
            .ok_or_else(|| Failure::parameter(&name, "unknown", "is not a parameter of this call"))?;
        set(message, &path, &field, &name, &value)?;
    }
    Ok(())
}

/// Sets the field at a path of proto names; a list grows.
pub(super) fn set(
    message: &mut DynamicMessage,
    path: &str,
    field: &FieldDescriptor,
    shown: &str,
    text: &str,
) -> Result<(), Failure> {
    let Some((first, rest)) = path.split_once('.') else {
        let value = value(&field.kind(), shown, text)?;
        if field.is_list() {
            if let Some(list) = message.get_field_mut(field).as_list_mut() {
                list.push(value);
            }
            return Ok(());
        }
        if message.has_field(field) {
            return Err(Failure::parameter(shown, "duplicate", "is given twice"));
        }
        message.set_field(field, value);
        return Ok(());
    };
    match message.get_field_by_name_mut(first).and_then(Value::as_message_mut) {
        Some(inner) => set(inner, rest, field, shown, text),
        None => Ok(()),
    }
}

fn value(kind: &Kind, name: &str, text: &str) -> Result<Value, Failure> {
    let wrong = |expected: &str| Failure::parameter(name, "invalid", &format!("must be {expected}"));
    match kind {
        Kind::String => Ok(Value::String(text.to_owned())),
        Kind::Bool => text.parse().map(Value::Bool).map_err(|_| wrong("true or false")),
        Kind::Enum(descriptor) => {
            let unknown = || Failure::parameter(name, "unknown", &format!("must be one of {}", words(descriptor)));
            enum_value(descriptor, text).ok_or_else(unknown)
        }
        Kind::Message(descriptor) => timestamp(descriptor, text).ok_or_else(|| wrong("an RFC 3339 time")),
        Kind::Bytes => Err(wrong("given in a body")),
        _ => number(kind, text).map_err(|(reason, problem)| Failure::parameter(name, reason, &problem)),
    }
}

/// The field of a dotted name of JSON or proto names, with its path in proto names; only what text can express.
fn find(message: &MessageDescriptor, name: &str) -> Option<(String, FieldDescriptor)> {
    let (first, rest) = name.split_once('.').map_or((name, None), |(first, rest)| (first, Some(rest)));
    let field = message.get_field_by_json_name(first).or_else(|| message.get_field_by_name(first))?;
    let kind = field.kind();
    let is_time = kind.as_message().is_some_and(|message| message.full_name() == "google.protobuf.Timestamp");
    match rest {
        None if !field.is_map() && (kind.as_message().is_none() || is_time) => Some((field.name().to_owned(), field)),
        Some(rest) if !field.is_list() && !field.is_map() && !is_time => {
            let (path, found) = find(kind.as_message()?, rest)?;
            Some((format!("{}.{path}", field.name()), found))
        }
        _ => None,
    }
}

fn in_body(path: &str, route: &Route) -> bool {
    let first = path.split('.').next().unwrap_or(path);
    match &route.body {
        BodyRule::None => false,
        BodyRule::Whole => true,
        BodyRule::Field(field) => {
            field.name() == first || route.update_mask.as_ref().is_some_and(|mask| mask.name() == first)
        }
    }
}

fn text(escaped: &str) -> Result<String, Failure> {
    let spaced = escaped.replace('+', " ");
    unescape(&spaced, false).map_err(|_| Failure::new("INVALID_PARAMETER", "the query has a broken escape"))
}
