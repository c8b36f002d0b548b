//! JSON into wire bytes, without a message between. A fault names the field by its path, for example `retry.max` or
//! `events[1]`.

use std::{
    borrow::Cow,
    collections::{HashMap, HashSet},
};

use base64::{Engine, engine::general_purpose::STANDARD};
use serde::de::IgnoredAny;
use serde_json::value::RawValue;

use super::{
    MAX_DEPTH,
    error::Failure,
    json::{Cursor, unquoted},
    path::Path,
    scalar::{integer, number, time},
    tables::{Field, Kind, Shape, Tables},
    wire::{self, Value},
};

/// So many keys of one object are compared one by one, which is faster than hashing them.
const FEW_KEYS: usize = 16;

/// Appends what an object says as the fields of a message. Answers with the fields that it gives, also those given as
/// null, in their order.
pub(super) fn body(tables: &Tables, message: usize, raw: &RawValue, out: &mut Vec<u8>) -> Result<Vec<usize>, Failure> {
    let mut decoder = Decoder { tables, json: Cursor::new(raw.get()) };
    decoder.message(out, message, &Path::Root, 1)
}

/// What is left to read. Every method reads its value to the end, also when it finds a fault: a key given twice further
/// on in an object that contains it counts before it.
struct Decoder<'t, 'j> {
    tables: &'t Tables,
    json: Cursor<'j>,
}

/// The keys of one object so far.
#[derive(Default)]
struct Keys<'j> {
    few: Vec<Cow<'j, str>>,
    many: HashSet<Cow<'j, str>>,
}

impl<'j> Keys<'j> {
    /// Whether the key is new.
    fn insert(&mut self, key: Cow<'j, str>) -> bool {
        if self.many.is_empty() && self.few.len() < FEW_KEYS {
            let new = !self.few.contains(&key);
            self.few.push(key);
            return new;
        }
        // A body full of keys must not cost the square of their number.
        self.many.extend(self.few.drain(..));
        self.many.insert(key)
    }
}

