//! What the codec knows about messages: flat tables, read from the descriptors once at the start, so that no request
//! walks a descriptor or computes a name.

use std::collections::HashMap;

use prost_reflect::{
    DescriptorPool, EnumDescriptor, ExtensionDescriptor, FieldDescriptor, Kind as Described, MessageDescriptor,
};

use super::routes::StartError;

/// Messages and enums by index.
pub(super) struct Tables {
    messages: Vec<Message>,
    enums: Vec<Enum>,
    by_full_name: HashMap<String, usize>,
}

/// One message type.
#[derive(Default)]
pub(super) struct Message {
    pub(super) full_name: String,
    /// In the order of their numbers, which is the order in JSON.
    pub(super) fields: Vec<Field>,
    /// JSON names and proto names, sorted, with the index of the field.
    by_name: Vec<(String, usize)>,
    /// How many oneofs there are.
    pub(super) oneofs: usize,
    /// The field that becomes the `id:` of an event.
    pub(super) event_id: Option<usize>,
    /// The field that `Last-Event-ID` fills.
    pub(super) last_event_id: Option<usize>,
}

/// One field.
pub(super) struct Field {
    pub(super) number: u32,
    /// The proto name.
    pub(super) name: String,
    pub(super) json_name: String,
    /// The JSON name as it stands before a value: quoted, with its colon.
    pub(super) key: Vec<u8>,
    pub(super) kind: Kind,
    pub(super) shape: Shape,
    /// Whether absent and empty are different.
    pub(super) presence: bool,
    pub(super) omit_empty: bool,
    pub(super) oneof: Option<usize>,
}

/// How often a field has a value.
pub(super) enum Shape {
    Single,
    /// Whether it is written as one run of bytes.
    List {
        packed: bool,
    },
    /// The index of the message of its entries.
    Map(usize),
}

/// What a value is.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Double,
    Float,
    Int32,
    Int64,
    Uint32,
    Uint64,
    Sint32,
    Sint64,
    Fixed32,
    Fixed64,
    Sfixed32,
    Sfixed64,
    Bool,
    String,
    Bytes,
    /// A string that holds a JSON object.
    RawJson,
    Time,
    /// The index of the enum.
    Enum(usize),
    /// The index of the message.
    Message(usize),
}

/// One enum type.
pub(super) struct Enum {
    /// The words that JSON may use, with their numbers; the unspecified value has none.
    words: Vec<(String, i32)>,
    /// The words for messages.
    pub(super) allowed: String,
    /// Every number with its word in quotes, sorted by number.
    shown: Vec<(i32, Vec<u8>)>,
}

/// The options of `shortkit.rest.v1` on fields.
struct Options {
    raw_json: ExtensionDescriptor,
    event_id: ExtensionDescriptor,
    last_event_id: ExtensionDescriptor,
    omit_empty: ExtensionDescriptor,
}

/// A path of field indices, from one message into the messages inside it.
pub(super) type FieldPath = Vec<usize>;

impl Tables {
    /// Reads these messages and all that they contain.
    pub(super) fn read(
        pool: &DescriptorPool,
        messages: impl Iterator<Item = MessageDescriptor>,
    ) -> Result<Self, StartError> {
        let option = |name| pool.get_extension_by_name(name).ok_or(StartError::Undefined(name));
        let options = Options {
            raw_json: option("shortkit.rest.v1.raw_json")?,
            event_id: option("shortkit.rest.v1.event_id")?,
            last_event_id: option("shortkit.rest.v1.last_event_id")?,
            omit_empty: option("shortkit.rest.v1.omit_empty")?,
        };
        let mut tables = Self { messages: Vec::new(), enums: Vec::new(), by_full_name: HashMap::new() };
        for message in messages {
            tables.add_message(&message, &options)?;
        }
        Ok(tables)
    }

    pub(super) fn message(&self, index: usize) -> &Message {
        &self.messages[index]
    }

