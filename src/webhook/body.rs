//! What a receiver gets.

use super::{Event, Timestamp};

/// The request body: `{"event":…,"data":…,"timestamp":…,"webhookId":…}`, with the data as it was published.
///
/// Event types and ids are made of characters that JSON does not escape, so the parts are set side by side: nothing is
/// parsed or serialised again.
pub fn body(event: &Event, webhook_id: &str) -> Vec<u8> {
    let timestamp: Timestamp = event.created_at;
    let (event_type, data) = (&event.event_type, event.data.as_str());
    format!(r#"{{"event":"{event_type}","data":{data},"timestamp":"{timestamp}","webhookId":"{webhook_id}"}}"#)
        .into_bytes()
}
