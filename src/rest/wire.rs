//! Values as protobuf writes them (<https://protobuf.dev/programming-guides/encoding/>).

use bytes::BufMut;
use prost::encoding::{
    DecodeContext, WireType, decode_key, decode_varint, encode_key, encode_varint, encoded_len_varint, skip_field,
};

use super::tables::Kind;

/// One value of one field.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Value<'a> {
    Varint(u64),
    Fixed32(u32),
    Fixed64(u64),
    Bytes(&'a [u8]),
}

/// Bytes that are not the message they should be.
#[derive(Debug)]
pub(super) struct Malformed;

impl Value<'_> {
    /// The value of a field that is not there.
    pub(super) fn zero(kind: Kind) -> Self {
        match wire_type(kind) {
            WireType::Varint => Self::Varint(0),
            WireType::ThirtyTwoBit => Self::Fixed32(0),
            WireType::SixtyFourBit => Self::Fixed64(0),
            _ => Self::Bytes(&[]),
        }
    }

    pub(super) fn wire_type(self) -> WireType {
        match self {
            Self::Varint(_) => WireType::Varint,
            Self::Fixed32(_) => WireType::ThirtyTwoBit,
            Self::Fixed64(_) => WireType::SixtyFourBit,
            Self::Bytes(_) => WireType::LengthDelimited,
        }
    }

    /// Appends the value alone, as it stands in a packed list.
    pub(super) fn put(self, out: &mut Vec<u8>) {
        match self {
            Self::Varint(number) => encode_varint(number, out),
            Self::Fixed32(number) => out.put_u32_le(number),
            Self::Fixed64(number) => out.put_u64_le(number),
            Self::Bytes(bytes) => {
                encode_varint(bytes.len() as u64, out);
                out.extend_from_slice(bytes);
            }
        }
    }
}

/// How values of a kind are written.
pub(super) fn wire_type(kind: Kind) -> WireType {
    match kind {
        Kind::Double | Kind::Fixed64 | Kind::Sfixed64 => WireType::SixtyFourBit,
        Kind::Float | Kind::Fixed32 | Kind::Sfixed32 => WireType::ThirtyTwoBit,
        Kind::String | Kind::Bytes | Kind::RawJson | Kind::Time | Kind::Message(_) => WireType::LengthDelimited,
        _ => WireType::Varint,
    }
}

/// Appends a field.
pub(super) fn field(out: &mut Vec<u8>, number: u32, value: Value<'_>) {
    encode_key(number, value.wire_type(), out);
    value.put(out);
}

/// Appends a field that contains what `inside` appends.
pub(super) fn nested<E>(
    out: &mut Vec<u8>,
    number: u32,
    inside: impl FnOnce(&mut Vec<u8>) -> Result<(), E>,
) -> Result<(), E> {
    encode_key(number, WireType::LengthDelimited, out);
    let start = out.len();
    // Most lengths fit into one byte; where one does not, the contents make room for it.
    out.push(0);
    inside(out)?;
    let length = out.len() - start - 1;
    let width = encoded_len_varint(length as u64);
    if width > 1 {
        let end = out.len();
        out.resize(end + width - 1, 0);
        out.copy_within(start + 1..end, start + width);
    }
    encode_varint(length as u64, &mut &mut out[start..start + width]);
    Ok(())
}

/// Takes the first field off a message: its number, and its value unless it is a group; none at the end.
pub(super) fn next<'a>(wire: &mut &'a [u8]) -> Result<Option<(u32, Option<Value<'a>>)>, Malformed> {
    if wire.is_empty() {
        return Ok(None);
    }
    let (number, wire_type) = decode_key(wire).map_err(|_| Malformed)?;
    if let WireType::StartGroup | WireType::EndGroup = wire_type {
        skip_field(wire_type, number, wire, DecodeContext::default()).map_err(|_| Malformed)?;
        return Ok(Some((number, None)));
    }
    Ok(Some((number, Some(value(wire_type, wire)?))))
}

/// Takes a value off the front.
pub(super) fn value<'a>(wire_type: WireType, wire: &mut &'a [u8]) -> Result<Value<'a>, Malformed> {
    Ok(match wire_type {
        WireType::Varint => Value::Varint(decode_varint(wire).map_err(|_| Malformed)?),
        WireType::ThirtyTwoBit => {
            let (bytes, rest) = wire.split_first_chunk().ok_or(Malformed)?;
            *wire = rest;
            Value::Fixed32(u32::from_le_bytes(*bytes))
        }
        WireType::SixtyFourBit => {
            let (bytes, rest) = wire.split_first_chunk().ok_or(Malformed)?;
            *wire = rest;
            Value::Fixed64(u64::from_le_bytes(*bytes))
        }
        WireType::LengthDelimited => {
            let length = decode_varint(wire).map_err(|_| Malformed)?;
            let length = usize::try_from(length).map_err(|_| Malformed)?;
            let (bytes, rest) = wire.split_at_checked(length).ok_or(Malformed)?;
            *wire = rest;
            Value::Bytes(bytes)
        }
        WireType::StartGroup | WireType::EndGroup => return Err(Malformed),
    })
}
