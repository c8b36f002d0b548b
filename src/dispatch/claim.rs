//! Fetches what falls due, and what dead nodes left.

use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, Instant},
};

use tokio_util::sync::CancellationToken;

use super::{Engine, lease_length};
use crate::{
    clock,
    store::{Claimed, Error, News, Store, Waiting},
    webhook::RetrySchedule,
};

/// How often the database is looked at for what other nodes left to do.
const POLL: Duration = Duration::from_secs(1);

/// After claims that brought few, nothing is claimed during this many times as long: every attempt that ends may ring the
/// bell, and what ends in the meantime makes one claim …
const REST: u32 = 8;
/// … and so many are not few.
const MANY: usize = 32;
/// After looking, nothing is looked for during this many times as long: looking costs more the more webhooks wait. What is
/// known is claimed all the same, as soon as there is room.
const REST_FROM_LOOKING: u32 = 16;

/// What is known of the work to do.
struct Claims {
    store: Store,
    /// The webhooks that had deliveries waiting at the last look or were told of since, without those that turned out to
    /// have no more.
    waiting: HashMap<Arc<str>, Waiting>,
    /// When the last look was, and how long it took.
    looked: Option<(Instant, Duration)>,
    /// Whether there may be something that only another one finds.
    look: bool,
    rescued: Option<Instant>,
}

/// Claims until `shutdown`. A database that fails is asked again after [`POLL`].
pub(super) async fn run(engine: Engine, shutdown: CancellationToken) {
    let Engine { store, schedule, request_timeout, .. } = engine;
    let mut claims = Claims { store, waiting: HashMap::new(), looked: None, look: true, rescued: None };
    let (mut began, mut claimed) = (clock::stopwatch(), 0);
    while !shutdown.is_cancelled() {
        let wait = match claims.round(&schedule, lease_length(request_timeout)).await {
            Ok((Claimed { count, more }, wait)) => {
                claimed += count;
                if more {
                    continue;
                }
                wait
            }
            Err(error) => {
                tracing::warn!(%error, "due deliveries could not be claimed; trying again");
                claimed = 0;
                POLL
            }
        };
        let rest = if claimed < MANY { (began.elapsed() * REST).min(POLL / 5) } else { Duration::ZERO };
        tokio::select! {
            () = shutdown.cancelled() => {}
            () = async {
                tokio::time::sleep(rest).await;
                claims.store.due().await;
            } => {}
            () = tokio::time::sleep(wait.max(rest)) => {}
        }
        (began, claimed) = (clock::stopwatch(), 0);
    }
}

impl Claims {
    /// Claims what is due and there is room for; answers how long nothing more will be, unless there is more at once.
    async fn round(&mut self, schedule: &RetrySchedule, lease: Duration) -> Result<(Claimed, Duration), Error> {
        // Leases run out by the clock, not by what happens here: looking once in a while is enough.
        if self.rescued.is_none_or(|at| at.elapsed() >= POLL) {
            self.rescued = Some(clock::stopwatch());
            self.rescue(schedule).await?;
        }
        if self.until_look().is_zero() {
            let began = clock::stopwatch();
            self.waiting = self.store.waiting().await?;
            self.look = false;
            self.looked = Some((clock::stopwatch(), began.elapsed()));
        }
        // After the look, which may not have seen it yet.
        let News { waiting, look } = self.store.news();
        self.look |= look;
        waiting.into_values().for_each(|waiting| waiting.add_to(&mut self.waiting));
        let (now, known) = (clock::now(), self.waiting.len());
        let claimed = self.store.claim(&mut self.waiting, now, lease).await?;
        // Who has no more that is due may have something that falls due soon.
        self.look |= self.waiting.len() < known;
        // What is due and was not claimed has no room: freeing some rings the bell.
        let next = self.waiting.values().map(|webhook| webhook.due_at).filter(|due_at| *due_at > now).min();
        Ok((claimed, next.map_or(POLL, |due_at| now.until(due_at)).min(self.until_look())))
    }

    /// How long until it is time to look.
    fn until_look(&self) -> Duration {
        let rest = |took: Duration| if self.look { (took * REST_FROM_LOOKING).min(POLL) } else { POLL };
        self.looked.map_or(Duration::ZERO, |(at, took)| rest(took).saturating_sub(at.elapsed()))
    }

    async fn rescue(&self, schedule: &RetrySchedule) -> Result<(), Error> {
        let mut rescued = 0;
        // A node that is gone may have held thousands, and one step takes only so many.
        while let more @ 1.. = self.store.rescue(false, schedule).await? {
            rescued += more;
        }
        if rescued > 0 {
            tracing::warn!(count = rescued, "deliveries of a node that is gone were taken over");
        }
        Ok(())
    }
}
