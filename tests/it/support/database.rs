//! A fresh database for each test.

use sea_orm::{ConnectionTrait, Database as SeaOrm};
use shortkit_webhooks::clock;
use tempfile::TempDir;

/// Which database.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Sqlite,
    Postgres,
}

/// An empty database; a file is gone when this is dropped, a PostgreSQL database with its server.
pub(crate) struct Database {
    pub(crate) url: String,
    _directory: Option<TempDir>,
}

impl Database {
    pub(crate) async fn fresh(kind: Kind) -> Self {
        match kind {
            Kind::Sqlite => {
                let directory = tempfile::tempdir().unwrap();
                let url = format!("sqlite://{}?mode=rwc", directory.path().join("test.db").display());
                Self { url, _directory: Some(directory) }
            }
            Kind::Postgres => {
                let server = std::env::var("SHORTKIT_TEST_POSTGRES")
                    .expect("SHORTKIT_TEST_POSTGRES names a PostgreSQL server for tests; tests/run starts one");
                let name = clock::new_id("t");
                let admin = SeaOrm::connect(format!("{server}/postgres")).await.unwrap();
                admin.execute_unprepared(&format!("CREATE DATABASE {name}")).await.unwrap();
                admin.close().await.unwrap();
                Self { url: format!("{server}/{name}"), _directory: None }
            }
        }
    }
}
