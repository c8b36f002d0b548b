//! Why: the first schema. Webhooks and who subscribes to what, events and their deliveries with every attempt, the log
//! of changes that streams are read from, counts that spare the lists a scan, and API keys.
//!
//! Times are milliseconds since the epoch, so that both databases and the code hold the same number. There are no
//! foreign keys between the tables of the hot path: each would cost a look-up per row, and rows go only through
//! `store`, which removes them in order.

use sea_orm::DbBackend;

/// The schema with the few types that differ as `{id}` and `{seq}`.
const SCHEMA: &str = r#"
-- One value a name: what all nodes on this database must agree on.
CREATE TABLE settings (
    name TEXT PRIMARY KEY,
    value TEXT NOT NULL
);

-- `hash` is the hex form of SHA-256 over the key: the key itself is nowhere.
CREATE TABLE api_keys (
    id {id} PRIMARY KEY,
    hash TEXT NOT NULL UNIQUE,
    prefix TEXT NOT NULL,
    kind TEXT NOT NULL CONSTRAINT api_keys_kind_known CHECK (kind IN ('secret', 'publishable', 'service')),
    organization TEXT,
    environment TEXT NOT NULL CONSTRAINT api_keys_environment_known CHECK (environment IN ('live', 'test')),
    created_at_ms BIGINT NOT NULL,
    last_used_at_ms BIGINT,
    expires_at_ms BIGINT,
    revoked_at_ms BIGINT,
    CONSTRAINT api_keys_organization_named CHECK ((organization IS NULL) = (kind = 'service'))
);

-- `events` is a JSON array, in the order given. A deleted webhook stays until its deliveries are removed.
CREATE TABLE webhooks (
    id {id} PRIMARY KEY,
    organization TEXT NOT NULL,
    environment TEXT NOT NULL CONSTRAINT webhooks_environment_known CHECK (environment IN ('live', 'test')),
    url TEXT NOT NULL,
    events TEXT NOT NULL,
    description TEXT,
    status TEXT NOT NULL CONSTRAINT webhooks_status_known CHECK (status IN ('active', 'disabled')),
    secret TEXT NOT NULL,
    previous_secret TEXT,
    previous_secret_expires_at_ms BIGINT,
    created_at_ms BIGINT NOT NULL,
    deleted_at_ms BIGINT
);
CREATE INDEX webhooks_tenant ON webhooks (organization, environment, id) WHERE deleted_at_ms IS NULL;
CREATE INDEX webhooks_deleted ON webhooks (deleted_at_ms) WHERE deleted_at_ms IS NOT NULL;

-- Which webhooks an event goes to: one row for each event type of a webhook.
CREATE TABLE subscriptions (
    organization TEXT NOT NULL,
    environment TEXT NOT NULL,
    event_type TEXT NOT NULL,
    webhook_id {id} NOT NULL,
    PRIMARY KEY (organization, environment, event_type, webhook_id)
);
CREATE INDEX subscriptions_webhook ON subscriptions (webhook_id);

-- `data` is text, not JSON: it goes out byte for byte as it came in.
CREATE TABLE events (
    id {id} PRIMARY KEY,
    event_type TEXT NOT NULL,
    data TEXT NOT NULL,
    created_at_ms BIGINT NOT NULL
);

-- A pending delivery either waits for its next attempt or is leased to the node that makes it, never both.
-- `granted`: `attempts` already counts the next attempt, by a retry by hand or a lease given back unused.
-- `once`: the attempt is not followed by another, whatever the retry schedule says.
CREATE TABLE deliveries (
    webhook_id {id} NOT NULL,
    id {id} NOT NULL,
    organization TEXT NOT NULL,
    environment TEXT NOT NULL,
    event_id {id} NOT NULL,
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
    PRIMARY KEY (webhook_id, id),
    CONSTRAINT deliveries_leased_by_a_node CHECK ((lease_node IS NULL) = (lease_expires_at_ms IS NULL)),
    CONSTRAINT deliveries_pending_waits_or_is_leased CHECK (
        (status = 'pending') = ((next_attempt_at_ms IS NULL) <> (lease_node IS NULL))
        AND (status = 'pending' OR (next_attempt_at_ms IS NULL AND lease_node IS NULL))
    )
);
-- Lists with a filter: a filter names ranges of it, each already in the order of the list.
CREATE INDEX deliveries_filter ON deliveries (webhook_id, event_type, status, id);
-- What is due, webhook by webhook, so that a long queue of one costs the others nothing.
CREATE INDEX deliveries_due ON deliveries (webhook_id, next_attempt_at_ms) WHERE next_attempt_at_ms IS NOT NULL;
CREATE INDEX deliveries_leased ON deliveries (lease_expires_at_ms) WHERE lease_expires_at_ms IS NOT NULL;

CREATE TABLE attempts (
    delivery_id {id} NOT NULL,
    number INTEGER NOT NULL,
    started_at_ms BIGINT NOT NULL,
    duration_ms INTEGER NOT NULL,
    status_code INTEGER,
    response TEXT,
    error TEXT,
    PRIMARY KEY (delivery_id, number)
);

-- How many deliveries of a webhook are of a type and in a state: `meta.total` and the statistics.
CREATE TABLE delivery_counts (
    webhook_id {id} NOT NULL,
    event_type TEXT NOT NULL,
    status TEXT NOT NULL CONSTRAINT delivery_counts_status_known CHECK (status IN ('pending', 'success', 'failed')),
    total BIGINT NOT NULL,
    last_attempt_at_ms BIGINT,
    PRIMARY KEY (webhook_id, event_type, status)
);

-- Every change of every delivery in the order of commits, for the streams.
CREATE TABLE changes (
    seq {seq},
    organization TEXT NOT NULL,
    environment TEXT NOT NULL,
    webhook_id {id} NOT NULL,
    delivery_id {id} NOT NULL,
    event_type TEXT NOT NULL,
    kind TEXT NOT NULL CONSTRAINT changes_kind_known CHECK (kind IN ('created', 'attempted', 'retried')),
    status TEXT NOT NULL CONSTRAINT changes_status_known CHECK (status IN ('pending', 'success', 'failed')),
    attempts INTEGER NOT NULL,
    status_code INTEGER,
    response_time_ms INTEGER,
    last_error TEXT,
    next_attempt_at_ms BIGINT,
    occurred_at_ms BIGINT NOT NULL
);
CREATE INDEX changes_tenant ON changes (organization, environment, seq);
"#;

pub(super) fn schema(backend: DbBackend) -> String {
    let (id, seq) = match backend {
        // Differs from SQLite because the order of ids must be that of their bytes in every locale.
        DbBackend::Postgres => (r#"TEXT COLLATE "C""#, "BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY"),
        // Differs from PostgreSQL because text is compared by bytes anyway, and because only AUTOINCREMENT never
        // gives a number out again after the newest row was removed.
        _ => ("TEXT", "INTEGER PRIMARY KEY AUTOINCREMENT"),
    };
    SCHEMA.replace("{id}", id).replace("{seq}", seq)
}
