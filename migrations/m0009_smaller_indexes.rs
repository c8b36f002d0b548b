//! Why: each result moved a delivery from one place of the filter index to another, which was more than a quarter of all
//! pages that a commit wrote, and made the index lose whole pages where deliveries had been pending. Pending ones have an
//! index of their own now, which stays as small as they are few, and those that ended are entered once, where they stay.

use sea_orm::DbBackend;

/// Lists with a filter: a filter names ranges of them, each already in the order of the list. What takes the strongest lock
/// goes first: behind the others it would wait for nodes that wait for it.
const SCHEMA: &str = "
DROP INDEX deliveries_filter;
CREATE INDEX deliveries_pending ON deliveries (webhook_id, event_type, id) WHERE status = 'pending';
CREATE INDEX deliveries_ended ON deliveries (webhook_id, event_type, status, id) WHERE status <> 'pending';
";

pub(super) fn schema(_: DbBackend) -> String {
    SCHEMA.to_owned()
}
