//! Requests as domain types, or the status that names what is wrong with them.

use std::fmt::Display;

use tonic::Status;

use super::{Api, convert, proto, status};
use crate::{
    store::{AuditAction, NewEvent},
    webhook::{
        self, DeliveryStatus, EventData, NewWebhook, WebhookStatus, WebhookUpdate, validate_description,
        validate_events,
    },
};

/// No id is longer.
const MAX_ID_BYTES: usize = 64;
/// Page size when none is asked for.
const DEFAULT_LIMIT: u64 = 20;
/// The largest page; more is refused.
const MAX_LIMIT: u64 = 100;

/// One call publishes at most this many events; more are refused.
const MAX_EVENTS: usize = 1_000;
/// So many bytes of events are looked at before others have a turn; they take a tenth of a millisecond …
const BYTES_A_TURN: usize = 64 * 1024;
/// … if an event counts as at least so many.
const MIN_BYTES: usize = 1024;

/// What an update may change, in the order in which [`named`] tells it.
const CHANGEABLE: [&str; 4] = ["url", "events", "description", "status"];

/// Refuses what cannot be an id, so that no database has to.
pub(super) fn id(what: &str, id: &str) -> Result<(), Status> {
    let plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'_';
    if id.len() <= MAX_ID_BYTES && id.bytes().all(plain) { Ok(()) } else { Err(status::not_found(what)) }
}

/// Size of a page.
pub(super) fn limit(limit: Option<i32>) -> Result<u64, Status> {
    let Some(limit) = limit else { return Ok(DEFAULT_LIMIT) };
    match u64::try_from(limit) {
        Ok(limit @ 1..=MAX_LIMIT) => Ok(limit),
        _ => Err(status::invalid_parameter("limit", "out_of_range", format!("limit must be from 1 to {MAX_LIMIT}"))),
    }
}

/// State to filter by.
pub(super) fn delivery_status(field: Option<i32>) -> Result<Option<DeliveryStatus>, Status> {
    field
        .map(|number| match proto::DeliveryStatus::try_from(number) {
            Ok(proto::DeliveryStatus::Pending) => Ok(DeliveryStatus::Pending),
            Ok(proto::DeliveryStatus::Success) => Ok(DeliveryStatus::Success),
            Ok(proto::DeliveryStatus::Failed) => Ok(DeliveryStatus::Failed),
            _ => {
                let message = "status must be one of pending, success, failed".to_owned();
                Err(status::invalid_parameter("status", "unknown", message))
            }
        })
        .transpose()
}

/// An id to filter by.
pub(super) fn id_filter(field: &str, value: &str) -> Result<(), Status> {
    let invalid = |_| status::invalid_parameter(field, "invalid", format!("{field} is not an id"));
    id(field, value).map_err(invalid)
}

/// Action to filter by.
pub(super) fn audit_action(field: Option<i32>) -> Result<Option<AuditAction>, Status> {
    let Some(number) = field else { return Ok(None) };
    let known = AuditAction::ALL.into_iter().find(|action| i32::from(convert::audit_action(*action)) == number);
    let unknown = || {
        let words = AuditAction::ALL.map(AuditAction::as_str).join(", ");
        status::invalid_parameter("action", "unknown", format!("action must be one of {words}"))
    };
    known.map(Some).ok_or_else(unknown)
}

impl Api {
    /// An event type that must be known.
    pub(super) fn event_type(&self, name: &str) -> Result<(), Status> {
        self.event_types.validate("event", name).map_err(status::fault)
    }

    /// An event type to filter by, which must be known.
    pub(super) fn event_filter(&self, name: &str) -> Result<(), Status> {
        let known = self.event_types.validate_known("event", name);
        known.map_err(|fault| status::invalid_parameter(&fault.field, fault.reason, fault.message))
    }

    /// An event to publish; `place` stands before the names of its fields in errors.
    pub(super) fn new_event(
        &self,
        place: impl Display,
        request: proto::PublishEventRequest,
    ) -> Result<NewEvent, Status> {
        self.event_types.validate(format_args!("{place}event"), &request.event).map_err(status::fault)?;
        let data = EventData::parse(&request.data).map_err(|error| status::event_data(place, &error))?;
        Ok(NewEvent { event_type: request.event, data })
    }

