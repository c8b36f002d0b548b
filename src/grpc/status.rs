//! The only place that turns errors into a `Status`. Every one carries `google.rpc.ErrorInfo`, whose reason is the code
//! of the documented error table; one about a field carries `BadRequest` too.

use std::{any::Any, collections::HashMap, fmt::Display, time::Duration};

use tonic::{Code, Status};
use tonic_types::{ErrorDetails, FieldViolation, StatusExt};

use crate::{
    clock::Seldom,
    egress::UrlError,
    store::{self, RetryError, WatchError},
    webhook::{EventDataError, Fault},
};

/// `ErrorInfo.domain` of every error.
const DOMAIN: &str = "shortkit.dev";
/// When to ask again after the database failed to answer.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// Calls that are refused for that reason are said to be once in this time.
const SAY_AGAIN: Duration = Duration::from_secs(1);
static NO_ANSWER: Seldom = Seldom::new(SAY_AGAIN);
static NO_ROOM: Seldom = Seldom::new(SAY_AGAIN);
static FULL: Seldom = Seldom::new(SAY_AGAIN);

/// When to publish again after too much was pending: the counts are looked at more often, but what is pending takes time.
const RETRY_AFTER_BACKLOG: Duration = Duration::from_secs(5);

/// When to watch again after an organisation had as many streams as it may: one has to end first.
const RETRY_AFTER_STREAMS: Duration = Duration::from_secs(5);

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
    about("VALIDATION_ERROR", fault)
}

/// A field that holds what it must not.
pub(crate) fn invalid(field: &str, reason: &'static str, message: impl Into<String>) -> Status {
    fault(Fault { field: field.to_owned(), reason, message: message.into() })
}

/// A header, a filter or a cursor, which is no part of a body over REST, that holds what it must not.
pub(crate) fn invalid_parameter(name: &str, reason: &'static str, message: String) -> Status {
    about("INVALID_PARAMETER", Fault { field: name.to_owned(), reason, message })
}

