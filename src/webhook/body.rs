//! What a receiver gets.

use std::io::Write;

use super::{Event, Timestamp};

/// What stands around the data is hardly ever longer.
const MOST_BESIDE_DATA: usize = 160;

/// The request body: `{"event":…,"data":…,"timestamp":…,"webhookId":…}`, with the data as it was published.
///
/// Event types and ids are made of characters that JSON does not escape, so the parts are set side by side: nothing is
/// parsed or serialised again.
pub fn body(event: &Event, webhook_id: &str) -> Vec<u8> {
    let timestamp: Timestamp = event.created_at;
    let (event_type, data) = (&event.event_type, event.data.as_str());
    // All of it, lest it grow twice on the way.
    let mut body = Vec::with_capacity(MOST_BESIDE_DATA + data.len());
    // Writing into memory cannot fail.
    let _ = write!(
        body,
        r#"{{"event":"{event_type}","data":{data},"timestamp":"{timestamp}","webhookId":"{webhook_id}"}}"#
    );
    body
}
