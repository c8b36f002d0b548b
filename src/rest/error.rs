//! Errors as REST shows them, and the one table from codes to HTTP.

use std::time::Duration;

use http::{
    HeaderMap, HeaderValue, Response, StatusCode,
    header::{CONTENT_TYPE, RETRY_AFTER, WWW_AUTHENTICATE},
};
use serde_json::{Map, Value};
use tonic::{Code, Status, body::Body};
use tonic_types::StatusExt;

use super::{call::InnerError, routes::Route};

/// A name that the caller chose is shown up to this length, so that an answer does not grow with the question.
const MAX_SHOWN_CHARS: usize = 64;

/// The codes and their HTTP status.
const TABLE: [(&str, u16); 15] = [
    ("UNAUTHORIZED", 401),
    ("KEY_REVOKED", 401),
    ("KEY_EXPIRED", 401),
    ("FORBIDDEN", 403),
    ("ENVIRONMENT_MISMATCH", 403),
    ("VALIDATION_ERROR", 400),
    ("INVALID_REQUEST", 400),
    ("INVALID_PARAMETER", 400),
    ("NOT_FOUND", 404),
    ("CONFLICT", 409),
    ("METHOD_NOT_ALLOWED", 405),
    ("PAYLOAD_TOO_LARGE", 413),
    ("UNSUPPORTED_MEDIA_TYPE", 415),
    ("RATE_LIMITED", 429),
    ("SERVICE_UNAVAILABLE", 503),
];

/// An error on its way out.
#[derive(Debug)]
pub(super) struct Failure {
    status: u16,
    code: String,
    message: String,
    details: Map<String, Value>,
    retry_after: Option<Duration>,
    /// What the answer says beside the error; behind a pointer, since hardly any has it.
    headers: Option<Box<HeaderMap>>,
}

impl Failure {
    pub(super) fn new(code: &str, message: impl Into<String>) -> Self {
        let status = TABLE.iter().find(|(known, _)| *known == code).map_or(500, |(_, status)| *status);
        Self {
            status,
            code: code.to_owned(),
            message: message.into(),
            details: Map::new(),
            retry_after: None,
            headers: None,
        }
    }

    /// Something wrong with a field of the body.
    pub(super) fn body(path: &str, reason: &str, problem: &str) -> Self {
        Self::about("VALIDATION_ERROR", path, reason, problem)
    }

    /// Something wrong with a parameter of path or query.
    pub(super) fn parameter(name: &str, reason: &str, problem: &str) -> Self {
        Self::about("INVALID_PARAMETER", name, reason, problem)
    }

    /// A body that is not the JSON it should be.
    pub(super) fn request(message: impl Into<String>) -> Self {
        Self::new("INVALID_REQUEST", message)
    }

    pub(super) fn about(code: &str, field: &str, reason: &str, problem: &str) -> Self {
        let field = shown(field);
        Self::new(code, format!("{field} {problem}")).with("field", field).with("reason", reason.to_owned())
    }

    pub(super) fn with(mut self, key: &str, value: impl Into<Value>) -> Self {
        self.details.insert(key.to_owned(), value.into());
        self
    }

    pub(super) fn with_headers(mut self, headers: HeaderMap) -> Self {
        self.headers.get_or_insert_default().extend(headers);
        self
    }

    pub(super) fn method_not_allowed(allow: &str) -> Self {
        let failure = Self::new("METHOD_NOT_ALLOWED", format!("this path takes {allow}"));
        let allow = HeaderValue::from_str(allow).map(|allow| (http::header::ALLOW, allow));
        failure.with_headers(allow.into_iter().collect())
    }

    pub(super) fn internal() -> Self {
        Self::new("INTERNAL_ERROR", "internal error")
    }

    pub(super) fn deadline() -> Self {
        let mut failure = Self::new("DEADLINE_EXCEEDED", "the call took too long and was given up");
        failure.status = 504;
        failure
    }

    /// What the service inside answered.
    pub(super) fn from_inner(error: InnerError, route: &Route) -> Self {
        match error {
            InnerError::Status(status) => Self::from_status(&status, route),
            InnerError::Broken => Self::internal(),
        }
    }

