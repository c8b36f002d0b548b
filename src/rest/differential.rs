//! The codec against prost-reflect, which goes the long way through a message of its own.

use proptest::{prelude::*, test_runner::TestRng};
use prost::Message as _;
use prost_reflect::{
    DynamicMessage, FieldDescriptor, Kind, MapKey, MessageDescriptor, ReflectMessage, Value as Dynamic,
};
use serde_json::{Map, Value, json, value::RawValue};

use super::{decode, encode, tables::Tables};

const RAW: &str = r#"{"b": 45.20,"a":[12345678901234567890, 1e400,"é"] }"#;

fn sink() -> (Tables, MessageDescriptor) {
    let mut compiler = protox::Compiler::new(["proto", "tests/it/rest_layer"]).unwrap();
    compiler.include_imports(true).open_files(["kitchen_sink.proto"]).unwrap();
    let pool = prost_reflect::DescriptorPool::decode(compiler.encode_file_descriptor_set().as_slice()).unwrap();
    let descriptor = pool.get_message_by_name("kitchen.v1.Sink").unwrap();
    (Tables::read(&pool, [descriptor.clone()].into_iter()).unwrap(), descriptor)
}

/// A message with about half of its fields set.
fn random(descriptor: &MessageDescriptor, rng: &mut TestRng, depth: u32) -> DynamicMessage {
    let mut message = DynamicMessage::new(descriptor.clone());
    for field in descriptor.fields() {
        if rng.random_bool(0.5) {
            continue;
        }
        let deeper = depth + 1;
        if field.kind().as_message().is_some_and(|inner| inner.name() == "Sink" || field.is_map()) && depth > 1 {
            continue;
        }
        let count = rng.random_range(1..4);
        let value = if let (true, Kind::Message(entry)) = (field.is_map(), field.kind()) {
            let (key, value) = (entry.map_entry_key_field().kind(), entry.map_entry_value_field());
            Dynamic::Map((0..count).map(|_| (map_key(&key, rng), single(&value, rng, deeper))).collect())
        } else if field.is_list() {
            Dynamic::List((0..count).map(|_| single(&field, rng, deeper)).collect())
        } else {
            single(&field, rng, deeper)
        };
        message.set_field(&field, value);
    }
    message
}

fn map_key(kind: &Kind, rng: &mut TestRng) -> MapKey {
    match kind {
        Kind::Bool => MapKey::Bool(rng.random()),
        Kind::Int32 => MapKey::I32(rng.random()),
        _ => MapKey::String(word(rng)),
    }
}

fn word(rng: &mut TestRng) -> String {
    let letters = ['a', '"', '\\', '\n', 'é', '😀', '\u{1}', '/'];
    (0..rng.random_range(0..6)).map(|_| letters[rng.random_range(0..letters.len())]).collect()
}

fn single(field: &FieldDescriptor, rng: &mut TestRng, depth: u32) -> Dynamic {
    match field.kind() {
        Kind::Double => Dynamic::F64(f64::from(rng.random::<f32>()) * 1e6),
        Kind::Float => Dynamic::F32(rng.random()),
        Kind::Int32 | Kind::Sint32 | Kind::Sfixed32 => Dynamic::I32(rng.random()),
        Kind::Int64 | Kind::Sint64 | Kind::Sfixed64 => Dynamic::I64(rng.random()),
        Kind::Uint32 | Kind::Fixed32 => Dynamic::U32(rng.random()),
        Kind::Uint64 | Kind::Fixed64 => Dynamic::U64(rng.random()),
        Kind::Bool => Dynamic::Bool(rng.random()),
        Kind::String if field.name() == "raw" => Dynamic::String(RAW.to_owned()),
        Kind::String => Dynamic::String(word(rng)),
        Kind::Bytes => Dynamic::Bytes(word(rng).into_bytes().into()),
        Kind::Enum(_) => Dynamic::EnumNumber([1, 2, -1][rng.random_range(0..3)]),
        Kind::Message(inner) if inner.name() == "Timestamp" => {
            let mut time = DynamicMessage::new(inner);
            time.set_field_by_name("seconds", Dynamic::I64(rng.random_range(-60_000_000_000..250_000_000_000)));
            let nanos = [0, 5_000_000, 1][rng.random_range(0..3)];
            time.set_field_by_name("nanos", Dynamic::I32(nanos));
            Dynamic::Message(time)
        }
        Kind::Message(inner) => Dynamic::Message(random(&inner, rng, depth)),
    }
}

/// The JSON of a message, in the plainest way.
fn expected(message: &DynamicMessage) -> Value {
    let mut object = Map::new();
    for field in message.descriptor().fields() {
        let has = message.has_field(&field);
        let can_hide = field.supports_presence()
            || field.name() == "blobs"
            || field.name() == "raw"
            || (matches!(field.kind(), Kind::Enum(_)) && !field.is_list());
        if has || !can_hide {
            object.insert(field.json_name().to_owned(), shown(&field, &message.get_field(&field)));
        }
    }
    Value::Object(object)
}

