//! Wire bytes into JSON, without a message between: camelCase keys in the order of fields, what is absent left out.

use std::{collections::BTreeMap, ops::Range};

use base64::{Engine, engine::general_purpose::STANDARD};
use prost::Message as _;
use serde::Serialize;

use super::{
    tables::{Field, Kind, Message, Shape, Tables},
    wire::{self, Malformed, Value},
};

/// A reply may contain messages nested this deep, which is prost's own limit.
const MAX_REPLY_DEPTH: usize = 100;
/// Marks a value that another member of its oneof displaced; it sorts behind every field.
const DISPLACED: usize = usize::MAX;

/// Appends a message as a JSON object.
pub(super) fn message(tables: &Tables, message: usize, wire: &[u8], out: &mut Vec<u8>) -> Result<(), Malformed> {
    Encoder { tables, out, found: Vec::new() }.message(message, wire, 0)
}

/// Appends the envelope: the field `data_field` of the message is `data` and its siblings are `meta`; without one, the
/// message is `data`.
pub(super) fn envelope(
    tables: &Tables,
    message: usize,
    data_field: Option<usize>,
    wire: &[u8],
    out: &mut Vec<u8>,
) -> Result<(), Malformed> {
    out.extend_from_slice(b"{\"data\":");
    let mut encoder = Encoder { tables, out, found: Vec::new() };
    match data_field {
        None => encoder.message(message, wire, 0)?,
        Some(data_field) => encoder.data_and_meta(tables.message(message), data_field, wire)?,
    }
    out.push(b'}');
    Ok(())
}

/// The last value of a string field; empty when there is none.
pub(super) fn text<'w>(field: &Field, wire: &'w [u8]) -> Result<&'w str, Malformed> {
    let mut rest = wire;
    let mut last = "";
    while let Some((number, value)) = wire::next(&mut rest)? {
        if let (true, Some(Value::Bytes(bytes))) = (number == field.number, value) {
            last = std::str::from_utf8(bytes).map_err(|_| Malformed)?;
        }
    }
    Ok(last)
}

/// A value on the wire, and the index of its field.
#[derive(Clone, Copy)]
struct Found<'w> {
    field: usize,
    value: Value<'w>,
}

struct Encoder<'a, 'w> {
    tables: &'a Tables,
    out: &'a mut Vec<u8>,
    /// The values of the messages that are being written, the innermost message's last.
    found: Vec<Found<'w>>,
}

