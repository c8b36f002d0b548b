//! The only place that turns errors into a `Status`. Every one carries `google.rpc.ErrorInfo`, whose reason is the code
//! of the documented error table; one about a field carries `BadRequest` too.

use std::{collections::HashMap, time::Duration};

use tonic::{Code, Status};
use tonic_types::{ErrorDetails, FieldViolation, StatusExt};

use crate::{
    egress::UrlError,
    store::{self, RetryError, WatchError},
    webhook::{EventDataError, Fault},
};

/// `ErrorInfo.domain` of every error.
const DOMAIN: &str = "shortkit.dev";
/// When to ask again after the database failed to answer.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// When to publish again after too much was pending: the counts are looked at more often, but what is pending takes time.
const RETRY_AFTER_BACKLOG: Duration = Duration::from_secs(5);

/// An error with a code of the documented table.
fn coded(code: Code, reason: &str, message: impl Into<String>, mut details: ErrorDetails) -> Status {
    details.set_error_info(reason, DOMAIN, HashMap::new());
    Status::with_error_details(code, message, details)
}

/// A key that does not open the door, with the code that says why.
pub(crate) fn key_refused(reason: &'static str, message: &'static str) -> Status {
    let code = match reason {
        "FORBIDDEN" | "ENVIRONMENT_MISMATCH" => Code::PermissionDenied,
        _ => Code::Unauthenticated,
    };
    coded(code, reason, message, ErrorDetails::new())
}

pub(crate) fn fault(fault: Fault) -> Status {
    let violation = FieldViolation {
        field: fault.field,
        description: fault.message.clone(),
        reason: fault.reason.to_owned(),
        localized_message: None,
    };
    let details = ErrorDetails::with_bad_request(vec![violation]);
    coded(Code::InvalidArgument, "VALIDATION_ERROR", fault.message, details)
}

/// A field that holds what it must not.
pub(crate) fn invalid(field: &str, reason: &'static str, message: impl Into<String>) -> Status {
    fault(Fault { field: field.to_owned(), reason, message: message.into() })
}

/// A header, which REST and gRPC have in common, that holds what it must not.
pub(crate) fn invalid_parameter(name: &str, reason: &'static str, message: String) -> Status {
    let violation = FieldViolation {
        field: name.to_owned(),
        description: message.clone(),
        reason: reason.to_owned(),
        localized_message: None,
    };
    coded(Code::InvalidArgument, "INVALID_PARAMETER", message, ErrorDetails::with_bad_request(vec![violation]))
}

/// An idempotency key that named another request before.
pub(crate) fn key_reused() -> Status {
    let message = "the idempotency key was used for another request; each request needs a key of its own";
    coded(Code::FailedPrecondition, "CONFLICT", message, ErrorDetails::new())
}

/// A message that is longer than one may be.
pub(crate) fn message_too_long(max: usize) -> Status {
    coded(
        Code::OutOfRange,
        "PAYLOAD_TOO_LARGE",
        format!("the message must be at most {max} bytes"),
        ErrorDetails::new(),
    )
}

/// A call too many. Over REST the wait is in whole seconds, so it is everywhere.
pub(crate) fn rate_limited(retry_in: Duration) -> Status {
    let wait = Duration::from_secs(retry_in.as_millis().div_ceil(1000).max(1).try_into().unwrap_or(u64::MAX));
    let message = format!("too many requests; try again in {} s", wait.as_secs());
    coded(Code::ResourceExhausted, "RATE_LIMITED", message, ErrorDetails::with_retry_info(Some(wait)))
}

pub(super) fn not_found(what: &str) -> Status {
    coded(Code::NotFound, "NOT_FOUND", format!("no such {what}"), ErrorDetails::new())
}

pub(super) fn shutting_down() -> Status {
    unavailable("the server is shutting down; try again")
}

/// A test event whose attempt was not made: its webhook is gone by now, or the server is.
pub(super) fn interrupted() -> Status {
    unavailable("the test event was not sent, because the webhook was deleted or the server is shutting down")
}

/// More test events than [`super::MAX_TESTS`].
pub(super) fn too_many_tests() -> Status {
    unavailable("too many test events are under way; try again")
}

/// Something that cannot be; the detail goes to the log only.
pub(crate) fn internal(detail: &str) -> Status {
    tracing::error!(detail, "internal error");
    coded(Code::Internal, "INTERNAL_ERROR", "internal error", ErrorDetails::new())
}

fn unavailable(message: &str) -> Status {
    unavailable_for(RETRY_AFTER, message)
}

fn unavailable_for(wait: Duration, message: &str) -> Status {
    coded(Code::Unavailable, "SERVICE_UNAVAILABLE", message, ErrorDetails::with_retry_info(Some(wait)))
}

pub(crate) fn store(error: store::Error) -> Status {
    match error {
        store::Error::Unavailable(_) => {
            tracing::warn!(%error, "the database does not answer");
            unavailable("the service is not available for the moment; try again")
        }
        store::Error::Overloaded => unavailable("too many requests are waiting; try again"),
        store::Error::OrganizationBacklog => {
            let details = ErrorDetails::with_retry_info(Some(RETRY_AFTER_BACKLOG));
            let message = "too many deliveries of this organization are pending; publish again later";
            coded(Code::ResourceExhausted, "RATE_LIMITED", message, details)
        }
        store::Error::Backlog => {
            unavailable_for(RETRY_AFTER_BACKLOG, "too many deliveries are pending; publish again later")
        }
        store::Error::Repeated => unavailable("another request with this idempotency key is at work; try again"),
        store::Error::Closed => shutting_down(),
        other => internal(&other.to_string()),
    }
}

pub(super) fn url(error: UrlError) -> Status {
    invalid("url", error.reason(), error.to_string())
}

pub(super) fn event_data(error: &EventDataError) -> Status {
    let reason = match error {
        EventDataError::Missing => "required",
        EventDataError::NotAnObject => "wrong_type",
        EventDataError::Invalid { .. } => "invalid",
        EventDataError::TooDeep => "too_deep",
    };
    invalid("data", reason, error.to_string())
}

pub(super) fn retry(error: RetryError) -> Status {
    match error {
        RetryError::NotFound => not_found("delivery"),
        RetryError::NotFailed(_) => coded(Code::FailedPrecondition, "CONFLICT", error.to_string(), ErrorDetails::new()),
        RetryError::Store(error) => store(error),
    }
}

pub(super) fn watch(error: WatchError) -> Status {
    match error {
        WatchError::TooOld => invalid("resume_token", "too_old", error.to_string()),
        WatchError::TooSlow => coded(Code::Aborted, "SLOW_READER", error.to_string(), ErrorDetails::new()),
        WatchError::Store(error) => store(error),
    }
}
