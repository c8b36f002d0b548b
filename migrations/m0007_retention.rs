//! Why: what is finished and old is removed. Lists go on counting what is there, while statistics tell of all there ever
//! was; a retry by hand says for how long the payload is needed again; and deliveries that ended long after they were made
//! are found by when they ended. All others ended soon after, so their ids, which begin with the time, say enough: the
//! index holds none of them, and costs what succeeds at once nothing.

use sea_orm::DbBackend;

/// `store/retention.rs` knows how late is late.
const SCHEMA: &str = "
-- Deliveries that `total` no longer counts, because retention removed them.
ALTER TABLE delivery_counts ADD COLUMN removed BIGINT NOT NULL DEFAULT 0;
-- When a delivery of the event was last retried by hand.
ALTER TABLE events ADD COLUMN retried_at_ms BIGINT;
CREATE INDEX deliveries_late ON deliveries (last_attempt_at_ms, webhook_id, id)
    WHERE status <> 'pending' AND last_attempt_at_ms > created_at_ms + 3600000;
";

pub(super) fn schema(_: DbBackend) -> String {
    SCHEMA.to_owned()
}
