//! The schema, step by step. A step never changes once it has landed; each one says why it is there and is one
//! transaction on both databases.

use sea_orm::{ConnectionTrait, DbBackend, DbErr};
use sea_orm_migration::{MigrationName, MigrationTrait, MigratorTrait, SchemaManager, async_trait};

mod m0001_initial;
mod m0002_hot_path;
mod m0003_sealed_secrets;
mod m0004_idempotency;
mod m0005_audit;
mod m0006_revisions;
mod m0007_retention;
mod m0008_expectations;
mod m0009_smaller_indexes;
mod m0010_forgotten_changes;
mod m0011_webhook_changes;
mod m0012_given_back;
mod m0013_publish_parts;
mod m0014_publish_drafts;
mod m0015_deliveries_by_time;
mod m0016_filed_changes;

/// Before each step: it may take as long as there are rows, which must not keep a node from ever starting; and when the node has
/// gone it ends, where the server can tell (from version 14 on, on Linux), or the next node would wait for it.
const ON_POSTGRES: &str = "SET LOCAL statement_timeout TO 0; \
    SELECT set_config(name, '5s', TRUE) FROM pg_settings WHERE name = 'client_connection_check_interval' \
    AND version() LIKE '%linux%';";

/// Runs the steps that a database has not seen.
pub(crate) struct Migrator;

/// One of them.
struct Step {
    /// What a database remembers it by.
    name: &'static str,
    schema: fn(DbBackend) -> String,
}

impl MigrationName for Step {
    fn name(&self) -> &str {
        self.name
    }
}

#[async_trait::async_trait]
impl MigrationTrait for Step {
    fn use_transaction(&self) -> Option<bool> {
        Some(true)
    }

    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        let mut schema = (self.schema)(manager.get_database_backend());
        if manager.get_database_backend() == DbBackend::Postgres {
            schema.insert_str(0, ON_POSTGRES);
        }
        manager.get_connection().execute_unprepared(&schema).await?;
        Ok(())
    }
}

#[async_trait::async_trait]
impl MigratorTrait for Migrator {
    fn migrations() -> Vec<Box<dyn MigrationTrait>> {
        let steps = [
            Step { name: "m0001_initial", schema: m0001_initial::schema },
            Step { name: "m0002_hot_path", schema: m0002_hot_path::schema },
            Step { name: "m0003_sealed_secrets", schema: m0003_sealed_secrets::schema },
            Step { name: "m0004_idempotency", schema: m0004_idempotency::schema },
            Step { name: "m0005_audit", schema: m0005_audit::schema },
            Step { name: "m0006_revisions", schema: m0006_revisions::schema },
            Step { name: "m0007_retention", schema: m0007_retention::schema },
            Step { name: "m0008_expectations", schema: m0008_expectations::schema },
            Step { name: "m0009_smaller_indexes", schema: m0009_smaller_indexes::schema },
            Step { name: "m0010_forgotten_changes", schema: m0010_forgotten_changes::schema },
            Step { name: "m0011_webhook_changes", schema: m0011_webhook_changes::schema },
            Step { name: "m0012_given_back", schema: m0012_given_back::schema },
            Step { name: "m0013_publish_parts", schema: m0013_publish_parts::schema },
            Step { name: "m0014_publish_drafts", schema: m0014_publish_drafts::schema },
            Step { name: "m0015_deliveries_by_time", schema: m0015_deliveries_by_time::schema },
            Step { name: "m0016_filed_changes", schema: m0016_filed_changes::schema },
        ];
        steps.into_iter().map(|step| Box::new(step) as Box<dyn MigrationTrait>).collect()
    }
}
