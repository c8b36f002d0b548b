//! A reply as the JSON of its success.

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, Response, StatusCode, header};
use http_body_util::Full;
use tonic::body::Body;

use super::{
    call::{self, InnerError},
    encode,
    routes::Route,
};

/// The whole answer.
pub(super) fn response(route: &Route, headers: HeaderMap, reply: &[u8]) -> Result<Response<Body>, InnerError> {
    // JSON has names where the wire has numbers.
    let mut out = Vec::with_capacity(2 * reply.len() + 128);
    encode::envelope(&route.tables, route.output, route.response_body, reply, &mut out)
        .map_err(|_| InnerError::Broken)?;
    let mut response = Response::new(Body::new(Full::new(Bytes::from(out))));
    *response.status_mut() = StatusCode::from_u16(route.success).unwrap_or(StatusCode::OK);
    *response.headers_mut() = passed_on(headers);
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    Ok(response)
}

/// The headers of a reply that are not gRPC's own.
pub(super) fn passed_on(mut headers: HeaderMap) -> HeaderMap {
    let of_body = |name: &HeaderName| *name == header::CONTENT_TYPE || *name == header::CONTENT_LENGTH;
    call::remove(&mut headers, |name| of_body(name) || call::is_grpc(name));
    headers
}
