//! Why: the parts of a large publish are half a megabyte, and one commit of them is long as well. They are kept in several,
//! and this says which of them are not accepted yet.

use sea_orm::DbBackend;

const SCHEMA: &str = "
-- Publishes that are being kept: the rows of publish_parts whose ids begin with such an id may still be discarded.
CREATE TABLE publish_drafts (
    id TEXT NOT NULL PRIMARY KEY,
    -- Who keeps it, and until when the next piece is to come.
    node TEXT NOT NULL,
    lease_expires_at_ms BIGINT NOT NULL
);
";

pub(super) fn schema(_: DbBackend) -> String {
    SCHEMA.to_owned()
}
