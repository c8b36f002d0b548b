//! A reply as the JSON of its success.

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Response, StatusCode, header};
use http_body_util::Full;
use prost_reflect::{DynamicMessage, ReflectMessage};
use tonic::body::Body;

use super::{call::InnerError, encode, routes::Route};

/// The envelope: the field that `response_body` names is `data`, its siblings are `meta`; without one the message is
/// `data`.
pub(super) fn envelope(route: &Route, reply: &DynamicMessage) -> String {
    let mut out = String::with_capacity(256);
    out.push_str("{\"data\":");
    match &route.response_body {
        None => encode::message(&mut out, reply, &route.rules, |_| false),
        Some(field) => {
            encode::field(&mut out, reply, field, &route.rules);
            let sibling = |other: &prost_reflect::FieldDescriptor| other.number() != field.number();
            let shown = |other: &_| sibling(other) && encode::is_shown(reply, other, &route.rules);
            if reply.descriptor().fields().any(|other| shown(&other)) {
                out.push_str(",\"meta\":");
                encode::message(&mut out, reply, &route.rules, |other| !sibling(other));
            }
        }
    }
    out.push('}');
    out
}

/// The whole answer.
pub(super) fn response(route: &Route, headers: HeaderMap, reply: Bytes) -> Result<Response<Body>, InnerError> {
    let reply = DynamicMessage::decode(route.output.clone(), reply).map_err(|_| InnerError::Broken)?;
    let mut response = Response::new(Body::new(Full::from(envelope(route, &reply))));
    *response.status_mut() = StatusCode::from_u16(route.success).unwrap_or(StatusCode::OK);
    *response.headers_mut() = passed_on(headers);
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    Ok(response)
}

/// The headers of a reply that are not gRPC's own.
pub(super) fn passed_on(mut headers: HeaderMap) -> HeaderMap {
    let own: Vec<_> = headers.keys().filter(|name| name.as_str().starts_with("grpc-")).cloned().collect();
    own.iter().for_each(|name| drop(headers.remove(name)));
    headers.remove(header::CONTENT_TYPE);
    headers.remove(header::CONTENT_LENGTH);
    headers
}