impl<'w> Encoder<'_, 'w> {
    fn message(&mut self, message: usize, wire: &'w [u8], depth: usize) -> Result<(), Malformed> {
        let table = self.tables.message(message);
        let found = self.scan(table, wire)?;
        self.fields(table, found.clone(), None, depth)?;
        self.found.truncate(found.start);
        Ok(())
    }

    fn data_and_meta(&mut self, table: &Message, data_field: usize, wire: &'w [u8]) -> Result<(), Malformed> {
        let found = self.scan(table, wire)?;
        let at = |field: &Found<'_>| field.field;
        let start = found.start + self.found[found.clone()].partition_point(|value| at(value) < data_field);
        let end = found.start + self.found[found.clone()].partition_point(|value| at(value) <= data_field);
        self.field(&table.fields[data_field], start..end, 0)?;
        let before = self.out.len();
        self.out.extend_from_slice(b",\"meta\":");
        let meta = self.out.len();
        self.fields(table, found, Some(data_field), 0)?;
        if self.out[meta..] == *b"{}" {
            self.out.truncate(before);
        }
        Ok(())
    }

    /// Puts the values of a message on top of `found`, in the order of fields; says where.
    fn scan(&mut self, table: &Message, mut wire: &'w [u8]) -> Result<Range<usize>, Malformed> {
        let start = self.found.len();
        while let Some((number, value)) = wire::next(&mut wire)? {
            let Some(place) = table.numbered(number) else { continue };
            let field = &table.fields[place];
            let value = value.ok_or(Malformed)?;
            match (&field.shape, value) {
                (Shape::List { .. }, Value::Bytes(run)) if is_packable(field.kind) && run.is_empty() => continue,
                (Shape::List { .. }, Value::Bytes(_)) if is_packable(field.kind) => {}
                _ if value.wire_type() == wire::wire_type(field.kind) => {}
                _ => return Err(Malformed),
            }
            self.found.push(Found { field: place, value });
        }
        let found = &mut self.found[start..];
        if table.oneofs > 0 {
            settle_oneofs(table, found);
        }
        // Nearly every writer keeps the order of numbers.
        if !found.is_sorted_by_key(|found| found.field) {
            found.sort_by_key(|found| found.field);
        }
        Ok(start..self.found.len())
    }

    /// Writes an object of the fields that are shown, all but `left_out`.
    fn fields(
        &mut self,
        table: &Message,
        found: Range<usize>,
        left_out: Option<usize>,
        depth: usize,
    ) -> Result<(), Malformed> {
        if depth > MAX_REPLY_DEPTH {
            return Err(Malformed);
        }
        self.out.push(b'{');
        let first = self.out.len();
        let mut at = found.start;
        for (place, field) in table.fields.iter().enumerate() {
            let start = at;
            while at < found.end && self.found[at].field == place {
                at += 1;
            }
            if left_out == Some(place) || !is_shown(field, &self.found[start..at]) {
                continue;
            }
            if self.out.len() > first {
                self.out.push(b',');
            }
            self.out.extend_from_slice(&field.key);
            self.field(field, start..at, depth)?;
        }
        self.out.push(b'}');
        Ok(())
    }

    /// Writes the value of one field.
    fn field(&mut self, field: &Field, found: Range<usize>, depth: usize) -> Result<(), Malformed> {
        match field.shape {
            Shape::Single => self.single(field.kind, found, depth),
            Shape::List { .. } => self.list(field.kind, found, depth),
            Shape::Map(entry) => self.map(entry, found, depth),
        }
    }

    /// Writes the one value that all the values found for a field amount to.
    fn single(&mut self, kind: Kind, found: Range<usize>, depth: usize) -> Result<(), Malformed> {
        let last = self.found[found.clone()].last().map_or(Value::zero(kind), |found| found.value);
        if found.len() < 2 || !matches!(kind, Kind::Message(_) | Kind::Time) {
            return self.value(kind, last, depth);
        }
        // A message in several pieces is what they are in a row.
        let pieces = self.found[found].iter().map(|found| match found.value {
            Value::Bytes(bytes) => bytes,
            _ => &[],
        });
        let joined = pieces.collect::<Vec<_>>().concat();
        let mut encoder = Encoder { tables: self.tables, out: self.out, found: Vec::new() };
        encoder.value(kind, Value::Bytes(&joined), depth)
    }

    fn list(&mut self, kind: Kind, found: Range<usize>, depth: usize) -> Result<(), Malformed> {
        self.out.push(b'[');
        let first = self.out.len();
        for at in found {
            let value = self.found[at].value;
            let (mut run, one) = match value {
                Value::Bytes(run) if is_packable(kind) => (run, None),
                value => (&[][..], Some(value)),
            };
            let mut next = one;
            while next.is_some() || !run.is_empty() {
                let value = match next.take() {
                    Some(value) => value,
                    None => wire::value(wire::wire_type(kind), &mut run)?,
                };
                if self.out.len() > first {
                    self.out.push(b',');
                }
                self.value(kind, value, depth)?;
            }
        }
        self.out.push(b']');
        Ok(())
    }

    fn map(&mut self, entry: usize, found: Range<usize>, depth: usize) -> Result<(), Malformed> {
        let table = self.tables.message(entry);
        let [key, value] = table.fields.as_slice() else { return Err(Malformed) };
        let base = self.found.len();
        // A map has no order of its own: a fixed one keeps answers comparable. Of two entries the later one counts.
        let mut entries: BTreeMap<String, Range<usize>> = BTreeMap::new();
        for at in found {
            let Value::Bytes(wire) = self.found[at].value else { return Err(Malformed) };
            let found = self.scan(table, wire)?;
            let split = found.start + self.found[found.clone()].partition_point(|found| found.field == 0);
            let key_value = self.found[found.start..split].last().map_or(Value::zero(key.kind), |found| found.value);
            entries.insert(key_text(key.kind, key_value)?, split..found.end);
        }
        self.out.push(b'{');
        let first = self.out.len();
        for (key, found) in entries {
            if self.out.len() > first {
                self.out.push(b',');
            }
            put(self.out, &key)?;
            self.out.push(b':');
            self.single(value.kind, found, depth)?;
        }
        self.out.push(b'}');
        self.found.truncate(base);
        Ok(())
    }

    fn value(&mut self, kind: Kind, value: Value<'w>, depth: usize) -> Result<(), Malformed> {
        let out = &mut *self.out;
        match (kind, value) {
            (Kind::Message(inner), Value::Bytes(wire)) => self.message(inner, wire, depth + 1),
            (Kind::Time, Value::Bytes(wire)) => {
                let at = prost_types::Timestamp::decode(wire).map_err(|_| Malformed)?;
                put(out, &at.to_string())
            }
            (Kind::String, Value::Bytes(bytes)) => put(out, utf8(bytes)?),
            (Kind::RawJson, Value::Bytes(b"")) => put(out, &()),
            (Kind::RawJson, Value::Bytes(bytes)) => {
                out.extend_from_slice(utf8(bytes)?.as_bytes());
                Ok(())
            }
            (Kind::Bytes, Value::Bytes(bytes)) => put(out, &STANDARD.encode(bytes)),
            (Kind::Bool, Value::Varint(flag)) => put(out, &(flag != 0)),
            (Kind::Enum(index), Value::Varint(number)) => match self.tables.enumeration(index).shown(number as i32) {
                Some(word) => {
                    out.extend_from_slice(word);
                    Ok(())
                }
                None => put(out, &(number as i32)),
            },
            (Kind::Float, Value::Fixed32(bits)) => put(out, &f32::from_bits(bits)),
            (Kind::Double, Value::Fixed64(bits)) => put(out, &f64::from_bits(bits)),
            _ => match integer(kind, value)? {
                Integer::Signed(number) => put(out, &number),
                Integer::Unsigned(number) => put(out, &number),
            },
        }
    }
}

