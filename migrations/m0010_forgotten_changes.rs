//! Why: a resume token was refused when the whole log began after it, though nothing of its tenant was missing. Whoever
//! removes changes notes from now on, for each tenant, how far it went.
//!
//! Nodes of before remove changes without a note: they should be stopped first.

use sea_orm::DbBackend;

/// Before there was this table, changes up to the first that is left may have been anybody's: that has no name. A row has
/// places for 128 changes (`store/log.rs`).
const SCHEMA: &str = "
-- The place, in the order of commits, of the last change of a tenant that was removed from `changes`.
CREATE TABLE forgotten_changes (
    organization TEXT NOT NULL,
    environment TEXT NOT NULL,
    place BIGINT NOT NULL,
    PRIMARY KEY (organization, environment)
);
INSERT INTO forgotten_changes (organization, environment, place)
    SELECT '', '', min(seq) * 128 - 1 FROM changes HAVING min(seq) > 1;
";

pub(super) fn schema(_: DbBackend) -> String {
    SCHEMA.to_owned()
}
