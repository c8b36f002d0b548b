//! JSON into messages. A fault names the field by its path, for example `retry.max` or `events[1]`.

use std::{borrow::Cow, collections::HashSet, fmt};

use base64::{Engine, engine::general_purpose::STANDARD};
use prost_reflect::{DynamicMessage, EnumDescriptor, FieldDescriptor, Kind, MapKey, MessageDescriptor, Value};
use serde::de::{Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_json::value::RawValue;

use super::{MAX_DEPTH, error::Failure, routes::Rules};

/// Members of an object in their order, values as they stand.
pub(super) struct Members<'a>(pub(super) Vec<(Cow<'a, str>, &'a RawValue)>);

impl<'de> Deserialize<'de> for Members<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Collect;
        impl<'de> Visitor<'de> for Collect {
            type Value = Members<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut members = Vec::new();
                while let Some(key) = map.next_key::<Name<'de>>()? {
                    members.push((key.0, map.next_value()?));
                }
                Ok(Members(members))
            }
        }
        deserializer.deserialize_map(Collect)
    }
}

/// A key, borrowed where it has no escapes.
#[derive(serde::Deserialize)]
struct Name<'a>(#[serde(borrow)] Cow<'a, str>);

struct Elements<'a>(Vec<&'a RawValue>);

impl<'de> Deserialize<'de> for Elements<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Collect;
        impl<'de> Visitor<'de> for Collect {
            type Value = Elements<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an array")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut sequence: A) -> Result<Self::Value, A::Error> {
                let mut elements = Vec::new();
                while let Some(element) = sequence.next_element()? {
                    elements.push(element);
                }
                Ok(Elements(elements))
            }
        }
        deserializer.deserialize_seq(Collect)
    }
}

/// The members of an object; a key given twice is a fault.
pub(super) fn members<'a>(raw: &'a RawValue, path: &str) -> Result<Members<'a>, Failure> {
    if !raw.get().starts_with('{') {
        return Err(match path {
            "" => Failure::request("the body must be a JSON object"),
            _ => Failure::body(path, "wrong_type", "must be an object"),
        });
    }
    let members: Members<'a> = serde_json::from_str(raw.get())
        .map_err(|error| Failure::request(format!("the body is not valid JSON: {error}")))?;
    let mut seen = HashSet::with_capacity(members.0.len());
    for (key, _) in &members.0 {
        if !seen.insert(key) {
            return Err(Failure::about("INVALID_REQUEST", &join(path, key), "duplicate", "is given twice"));
        }
    }
    Ok(members)
}

/// What an object says, as a message.
pub(super) fn message(
    descriptor: &MessageDescriptor,
    raw: &RawValue,
    path: &str,
    depth: usize,
    rules: &Rules,
) -> Result<DynamicMessage, Failure> {
    if depth > MAX_DEPTH {
        return Err(Failure::body(path, "too_deep", &format!("is nested more than {MAX_DEPTH} levels deep")));
    }
    let mut message = DynamicMessage::new(descriptor.clone());
    let mut filled: Vec<u32> = Vec::new();
    for (key, value) in members(raw, path)?.0 {
        let path = join(path, &key);
        let field = descriptor.get_field_by_json_name(&key).or_else(|| descriptor.get_field_by_name(&key));
        let field = field.ok_or_else(|| Failure::body(&path, "unknown", "is not a known field"))?;
        // The same field by its JSON name and by its proto name.
        if filled.contains(&field.number()) {
            return Err(Failure::about("INVALID_REQUEST", &path, "duplicate", "is given twice"));
        }
        filled.push(field.number());
        if value.get() != "null" {
            let other = field.containing_oneof().filter(|oneof| !oneof.is_synthetic());
            if other.is_some_and(|oneof| oneof.fields().any(|other| message.has_field(&other))) {
                return Err(Failure::body(&path, "conflict", "excludes another field that is given"));
            }
            let value = field_value(&field, value, &path, depth, rules)?;
            message.set_field(&field, value);
        }
    }
    Ok(message)
}

