//! Why: signing secrets are encrypted. `secret` and `previous_secret` hold sealed values in base64 from now on, and
//! `master_key_id` says which master key opens both. A row without one is from before: its secrets are plain text until
//! the first start with a master key seals them.
//!
//! The index finds the rows that a replaced master key still seals, and which master keys are in use.

use sea_orm::DbBackend;

const SCHEMA: &str = r#"
ALTER TABLE webhooks ADD COLUMN master_key_id TEXT;
CREATE INDEX webhooks_master_key ON webhooks (master_key_id);
"#;

pub(super) fn schema(_: DbBackend) -> String {
    SCHEMA.to_owned()
}
