//! Numbers, words and times from their text into wire values.

use prost::Message;

use super::{tables::Kind, wire::Value};

/// A number in JSON's or a query's spelling; otherwise a reason and what is wrong.
pub(super) fn number(kind: Kind, text: &str) -> Result<Value<'static>, (&'static str, String)> {
    if let Kind::Double | Kind::Float = kind {
        let value: f64 = text.parse().map_err(|_| ("wrong_type", "must be a number".to_owned()))?;
        return match kind {
            Kind::Float if (value as f32).is_finite() => Ok(Value::Fixed32((value as f32).to_bits())),
            Kind::Double if value.is_finite() => Ok(Value::Fixed64(value.to_bits())),
            _ => Err(("out_of_range", "is out of range".to_owned())),
        };
    }
    let digits = text.strip_prefix('-').unwrap_or(text);
    if digits.is_empty() || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(("wrong_type", "must be a whole number".to_owned()));
    }
    integer(kind, text).ok_or_else(|| ("out_of_range", "is out of range".to_owned()))
}

/// A whole number, as the kind writes it; none when it is out of range or not one.
pub(super) fn integer(kind: Kind, text: &str) -> Option<Value<'static>> {
    Some(match kind {
        Kind::Int32 => Value::Varint(i64::from(text.parse::<i32>().ok()?) as u64),
        Kind::Int64 => Value::Varint(text.parse::<i64>().ok()? as u64),
        Kind::Uint32 => Value::Varint(text.parse::<u32>().ok()?.into()),
        Kind::Uint64 => Value::Varint(text.parse().ok()?),
        Kind::Sint32 => {
            let number: i32 = text.parse().ok()?;
            Value::Varint(u64::from(((number << 1) ^ (number >> 31)) as u32))
        }
        Kind::Sint64 => {
            let number: i64 = text.parse().ok()?;
            Value::Varint(((number << 1) ^ (number >> 63)) as u64)
        }
        Kind::Fixed32 => Value::Fixed32(text.parse().ok()?),
        Kind::Fixed64 => Value::Fixed64(text.parse().ok()?),
        Kind::Sfixed32 => Value::Fixed32(text.parse::<i32>().ok()? as u32),
        Kind::Sfixed64 => Value::Fixed64(text.parse::<i64>().ok()? as u64),
        _ => return None,
    })
}

/// An RFC 3339 time as a timestamp message.
pub(super) fn time(text: &str) -> Option<Vec<u8>> {
    Some(text.parse::<prost_types::Timestamp>().ok()?.encode_to_vec())
}
