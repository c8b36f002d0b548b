//! Why: nodes keep webhooks and keys in memory, and must learn when another node, or the command line, has changed one.
//! Each of them adds to a counter here in the transaction of its change; one small query several times a second reads
//! the counters, instead of one for every webhook and key that is in use.

use sea_orm_migration::prelude::*;

const SCHEMA: &str = "
-- `number` counts the changes of what `name` names. Only that it differs from the one read before says something.
CREATE TABLE revisions (
    name TEXT PRIMARY KEY,
    number BIGINT NOT NULL
);
INSERT INTO revisions (name, number) VALUES ('webhooks', 1), ('keys', 1);
";

pub(super) struct Migration;

impl MigrationName for Migration {
    fn name(&self) -> &str {
        "m0006_revisions"
    }
}

#[async_trait::async_trait]
impl MigrationTrait for Migration {
    fn use_transaction(&self) -> Option<bool> {
        Some(true)
    }

    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        manager.get_connection().execute_unprepared(SCHEMA).await?;
        Ok(())
    }
}