impl<'j> Decoder<'_, 'j> {
    fn message(
        &mut self,
        out: &mut Vec<u8>,
        message: usize,
        path: &Path<'_>,
        depth: usize,
    ) -> Result<Vec<usize>, Failure> {
        if depth > MAX_DEPTH {
            self.json.value();
            return Err(fault(path, "too_deep", &format!("is nested more than {MAX_DEPTH} levels deep")));
        }
        let table = self.tables.message(message);
        let mut given: Vec<usize> = Vec::new();
        let mut oneofs: Vec<usize> = Vec::new();
        self.members(path, |decoder, key| {
            let path = Path::Member(path, key);
            let Some(place) = table.named(key) else {
                decoder.json.value();
                return Err(fault(&path, "unknown", "is not a known field"));
            };
            // The same field by its JSON name and by its proto name.
            if given.contains(&place) {
                decoder.json.value();
                return Err(given_twice(&path));
            }
            given.push(place);
            if decoder.json.peek() == b'n' {
                decoder.json.value();
                return Ok(());
            }
            let field = &table.fields[place];
            if let Some(oneof) = field.oneof {
                if oneofs.contains(&oneof) {
                    decoder.json.value();
                    return Err(fault(&path, "conflict", "excludes another field that is given"));
                }
                oneofs.push(oneof);
            }
            decoder.field(out, field, &path, depth)
        })?;
        Ok(given)
    }

    fn field(&mut self, out: &mut Vec<u8>, field: &Field, path: &Path<'_>, depth: usize) -> Result<(), Failure> {
        match field.shape {
            Shape::Single => self.single(out, field, path, depth),
            Shape::Map(entry) => self.map(out, field, entry, path, depth),
            Shape::List { packed: false } => {
                self.elements(path, |decoder, index| decoder.single(out, field, &Path::Element(path, index), depth))
            }
            Shape::List { packed: true } => wire::nested(out, field.number, |out| {
                self.elements(path, |decoder, index| {
                    let value = decoder.unsized_value(field.kind, &Path::Element(path, index))?;
                    value.put(out);
                    Ok(())
                })
            }),
        }
    }

    fn map(
        &mut self,
        out: &mut Vec<u8>,
        field: &Field,
        entry: usize,
        path: &Path<'_>,
        depth: usize,
    ) -> Result<(), Failure> {
        let [key_field, value_field] = self.tables.message(entry).fields.as_slice() else {
            self.json.value();
            return Err(fault(path, "unsupported", "cannot be given in JSON"));
        };
        self.members(path, |decoder, key| {
            let path = Path::Entry(path, key);
            let number = match key_field.kind {
                Kind::String => Some(Value::Bytes(key.as_bytes())),
                Kind::Bool => key.parse().ok().map(|flag: bool| Value::Varint(flag.into())),
                kind => integer(kind, key),
            };
            let Some(key) = number else {
                decoder.json.value();
                return Err(fault(&path, "wrong_type", "has a key of the wrong type"));
            };
            wire::nested(out, field.number, |out| {
                wire::field(out, key_field.number, key);
                decoder.single(out, value_field, &path, depth)
            })
        })
    }

    /// One value with the field's key before it.
    fn single(&mut self, out: &mut Vec<u8>, field: &Field, path: &Path<'_>, depth: usize) -> Result<(), Failure> {
        let wrong = |expected: &str| fault(path, "wrong_type", &format!("must be {expected}"));
        if let Kind::Message(inner) = field.kind {
            return wire::nested(out, field.number, |out| self.message(out, inner, path, depth + 1).map(drop));
        }
        if wire::wire_type(field.kind) != prost::encoding::WireType::LengthDelimited {
            let value = self.unsized_value(field.kind, path)?;
            wire::field(out, field.number, value);
            return Ok(());
        }
        let text = self.json.value();
        let mut put = |bytes: &[u8]| wire::field(out, field.number, Value::Bytes(bytes));
        match field.kind {
            // What is inside is the service's to judge, which has the same question from gRPC.
            Kind::RawJson if text.starts_with('{') => put(text.as_bytes()),
            Kind::RawJson => return Err(wrong("an object")),
            Kind::Time => {
                let text = unquoted(text).ok_or_else(|| wrong("an RFC 3339 time"))?;
                put(&time(&text).ok_or_else(|| fault(path, "invalid", "must be an RFC 3339 time"))?);
            }
            Kind::Bytes => {
                let text = unquoted(text).ok_or_else(|| wrong("a base64 string"))?;
                put(&STANDARD.decode(text.as_bytes()).map_err(|_| fault(path, "invalid", "must be base64"))?);
            }
            _ => put(unquoted(text).ok_or_else(|| wrong("a string"))?.as_bytes()),
        }
        Ok(())
    }

    /// One value of a kind whose length needs no telling: a number, a flag or a word of an enum.
    fn unsized_value(&mut self, kind: Kind, path: &Path<'_>) -> Result<Value<'static>, Failure> {
        let text = self.json.value();
        let wrong = |expected: &str| fault(path, "wrong_type", &format!("must be {expected}"));
        match kind {
            Kind::Bool => match text {
                "true" => Ok(Value::Varint(1)),
                "false" => Ok(Value::Varint(0)),
                _ => Err(wrong("true or false")),
            },
            Kind::Enum(index) => {
                let word = unquoted(text).ok_or_else(|| wrong("a string"))?;
                let words = self.tables.enumeration(index);
                let number = words.number(&word);
                let number =
                    number.ok_or_else(|| fault(path, "unknown", &format!("must be one of {}", words.allowed)))?;
                Ok(Value::Varint(i64::from(number) as u64))
            }
            _ if text.starts_with(|first: char| first == '-' || first.is_ascii_digit()) => {
                number(kind, text).map_err(|(reason, problem)| fault(path, reason, &problem))
            }
            _ => Err(wrong("a number")),
        }
    }

    /// Goes through an object. After a fault it goes on only to see whether a key is given twice.
    fn members(
        &mut self,
        path: &Path<'_>,
        mut each: impl FnMut(&mut Self, &str) -> Result<(), Failure>,
    ) -> Result<(), Failure> {
        let start = self.json.place();
        if self.json.peek() != b'{' {
            self.json.value();
            return Err(match path {
                Path::Root => Failure::request("the body must be a JSON object"),
                _ => fault(path, "wrong_type", "must be an object"),
            });
        }
        self.json.enter();
        let mut keys = Keys::default();
        let mut found = Ok(());
        let (mut broken, mut doubled) = (false, None);
        while self.json.more() {
            let Some(key) = unquoted(self.json.key()) else {
                broken = true;
                self.json.value();
                continue;
            };
            if !keys.insert(key.clone()) && doubled.is_none() {
                doubled = Some(given_twice(&Path::Member(path, &key)));
            }
            if found.is_ok() && doubled.is_none() {
                found = each(self, &key);
            } else {
                self.json.value();
            }
        }
        if broken {
            let object = self.json.since(start);
            let error = serde_json::from_str::<HashMap<String, IgnoredAny>>(object).err();
            let error = error.map(|error| format!(": {error}")).unwrap_or_default();
            return Err(Failure::request(format!("the body is not valid JSON{error}")));
        }
        doubled.map_or(found, Err)
    }

    /// Goes through an array.
    fn elements(
        &mut self,
        path: &Path<'_>,
        mut each: impl FnMut(&mut Self, usize) -> Result<(), Failure>,
    ) -> Result<(), Failure> {
        if self.json.peek() != b'[' {
            self.json.value();
            return Err(fault(path, "wrong_type", "must be an array"));
        }
        self.json.enter();
        let mut found = Ok(());
        for index in 0_usize.. {
            if !self.json.more() {
                break;
            }
            if found.is_ok() {
                found = each(self, index);
            } else {
                self.json.value();
            }
        }
        found
    }
}

fn fault(path: &Path<'_>, reason: &str, problem: &str) -> Failure {
    Failure::body(&path.to_string(), reason, problem)
}

fn given_twice(path: &Path<'_>) -> Failure {
    Failure::about("INVALID_REQUEST", &path.to_string(), "duplicate", "is given twice")
}
