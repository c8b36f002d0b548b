//! Brings the schema up to date, and says what it does: where much is stored, a migration takes minutes.

#[path = "../../migrations/mod.rs"]
mod migrations;

use std::{future::Future, time::Duration};

use sea_orm::{ConnectionTrait, DatabaseTransaction, DbBackend, DbErr};
use sea_orm_migration::{MigratorTrait, SchemaManager};

use self::migrations::Migrator;
use super::{Error, Store, error::code, sql::Sql};
use crate::clock;

/// Identifies, among PostgreSQL's advisory locks, the one of whoever brings the schema up to date.
const LOCK: i64 = 0x736b_776d;
/// Who finds it taken tries again after this time.
const WAIT: Duration = Duration::from_millis(200);
/// What is not made within this time is made by nobody.
const STANDSTILL: Duration = Duration::from_secs(1);
/// PostgreSQL has waited for a table in vain, for five seconds; whoever came meanwhile has waited behind that.
const LOCK_NOT_AVAILABLE: &str = "55P03";
/// For so long they have it to themselves.
const OTHERS_FIRST: Duration = Duration::from_secs(5);
/// So often it is said that a migration is under way.
const UNDER_WAY: Duration = Duration::from_secs(10);

/// The names of the migrations that a database has not seen.
struct Missing(Vec<String>);

impl Store {
    /// Brings the schema up to date. Of nodes that start together on one PostgreSQL one does, and the others wait for it. The
    /// schema of a SQLite database that another process serves stays as that one knows it.
    pub async fn migrate(&self) -> Result<(), Error> {
        if self.missing().await?.are_none() {
            return Ok(());
        }
        let _turn = if self.sqlite() { None } else { Some(self.turn_to_migrate().await?) };
        self.work_in_files(true).await?;
        let migrated = self.make_all().await;
        self.work_in_files(false).await.and(migrated)
    }

    /// Makes the schema of a new database, and expects that of any other to be up to date: whoever only looks at it is not to
    /// change it under those that serve it.
    pub async fn expect_schema(&self) -> Result<(), Error> {
        let missing = self.missing_for_good().await?;
        match missing.0.first() {
            Some(_) if missing.are_all() => self.migrate().await,
            Some(first) => Err(Error::OlderSchema(first.clone())),
            None => Ok(()),
        }
    }

    /// What is missing and is not being made by another process at this moment, as it is on a new database.
    async fn missing_for_good(&self) -> Result<Missing, Error> {
        let mut missing = self.missing().await?;
        while !missing.are_none() && !missing.are_all() {
            tokio::time::sleep(STANDSTILL).await;
            let before = std::mem::replace(&mut missing, self.missing().await?);
            if missing.0.len() >= before.0.len() {
                break;
            }
        }
        Ok(missing)
    }

    /// Asks without changing anything, so that it also works for who may not, or whose schema others make at this moment.
    async fn missing(&self) -> Result<Missing, Error> {
        let (write, all) = (&self.0.write, Migrator::migrations());
        let mut made = Vec::new();
        if SchemaManager::new(write).has_table("seaql_migrations").await? {
            let select = Sql::new("SELECT version FROM seaql_migrations").build(write.get_database_backend());
            for row in write.query_all_raw(select).await? {
                made.push(row.try_get_by_index::<String>(0)?);
            }
        }
        if let Some(unknown) = made.iter().find(|made| all.iter().all(|known| known.name() != **made)) {
            return Err(Error::NewerSchema(unknown.clone()));
        }
        let missing = all.iter().map(|known| known.name()).filter(|name| made.iter().all(|made| made != name));
        Ok(Missing(missing.map(str::to_owned).collect()))
    }

    /// Makes the migrations that are missing.
    async fn make_all(&self) -> Result<(), Error> {
        // Held until all are made.
        let mut exclusive = None;
        loop {
            let missing = self.missing().await?;
            let Some(migration) = missing.0.first() else { return Ok(()) };
            let count = missing.0.len();
            // A new database has all of them in a moment, of which nothing is to be said.
            let made = if missing.are_all() {
                Migrator::up(&self.0.write, None).await
            } else if self.sqlite() && exclusive.is_none() {
                if !self.missing_for_good().await?.are_none() {
                    exclusive = Some(self.exclusively()?);
                }
                continue;
            } else {
                self.make(migration, count).await
            };
            match made {
                Err(error) if code(&error).as_deref() == Some(LOCK_NOT_AVAILABLE) => {
                    tracing::info!(migration, "others use its tables, and go first; trying again");
                    tokio::time::sleep(OTHERS_FIRST).await;
                }
                // Another process may have made it at the same time, of which there can be two on a new SQLite.
                Err(error) if self.missing().await?.0.len() >= count => return Err(error.into()),
                Ok(()) | Err(_) => {}
            }
        }
    }

    /// Makes the first of those that are left.
    async fn make(&self, migration: &str, left: usize) -> Result<(), DbErr> {
        tracing::info!(migration, left, "bringing the schema up to date; this process serves nothing until it is");
        let began = clock::stopwatch();
        let say = || tracing::info!(migration, elapsed_ms = began.elapsed().as_millis(), "the migration is under way");
        every_while(UNDER_WAY, say, Migrator::up(&self.0.write, Some(1))).await?;
        tracing::info!(migration, elapsed_ms = began.elapsed().as_millis(), "the migration is done");
        Ok(())
    }

    /// Until it ends, no other node migrates: two that make the same migration fail each other.
    async fn turn_to_migrate(&self) -> Result<DatabaseTransaction, Error> {
        let mut waits = false;
        loop {
            let attempt = async {
                let turn = self.write_by(&self.0.engine_write).await?;
                // It does nothing for as long as the migrations take.
                turn.execute_unprepared("SET LOCAL idle_in_transaction_session_timeout TO 0").await?;
                let lock = Sql::new(&format!("SELECT pg_try_advisory_xact_lock({LOCK})"));
                let row = turn.query_one_raw(lock.build(DbBackend::Postgres)).await?;
                let taken = row.map(|row| row.try_get_by_index(0)).transpose()?.unwrap_or(false);
                Ok::<_, Error>(taken.then_some(turn))
            };
            if let Some(turn) = self.heard(attempt).await? {
                return Ok(turn);
            }
            if !waits {
                tracing::info!("another node brings the schema up to date; waiting for it");
                waits = true;
            }
            tokio::time::sleep(WAIT).await;
        }
    }
}

impl Missing {
    fn are_none(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether the database is a new one.
    fn are_all(&self) -> bool {
        self.0.len() == Migrator::migrations().len()
    }
}

/// What `work` comes to; does `something` each time that it has gone on for so long.
async fn every_while<T>(every: Duration, something: impl Fn(), work: impl Future<Output = T>) -> T {
    let mut work = std::pin::pin!(work);
    loop {
        match tokio::time::timeout(every, &mut work).await {
            Ok(done) => return done,
            Err(_) => something(),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{cell::Cell, future::poll_fn, task::Poll};

    use super::*;

    #[tokio::test]
    async fn what_takes_long_is_told_of() {
        let told = Cell::new(0);
        let tell = || told.set(told.get() + 1);
        assert_eq!(every_while(UNDER_WAY, tell, async { "soon" }).await, "soon");
        assert_eq!(told.get(), 0);
        let until_told_twice = poll_fn(|_| if told.get() < 2 { Poll::Pending } else { Poll::Ready("late") });
        let work = every_while(Duration::from_millis(1), tell, until_told_twice);
        assert_eq!(tokio::time::timeout(UNDER_WAY, work).await, Ok("late"));
        assert_eq!(told.get(), 2);
    }
}