    /// Events to publish together. Many of them leave the processor to others in between.
    pub(super) async fn new_events(&self, requests: Vec<proto::PublishEventRequest>) -> Result<Vec<NewEvent>, Status> {
        match requests.len() {
            0 => return Err(status::invalid("events", "required", "events must not be empty")),
            1..=MAX_EVENTS => {}
            _ => {
                let message = format!("events must be at most {MAX_EVENTS}");
                return Err(status::invalid("events", "too_many", message));
            }
        }
        let (mut events, mut bytes) = (Vec::with_capacity(requests.len()), 0);
        for (index, request) in requests.into_iter().enumerate() {
            if bytes >= BYTES_A_TURN {
                tokio::task::yield_now().await;
                bytes = 0;
            }
            bytes += request.data.len().max(MIN_BYTES);
            events.push(self.new_event(format_args!("events[{index}]."), request)?);
        }
        Ok(events)
    }

    pub(super) async fn new_webhook(&self, request: proto::CreateWebhookRequest) -> Result<NewWebhook, Status> {
        // Cheap checks first: the one of the URL may ask a name server.
        if request.url.is_empty() {
            return Err(status::invalid("url", "required", "url is required"));
        }
        validate_events(&request.events, &self.event_types).map_err(status::fault)?;
        if let Some(description) = &request.description {
            validate_description(description).map_err(status::fault)?;
        }
        let url = self.client.check(&request.url).await.map_err(status::url)?;
        Ok(NewWebhook { url: url.into(), events: request.events, description: request.description })
    }

    pub(super) async fn update(&self, request: proto::UpdateWebhookRequest) -> Result<WebhookUpdate, Status> {
        let mask = request.update_mask.unwrap_or_default().paths;
        let [url, events, description, status] = named(&mask)?;
        let new = request.webhook.unwrap_or_default();
        let mut update = WebhookUpdate::default();
        // Cheap checks first, as above.
        if events {
            validate_events(&new.events, &self.event_types).map_err(status::fault)?;
            update.events = Some(new.events);
        }
        if description {
            if let Some(description) = &new.description {
                validate_description(description).map_err(status::fault)?;
            }
            update.description = Some(new.description);
        }
        if status {
            update.status = Some(webhook_status(new.status)?);
        }
        if url {
            let url = new.url.as_deref().unwrap_or_default();
            update.url = Some(self.client.check(url).await.map_err(status::url)?.into());
        }
        Ok(update)
    }
}

/// Which of [`CHANGEABLE`] a mask names, which is a set: however often it names one, that is judged and changed once. Refuses
/// one that names nothing, or something unknown.
fn named(mask: &[String]) -> Result<[bool; CHANGEABLE.len()], Status> {
    if mask.is_empty() {
        return Err(status::invalid("update_mask", "required", "name at least one field to change"));
    }
    let mut named = [false; CHANGEABLE.len()];
    for path in mask {
        let Some(place) = CHANGEABLE.iter().position(|field| field == path) else {
            let known = "update_mask may name url, events, description and status";
            return Err(status::invalid("update_mask", "unknown", known));
        };
        named[place] = true;
    }
    Ok(named)
}

fn webhook_status(field: Option<i32>) -> Result<WebhookStatus, Status> {
    match field.map(proto::WebhookStatus::try_from) {
        Some(Ok(proto::WebhookStatus::Active)) => Ok(WebhookStatus::Active),
        Some(Ok(proto::WebhookStatus::Disabled)) => Ok(WebhookStatus::Disabled),
        None => Err(status::invalid("status", "required", "status cannot be cleared")),
        _ => Err(status::invalid("status", "unknown", "status must be one of active, disabled")),
    }
}

/// Data of a test event.
pub(super) fn sample(event_type: &str) -> webhook::EventData {
    let text = match event_type {
        "content.ready" => r#"{"contentId":"cnt_test123","title":"Test content","duration":45.2,"status":"ready"}"#,
        "content.errored" => r#"{"contentId":"cnt_test123","title":"Test content","status":"errored"}"#,
        "export.ready" => r#"{"exportId":"exp_test123","status":"ready"}"#,
        _ => r#"{"test":true}"#,
    };
    webhook::EventData::parse(text).unwrap_or_else(|error| unreachable!("{error}"))
}
