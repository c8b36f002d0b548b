//! Lets pages in browsers call the API with a key that their user gave them: any origin, no cookies.

use http::{
    HeaderMap, HeaderValue, Method, Request, Response, StatusCode,
    header::{
        ACCESS_CONTROL_ALLOW_HEADERS, ACCESS_CONTROL_ALLOW_METHODS, ACCESS_CONTROL_ALLOW_ORIGIN,
        ACCESS_CONTROL_EXPOSE_HEADERS, ACCESS_CONTROL_MAX_AGE, ACCESS_CONTROL_REQUEST_HEADERS,
        ACCESS_CONTROL_REQUEST_METHOD, ORIGIN, VARY,
    },
};

const METHODS: HeaderValue = HeaderValue::from_static("GET, POST, PATCH, DELETE");
/// Headers that pages may read beside the ordinary ones: those of REST, and those of gRPC-Web.
const EXPOSED: HeaderValue = HeaderValue::from_static(
    "allow, retry-after, x-request-id, idempotency-replayed, x-ratelimit-limit, x-ratelimit-remaining, \
     x-ratelimit-reset, grpc-status, grpc-message, grpc-status-details-bin",
);
/// How many seconds a browser may remember what it asked.
const MAX_AGE: HeaderValue = HeaderValue::from_static("3600");
const ANY: HeaderValue = HeaderValue::from_static("*");

/// Whether a page sent the request.
pub(crate) fn is_from_page(headers: &HeaderMap) -> bool {
    headers.contains_key(ORIGIN)
}

/// The answer to a browser that asks whether a page may make a request; none for any other request. An OPTIONS that does
/// not ask that is about the path, and not about pages.
pub(crate) fn preflight<T, B: Default>(request: &Request<T>) -> Option<Response<B>> {
    if request.method() != Method::OPTIONS || !request.headers().contains_key(ACCESS_CONTROL_REQUEST_METHOD) {
        return None;
    }
    let mut response = Response::new(B::default());
    *response.status_mut() = StatusCode::NO_CONTENT;
    let headers = response.headers_mut();
    headers.insert(ACCESS_CONTROL_ALLOW_METHODS, METHODS);
    headers.insert(ACCESS_CONTROL_MAX_AGE, MAX_AGE);
    // Mirrored, since a wildcard would not include `Authorization`.
    if let Some(asked) = request.headers().get(ACCESS_CONTROL_REQUEST_HEADERS) {
        headers.insert(ACCESS_CONTROL_ALLOW_HEADERS, asked.clone());
        headers.insert(VARY, ACCESS_CONTROL_REQUEST_HEADERS.into());
    }
    Some(response)
}

/// Lets a page read an answer.
pub(crate) fn allow(headers: &mut HeaderMap) {
    headers.insert(ACCESS_CONTROL_ALLOW_ORIGIN, ANY);
    headers.insert(ACCESS_CONTROL_EXPOSE_HEADERS, EXPOSED);
    headers.append(VARY, HeaderValue::from(ORIGIN));
}
