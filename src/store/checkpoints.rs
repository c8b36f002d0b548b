//! When what is in SQLite's log is brought into the database. Left to SQLite, it is part of about every hundredth commit,
//! which takes three flushes longer than the others, and whose callers wait for that. Whoever commits does it before, in a
//! moment when nobody waits. A log that grows faster than there are such moments is still SQLite's.

use std::time::Duration;

/// As soon as the log has so many pages, reckoned; with a thousand SQLite does it ([`wal_autocheckpoint`]).
///
/// [`wal_autocheckpoint`]: https://sqlite.org/pragma.html#pragma_wal_autocheckpoint
const DUE: usize = 700;
/// Pages that a commit writes, and more with each delivery or result in it (counted: 82 for an event with 20 deliveries, 7
/// or 8 for one with one).
const PER_COMMIT: usize = 3;
const PER_ITEM: usize = 4;
/// Rows of the log that are filed in a page, reckoned between those of one tenant and one row each of many.
const FILED_PER_PAGE: usize = 4;
/// It is a good moment when nobody came for so long before the last commit, and nobody came during it.
const QUIET: Duration = Duration::from_millis(1);

/// What the log has, reckoned in pages.
#[derive(Default)]
pub(super) struct Checkpoints(usize);

impl Checkpoints {
    /// A commit of so many items has ended, after the writer had waited for them, and so many rows of the log were filed behind
    /// it. Whether it is time, and nobody `waits`.
    pub(super) fn after_commit(&mut self, items: usize, filed: i64, waited: Duration, waits: bool) -> bool {
        self.0 += PER_COMMIT + PER_ITEM * items + usize::try_from(filed).unwrap_or(0) / FILED_PER_PAGE;
        let now = self.0 >= DUE && waited >= QUIET && !waits;
        if now {
            self.0 = 0;
        }
        now
    }
}

#[cfg(test)]
mod tests {
    use sea_orm::{ConnectionTrait, DbBackend, TransactionTrait};

    use super::*;
    use crate::store::{Store, sql::Sql};

    #[tokio::test]
    async fn it_empties_the_log_and_waits_for_nobody() {
        let (_directory, store) = Store::fresh().await;
        // Frames in the log, and those of them that are in the database; looking changes nothing.
        let log = async || -> (i32, i32) {
            let found =
                store.0.read.query_one_raw(Sql::new("PRAGMA wal_checkpoint(NOOP)").build(DbBackend::Sqlite)).await;
            let (_busy, log, done): (i32, i32, i32) = found.unwrap().unwrap().try_get_many_by_index().unwrap();
            (log, done)
        };
        store.0.write.execute_unprepared("CREATE TABLE t (i INTEGER)").await.unwrap();
        let (before, done) = log().await;
        assert!(done < before, "{done} of {before}");
        let busy = store.0.write.begin().await.unwrap();
        store.0.commits.checkpoint().await;
        assert_eq!(log().await, (before, done), "somebody writes");
        busy.rollback().await.unwrap();
        store.0.commits.checkpoint().await;
        assert_eq!(log().await, (before, before));
    }

    #[test]
    fn it_is_before_sqlite_does_it_and_only_when_nobody_waits() {
        for (items, commits) in [(1, 100), (20, 9)] {
            let mut checkpoints = Checkpoints::default();
            for _ in 0..2 {
                assert!((1..commits).all(|_| !checkpoints.after_commit(items, 0, QUIET, false)), "{items}");
                assert!(!checkpoints.after_commit(items, 0, QUIET, true));
                assert!(!checkpoints.after_commit(items, 0, Duration::ZERO, false));
                assert!(checkpoints.after_commit(items, 0, QUIET, false), "{items}");
            }
        }
    }
}
