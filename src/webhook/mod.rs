//! The domain, pure: no async, no IO, no clock. States, transitions, retry schedule, signatures, validation.

mod body;
mod delivery;
mod event_data;
mod rate_limit;
mod retention;
mod retry_schedule;
mod secret;
mod signature;
mod tenant;
mod timestamp;
mod transition;
mod validation;

pub use body::body;
pub use delivery::{Answer, Attempt, Change, ChangeKind, Delivery, DeliveryStatus, Event};
pub use event_data::{EventData, EventDataError, MAX_EVENT_DATA_DEPTH};
pub use rate_limit::{Admission, RateLimit};
pub use retention::Retention;
pub use retry_schedule::RetrySchedule;
pub use secret::Secret;
pub use signature::{SigningKey, TOLERANCE_SECS, VerifyError, signature_headers, verify, verify_shortform};
pub use tenant::{Environment, MAX_ORGANIZATION_BYTES, Tenant};
pub use timestamp::Timestamp;
pub use transition::{Outcome, Plan, Transition, decide, rescue};
pub use validation::{
    EventTypes, Fault, MAX_DESCRIPTION_CHARS, NewWebhook, WebhookUpdate, validate_description, validate_events,
};

/// An endpoint of a tenant, without its secrets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Webhook {
    /// `whk_` and a time-ordered unique part.
    pub id: String,
    /// Where events are sent; normalised.
    pub url: String,
    /// The event types it receives, in the order given.
    pub events: Vec<String>,
    /// A note for people; `Some("")` and `None` are different.
    pub description: Option<String>,
    /// Whether events are sent.
    pub status: WebhookStatus,
    /// When it was registered.
    pub created_at: Timestamp,
}

/// Whether a webhook gets events.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum WebhookStatus {
    /// Events are sent.
    Active,
    /// No new deliveries are made, and pending ones wait.
    Disabled,
}

impl WebhookStatus {
    /// The word for it in the database.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Active => "active",
            Self::Disabled => "disabled",
        }
    }

    /// The status that a word names.
    pub fn parse(word: &str) -> Option<Self> {
        [Self::Active, Self::Disabled].into_iter().find(|status| status.as_str() == word)
    }
}
