//! Why: what a node gives back when it stops was found by the others as they look through all that waits, which takes half a
//! minute where a hundred thousand webhooks have something. It notes which webhooks they are.

use sea_orm::DbBackend;

const SCHEMA: &str = "
-- Webhooks of which a node gave something back, by the number that the counter `given_back` had after it.
CREATE TABLE given_back (
    number BIGINT NOT NULL,
    webhook_id TEXT NOT NULL,
    organization TEXT NOT NULL,
    due_at_ms BIGINT NOT NULL,
    PRIMARY KEY (number, webhook_id)
);
INSERT INTO revisions (name, number) VALUES ('given_back', 1);
";

pub(super) fn schema(_: DbBackend) -> String {
    SCHEMA.to_owned()
}