enum Integer {
    Signed(i64),
    Unsigned(u64),
}

fn integer(kind: Kind, value: Value<'_>) -> Result<Integer, Malformed> {
    Ok(match (kind, value) {
        (Kind::Int32, Value::Varint(number)) => Integer::Signed((number as i32).into()),
        (Kind::Int64, Value::Varint(number)) => Integer::Signed(number as i64),
        (Kind::Uint32, Value::Varint(number)) => Integer::Unsigned((number as u32).into()),
        (Kind::Uint64, Value::Varint(number)) => Integer::Unsigned(number),
        (Kind::Sint32, Value::Varint(number)) => {
            let number = number as u32;
            Integer::Signed((((number >> 1) as i32) ^ -((number & 1) as i32)).into())
        }
        (Kind::Sint64, Value::Varint(number)) => Integer::Signed(((number >> 1) as i64) ^ -((number & 1) as i64)),
        (Kind::Fixed32, Value::Fixed32(number)) => Integer::Unsigned(number.into()),
        (Kind::Fixed64, Value::Fixed64(number)) => Integer::Unsigned(number),
        (Kind::Sfixed32, Value::Fixed32(number)) => Integer::Signed((number as i32).into()),
        (Kind::Sfixed64, Value::Fixed64(number)) => Integer::Signed(number as i64),
        _ => return Err(Malformed),
    })
}

fn key_text(kind: Kind, value: Value<'_>) -> Result<String, Malformed> {
    match (kind, value) {
        (Kind::String, Value::Bytes(bytes)) => utf8(bytes).map(str::to_owned),
        (Kind::Bool, Value::Varint(flag)) => Ok((flag != 0).to_string()),
        _ => integer(kind, value).map(|number| match number {
            Integer::Signed(number) => number.to_string(),
            Integer::Unsigned(number) => number.to_string(),
        }),
    }
}

/// A field that can be absent is shown when it is there; one that cannot is always shown.
fn is_shown(field: &Field, found: &[Found<'_>]) -> bool {
    let Shape::Single = field.shape else { return !field.omit_empty || !found.is_empty() };
    let is_set = || match found.last().map(|found| found.value) {
        None => false,
        Some(Value::Varint(number)) if matches!(field.kind, Kind::Enum(_)) => number as i32 != 0,
        Some(value) => value != Value::zero(field.kind),
    };
    match field.kind {
        // No text is no object.
        Kind::RawJson => is_set(),
        _ if field.presence => !found.is_empty(),
        // The unspecified value is as good as none.
        Kind::Enum(_) => is_set(),
        _ => !field.omit_empty || is_set(),
    }
}

/// Of each oneof, keeps the member that stands last, in the pieces that no other member separates.
fn settle_oneofs(table: &Message, found: &mut [Found<'_>]) {
    let mut last: Vec<Option<usize>> = vec![None; table.oneofs];
    for found in found.iter_mut().rev() {
        let Some(oneof) = table.fields[found.field].oneof else { continue };
        if *last[oneof].get_or_insert(found.field) != found.field {
            // Nothing equals this: whatever stands before is displaced too.
            last[oneof] = Some(DISPLACED);
            found.field = DISPLACED;
        }
    }
}

fn is_packable(kind: Kind) -> bool {
    wire::wire_type(kind) != prost::encoding::WireType::LengthDelimited
}

fn utf8(bytes: &[u8]) -> Result<&str, Malformed> {
    std::str::from_utf8(bytes).map_err(|_| Malformed)
}

fn put(out: &mut Vec<u8>, value: &(impl Serialize + ?Sized)) -> Result<(), Malformed> {
    serde_json::to_writer(out, value).map_err(|_| Malformed)
}