    pub(super) fn enumeration(&self, index: usize) -> &Enum {
        &self.enums[index]
    }

    /// The index of a message by its full name.
    pub(super) fn index(&self, full_name: &str) -> Option<usize> {
        self.by_full_name.get(full_name).copied()
    }

    /// The fields that a dotted name of JSON or proto names leads through; all but the last are single messages.
    pub(super) fn path(&self, message: usize, dotted: &str) -> Option<FieldPath> {
        let mut path = FieldPath::new();
        let mut inside = Some(message);
        for name in dotted.split('.') {
            let table = self.message(inside?);
            let index = table.named(name)?;
            path.push(index);
            inside = match &table.fields[index] {
                Field { kind: Kind::Message(inner), shape: Shape::Single, .. } => Some(*inner),
                _ => None,
            };
        }
        Some(path)
    }

    /// A path in proto names.
    pub(super) fn proto_name(&self, message: usize, path: &[usize]) -> String {
        let Some((first, rest)) = path.split_first() else { return String::new() };
        let field = &self.message(message).fields[*first];
        match field.kind {
            Kind::Message(inner) if !rest.is_empty() => format!("{}.{}", field.name, self.proto_name(inner, rest)),
            _ => field.name.clone(),
        }
    }

    /// The field at the end of a path.
    pub(super) fn last(&self, message: usize, path: &[usize]) -> Option<&Field> {
        let (first, rest) = path.split_first()?;
        let field = &self.message(message).fields[*first];
        match field.kind {
            Kind::Message(inner) if !rest.is_empty() => self.last(inner, rest),
            _ => Some(field),
        }
    }

    fn add_message(&mut self, message: &MessageDescriptor, options: &Options) -> Result<usize, StartError> {
        if let Some(known) = self.index(message.full_name()) {
            return Ok(known);
        }
        // The place is taken before the fields are read: a message may contain itself.
        let index = self.messages.len();
        self.messages.push(Message::default());
        self.by_full_name.insert(message.full_name().to_owned(), index);
        let fields = message.fields().map(|field| self.field(&field, options)).collect::<Result<Vec<_>, _>>()?;
        let places = || fields.iter().enumerate();
        let mut by_name: Vec<_> = places().map(|(place, field)| (field.json_name.clone(), place)).collect();
        for (place, field) in places() {
            if !by_name.iter().any(|(name, _)| *name == field.name) {
                by_name.push((field.name.clone(), place));
            }
        }
        by_name.sort();
        self.messages[index] = Message {
            full_name: message.full_name().to_owned(),
            by_name,
            oneofs: message.oneofs().len(),
            event_id: message.fields().position(|field| flag(&field, &options.event_id)),
            last_event_id: message.fields().position(|field| flag(&field, &options.last_event_id)),
            fields,
        };
        Ok(index)
    }

    fn field(&mut self, field: &FieldDescriptor, options: &Options) -> Result<Field, StartError> {
        let fail = |fault: &str| StartError::Field { field: field.full_name().to_owned(), fault: fault.to_owned() };
        if field.is_group() {
            return Err(fail("a group has no form in JSON"));
        }
        let kind = self.kind(field, options)?;
        if kind == Kind::RawJson && !matches!(field.kind(), Described::String) {
            return Err(fail("raw_json is for strings"));
        }
        for option in [&options.event_id, &options.last_event_id] {
            if flag(field, option) && (kind != Kind::String || field.is_list()) {
                return Err(fail("the id of an event is a single string"));
            }
        }
        let shape = match kind {
            Kind::Message(entry) if field.is_map() => Shape::Map(entry),
            _ if field.is_list() => Shape::List { packed: field.is_packed() },
            _ => Shape::Single,
        };
        let oneof = field.containing_oneof().filter(|oneof| !oneof.is_synthetic());
        let position = |name: &str| field.parent_message().oneofs().position(|oneof| oneof.full_name() == name);
        Ok(Field {
            number: field.number(),
            name: field.name().to_owned(),
            json_name: field.json_name().to_owned(),
            key: format!("{}:", quoted(field.json_name())).into_bytes(),
            kind,
            shape,
            presence: field.supports_presence(),
            omit_empty: flag(field, &options.omit_empty),
            oneof: oneof.and_then(|oneof| position(oneof.full_name())),
        })
    }

