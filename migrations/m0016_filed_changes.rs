//! Why: each commit entered the log's new rows in an index by tenant, where hardly two of them meet in a page when they are of
//! many tenants: with a hundred of them, that was more than a quarter of what a commit on SQLite took. They are entered there
//! many at a time now, behind the commits, with a mark of how far that went.

use sea_orm::DbBackend;

const SQLITE: &str = "
-- Which rows of `changes` are whose, as far as the next table says; `store/filing.rs` goes on with it.
CREATE TABLE changes_of_tenants (
    organization TEXT NOT NULL,
    environment TEXT NOT NULL,
    seq INTEGER NOT NULL,
    PRIMARY KEY (organization, environment, seq)
) WITHOUT ROWID;
-- One row.
CREATE TABLE changes_filed (
    -- The rows up to this one are filed, whosever they are …
    seq INTEGER NOT NULL,
    -- … and up to this one those of the tenants up to this one, in the order of names.
    run_end INTEGER NOT NULL,
    organization TEXT NOT NULL,
    environment TEXT NOT NULL,
    -- Within a step: up to whom it files; none when it is the last of a run.
    next_organization TEXT,
    next_environment TEXT
);
INSERT INTO changes_of_tenants (organization, environment, seq)
    SELECT organization, environment, seq FROM changes ORDER BY organization, environment, seq;
INSERT INTO changes_filed (seq, run_end, organization, environment)
    SELECT COALESCE(max(seq), 0), COALESCE(max(seq), 0), '', '' FROM changes;
DROP INDEX changes_tenant;
";

pub(super) fn schema(backend: DbBackend) -> String {
    match backend {
        // Differs from SQLite because it made no difference there: what goes to the disk with a commit is the entry, and its
        // page with the next checkpoint, once for all commits that changed it.
        DbBackend::Postgres => String::new(),
        _ => SQLITE.to_owned(),
    }
}