fn field_value(
    field: &FieldDescriptor,
    raw: &RawValue,
    path: &str,
    depth: usize,
    rules: &Rules,
) -> Result<Value, Failure> {
    if rules.is_raw_json(field) {
        // What is inside is the service's to judge, which has the same question from gRPC.
        if !raw.get().starts_with('{') {
            return Err(Failure::body(path, "wrong_type", "must be an object"));
        }
        return Ok(Value::String(raw.get().to_owned()));
    }
    if field.is_map() {
        let Kind::Message(entry) = field.kind() else { return Err(unsupported(path)) };
        let mut map = std::collections::HashMap::new();
        for (key, value) in members(raw, path)?.0 {
            let path = format!("{path}[{key}]");
            let key = map_key(&entry.map_entry_key_field().kind(), &key, &path)?;
            map.insert(key, single(&entry.map_entry_value_field().kind(), value, &path, depth, rules)?);
        }
        return Ok(Value::Map(map));
    }
    if field.is_list() {
        if !raw.get().starts_with('[') {
            return Err(Failure::body(path, "wrong_type", "must be an array"));
        }
        let elements: Elements<'_> =
            serde_json::from_str(raw.get()).map_err(|_| Failure::body(path, "wrong_type", "must be an array"))?;
        let values = elements
            .0
            .iter()
            .enumerate()
            .map(|(index, element)| single(&field.kind(), element, &format!("{path}[{index}]"), depth, rules));
        return Ok(Value::List(values.collect::<Result<_, _>>()?));
    }
    single(&field.kind(), raw, path, depth, rules)
}

fn single(kind: &Kind, raw: &RawValue, path: &str, depth: usize, rules: &Rules) -> Result<Value, Failure> {
    let text = raw.get();
    let wrong = |expected: &str| Failure::body(path, "wrong_type", &format!("must be {expected}"));
    match kind {
        Kind::Message(descriptor) if descriptor.full_name() == "google.protobuf.Timestamp" => {
            let text: String = serde_json::from_str(text).map_err(|_| wrong("an RFC 3339 time"))?;
            timestamp(descriptor, &text).ok_or_else(|| Failure::body(path, "invalid", "must be an RFC 3339 time"))
        }
        Kind::Message(descriptor) => Ok(Value::Message(message(descriptor, raw, path, depth + 1, rules)?)),
        Kind::Bool => match text {
            "true" => Ok(Value::Bool(true)),
            "false" => Ok(Value::Bool(false)),
            _ => Err(wrong("true or false")),
        },
        Kind::String => serde_json::from_str(text).map(Value::String).map_err(|_| wrong("a string")),
        Kind::Bytes => {
            let encoded: String = serde_json::from_str(text).map_err(|_| wrong("a base64 string"))?;
            let bytes = STANDARD.decode(encoded).map_err(|_| Failure::body(path, "invalid", "must be base64"))?;
            Ok(Value::Bytes(bytes.into()))
        }
        Kind::Enum(descriptor) => {
            let word: String = serde_json::from_str(text).map_err(|_| wrong("a string"))?;
            enum_value(descriptor, &word)
                .ok_or_else(|| Failure::body(path, "unknown", &format!("must be one of {}", words(descriptor))))
        }
        _ => match text.as_bytes().first() {
            Some(b'-' | b'0'..=b'9') => {
                number(kind, text).map_err(|(reason, problem)| Failure::body(path, reason, &problem))
            }
            _ => Err(wrong("a number")),
        },
    }
}

