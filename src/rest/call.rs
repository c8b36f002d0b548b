//! The call of the service inside, as one gRPC frame.

use bytes::{BufMut, Bytes, BytesMut};
use http::{HeaderMap, HeaderValue, Method, Request, Response, Uri, Version, header};
use http_body_util::{BodyExt, Full};
use prost::Message;
use prost_reflect::DynamicMessage;
use tonic::{Code, Status, body::Body};

use super::routes::Route;

/// Length of what stands before a message: a flag, and the length in four bytes.
const PREFIX: usize = 5;

/// What came back instead of an answer.
pub(super) enum InnerError {
    /// The service refused.
    Status(Box<Status>),
    /// Something that is not gRPC.
    Broken,
}

/// Headers that are about this connection or this encoding, and not about the call.
const LEFT_OUT: [header::HeaderName; 13] = [
    header::ACCEPT_ENCODING,
    header::CONNECTION,
    header::CONTENT_ENCODING,
    header::CONTENT_LENGTH,
    header::CONTENT_TYPE,
    header::EXPECT,
    header::HOST,
    header::PROXY_AUTHENTICATE,
    header::PROXY_AUTHORIZATION,
    header::TE,
    header::TRAILER,
    header::TRANSFER_ENCODING,
    header::UPGRADE,
];

/// The request for the service inside, with the caller's headers and extensions.
pub(super) fn request(route: &Route, parts: http::request::Parts, message: &DynamicMessage) -> Request<Body> {
    let length = message.encoded_len();
    let mut frame = BytesMut::with_capacity(PREFIX + length);
    frame.put_u8(0);
    frame.put_u32(u32::try_from(length).unwrap_or(u32::MAX));
    frame.put_slice(&message.encode_to_vec());
    let mut request = Request::new(Body::new(Full::new(frame.freeze())));
    *request.method_mut() = Method::POST;
    *request.version_mut() = Version::HTTP_2;
    *request.uri_mut() = Uri::try_from(route.grpc_path.as_str()).unwrap_or_default();
    *request.extensions_mut() = parts.extensions;
    *request.headers_mut() = parts.headers;
    let headers = request.headers_mut();
    LEFT_OUT.iter().for_each(|name| drop(headers.remove(name)));
    let grpc: Vec<_> = headers.keys().filter(|name| name.as_str().starts_with("grpc-")).cloned().collect();
    grpc.iter().for_each(|name| drop(headers.remove(name)));
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    headers.insert(header::TE, HeaderValue::from_static("trailers"));
    request
}

/// The status that a response's headers carry, when it has nothing else.
pub(super) fn refusal(headers: &HeaderMap) -> Option<Box<Status>> {
    Status::from_header_map(headers).filter(|status| status.code() != Code::Ok).map(Box::new)
}

/// The one message of an answer.
pub(super) async fn unary(response: Response<Body>) -> Result<Bytes, InnerError> {
    if let Some(status) = refusal(response.headers()) {
        return Err(InnerError::Status(status));
    }
    let collected = response.into_body().collect().await.map_err(|status| InnerError::Status(Box::new(status)))?;
    if let Some(status) = collected.trailers().and_then(refusal) {
        return Err(InnerError::Status(status));
    }
    let mut bytes = BytesMut::from(collected.to_bytes().as_ref());
    take_frame(&mut bytes).ok_or(InnerError::Broken)
}

/// Takes the first message off the front, when it is there whole.
pub(super) fn take_frame(bytes: &mut BytesMut) -> Option<Bytes> {
    let prefix: [u8; PREFIX] = bytes.get(..PREFIX)?.try_into().ok()?;
    let [_, a, b, c, d] = prefix;
    let end = PREFIX + usize::try_from(u32::from_be_bytes([a, b, c, d])).ok()?;
    if bytes.len() < end {
        return None;
    }
    Some(bytes.split_to(end).freeze().slice(PREFIX..))
}
