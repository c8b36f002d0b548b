//! How a node learns that webhooks or keys were changed somewhere else.
//!
//! A change adds to its counter in its own transaction. Every node reads all counters in one query every [`POLL`] and
//! forgets what it knows of the things whose counter moved. What it knows is trusted only while the last reading, or
//! the look-up itself, is younger than [`MAX_AGE`]: a node that cannot read the counters asks the database each time
//! what it has not just learned, and says so when it gets no answer. So a change holds everywhere within [`MAX_AGE`].

use std::{
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use sea_orm::{ConnectionTrait, DatabaseTransaction};
use tokio::sync::watch;

use super::{Error, Store, silence::MAX_SILENCE, sql::Sql};
use crate::clock;

/// Between two readings of the counters.
const POLL: Duration = Duration::from_millis(300);
/// What was not known to hold within this time is asked for again.
const MAX_AGE: Duration = Duration::from_secs(1);

/// What a counter is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Subject {
    /// Where deliveries go, and which webhooks subscribe to what.
    Webhooks,
    /// Which keys open the door.
    Keys,
}

/// When the counters were last read, and who waits for a change.
#[derive(Default)]
pub(super) struct Revisions {
    /// The moment before the last question that was answered: a later change may be missing from the answer.
    read_at: Mutex<Option<Instant>>,
    keys_changed: watch::Sender<()>,
}

impl Subject {
    const ALL: [Self; 2] = [Self::Webhooks, Self::Keys];

    /// The name of the counter.
    fn as_str(self) -> &'static str {
        match self {
            Self::Webhooks => "webhooks",
            Self::Keys => "keys",
        }
    }
}

impl Revisions {
    /// Whether what the database was asked at `asked_at`, and what was not forgotten since, may be trusted.
    pub(super) fn hold(&self, asked_at: Instant) -> bool {
        let read_at = *self.read_at.lock().unwrap_or_else(PoisonError::into_inner);
        read_at.map_or(asked_at, |read_at| read_at.max(asked_at)).elapsed() < MAX_AGE
    }
}

impl Store {
    /// Learns of the changes that others make, until the database fails.
    pub async fn follow_revisions(&self) -> Result<(), Error> {
        let mut last = Vec::new();
        let mut interval = tokio::time::interval(POLL);
        interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            interval.tick().await;
            let asked_at = clock::stopwatch();
            let read = self.0.silence.heard(MAX_SILENCE, self.read_revisions()).await?;
            for subject in Subject::ALL {
                let number =
                    |of: &[(String, i64)]| of.iter().find(|(name, _)| name == subject.as_str()).map(|(_, n)| *n);
                // Not only when it grew: a database restored from a backup counts from an earlier number.
                if number(&read) != number(&last) {
                    self.forget(subject);
                }
            }
            last = read;
            // Last: from here on, what is still known is as fresh as the reading.
            *self.0.revisions.read_at.lock().unwrap_or_else(PoisonError::into_inner) = Some(asked_at);
        }
    }

    /// Says from now on when keys may have changed.
    pub fn key_changes(&self) -> watch::Receiver<()> {
        self.0.revisions.keys_changed.subscribe()
    }

    /// Commits a change of `subject`, so that it holds on this node at once and on the others within [`MAX_AGE`].
    pub(super) async fn commit_change(&self, transaction: DatabaseTransaction, subject: Subject) -> Result<(), Error> {
        // The last statement: on PostgreSQL, all that change the same thing take turns from here to the commit.
        let mut sql = Sql::new("UPDATE revisions SET number = number + 1 WHERE name = ");
        sql.value(subject.as_str());
        transaction.execute_raw(sql.build(transaction.get_database_backend())).await?;
        let committed = transaction.commit().await;
        // Also after a failure: a commit whose reply was lost may have happened.
        self.forget(subject);
        Ok(committed?)
    }

    async fn read_revisions(&self) -> Result<Vec<(String, i64)>, Error> {
        let sql = Sql::new("SELECT name, number FROM revisions");
        let reader = &self.0.engine_read;
        let rows = reader.query_all_raw(sql.build(reader.get_database_backend())).await?;
        Ok(rows.iter().map(sea_orm::QueryResult::try_get_many_by_index).collect::<Result<_, _>>()?)
    }

    fn forget(&self, subject: Subject) {
        match subject {
            Subject::Webhooks => self.0.targets.forget(),
            Subject::Keys => {
                self.0.known_keys.forget();
                self.0.revisions.keys_changed.send_replace(());
            }
        }
    }
}
