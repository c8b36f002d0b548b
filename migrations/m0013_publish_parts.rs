//! Why: events that are published together are stored all or none, and one commit of a thousand events is long for those who
//! wait behind it. Where others write as well, what is published is first kept here whole, in parts, and then each part is
//! stored by itself.

use sea_orm::DbBackend;

const TABLE: &str = "
-- Accepted, and not stored yet as events and deliveries: a row for each part, until that is done.
CREATE TABLE publish_parts (
    id TEXT NOT NULL PRIMARY KEY,
    -- Who stores it, and until when nobody else does.
    node TEXT NOT NULL,
    lease_expires_at_ms BIGINT NOT NULL,
    -- JSON, see src/store/publish/parts.rs.
    content TEXT NOT NULL
);
CREATE INDEX publish_parts_by_lease ON publish_parts (lease_expires_at_ms);
";

/// As in m0008, with one word more.
const EXPECTATIONS: &str = "
DROP TRIGGER expectations_are_met;
CREATE TRIGGER expectations_are_met INSTEAD OF INSERT ON expectations WHEN NEW.found <> NEW.expected BEGIN
    SELECT CASE NEW.what
        WHEN 'lease' THEN RAISE(ABORT, 'not found for each row: lease')
        WHEN 'name' THEN RAISE(ABORT, 'not found for each row: name')
        WHEN 'part' THEN RAISE(ABORT, 'not found for each row: part')
        ELSE RAISE(ABORT, 'not found for each row')
    END;
END;
";

pub(super) fn schema(backend: DbBackend) -> String {
    if backend == DbBackend::Postgres { TABLE.to_owned() } else { format!("{TABLE}{EXPECTATIONS}") }
}