fn about(code: &str, Fault { field, reason, message }: Fault) -> Status {
    let violation =
        FieldViolation { field, description: message.clone(), reason: reason.to_owned(), localized_message: None };
    coded(Code::InvalidArgument, code, message, ErrorDetails::with_bad_request(vec![violation]))
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

/// Something that cannot be; the detail goes to the log only.
pub(crate) fn internal(detail: &str) -> Status {
    tracing::error!(detail, "internal error");
    coded(Code::Internal, "INTERNAL_ERROR", "internal error", ErrorDetails::new())
}

/// A handler that panicked; nothing of the inside leaks.
pub(crate) fn panicked(panic: &(dyn Any + Send)) -> Status {
    let text = panic.downcast_ref::<String>().map(String::as_str).or_else(|| panic.downcast_ref::<&str>().copied());
    internal(&format!("a handler panicked: {}", text.unwrap_or("without a message")))
}

/// Messages in another format than protobuf.
pub(super) fn not_protobuf() -> Status {
    let message = "messages must be protobuf: application/grpc or application/grpc+proto";
    coded(Code::Unimplemented, "UNSUPPORTED_MEDIA_TYPE", message, ErrorDetails::new())
}

/// What tonic or a service that is not ours refuses, with the details that it lacks.
pub(super) fn explained(bare: &Status) -> Status {
    let message = bare.message();
    let (code, reason) = match bare.code() {
        Code::Unimplemented if message.is_empty() => {
            return coded(Code::Unimplemented, "NOT_FOUND", "no such method", ErrorDetails::new());
        }
        Code::Unimplemented => (Code::Unimplemented, "UNSUPPORTED_MEDIA_TYPE"),
        Code::OutOfRange => {
            // tonic ends with what the service allows, which is not the same everywhere.
            let most = message.rsplit_once("the limit is: ").map_or("", |(_, most)| most);
            let message = format!("the message must be at most {most}");
            return coded(Code::ResourceExhausted, "PAYLOAD_TOO_LARGE", message, ErrorDetails::new());
        }
        // tonic calls a message that cannot be read an internal error; our own of that code have details.
        Code::Internal => return unreadable(message),
        Code::NotFound => (Code::NotFound, "NOT_FOUND"),
        Code::DeadlineExceeded => (Code::DeadlineExceeded, "DEADLINE_EXCEEDED"),
        Code::InvalidArgument => (Code::InvalidArgument, "INVALID_REQUEST"),
        Code::Unavailable => return unavailable(message),
        Code::ResourceExhausted => {
            let details = ErrorDetails::with_retry_info(Some(RETRY_AFTER));
            return coded(Code::ResourceExhausted, "RATE_LIMITED", message, details);
        }
        code => (code, "INTERNAL_ERROR"),
    };
    coded(code, reason, message, ErrorDetails::new())
}

/// A message that is not protobuf, or not of its type.
fn unreadable(message: &str) -> Status {
    match unreadable_field(message) {
        Some(field) => about("INVALID_REQUEST", Fault { field, reason: "unreadable", message: message.to_owned() }),
        None => coded(Code::InvalidArgument, "INVALID_REQUEST", message, ErrorDetails::new()),
    }
}

/// The field of which prost says, from the inside out, `WebhookUpdate.url: UpdateWebhookRequest.webhook: …`.
fn unreadable_field(message: &str) -> Option<String> {
    let places = message.strip_prefix("failed to decode Protobuf message: ")?.split(": ");
    let fields = places.map_while(|place| place.split_once('.').filter(|(message, _)| !message.contains(' ')));
    let path = fields.map(|(_, field)| field).collect::<Vec<_>>();
    (!path.is_empty()).then(|| path.into_iter().rev().collect::<Vec<_>>().join("."))
}

fn unavailable(message: &str) -> Status {
    unavailable_for(RETRY_AFTER, message)
}

fn unavailable_for(wait: Duration, message: &str) -> Status {
    coded(Code::Unavailable, "SERVICE_UNAVAILABLE", message, ErrorDetails::with_retry_info(Some(wait)))
}

/// The database does not answer.
pub(crate) fn no_database() -> Status {
    unavailable("the service is not available for the moment; try again")
}

pub(crate) fn store(error: store::Error) -> Status {
    match error {
        store::Error::Unavailable(_) => {
            if let Some(count) = NO_ANSWER.reasons() {
                tracing::warn!(%error, count, "calls are refused: the database does not answer");
            }
            no_database()
        }
        store::Error::Overloaded => {
            if let Some(count) = NO_ROOM.reasons() {
                tracing::warn!(count, "calls are refused: too many wait for the database");
            }
            unavailable("too many requests are waiting; try again")
        }
        store::Error::OrganizationOverloaded => {
            let details = ErrorDetails::with_retry_info(Some(RETRY_AFTER));
            let message = "too many events of this organization are waiting to be stored; publish again later";
            coded(Code::ResourceExhausted, "RATE_LIMITED", message, details)
        }
        store::Error::OrganizationBusy => {
            let details = ErrorDetails::with_retry_info(Some(RETRY_AFTER));
            let message = "too many calls of this organization are under way; try again";
            coded(Code::ResourceExhausted, "RATE_LIMITED", message, details)
        }
        store::Error::OrganizationBacklog => {
            let details = ErrorDetails::with_retry_info(Some(RETRY_AFTER_BACKLOG));
            let message = "too many deliveries of this organization are pending; publish again later";
            coded(Code::ResourceExhausted, "RATE_LIMITED", message, details)
        }
        store::Error::Backlog => {
            if let Some(count) = FULL.reasons() {
                tracing::warn!(count, "publishing is refused: as many deliveries are pending as --max-backlog allows");
            }
            unavailable_for(RETRY_AFTER_BACKLOG, "too many deliveries are pending; publish again later")
        }
        store::Error::TooManyWebhooks(_) => {
            let message = format!("{error}; delete one first");
            coded(Code::FailedPrecondition, "CONFLICT", message, ErrorDetails::new())
        }
        store::Error::OrganizationTests => {
            let details = ErrorDetails::with_retry_info(Some(RETRY_AFTER));
            let message = "too many test events of this organization are under way; try again when one has ended";
            coded(Code::ResourceExhausted, "RATE_LIMITED", message, details)
        }
        store::Error::Tests => unavailable("too many test events are under way; try again"),
        store::Error::TooManyDeliveries(max) => {
            let message = format!("events would make more than {max} deliveries together; publish fewer in a call");
            invalid("events", "too_many_deliveries", message)
        }
        store::Error::Repeated => unavailable("another request with this idempotency key is at work; try again"),
        store::Error::TakenOver => unavailable("the events could not be kept in time; publish them again"),
        store::Error::Closed => shutting_down(),
        other => internal(&other.to_string()),
    }
}

pub(super) fn url(error: UrlError) -> Status {
    invalid("url", error.reason(), error.to_string())
}

/// Faulty data of an event; `place` is where in the request the event stands.
pub(super) fn event_data(place: impl Display, error: &EventDataError) -> Status {
    let reason = match error {
        EventDataError::Missing => "required",
        EventDataError::NotAnObject => "wrong_type",
        EventDataError::Invalid { .. } => "invalid",
        EventDataError::TooDeep => "too_deep",
    };
    invalid(&format!("{place}data"), reason, format!("{place}{error}"))
}

pub(super) fn retry(error: RetryError) -> Status {
    match error {
        RetryError::NotFound => not_found("delivery"),
        RetryError::NotFailed(_) | RetryError::PayloadRemoved => {
            coded(Code::FailedPrecondition, "CONFLICT", error.to_string(), ErrorDetails::new())
        }
        RetryError::Store(error) => store(error),
    }
}

pub(super) fn watch(error: WatchError) -> Status {
    match error {
        WatchError::TooOld => invalid_parameter("resume_token", "too_old", error.to_string()),
        WatchError::Lost => invalid_parameter("resume_token", "lost", error.to_string()),
        WatchError::TooMany => {
            let details = ErrorDetails::with_retry_info(Some(RETRY_AFTER_STREAMS));
            coded(Code::ResourceExhausted, "RATE_LIMITED", error.to_string(), details)
        }
        WatchError::TooSlow => coded(Code::Aborted, "SLOW_READER", error.to_string(), ErrorDetails::new()),
        WatchError::Store(error) => store(error),
    }
}