    fn kind(&mut self, field: &FieldDescriptor, options: &Options) -> Result<Kind, StartError> {
        if flag(field, &options.raw_json) {
            return Ok(Kind::RawJson);
        }
        Ok(match field.kind() {
            Described::Double => Kind::Double,
            Described::Float => Kind::Float,
            Described::Int32 => Kind::Int32,
            Described::Int64 => Kind::Int64,
            Described::Uint32 => Kind::Uint32,
            Described::Uint64 => Kind::Uint64,
            Described::Sint32 => Kind::Sint32,
            Described::Sint64 => Kind::Sint64,
            Described::Fixed32 => Kind::Fixed32,
            Described::Fixed64 => Kind::Fixed64,
            Described::Sfixed32 => Kind::Sfixed32,
            Described::Sfixed64 => Kind::Sfixed64,
            Described::Bool => Kind::Bool,
            Described::String => Kind::String,
            Described::Bytes => Kind::Bytes,
            Described::Message(message) if message.full_name() == "google.protobuf.Timestamp" => Kind::Time,
            Described::Message(message) => Kind::Message(self.add_message(&message, options)?),
            Described::Enum(descriptor) => {
                self.enums.push(Enum::read(&descriptor));
                Kind::Enum(self.enums.len() - 1)
            }
        })
    }
}

impl Message {
    /// The index of the field of this JSON name or proto name; where both exist the JSON name wins.
    pub(super) fn named(&self, name: &str) -> Option<usize> {
        let at = self.by_name.binary_search_by(|(known, _)| known.as_str().cmp(name)).ok()?;
        Some(self.by_name[at].1)
    }

    /// The index of the field of this number.
    pub(super) fn numbered(&self, number: u32) -> Option<usize> {
        self.fields.binary_search_by_key(&number, |field| field.number).ok()
    }
}

impl Enum {
    fn read(descriptor: &EnumDescriptor) -> Self {
        let named = descriptor.values().filter(|value| value.number() != 0);
        let words: Vec<_> = named.map(|value| (short_name(descriptor, value.name()), value.number())).collect();
        let mut shown: Vec<_> = descriptor
            .values()
            .map(|value| (value.number(), quoted(&short_name(descriptor, value.name())).into_bytes()))
            .collect();
        // Stable, so that of several names of one number the first stays.
        shown.sort_by_key(|(number, _)| *number);
        shown.dedup_by_key(|(number, _)| *number);
        let allowed = words.iter().map(|(word, _)| word.as_str()).collect::<Vec<_>>().join(", ");
        Self { words, allowed, shown }
    }

    /// The number of a word.
    pub(super) fn number(&self, word: &str) -> Option<i32> {
        self.words.iter().find(|(known, _)| known == word).map(|(_, number)| *number)
    }

    /// A number's word in quotes; none for a value newer than the descriptors.
    pub(super) fn shown(&self, number: i32) -> Option<&[u8]> {
        let at = self.shown.binary_search_by_key(&number, |(known, _)| *known).ok()?;
        Some(&self.shown[at].1)
    }
}

fn flag(field: &FieldDescriptor, option: &ExtensionDescriptor) -> bool {
    field.options().get_extension(option).as_bool() == Some(true)
}

fn quoted(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

/// `WEBHOOK_STATUS_ACTIVE` of `WebhookStatus` as `active`.
fn short_name(descriptor: &EnumDescriptor, value: &str) -> String {
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
