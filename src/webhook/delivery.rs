//! One event on its way to one webhook.

use super::{EventData, Timestamp};

/// An accepted event.
#[derive(Debug, Clone)]
pub struct Event {
    /// `evt_` and a time-ordered unique part.
    pub id: String,
    /// Event type, for example `content.ready`.
    pub event_type: String,
    /// What the publisher said, byte for byte.
    pub data: EventData,
    /// When it was accepted.
    pub created_at: Timestamp,
}

/// One event for one webhook, with the state of its sending.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Delivery {
    /// `del_` and a time-ordered unique part.
    pub id: String,
    /// The event being sent.
    pub event_id: String,
    /// Its type.
    pub event_type: String,
    /// Where the sending stands.
    pub status: DeliveryStatus,
    /// Attempts made or under way, or granted by a retry by hand.
    pub attempts: i32,
    /// HTTP status of the last answer.
    pub status_code: Option<u16>,
    /// How long the last attempt took; absent when it got no answer.
    pub response_time_ms: Option<i32>,
    /// Why the last attempt failed.
    pub last_error: Option<String>,
    /// When the last attempt began.
    pub last_attempt_at: Option<Timestamp>,
    /// When the next attempt is due.
    pub next_attempt_at: Option<Timestamp>,
    /// When it was made.
    pub created_at: Timestamp,
}

/// States of a delivery: `pending` becomes `success` or `failed`, and a retry by hand makes `failed` `pending` again.
///
/// The database knows them by the CHECK `deliveries_status_known`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum DeliveryStatus {
    /// An attempt is under way or planned.
    Pending,
    /// The receiver answered with a 2xx in time.
    Success,
    /// The last attempt failed, and no other is planned.
    Failed,
}

/// One attempt that ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attempt {
    /// 1 for the first.
    pub number: i32,
    /// When it began.
    pub started_at: Timestamp,
    /// How long it took.
    pub duration_ms: i32,
    /// What came back, if anything did.
    pub answer: Option<Answer>,
    /// Why it failed.
    pub error: Option<String>,
}

/// A receiver's answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// HTTP status.
    pub status_code: u16,
    /// The first 16 KiB of the body; what is not UTF-8, and NUL, which PostgreSQL cannot hold, is replaced.
    pub body: String,
}

/// One committed change of one delivery, as watchers see it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    /// Place in the order of commits.
    pub seq: i64,
    /// What happened.
    pub kind: ChangeKind,
    /// The webhook it is for.
    pub webhook_id: String,
    /// The delivery after the change.
    pub delivery_id: String,
    /// Event type.
    pub event_type: String,
    /// State after the change.
    pub status: DeliveryStatus,
    /// Attempts after the change.
    pub attempts: i32,
    /// HTTP status of the attempt that ended.
    pub status_code: Option<u16>,
    /// How long the attempt took.
    pub response_time_ms: Option<i32>,
    /// Why the attempt failed.
    pub last_error: Option<String>,
    /// When the next attempt is due.
    pub next_attempt_at: Option<Timestamp>,
    /// When it happened.
    pub occurred_at: Timestamp,
}

/// Kinds of change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ChangeKind {
    /// The delivery was made.
    Created,
    /// An attempt ended.
    Attempted,
    /// A retry by hand made it pending again.
    Retried,
}

impl DeliveryStatus {
    /// Every state.
    pub const ALL: [Self; 3] = [Self::Pending, Self::Success, Self::Failed];

    /// The word for it in the database.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Pending => "pending",
            Self::Success => "success",
            Self::Failed => "failed",
        }
    }

    /// The state that a word names.
    pub fn parse(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|status| status.as_str() == word)
    }
}

impl ChangeKind {
    /// The word for it in the database.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Created => "created",
            Self::Attempted => "attempted",
            Self::Retried => "retried",
        }
    }

    /// The kind that a word names.
    pub fn parse(word: &str) -> Option<Self> {
        [Self::Created, Self::Attempted, Self::Retried].into_iter().find(|kind| kind.as_str() == word)
    }
}