fn shown(field: &FieldDescriptor, value: &Dynamic) -> Value {
    use base64::Engine as _;
    match value {
        Dynamic::List(list) => list.iter().map(|element| shown(field, element)).collect(),
        Dynamic::Map(map) => {
            let Kind::Message(entry) = field.kind() else { panic!("a map has entries") };
            let key = |key: &MapKey| match key {
                MapKey::Bool(key) => key.to_string(),
                MapKey::I32(key) => key.to_string(),
                key => key.as_str().unwrap().to_owned(),
            };
            map.iter().map(|(k, value)| (key(k), shown(&entry.map_entry_value_field(), value))).collect()
        }
        Dynamic::Message(inner) if inner.descriptor().name() == "Timestamp" => {
            prost_types::Timestamp::decode(inner.encode_to_vec().as_slice()).unwrap().to_string().into()
        }
        Dynamic::Message(inner) => expected(inner),
        Dynamic::EnumNumber(number) => {
            json!(["negative", "", "red", "dark_blue"][usize::try_from(number + 1).unwrap()])
        }
        Dynamic::String(text) if field.name() == "raw" => {
            serde_json::from_str(text).unwrap_or_else(|_| json!({"raw": text}))
        }
        Dynamic::String(text) => json!(text),
        Dynamic::Bytes(bytes) => json!(base64::engine::general_purpose::STANDARD.encode(bytes)),
        Dynamic::Bool(flag) => json!(flag),
        Dynamic::I32(number) => json!(number),
        Dynamic::I64(number) => json!(number),
        Dynamic::U32(number) => json!(number),
        Dynamic::U64(number) => json!(number),
        // Through its own text: as f64 the same number has more digits.
        Dynamic::F32(number) => serde_json::from_str(&serde_json::to_string(number).unwrap()).unwrap(),
        Dynamic::F64(number) => json!(number),
    }
}

fn encoded(tables: &Tables, wire: &[u8]) -> Option<String> {
    let mut out = Vec::new();
    encode::message(tables, tables.index("kitchen.v1.Sink").unwrap(), wire, &mut out).ok()?;
    Some(String::from_utf8(out).unwrap())
}

fn decoded(tables: &Tables, json: &str) -> Option<Vec<u8>> {
    let raw: &RawValue = serde_json::from_str(json).ok()?;
    let mut out = Vec::new();
    decode::body(tables, tables.index("kitchen.v1.Sink").unwrap(), raw, &mut out).ok()?;
    Some(out)
}

/// `RAW` holds a number that `serde_json::Value` cannot, so it is compared as text and taken out before the rest.
fn without_raw(json: &str) -> Value {
    serde_json::from_str(&json.replace(RAW, r#"{"raw":"the same"}"#)).unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn agrees_with_prost_reflect(rng in any::<u64>().prop_perturb(|_, rng| rng)) {
        let (tables, descriptor) = sink();
        let message = random(&descriptor, &mut { rng }, 0);
        let json = encoded(&tables, &message.encode_to_vec()).unwrap();
        let expectation = expected(&message).to_string();
        let expectation = expectation.replace(&json!({ "raw": RAW }).to_string(), r#"{"raw":"the same"}"#);
        prop_assert_eq!(without_raw(&json), serde_json::from_str::<Value>(&expectation).unwrap());
        let back = decoded(&tables, &json).expect("what is written can be read");
        // Shown as JSON: the Debug form of a type that contains itself never ends.
        let back = DynamicMessage::decode(descriptor.clone(), back.as_slice()).unwrap();
        // Once more around, because prost-reflect tells a zero that was on the wire from one that was not.
        let back = DynamicMessage::decode(descriptor.clone(), back.encode_to_vec().as_slice()).unwrap();
        let straight = DynamicMessage::decode(descriptor, message.encode_to_vec().as_slice()).unwrap();
        prop_assert!(back == straight, "{}\n{}", expected(&back), expected(&straight));
    }

    #[test]
    fn damaged_wire_never_panics(
        rng in any::<u64>().prop_perturb(|_, rng| rng),
        damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
    ) {
        let (tables, descriptor) = sink();
        let mut wire = random(&descriptor, &mut { rng }, 1).encode_to_vec();
        wire.push(0);
        for (place, byte) in damage {
            let place = place.index(wire.len());
            wire[place] = byte;
        }
        let _ = encoded(&tables, &wire);
    }

    #[test]
    fn any_bytes_and_any_text_never_panic(
        wire in prop::collection::vec(any::<u8>(), 0..64),
        text in "\\{(\"(child|at|words|byName|int32)\":[\\[\\]{}\",:\\\\a1.-]{0,12},?)*\\}",
    ) {
        let (tables, _) = sink();
        let _ = encoded(&tables, &wire);
        let _ = decoded(&tables, &text);
    }
}
