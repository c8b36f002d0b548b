//! HTTP/2 by hand (RFC 9113): no client library would send what these tests send. `benches/hostile_clients.rs` uses it too.

pub(crate) const DATA: u8 = 0x0;
pub(crate) const HEADERS: u8 = 0x1;
pub(crate) const PRIORITY: u8 = 0x2;
pub(crate) const RST_STREAM: u8 = 0x3;
pub(crate) const SETTINGS: u8 = 0x4;
pub(crate) const PUSH_PROMISE: u8 = 0x5;
pub(crate) const PING: u8 = 0x6;
pub(crate) const GOAWAY: u8 = 0x7;
pub(crate) const WINDOW_UPDATE: u8 = 0x8;
pub(crate) const CONTINUATION: u8 = 0x9;

pub(crate) const END_STREAM: u8 = 0x1;
pub(crate) const END_HEADERS: u8 = 0x4;

const INITIAL_WINDOW_SIZE: u16 = 0x4;

pub(crate) fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
    let mut frame = vec![length[1], length[2], length[3], kind, flags];
    frame.extend(stream.to_be_bytes());
    frame.extend(payload);
    frame
}

/// The preface and the settings of a client, with room for so many bytes of each answer.
pub(crate) fn opening(window: Option<u32>) -> Vec<u8> {
    let setting = window.map(|window| [&INITIAL_WINDOW_SIZE.to_be_bytes()[..], &window.to_be_bytes()].concat());
    let settings = frame(SETTINGS, 0, 0, &setting.unwrap_or_default());
    [b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".as_slice(), &settings].concat()
}

/// A header in HPACK (RFC 7541), as a literal that enters no table.
pub(crate) fn literal(name: &str, value: &str) -> Vec<u8> {
    [&[0x00], text(name).as_slice(), &text(value)].concat()
}

fn text(text: &str) -> Vec<u8> {
    let mut bytes = Vec::new();
    // The length in seven bits, and what does not fit in groups of seven.
    match text.len() {
        length @ 0..127 => bytes.push(u8::try_from(length).unwrap()),
        length => {
            bytes.push(127);
            let mut rest = length - 127;
            while rest >= 128 {
                bytes.push(u8::try_from(rest % 128).unwrap() | 0x80);
                rest /= 128;
            }
            bytes.push(u8::try_from(rest).unwrap());
        }
    }
    bytes.extend(text.bytes());
    bytes
}

fn head(method: &str, path: &str, key: &str, content_type: Option<&str>) -> Vec<u8> {
    let mut block = [
        literal(":method", method),
        literal(":scheme", "http"),
        literal(":path", path),
        literal(":authority", "x"),
        literal("authorization", &format!("Bearer {key}")),
    ]
    .concat();
    block.extend(content_type.map(|value| literal("content-type", value)).unwrap_or_default());
    block
}

pub(crate) fn get(path: &str, key: &str) -> Vec<u8> {
    head("GET", path, key, None)
}

pub(crate) fn post(path: &str, key: &str) -> Vec<u8> {
    head("POST", path, key, Some("application/json"))
}

pub(crate) fn grpc(path: &str, key: &str) -> Vec<u8> {
    head("POST", path, key, Some("application/grpc"))
}
