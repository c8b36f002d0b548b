//! What a caller may ask for.

use std::fmt::Display;

use super::WebhookStatus;

/// A description is at most this many characters; a longer one is refused.
pub const MAX_DESCRIPTION_CHARS: usize = 500;
/// The name of an event type is at most this many bytes; a longer one is a configuration error.
const MAX_EVENT_TYPE_BYTES: usize = 100;

/// A faulty field: its name on the wire, a stable word, and a sentence for people.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault {
    /// Proto path of the field, for example `events[1]`.
    pub field: String,
    /// `required`, `too_long`, `unknown`, `duplicate`, …
    pub reason: &'static str,
    /// What is wrong, and what would be right.
    pub message: String,
}

/// A webhook to register, validated.
#[derive(Debug, Clone)]
pub struct NewWebhook {
    /// Where to send events; normalised.
    pub url: String,
    /// The event types to receive.
    pub events: Vec<String>,
    /// A note for people.
    pub description: Option<String>,
}

/// A change to a webhook, validated: what is `None` stays as it is.
#[derive(Debug, Clone, Default)]
pub struct WebhookUpdate {
    /// Where to send events; normalised.
    pub url: Option<String>,
    /// The event types to receive.
    pub events: Option<Vec<String>>,
    /// A note for people; `Some(None)` clears it.
    pub description: Option<Option<String>>,
    /// Whether to send events.
    pub status: Option<WebhookStatus>,
}

/// The event types that the operator offers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EventTypes(Vec<String>);

impl EventTypes {
    /// Reads comma-separated names of lower-case letters, digits, `_`, `-` and `.`; the error is for the operator.
    pub fn parse(text: &str) -> Result<Self, String> {
        let names: Vec<String> = text.split(',').map(|name| name.trim().to_owned()).collect();
        for (index, name) in names.iter().enumerate() {
            let plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"_-.".contains(&byte);
            if name.is_empty() || name.len() > MAX_EVENT_TYPE_BYTES || !name.bytes().all(plain) {
                return Err(format!(
                    "`{name}`: an event type is 1 to {MAX_EVENT_TYPE_BYTES} of the characters a-z, 0-9, _, - and ."
                ));
            }
            if names[..index].contains(name) {
                return Err(format!("`{name}` stands twice"));
            }
        }
        Ok(Self(names))
    }

    /// Whether the server knows the type.
    pub fn contains(&self, name: &str) -> bool {
        self.0.iter().any(|known| known == name)
    }

    /// Finds fault with one event type of a request.
    pub fn validate(&self, field: impl Display, name: &str) -> Result<(), Fault> {
        if name.is_empty() {
            return Err(fault(&field, "required", format!("{field} is required")));
        }
        self.validate_known(field, name)
    }

    /// Finds fault with one event type where none need be given.
    pub fn validate_known(&self, field: impl Display, name: &str) -> Result<(), Fault> {
        if !self.contains(name) {
            return Err(fault(&field, "unknown", format!("{field} must be one of {}", self.0.join(", "))));
        }
        Ok(())
    }
}

impl Default for EventTypes {
    fn default() -> Self {
        Self(["content.ready", "content.errored", "export.ready"].map(str::to_owned).to_vec())
    }
}

/// Finds fault with the event types of a webhook.
pub fn validate_events(events: &[String], known: &EventTypes) -> Result<(), Fault> {
    if events.is_empty() {
        return Err(fault("events", "required", "events must not be empty".to_owned()));
    }
    for (index, event) in events.iter().enumerate() {
        let field = format!("events[{index}]");
        known.validate(&field, event)?;
        if events[..index].contains(event) {
            return Err(fault(&field, "duplicate", format!("{field} repeats an event type")));
        }
    }
    Ok(())
}

/// Finds fault with a description.
pub fn validate_description(description: &str) -> Result<(), Fault> {
    if description.contains('\0') {
        // PostgreSQL cannot hold it in text, and both databases accept the same.
        return Err(fault("description", "invalid", "description must not contain NUL".to_owned()));
    }
    if description.chars().count() > MAX_DESCRIPTION_CHARS {
        let message = format!("description must be at most {MAX_DESCRIPTION_CHARS} characters");
        return Err(fault("description", "too_long", message));
    }
    Ok(())
}

fn fault(field: impl Display, reason: &'static str, message: String) -> Fault {
    Fault { field: field.to_string(), reason, message }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn faulty(events: &[&str]) -> (String, &'static str) {
        let events: Vec<String> = events.iter().map(|event| (*event).to_owned()).collect();
        let fault = validate_events(&events, &EventTypes::default()).unwrap_err();
        (fault.field, fault.reason)
    }

    #[test]
    fn names_the_faulty_event() {
        assert_eq!(faulty(&[]), ("events".to_owned(), "required"));
        assert_eq!(faulty(&["content.ready", "nope"]), ("events[1]".to_owned(), "unknown"));
        assert_eq!(faulty(&["content.ready", "content.ready"]), ("events[1]".to_owned(), "duplicate"));
    }

    #[test]
    fn counts_characters_not_bytes() {
        assert!(validate_description(&"ä".repeat(500)).is_ok());
        assert_eq!(validate_description(&"ä".repeat(501)).unwrap_err().reason, "too_long");
    }

    #[test]
    fn event_types_need_no_escaping_in_json() {
        assert!(EventTypes::parse("a.b, order-paid_2").is_ok());
        for text in ["", "a,a", "a,,b", "Ärger", "a\"b"] {
            assert!(EventTypes::parse(text).is_err(), "{text}");
        }
    }
}
