//! Why: who did what, when, and by which request, for keys, webhooks, secrets and retries by hand.
//!
//! The record is append-only, also for whoever has the database's password but not the will to change its schema:
//! triggers refuse every other write. There is no CHECK of the actions, since there will be more of them, and SQLite
//! cannot change a CHECK.

use sea_orm::DbBackend;

/// `actor` is the id of a key, or `cli`. `organization` and `environment` say whose the resource is: a service key is
/// nobody's, a master key moreover of no environment. `webhook_id` is the webhook concerned, if one is. `changed_fields`
/// is a JSON array of names, never of values.
const SCHEMA: &str = r#"
CREATE TABLE audit (
    id {id} PRIMARY KEY,
    action TEXT NOT NULL,
    actor TEXT NOT NULL,
    organization TEXT,
    environment TEXT CONSTRAINT audit_environment_known CHECK (environment IN ('live', 'test')),
    resource_id TEXT NOT NULL,
    webhook_id TEXT,
    changed_fields TEXT NOT NULL,
    request_id TEXT,
    occurred_at_ms BIGINT NOT NULL
);
CREATE INDEX audit_tenant ON audit (organization, environment, id);
CREATE INDEX audit_action ON audit (organization, environment, action, id);
CREATE INDEX audit_webhook ON audit (webhook_id, id) WHERE webhook_id IS NOT NULL;
"#;

const POSTGRES: &str = r#"
CREATE FUNCTION audit_is_append_only() RETURNS trigger LANGUAGE plpgsql AS
    'BEGIN RAISE EXCEPTION ''the audit record is append-only''; END';
CREATE TRIGGER audit_refuses_changes BEFORE UPDATE OR DELETE OR TRUNCATE ON audit
    FOR EACH STATEMENT EXECUTE FUNCTION audit_is_append_only();
"#;

/// Differs from PostgreSQL because a trigger stands for one kind of write, and has its text in itself. A row that is
/// replaced is removed without asking a trigger unless the connection says otherwise, so that is refused by itself.
const SQLITE: &str = r#"
CREATE TRIGGER audit_refuses_updates BEFORE UPDATE ON audit
    BEGIN SELECT RAISE(ABORT, 'the audit record is append-only'); END;
CREATE TRIGGER audit_refuses_deletes BEFORE DELETE ON audit
    BEGIN SELECT RAISE(ABORT, 'the audit record is append-only'); END;
CREATE TRIGGER audit_refuses_replacing BEFORE INSERT ON audit WHEN EXISTS (SELECT 1 FROM audit WHERE id = NEW.id)
    BEGIN SELECT RAISE(ABORT, 'the audit record is append-only'); END;
"#;

pub(super) fn schema(backend: DbBackend) -> String {
    let (id, triggers) = match backend {
        // Differs from SQLite because the order of ids must be that of their bytes in every locale.
        DbBackend::Postgres => (r#"TEXT COLLATE "C""#, POSTGRES),
        _ => ("TEXT", SQLITE),
    };
    SCHEMA.replace("{id}", id) + triggers
}
