//! The schema, step by step. A step never changes once it has landed; each one says why it is there and is one
//! transaction on both databases.

use sea_orm_migration::{MigrationTrait, MigratorTrait, async_trait};

mod m0001_initial;
mod m0002_hot_path;
mod m0003_sealed_secrets;
mod m0004_idempotency;
mod m0005_audit;
mod m0006_revisions;
mod m0007_retention;

/// Runs the steps that a database has not seen.
pub(crate) struct Migrator;

#[async_trait::async_trait]
impl MigratorTrait for Migrator {
    fn migrations() -> Vec<Box<dyn MigrationTrait>> {
        vec![
            Box::new(m0001_initial::Migration),
            Box::new(m0002_hot_path::Migration),
            Box::new(m0003_sealed_secrets::Migration),
            Box::new(m0004_idempotency::Migration),
            Box::new(m0005_audit::Migration),
            Box::new(m0006_revisions::Migration),
            Box::new(m0007_retention::Migration),
        ]
    }
}