/// A number in JSON's or a query's spelling; otherwise a reason and what is wrong.
pub(super) fn number(kind: &Kind, text: &str) -> Result<Value, (&'static str, String)> {
    if matches!(kind, Kind::Double | Kind::Float) {
        let value: f64 = text.parse().map_err(|_| ("wrong_type", "must be a number".to_owned()))?;
        return match kind {
            Kind::Float if (value as f32).is_finite() => Ok(Value::F32(value as f32)),
            Kind::Double if value.is_finite() => Ok(Value::F64(value)),
            _ => Err(("out_of_range", "is out of range".to_owned())),
        };
    }
    let digits = text.strip_prefix('-').unwrap_or(text);
    if digits.is_empty() || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(("wrong_type", "must be a whole number".to_owned()));
    }
    let range = |low: String, high: String| ("out_of_range", format!("must be from {low} to {high}"));
    match kind {
        Kind::Int32 | Kind::Sint32 | Kind::Sfixed32 => {
            text.parse().map(Value::I32).map_err(|_| range(i32::MIN.to_string(), i32::MAX.to_string()))
        }
        Kind::Int64 | Kind::Sint64 | Kind::Sfixed64 => {
            text.parse().map(Value::I64).map_err(|_| range(i64::MIN.to_string(), i64::MAX.to_string()))
        }
        Kind::Uint32 | Kind::Fixed32 => {
            text.parse().map(Value::U32).map_err(|_| range("0".to_owned(), u32::MAX.to_string()))
        }
        _ => text.parse().map(Value::U64).map_err(|_| range("0".to_owned(), u64::MAX.to_string())),
    }
}

fn map_key(kind: &Kind, key: &str, path: &str) -> Result<MapKey, Failure> {
    let wrong = || Failure::body(path, "wrong_type", "has a key of the wrong type");
    match kind {
        Kind::String => Ok(MapKey::String(key.to_owned())),
        Kind::Bool => key.parse().map(MapKey::Bool).map_err(|_| wrong()),
        Kind::Int32 | Kind::Sint32 | Kind::Sfixed32 => key.parse().map(MapKey::I32).map_err(|_| wrong()),
        Kind::Int64 | Kind::Sint64 | Kind::Sfixed64 => key.parse().map(MapKey::I64).map_err(|_| wrong()),
        Kind::Uint32 | Kind::Fixed32 => key.parse().map(MapKey::U32).map_err(|_| wrong()),
        Kind::Uint64 | Kind::Fixed64 => key.parse().map(MapKey::U64).map_err(|_| wrong()),
        _ => Err(unsupported(path)),
    }
}

pub(super) fn timestamp(descriptor: &MessageDescriptor, text: &str) -> Option<Value> {
    let at: prost_types::Timestamp = text.parse().ok()?;
    let mut message = DynamicMessage::new(descriptor.clone());
    message.set_field_by_name("seconds", Value::I64(at.seconds));
    message.set_field_by_name("nanos", Value::I32(at.nanos));
    Some(Value::Message(message))
}

/// The value that a short lower-case word names; the unspecified one has no word.
pub(super) fn enum_value(descriptor: &EnumDescriptor, word: &str) -> Option<Value> {
    let named = descriptor.values().find(|value| value.number() != 0 && short_name(descriptor, value.name()) == word);
    named.map(|value| Value::EnumNumber(value.number()))
}

/// The words of an enum, for messages.
pub(super) fn words(descriptor: &EnumDescriptor) -> String {
    let named = descriptor.values().filter(|value| value.number() != 0);
    named.map(|value| short_name(descriptor, value.name())).collect::<Vec<_>>().join(", ")
}

/// `WEBHOOK_STATUS_ACTIVE` of `WebhookStatus` as `active`.
pub(super) fn short_name(descriptor: &EnumDescriptor, value: &str) -> String {
    let mut prefix = String::new();
    for char in descriptor.name().chars() {
        if char.is_uppercase() && !prefix.is_empty() {
            prefix.push('_');
        }
        prefix.extend(char.to_uppercase());
    }
    prefix.push('_');
    value.strip_prefix(&prefix).unwrap_or(value).to_lowercase()
}

fn unsupported(path: &str) -> Failure {
    Failure::body(path, "unsupported", "cannot be given in JSON")
}

fn join(path: &str, key: &str) -> String {
    if path.is_empty() { key.to_owned() } else { format!("{path}.{key}") }
}
