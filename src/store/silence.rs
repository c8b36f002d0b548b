//! A PostgreSQL that is gone without a word: its machine lost power, the network drops what it says, a firewall forgot a
//! connection. Nobody then ends what waits for it, since the system tries for a quarter of an hour, or for ever. So whoever
//! waits gives up, and no connection of before is used again. SQLite is waited for: there is nowhere else to go.

use std::{
    future::Future,
    sync::Arc,
    time::{Duration, Instant},
};

use sea_orm::{DbErr, RuntimeErr};
use tokio::sync::watch;

use super::Error;
use crate::clock;

/// Reading the revisions, a handful of rows, is answered within this time by any database that is there.
pub(super) const MAX_SILENCE: Duration = Duration::from_secs(5);
/// A commit is answered within this time, since the server ends one that takes longer …
pub(super) const MAX_COMMIT: Duration = Duration::from_secs(7);
/// … and anything else within this: the server ends each statement of it sooner.
pub(super) const MAX_WAIT: Duration = Duration::from_secs(40);

/// When the database was last found silent; none for SQLite.
#[derive(Clone)]
pub(super) struct Silence(Option<Arc<watch::Sender<Option<Instant>>>>);

impl Silence {
    /// That of a database with this URL.
    pub(super) fn of(url: &str) -> Self {
        Self((!url.starts_with("sqlite:")).then(Arc::default))
    }

    /// Whether a connection that was made so long ago is one of before.
    pub(super) fn concerns(&self, age: Duration) -> bool {
        self.0.as_ref().and_then(|found| *found.borrow()).is_some_and(|found| found.elapsed() <= age)
    }

    /// What `work` comes to, unless there is no answer for so long, or the database is found silent by somebody else.
    pub(super) async fn heard<T, E: From<Error>>(
        &self,
        most: Duration,
        work: impl Future<Output = Result<T, E>>,
    ) -> Result<T, E> {
        let Some(silence) = &self.0 else { return work.await };
        let mut found = silence.subscribe();
        tokio::select! {
            // First what was answered: this process may be what stood still.
            biased;
            done = work => return done,
            _ = found.changed() => {}
            () = tokio::time::sleep(most) => drop(silence.send_replace(Some(clock::stopwatch()))),
        }
        Err(E::from(Error::Unavailable(Arc::new(DbErr::Conn(RuntimeErr::Internal("it does not answer".to_owned()))))))
    }
}

#[cfg(test)]
mod tests {
    use std::future::{pending, ready};

    use super::*;

    #[tokio::test]
    async fn whoever_waits_gives_up() {
        let silence = Silence::of("postgres://db");
        let made = clock::stopwatch();
        assert!(!silence.concerns(made.elapsed()));
        let [waits, asks] = [MAX_WAIT, Duration::ZERO].map(|most| silence.heard(most, pending::<Result<(), Error>>()));
        let (waited, asked) = tokio::join!(waits, asks);
        assert!(matches!((waited, asked), (Err(Error::Unavailable(_)), Err(Error::Unavailable(_)))));
        assert!(silence.concerns(made.elapsed()));
        assert!(!silence.concerns(Duration::ZERO), "one that is made now");
        assert!(silence.heard(MAX_WAIT, ready(Ok::<_, Error>(()))).await.is_ok(), "it is there again");
    }
}
