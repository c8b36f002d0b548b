//! Messages into JSON: camelCase keys in the order of fields, what is absent left out.

use base64::{Engine, engine::general_purpose::STANDARD};
use prost_reflect::{DynamicMessage, FieldDescriptor, Kind, MapKey, ReflectMessage, Value};

use super::{decode::short_name, routes::Rules};

/// Appends a message as a JSON object, without the fields that `skip` selects.
pub(super) fn message(
    out: &mut String,
    message: &DynamicMessage,
    rules: &Rules,
    skip: impl Fn(&FieldDescriptor) -> bool,
) {
    out.push('{');
    let start = out.len();
    for field in message.descriptor().fields().filter(|field| !skip(field)) {
        if !is_shown(message, &field, rules) {
            continue;
        }
        if out.len() > start {
            out.push(',');
        }
        string(out, field.json_name());
        out.push(':');
        self::field(out, message, &field, rules);
    }
    out.push('}');
}

/// Appends the value of one field.
pub(super) fn field(out: &mut String, message: &DynamicMessage, field: &FieldDescriptor, rules: &Rules) {
    let value = message.get_field(field);
    if rules.is_raw_json(field) {
        out.push_str(value.as_str().unwrap_or("null"));
    } else {
        self::value(out, &field.kind(), &value, rules);
    }
}

/// A field that can be absent is shown when it is there; one that cannot is always shown.
pub(super) fn is_shown(message: &DynamicMessage, field: &FieldDescriptor, rules: &Rules) -> bool {
    if field.supports_presence() || rules.omits_empty(field) {
        return message.has_field(field);
    }
    // The unspecified value of an enum is as good as none.
    !matches!(field.kind(), Kind::Enum(_)) || field.is_list() || message.has_field(field)
}

fn value(out: &mut String, kind: &Kind, value: &Value, rules: &Rules) {
    match value {
        Value::List(list) => {
            out.push('[');
            for (index, element) in list.iter().enumerate() {
                if index > 0 {
                    out.push(',');
                }
                self::value(out, kind, element, rules);
            }
            out.push(']');
        }
        Value::Map(map) => {
            let Kind::Message(entry) = kind else { return };
            // A map has no order of its own: a fixed one keeps answers comparable.
            let mut entries: Vec<(String, &Value)> = map.iter().map(|(key, value)| (key_text(key), value)).collect();
            entries.sort_by(|(a, _), (b, _)| a.cmp(b));
            out.push('{');
            for (index, (key, element)) in entries.into_iter().enumerate() {
                if index > 0 {
                    out.push(',');
                }
                string(out, &key);
                out.push(':');
                self::value(out, &entry.map_entry_value_field().kind(), element, rules);
            }
            out.push('}');
        }
        Value::Message(inner) if inner.descriptor().full_name() == "google.protobuf.Timestamp" => {
            string(out, &timestamp(inner));
        }
        Value::Message(inner) => message(out, inner, rules, |_| false),
        Value::EnumNumber(number) => match kind {
            Kind::Enum(descriptor) => match descriptor.get_value(*number) {
                Some(value) => string(out, &short_name(descriptor, value.name())),
                // A value newer than these descriptors.
                None => out.push_str(&number.to_string()),
            },
            _ => out.push_str(&number.to_string()),
        },
        Value::String(text) => string(out, text),
        Value::Bytes(bytes) => string(out, &STANDARD.encode(bytes)),
        Value::Bool(flag) => out.push_str(if *flag { "true" } else { "false" }),
        Value::I32(number) => out.push_str(&number.to_string()),
        Value::I64(number) => out.push_str(&number.to_string()),
        Value::U32(number) => out.push_str(&number.to_string()),
        Value::U64(number) => out.push_str(&number.to_string()),
        Value::F32(number) => out.push_str(&serde_json::to_string(number).unwrap_or_default()),
        Value::F64(number) => out.push_str(&serde_json::to_string(number).unwrap_or_default()),
    }
}

fn timestamp(message: &DynamicMessage) -> String {
    let part = |name| message.get_field_by_name(name).map(|value| value.into_owned());
    let seconds = part("seconds").and_then(|value| value.as_i64()).unwrap_or(0);
    let nanos = part("nanos").and_then(|value| value.as_i32()).unwrap_or(0);
    prost_types::Timestamp { seconds, nanos }.to_string()
}

fn key_text(key: &MapKey) -> String {
    match key {
        MapKey::Bool(key) => key.to_string(),
        MapKey::I32(key) => key.to_string(),
        MapKey::I64(key) => key.to_string(),
        MapKey::U32(key) => key.to_string(),
        MapKey::U64(key) => key.to_string(),
        MapKey::String(key) => key.clone(),
    }
}

fn string(out: &mut String, text: &str) {
    out.push_str(&serde_json::to_string(text).unwrap_or_default());
}
