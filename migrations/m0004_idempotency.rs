//! Why: a caller whose connection broke cannot know whether its request was done. When it names the request with an
//! idempotency key and asks again, it gets the answer that this table keeps, and the work is done once.

use sea_orm::DbBackend;

/// The same schema with the one type that differs as `{bytes}`: text that is compared by its bytes.
const SCHEMA: &str = "
-- A request by the name that its caller gave it. `fingerprint` is the hex form of SHA-256 over its body. While it is at
-- work, `claim` names the run that is; `expires_at_ms` is until when that run may take, and later until when the answer
-- is kept. What has expired counts as not there. `answer` is the base64 form of the sealed message, and `master_key_id`
-- names the key that it is sealed under.
CREATE TABLE idempotency_keys (
    organization {bytes} NOT NULL,
    environment TEXT NOT NULL CONSTRAINT idempotency_keys_environment_known CHECK (environment IN ('live', 'test')),
    call {bytes} NOT NULL,
    idempotency_key {bytes} NOT NULL CONSTRAINT idempotency_keys_short CHECK (length(idempotency_key) BETWEEN 1 AND 255),
    fingerprint TEXT NOT NULL,
    claim TEXT,
    answer TEXT CONSTRAINT idempotency_keys_bounded CHECK (length(answer) <= 131072),
    master_key_id TEXT,
    expires_at_ms BIGINT NOT NULL,
    PRIMARY KEY (organization, environment, call, idempotency_key),
    CONSTRAINT idempotency_keys_at_work_or_answered CHECK ((claim IS NULL) <> (answer IS NULL))
);
CREATE INDEX idempotency_keys_expiry ON idempotency_keys (expires_at_ms);
";

pub(super) fn schema(backend: DbBackend) -> String {
    let bytes = match backend {
        // Differs from SQLite because nodes must insert in an order that does not depend on the locale.
        DbBackend::Postgres => r#"TEXT COLLATE "C""#,
        // Differs from PostgreSQL because text is compared by bytes anyway.
        _ => "TEXT",
    };
    SCHEMA.replace("{bytes}", bytes)
}
