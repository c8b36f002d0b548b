//! Why: a change of one webhook made every node forget all it knew of all webhooks. The counter of `revisions` says only that
//! there was a change; each now has a row that says of which webhook.

use sea_orm::DbBackend;

const SCHEMA: &str = "
-- The latest changes, by the number that the counter `webhooks` had after each. Whoever finds a gap takes all as changed.
CREATE TABLE webhook_changes (
    number BIGINT PRIMARY KEY,
    webhook_id TEXT NOT NULL,
    organization TEXT NOT NULL,
    environment TEXT NOT NULL
);
";

pub(super) fn schema(_: DbBackend) -> String {
    SCHEMA.to_owned()
}
