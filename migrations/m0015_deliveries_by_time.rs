//! Why: the primary key of deliveries began with the webhook, so each new delivery changed a page of its own there, which
//! SQLite writes whole with each commit and PostgreSQL after each checkpoint. It begins with the id now, and so with the
//! time: what is new is on the same few pages, whoever it is for. Lists, which went by that key, go by the indexes of
//! what is pending and what ended, which they have for their filters.
//!
//! Meanwhile nothing can be read or written: nodes of before should be stopped first, whose lists and retention would be slow
//! after it. On SQLite all deliveries are copied, which takes room for them once more, and for the log of that.

use sea_orm::DbBackend;

/// The webhook stays part of the key for those who distribute the table by it.
const POSTGRES: &str = "
ALTER TABLE deliveries DROP CONSTRAINT deliveries_pkey, ADD PRIMARY KEY (id, webhook_id);
";

/// SQLite cannot give a table another key.
const SQLITE: &str = "
-- First, so that the copy uses their pages.
DROP INDEX deliveries_due;
DROP INDEX deliveries_leased;
DROP INDEX deliveries_late;
DROP INDEX deliveries_pending;
DROP INDEX deliveries_ended;
CREATE TABLE deliveries_by_time (
    id TEXT NOT NULL,
    webhook_id TEXT NOT NULL,
    organization TEXT NOT NULL,
    environment TEXT NOT NULL,
    event_id TEXT NOT NULL,
    event_type TEXT NOT NULL,
    status TEXT NOT NULL CONSTRAINT deliveries_status_known CHECK (status IN ('pending', 'success', 'failed')),
    attempts INTEGER NOT NULL,
    granted BOOLEAN NOT NULL,
    once BOOLEAN NOT NULL,
    lost_leases INTEGER NOT NULL,
    next_attempt_at_ms BIGINT,
    lease_node TEXT,
    lease_expires_at_ms BIGINT,
    status_code INTEGER,
    response_time_ms INTEGER,
    last_error TEXT,
    last_attempt_at_ms BIGINT,
    created_at_ms BIGINT NOT NULL,
    response TEXT,
    PRIMARY KEY (id, webhook_id),
    CONSTRAINT deliveries_leased_by_a_node CHECK ((lease_node IS NULL) = (lease_expires_at_ms IS NULL)),
    CONSTRAINT deliveries_pending_waits_or_is_leased CHECK (
        (status = 'pending') = ((next_attempt_at_ms IS NULL) <> (lease_node IS NULL))
        AND (status = 'pending' OR (next_attempt_at_ms IS NULL AND lease_node IS NULL))
    )
);
INSERT INTO deliveries_by_time (id, webhook_id, organization, environment, event_id, event_type, status, attempts, granted,
    once, lost_leases, next_attempt_at_ms, lease_node, lease_expires_at_ms, status_code, response_time_ms, last_error,
    last_attempt_at_ms, created_at_ms, response)
    SELECT id, webhook_id, organization, environment, event_id, event_type, status, attempts, granted,
    once, lost_leases, next_attempt_at_ms, lease_node, lease_expires_at_ms, status_code, response_time_ms, last_error,
    last_attempt_at_ms, created_at_ms, response FROM deliveries ORDER BY rowid;
DROP TABLE deliveries;
ALTER TABLE deliveries_by_time RENAME TO deliveries;
CREATE INDEX deliveries_due ON deliveries (webhook_id, next_attempt_at_ms) WHERE next_attempt_at_ms IS NOT NULL;
CREATE INDEX deliveries_leased ON deliveries (lease_expires_at_ms) WHERE lease_expires_at_ms IS NOT NULL;
CREATE INDEX deliveries_late ON deliveries (last_attempt_at_ms, webhook_id, id)
    WHERE status <> 'pending' AND last_attempt_at_ms > created_at_ms + 3600000;
CREATE INDEX deliveries_pending ON deliveries (webhook_id, event_type, id) WHERE status = 'pending';
CREATE INDEX deliveries_ended ON deliveries (webhook_id, event_type, status, id) WHERE status <> 'pending';
";

pub(super) fn schema(backend: DbBackend) -> String {
    if backend == DbBackend::Postgres { POSTGRES } else { SQLITE }.to_owned()
}
