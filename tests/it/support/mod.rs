//! What every test stands on: a database, a server, a receiver.

mod database;
mod name_server;
mod process;
mod receiver;
mod server;
mod way;

use std::time::Duration;

pub(crate) use self::{
    database::{Database, FILED_CHANGES, Kind, PUBLISH_DRAFTS},
    name_server::{Says, serve_names},
    process::{Process, lie_about_time},
    receiver::{Received, Receiver, Reply},
    server::{Answer, Bearer, MASTER_KEY, TestServer, Watch, config},
    way::Way,
};

/// Something that does not happen within this time does not happen.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// Makes a test of `async fn name(database: Database)` for each database.
macro_rules! on_both_databases {
    ($($name:ident),+ $(,)?) => {
        mod sqlite {
            $(#[tokio::test]
            async fn $name() {
                super::$name($crate::support::Database::fresh($crate::support::Kind::Sqlite).await).await;
            })+
        }
        mod postgres {
            $(#[tokio::test]
            async fn $name() {
                super::$name($crate::support::Database::fresh($crate::support::Kind::Postgres).await).await;
            })+
        }
    };
}
pub(crate) use on_both_databases;

/// Waits for what must come.
pub(crate) async fn soon<T>(what: &str, future: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, future).await.unwrap_or_else(|_| panic!("{what} did not happen"))
}
