//! The call of the service inside, as one gRPC frame.

use bytes::{Buf, Bytes};
use futures_util::stream;
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Uri, Version, header};
use http_body::Frame;
use http_body_util::{BodyExt, StreamBody};
use tokio::sync::oneshot;
use tonic::{Status, body::Body};

use super::{error::Failure, request::Source, routes::Route};

/// Length of what stands before a message: a flag, and the length in four bytes.
pub(super) const PREFIX: usize = 5;

/// What came back instead of an answer.
#[derive(Debug)]
pub(super) enum InnerError {
    /// The service refused.
    Status(Box<Status>),
    /// Something that is not gRPC.
    Broken,
}

/// Headers that are about this connection or this encoding, and not about the call.
const LEFT_OUT: [HeaderName; 13] = [
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
pub(super) fn request(route: &Route, parts: http::request::Parts, body: Body) -> Request<Body> {
    request_for(route.uri.clone(), parts, body)
}

/// A request that the service inside has no call for.
pub(super) fn no_such(parts: http::request::Parts) -> Request<Body> {
    request_for(Uri::default(), parts, Body::empty())
}

fn request_for(uri: Uri, parts: http::request::Parts, body: Body) -> Request<Body> {
    let mut request = Request::new(body);
    *request.method_mut() = Method::POST;
    *request.version_mut() = Version::HTTP_2;
    *request.uri_mut() = uri;
    *request.extensions_mut() = parts.extensions;
    *request.headers_mut() = parts.headers;
    let headers = request.headers_mut();
    remove(headers, |name| LEFT_OUT.contains(name) || is_grpc(name));
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    headers.insert(header::TE, HeaderValue::from_static("trailers"));
    request
}

/// The body of a call, whose message is made when the service asks for it: a caller whom it refuses before that has nothing
/// read, and learns nothing of what is wrong with the rest of the request. Why no message could be made is reported beside
/// the service, since a status cannot carry all of it.
pub(super) fn body(source: Source) -> (Body, oneshot::Receiver<Failure>) {
    let (report, fault) = oneshot::channel();
    let frame = async move {
        match source.message().await {
            Ok(frame) => Ok(Frame::data(filled(frame))),
            Err(failure) => {
                // Nobody waits for it when the caller has left.
                let _ = report.send(failure);
                Err(Status::invalid_argument("the request has no message"))
            }
        }
    };
    (Body::new(StreamBody::new(stream::once(frame))), fault)
}

/// A frame with its prefix, for which it has room.
fn filled(mut frame: Vec<u8>) -> Bytes {
    // A body is so bounded that its message cannot exceed four bytes of length.
    let length = u32::try_from(frame.len().saturating_sub(PREFIX)).unwrap_or(u32::MAX);
    if let Some(place) = frame.get_mut(1..PREFIX) {
        place.copy_from_slice(&length.to_be_bytes());
    }
    Bytes::from(frame)
}

/// The status that headers or trailers carry when the call failed.
pub(super) fn refusal(headers: &HeaderMap) -> Option<Box<Status>> {
    let failed = headers.get(Status::GRPC_STATUS).is_some_and(|code| code != "0");
    failed.then(|| Status::from_header_map(headers)).flatten().map(Box::new)
}

/// The one message of an answer.
pub(super) async fn unary(headers: &HeaderMap, body: Body) -> Result<Bytes, InnerError> {
    if let Some(status) = refusal(headers) {
        return Err(InnerError::Status(status));
    }
    let collected = body.collect().await.map_err(|status| InnerError::Status(Box::new(status)))?;
    if let Some(status) = collected.trailers().and_then(refusal) {
        return Err(InnerError::Status(status));
    }
    take_frame(&mut collected.to_bytes())?.ok_or(InnerError::Broken)
}

/// Takes the first message off the front, when it is there whole. A compressed one was not asked for.
pub(super) fn take_frame(bytes: &mut (impl Buf + AsRef<[u8]>)) -> Result<Option<Bytes>, InnerError> {
    let Some([flag, length @ ..]) = bytes.as_ref().first_chunk::<PREFIX>() else { return Ok(None) };
    if *flag != 0 {
        return Err(InnerError::Broken);
    }
    let length = usize::try_from(u32::from_be_bytes(*length)).map_err(|_| InnerError::Broken)?;
    if bytes.remaining() - PREFIX < length {
        return Ok(None);
    }
    bytes.advance(PREFIX);
    Ok(Some(bytes.copy_to_bytes(length)))
}

/// Whether a header is gRPC's own.
pub(super) fn is_grpc(name: &HeaderName) -> bool {
    name.as_str().starts_with("grpc-")
}

/// Removes the headers of these names.
pub(super) fn remove(headers: &mut HeaderMap, unwanted: impl Fn(&HeaderName) -> bool) {
    let names: Vec<_> = headers.keys().filter(|name| unwanted(name)).cloned().collect();
    names.iter().for_each(|name| drop(headers.remove(name)));
}
