//! Why: what a delivery that succeeds at once costs. Its answer stands in its own row, so that only attempts that failed
//! are rows of `attempts`; and the log of changes has one row for all changes of a tenant in a commit, instead of two for
//! each delivery.
//!
//! Changes from before are forgotten: a stream that resumes there is told that its token is too old.

use sea_orm::DbBackend;

const STEP: &str = r#"
ALTER TABLE deliveries ADD COLUMN response TEXT;
UPDATE deliveries SET response = (
    SELECT attempts.response FROM attempts
    WHERE attempts.delivery_id = deliveries.id AND attempts.number = deliveries.attempts
) WHERE status = 'success';
DELETE FROM attempts WHERE error IS NULL;

-- `entries` is a JSON array, oldest change first; `store/changes.rs` knows its form. The place of a change in the order of
-- commits is `seq` and its place in the array.
DROP TABLE changes;
CREATE TABLE changes (
    seq {seq},
    organization TEXT NOT NULL,
    environment TEXT NOT NULL,
    entries TEXT NOT NULL,
    occurred_at_ms BIGINT NOT NULL
);
CREATE INDEX changes_tenant ON changes (organization, environment, seq);
"#;

/// PostgreSQL would compress entries at more cost than they save, and would look for room on full pages of counts, which
/// are few and change with every commit.
const POSTGRES: &str = "\
ALTER TABLE changes ALTER COLUMN entries SET STORAGE EXTERNAL;
ALTER TABLE delivery_counts SET (fillfactor = 20);
";

pub(super) fn schema(backend: DbBackend) -> String {
    let (seq, more) = match backend {
        DbBackend::Postgres => ("BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY", POSTGRES),
        // Differs from PostgreSQL because only AUTOINCREMENT never gives a number out again after the newest row was
        // removed.
        _ => ("INTEGER PRIMARY KEY AUTOINCREMENT", ""),
    };
    STEP.replace("{seq}", seq) + more
}