    pub(super) fn from_status(status: &Status, route: &Route) -> Self {
        let details = status.get_error_details();
        let reason = details.error_info().map(|info| info.reason.clone());
        let (code, http) = default_code(status.code());
        let code = reason.unwrap_or_else(|| code.to_owned());
        let hidden = http == 500;
        let message = if hidden { "internal error" } else { status.message() };
        let mut failure = Self::new(&code, message);
        if !TABLE.iter().any(|(known, _)| *known == code) {
            failure.status = http;
        }
        failure.retry_after = details.retry_info().and_then(|info| info.retry_delay);
        if matches!(failure.status, 429 | 503) {
            failure.retry_after.get_or_insert(Duration::from_secs(1));
        }
        let violation = details.bad_request().and_then(|bad| bad.field_violations.first());
        if let Some(violation) = violation.filter(|_| !hidden) {
            let in_query = !matches!(route.body, super::routes::BodyRule::Whole);
            let first = violation.field.split(['.', '[']).next().unwrap_or_default();
            let elsewhere =
                route.binds(&violation.field) || (in_query && route.update_mask.is_none() && route.has_field(first));
            if failure.code == "VALIDATION_ERROR" && elsewhere {
                "INVALID_PARAMETER".clone_into(&mut failure.code);
            }
            failure = failure.with("field", camel(&violation.field));
            if !violation.reason.is_empty() {
                failure = failure.with("reason", violation.reason.clone());
            }
        }
        failure
    }

    /// The envelope, in the order of the documented one.
    pub(super) fn json(&self, request_id: Option<&str>) -> String {
        let quoted = |text: &str| Value::from(text).to_string();
        let mut json = format!(r#"{{"error":{{"code":{},"message":{}"#, quoted(&self.code), quoted(&self.message));
        if !self.details.is_empty() {
            json.push_str(",\"details\":");
            json.push_str(&Value::Object(self.details.clone()).to_string());
        }
        json.push('}');
        if let Some(request_id) = request_id {
            json.push_str(&format!(r#","meta":{{"requestId":{}}}"#, quoted(request_id)));
        }
        json.push('}');
        json
    }

    /// The whole answer.
    pub(super) fn response(&self, request_id: Option<&str>) -> Response<Body> {
        let body = Body::new(http_body_util::Full::from(self.json(request_id)));
        let mut response = Response::new(body);
        *response.status_mut() = StatusCode::from_u16(self.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let headers = response.headers_mut();
        if let Some(inner) = &self.headers {
            headers.extend((**inner).clone());
        }
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        if let Some(wait) = self.retry_after {
            headers.insert(RETRY_AFTER, HeaderValue::from(wait.as_secs().max(1)));
        }
        if self.status == 401 {
            headers.insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}

/// The code for a status that names none, and its HTTP status.
fn default_code(code: Code) -> (&'static str, u16) {
    match code {
        Code::InvalidArgument | Code::OutOfRange => ("INVALID_REQUEST", 400),
        Code::Unauthenticated => ("UNAUTHORIZED", 401),
        Code::PermissionDenied => ("FORBIDDEN", 403),
        Code::NotFound => ("NOT_FOUND", 404),
        Code::AlreadyExists | Code::FailedPrecondition | Code::Aborted => ("CONFLICT", 409),
        Code::ResourceExhausted => ("RATE_LIMITED", 429),
        Code::Unimplemented => ("NOT_FOUND", 404),
        Code::Unavailable => ("SERVICE_UNAVAILABLE", 503),
        Code::DeadlineExceeded => ("DEADLINE_EXCEEDED", 504),
        _ => ("INTERNAL_ERROR", 500),
    }
}

/// A path of proto names as JSON spells it.
fn camel(path: &str) -> String {
    let mut name = String::with_capacity(path.len());
    let mut upper = false;
    for char in path.chars() {
        match char {
            '_' => upper = true,
            _ if upper => {
                name.extend(char.to_uppercase());
                upper = false;
            }
            _ => name.push(char),
        }
    }
    name
}

/// A caller's text, short enough to show.
fn shown(text: &str) -> String {
    match text.char_indices().nth(MAX_SHOWN_CHARS) {
        None => text.to_owned(),
        Some((end, _)) => format!("{}…", &text[..end]),
    }
}
