//! Brings the schema up to date, and says what it does: where much is stored, a step takes minutes.

#[path = "../../migrations/mod.rs"]
mod migrations;

use std::{future::Future, time::Duration};

use sea_orm::{ConnectionTrait, DatabaseTransaction, DbBackend};
use sea_orm_migration::MigratorTrait;

use self::migrations::Migrator;
use super::{Error, Store, sql::Sql};
use crate::clock;

/// Identifies, among PostgreSQL's advisory locks, the one of whoever brings the schema up to date.
const LOCK: i64 = 0x736b_776d;
/// Who finds it taken tries again after this time.
const WAIT: Duration = Duration::from_millis(200);
/// So often it is said that a step goes on.
const GOES_ON: Duration = Duration::from_secs(10);

impl Store {
    /// Brings the schema up to date. Of nodes that start together on one PostgreSQL one does, and the others wait for it.
    /// A SQLite database that another process serves is left as that knows it.
    pub async fn migrate(&self) -> Result<(), Error> {
        let turn = if self.sqlite() { None } else { Some(self.turn_to_migrate().await?) };
        self.work_in_files(true).await?;
        self.take_steps().await?;
        drop(turn);
        self.work_in_files(false).await
    }

    async fn take_steps(&self) -> Result<(), Error> {
        let write = &self.0.write;
        Migrator::install(write).await?;
        let done = Migrator::get_migration_models(write).await?;
        let steps = Migrator::migrations();
        if let Some(unknown) = done.iter().find(|done| steps.iter().all(|step| step.name() != done.version)) {
            return Err(Error::NewerSchema(unknown.version.clone()));
        }
        if done.is_empty() {
            // There is nothing yet, and no need to wait.
            return Ok(Migrator::up(write, None).await?);
        }
        let missing = steps.iter().map(|step| step.name()).filter(|name| done.iter().all(|done| done.version != *name));
        let missing: Vec<&str> = missing.collect();
        if !missing.is_empty() {
            self.take_exclusively().map_err(|error| match error {
                Error::Taken(path) => Error::OlderSchema(path),
                error => error,
            })?;
        }
        for (index, step) in missing.iter().enumerate() {
            let (number, of) = (index + 1, missing.len());
            tracing::info!(step, number, of, "bringing the schema up to date; nothing is served until it is");
            let began = clock::stopwatch();
            let goes_on = || tracing::info!(step, seconds = began.elapsed().as_secs(), "the step goes on");
            saying(GOES_ON, goes_on, Migrator::up(write, Some(1))).await?;
            tracing::info!(step, seconds = began.elapsed().as_secs_f32(), "the step is done");
        }
        Ok(())
    }

    /// Until it ends, no other node migrates: two that take the same step fail each other.
    async fn turn_to_migrate(&self) -> Result<DatabaseTransaction, Error> {
        let mut waits = false;
        loop {
            let attempt = async {
                let turn = self.write_by(&self.0.engine_write).await?;
                // It does nothing for as long as the steps take.
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

/// What `work` comes to; says `something` each time that so much time has passed.
async fn saying<T>(every: Duration, something: impl Fn(), work: impl Future<Output = T>) -> T {
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
    async fn who_takes_long_says_so() {
        let said = Cell::new(0);
        let say = || said.set(said.get() + 1);
        assert_eq!(saying(GOES_ON, say, async { "soon" }).await, "soon");
        assert_eq!(said.get(), 0);
        let until_said_twice = poll_fn(|_| if said.get() < 2 { Poll::Pending } else { Poll::Ready("late") });
        assert_eq!(saying(Duration::from_millis(1), say, until_said_twice).await, "late");
        assert_eq!(said.get(), 2);
    }

    #[tokio::test]
    async fn a_later_version_is_not_worked_with() {
        let (_directory, store) = Store::fresh().await;
        let later = "INSERT INTO seaql_migrations (version, applied_at) VALUES ('m9999_later', 1)";
        store.0.write.execute_unprepared(later).await.unwrap();
        let error = store.migrate().await.unwrap_err();
        assert!(matches!(&error, Error::NewerSchema(step) if step == "m9999_later"), "{error}");
    }
}
