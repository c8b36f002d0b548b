//! A PostgreSQL that is gone without a word: its machine lost power, the network drops what it says, a firewall forgot a
//! connection. Nobody then ends what waits for it, since the system tries for a quarter of an hour, or for ever. So whoever
//! waits gives up. SQLite is waited for: there is nowhere else to go.
//!
//! Some connections are for the revisions alone, a handful of rows that are read three times a second. When they are not
//! answered, the database is silent: everybody gives up, and no connection of before is used again. Anything else that takes
//! too long gives up only itself, since the database may just be slow, and connections of before are asked whether they are
//! there.

use std::{
    future::Future,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use sea_orm::{DbErr, RuntimeErr};
use tokio::sync::watch;

use super::Error;
use crate::clock;

/// Reading the revisions is answered within this time by any database that is there.
const MAX_SILENCE: Duration = Duration::from_secs(5);
/// A statement of a commit, which the server ends after six seconds, is given up after this time …
pub(super) const MAX_COMMIT: Duration = Duration::from_secs(8);
/// … as is a look-up by key, for which a commit or an attempt waits …
pub(super) const MAX_LOOK_UP: Duration = Duration::from_secs(8);
/// … and anything else after this.
pub(super) const MAX_WAIT: Duration = Duration::from_secs(40);

/// What is known of whether the database is there; nothing for SQLite.
#[derive(Clone)]
pub(super) struct Silence(Option<Arc<Known>>);

#[derive(Default)]
struct Known {
    /// When it was last found silent.
    found: watch::Sender<Option<Instant>>,
    /// Whether it answered when it was last asked.
    available: Available,
    times: Mutex<Times>,
}

struct Available(watch::Sender<bool>);

impl Default for Available {
    /// Until it is found silent.
    fn default() -> Self {
        Self(watch::channel(true).0)
    }
}

#[derive(Default)]
struct Times {
    /// When somebody last gave up.
    doubted: Option<Instant>,
    /// When the revisions were last read.
    heard: Option<Instant>,
}

/// Whether to use a connection.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Trust {
    /// It is one of before the silence.
    Gone,
    /// It may be.
    Ask,
    Use,
}

impl Silence {
    /// That of a database with this URL.
    pub(super) fn of(url: &str) -> Self {
        Self((!url.starts_with("sqlite:")).then(Arc::default))
    }

    /// Whether a connection that was made so long ago is to be used.
    pub(super) fn trust(&self, age: Duration) -> Trust {
        let Some(known) = &self.0 else { return Trust::Use };
        let is_before = |moment: Option<Instant>| moment.is_some_and(|moment| moment.elapsed() <= age);
        if is_before(*known.found.borrow()) {
            Trust::Gone
        } else if is_before(known.times().doubted) {
            Trust::Ask
        } else {
            Trust::Use
        }
    }

    /// Whether the database answers, and every change of that; of SQLite, which is part of this process, none.
    pub(super) fn available(&self) -> watch::Receiver<bool> {
        self.0.as_ref().map_or_else(|| watch::channel(true).1, |known| known.available.0.subscribe())
    }

    /// Ends when the database is found silent.
    pub(super) async fn found(&self) {
        match &self.0 {
            Some(known) => drop(known.found.subscribe().changed().await),
            None => std::future::pending().await,
        }
    }

    /// What `work` comes to, unless that takes longer than `most`, or the database is found silent meanwhile.
    pub(super) async fn heard<T, E: From<Error>>(
        &self,
        most: Duration,
        work: impl Future<Output = Result<T, E>>,
    ) -> Result<T, E> {
        let Some(known) = &self.0 else { return work.await };
        tokio::select! {
            // First what was answered: this process may be what stood still.
            biased;
            done = work => return done,
            () = self.found() => {}
            () = tokio::time::sleep(most) => known.times().doubted = Some(clock::stopwatch()),
        }
        Err(E::from(unanswered()))
    }

    /// The same for reading the revisions, by whose answer the database is judged.
    pub(super) async fn judge<T>(&self, reading: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
        let Some(known) = &self.0 else { return reading.await };
        let read = tokio::time::timeout(MAX_SILENCE, reading).await;
        let long_ago = |heard: &mut Instant| heard.elapsed() >= MAX_SILENCE;
        if matches!(read, Ok(Ok(_))) {
            known.times().heard = Some(clock::stopwatch());
            if known.becomes(true) {
                tracing::info!("the database answers again");
            }
        } else if read.is_err() || known.times().heard.take_if(long_ago).is_some() {
            // Or there has been no connection to read by for as long; that is said once.
            tracing::error!("the database does not answer; what waits for it is given up");
            known.found.send_replace(Some(clock::stopwatch()));
            known.becomes(false);
        }
        read.unwrap_or_else(|_| Err(unanswered()))
    }
}

impl Known {
    /// Whether it was otherwise before.
    fn becomes(&self, available: bool) -> bool {
        self.available.0.send_if_modified(|known| std::mem::replace(known, available) != available)
    }

    fn times(&self) -> MutexGuard<'_, Times> {
        self.times.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn unanswered() -> Error {
    Error::Unavailable(Arc::new(DbErr::Conn(RuntimeErr::Internal("it does not answer".to_owned()))))
}

#[cfg(test)]
mod tests {
    use std::future::{pending, ready};

    use super::*;

    #[tokio::test]
    async fn whoever_waits_gives_up() {
        let silence = Silence::of("postgres://db");
        let made = clock::stopwatch();
        let trust = || (silence.trust(made.elapsed()), silence.trust(Duration::ZERO));
        let available = silence.available();
        assert_eq!(trust(), (Trust::Use, Trust::Use));
        assert!(silence.judge(ready(Ok(()))).await.is_ok());
        assert!(silence.judge(ready(Err::<(), _>(unanswered()))).await.is_err());
        assert_eq!(trust(), (Trust::Use, Trust::Use), "it answered a moment ago");

        let slow = silence.heard(Duration::ZERO, pending::<Result<(), Error>>()).await;
        assert!(matches!(slow, Err(Error::Unavailable(_))));
        assert_eq!(trust(), (Trust::Ask, Trust::Use), "only one gave up");

        let waits = silence.heard(MAX_WAIT, pending::<Result<(), Error>>());
        let known = silence.0.as_ref().unwrap();
        let (waited, ()) =
            tokio::join!(waits, async { known.found.send_modify(|found| *found = Some(clock::stopwatch())) });
        assert!(matches!(waited, Err(Error::Unavailable(_))));
        assert_eq!(trust(), (Trust::Gone, Trust::Use));
        assert!(silence.heard(MAX_WAIT, ready(Ok::<_, Error>(()))).await.is_ok(), "it is there again");

        let later = clock::stopwatch();
        let found = || silence.trust(later.elapsed()) == Trust::Gone;
        known.times().heard = Some(later - MAX_SILENCE);
        assert!(!found() && silence.judge(ready(Err::<(), _>(unanswered()))).await.is_err() && found());
        assert!(!*available.borrow());
        assert!(silence.judge(ready(Ok(()))).await.is_ok() && *available.borrow());
    }
}
