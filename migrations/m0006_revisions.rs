//! Why: nodes keep webhooks and keys in memory, and must learn when another node, or the command line, has changed one.
//! Each of them adds to a counter here in the transaction of its change; one small query several times a second reads
//! the counters, instead of one for every webhook and key that is in use.

use sea_orm::DbBackend;

const SCHEMA: &str = "
-- `number` counts the changes of what `name` names. Only that it differs from the one read before says something.
CREATE TABLE revisions (
    name TEXT PRIMARY KEY,
    number BIGINT NOT NULL
);
INSERT INTO revisions (name, number) VALUES ('webhooks', 1), ('keys', 1);
";

pub(super) fn schema(_: DbBackend) -> String {
    SCHEMA.to_owned()
}
