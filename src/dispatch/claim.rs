//! Fetches what falls due, and what dead nodes left.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use tokio_util::sync::CancellationToken;

use super::{Engine, LEASE_MARGIN, attempt::RECORD_AGAIN, lease_length};
use crate::{
    clock::{self, Leaps, Seldom},
    store::{Claimed, Error, News, Store, Waitlist},
    webhook::RetrySchedule,
};

/// How often leases are looked for that have run out; a sweep over what waits takes at least as long.
const POLL: Duration = Duration::from_secs(1);

/// After claims that brought few, nothing is claimed during this many times as long: every attempt that ends may ring the
/// bell, and what ends in the meantime makes one claim …
const REST: u32 = 8;
/// … and so many are not few.
const MANY: usize = 32;
/// No rest between claims is longer than this.
const MAX_REST: Duration = Duration::from_millis(200);
/// After a look, none follows during this many times as long, but at most [`POLL`]. Known by looking alone is what other
/// nodes left, and what was not told because the database failed: that waits for a sweep, which has a look for every 2,048
/// webhooks.
const REST_FROM_LOOKING: u32 = 16;

/// What is known of the work to do.
struct Claims<'a> {
    store: Store,
    list: Waitlist,
    /// When the last look was, and how long none follows.
    looked: Option<(Instant, Duration)>,
    /// When the sweep that is under way began; none when it has ended.
    sweep: Option<Instant>,
    rescues: Seldom,
    leases: &'a LeaseEnds,
}

/// A node that has not looked for leases for so long stood still, and what it had on the wire may have outlasted its lease …
const STOOD_STILL: Duration = Duration::from_secs(15);
const _: () = assert!(STOOD_STILL.as_secs() < LEASE_MARGIN.as_secs());
/// … but is recorded within this time.
const RECORDED: Duration = Duration::from_secs(5);
const _: () = assert!(RECORDED.as_secs() > 2 * RECORD_AGAIN.as_secs());

/// Knows whether leases that seem to have run out have.
#[derive(Default)]
pub struct LeaseEnds(Mutex<Past>);

#[derive(Default)]
struct Past {
    leaps: Leaps,
    /// When the clock last leapt forward.
    leapt: Option<Instant>,
    /// When this was last asked.
    asked: Option<Instant>,
    /// When this node went on after it had stood still.
    halted: Option<Instant>,
    /// Results that this node has, and could not record.
    kept: usize,
}

/// A result that could not be recorded, until it is.
pub(super) struct Kept<'a>(&'a LeaseEnds);

/// Claims until `shutdown`, and takes over what other nodes had accepted. Claims do not wait for that; a fault in either ends
/// both.
pub(super) async fn run(engine: Arc<Engine>, shutdown: CancellationToken) {
    tokio::join!(claim(&engine, &shutdown), rescue_parts(&engine, &shutdown));
}

/// A database that fails is asked again after [`POLL`].
async fn claim(engine: &Engine, shutdown: &CancellationToken) {
    let (store, leases, rescues) = (engine.store.clone(), &engine.leases, Seldom::new(POLL));
    let mut claims = Claims { store, list: Waitlist::default(), looked: None, sweep: None, rescues, leases };
    let (mut began, mut claimed) = (clock::stopwatch(), 0);
    while !shutdown.is_cancelled() {
        let round = clock::stopwatch();
        let (wait, rest) = match claims.round(&engine.schedule, lease_length(engine.request_timeout)).await {
            Ok((Claimed { count, more }, wait)) => {
                claimed += count;
                if more {
                    // What falls due together, as after an outage, leaves half of the time to those who publish meanwhile.
                    if claims.store.is_shared() {
                        tokio::time::sleep(round.elapsed().min(MAX_REST)).await;
                    }
                    continue;
                }
                (wait, if claimed < MANY { (began.elapsed() * REST).min(MAX_REST) } else { Duration::ZERO })
            }
            Err(error) => {
                tracing::warn!(%error, "due deliveries could not be claimed; trying again");
                (POLL, POLL)
            }
        };
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

impl Claims<'_> {
    /// Claims what is due and there is room for; answers how long nothing more will be, unless there is more at once.
    async fn round(&mut self, schedule: &RetrySchedule, lease: Duration) -> Result<(Claimed, Duration), Error> {
        // Leases run out by the clock, not by what happens here: looking once in a while is enough. What cannot be taken over,
        // or looked through, is tried again as seldom, and holds up nothing that is known to be due.
        if self.rescues.is_time() {
            self.list.may_have_room();
            if let Err(error) = self.rescue(schedule, lease).await {
                tracing::warn!(%error, "deliveries of nodes that are gone could not be taken over; trying again");
            }
        }
        if self.until_look().is_zero()
            && let Err(error) = self.look().await
        {
            self.looked = Some((clock::stopwatch(), POLL));
            tracing::warn!(%error, "what waits could not be looked through; trying again");
        }
        // After the look, which may not have seen it yet.
        let News { waiting, room } = self.store.news();
        waiting.into_values().for_each(|waiting| self.list.add(waiting));
        room.iter().for_each(|webhook_id| self.list.has_room(webhook_id));
        let now = clock::now();
        let mut claimed = self.store.claim(&mut self.list, now, lease).await?;
        claimed.more |= !self.list.is_complete() && self.until_look().is_zero();
        // What is due and was not claimed has no room: freeing some rings the bell.
        let next = self.list.next_due_at().map_or(POLL, |due_at| now.until(due_at));
        Ok((claimed, next.min(self.until_look()).min(POLL)))
    }

    async fn look(&mut self) -> Result<(), Error> {
        let began = clock::stopwatch();
        let sweep = *self.sweep.get_or_insert(began);
        let ended = self.store.look(&mut self.list).await?;
        // The looks of the first sweep follow each other without rest.
        let rests = self.list.is_complete();
        let mut rest = if rests { (began.elapsed() * REST_FROM_LOOKING).min(POLL) } else { Duration::ZERO };
        if ended {
            self.sweep = None;
            rest = rest.max(POLL.saturating_sub(sweep.elapsed()));
        }
        self.looked = Some((clock::stopwatch(), rest));
        Ok(())
    }

    /// How long until it is time to look.
    fn until_look(&self) -> Duration {
        self.looked.map_or(Duration::ZERO, |(at, rest)| rest.saturating_sub(at.elapsed()))
    }

    async fn rescue(&mut self, schedule: &RetrySchedule, lease: Duration) -> Result<(), Error> {
        let mut rescued = 0;
        // A node that is gone may have held thousands, and one step takes only so many.
        while self.leases.have_ended(lease)
            && let more @ 1.. = self.store.rescue(false, schedule).await?
        {
            rescued += more;
        }
        if rescued > 0 {
            tracing::warn!(count = rescued, "deliveries of a node that is gone were taken over");
        }
        Ok(())
    }
}

/// Stores what other nodes had accepted and not stored before their leases ran out, until `shutdown`.
async fn rescue_parts(engine: &Engine, shutdown: &CancellationToken) {
    let (leases, lease) = (&engine.leases, lease_length(engine.request_timeout));
    while !shutdown.is_cancelled() {
        match engine.store.store_kept_parts(lease, || !shutdown.is_cancelled() && leases.have_ended(lease)).await {
            Ok(0) => {}
            Ok(parts) => tracing::warn!(
                parts,
                "published events that were accepted, and not stored by their node in time, were taken over"
            ),
            Err(error) => {
                tracing::warn!(%error, "published events of nodes that are gone could not be taken over; trying again");
            }
        }
        tokio::select! {
            () = shutdown.cancelled() => {}
            () = tokio::time::sleep(POLL) => {}
        }
    }
}

impl LeaseEnds {
    /// A clock that leaps forward says nothing of leases that were taken before: their attempts may be on the wire, and would
    /// be made twice. When as much time has passed as a lease lasts, they have ended.
    ///
    /// Nor are leases taken over while this node has results that it could not record yet, or right after it stood still: what
    /// their attempts came to is written down first.
    fn have_ended(&self, lease: Duration) -> bool {
        let mut past = self.lock();
        let leapt = past.leaps.any();
        if leapt {
            tracing::warn!(wait = ?lease, "the clock was set forward; for so long no leases are taken over");
        }
        past.have_ended(lease, leapt, clock::stopwatch())
    }

    /// What an attempt came to could not be written down, and is tried again until this is dropped.
    pub(super) fn keep_result(&self) -> Kept<'_> {
        self.lock().kept += 1;
        Kept(self)
    }

    fn lock(&self) -> MutexGuard<'_, Past> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Past {
    fn have_ended(&mut self, lease: Duration, leapt: bool, now: Instant) -> bool {
        if leapt {
            self.leapt = Some(now);
        }
        if self.asked.replace(now).is_some_and(|asked| now - asked >= STOOD_STILL) {
            self.halted = Some(now);
        }
        let is_over = |since: Option<Instant>, wait| since.is_none_or(|since| now - since >= wait);
        is_over(self.leapt, lease) && is_over(self.halted, RECORDED) && self.kept == 0
    }
}

impl Drop for Kept<'_> {
    fn drop(&mut self) {
        self.0.lock().kept -= 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_answered_goes_before_what_is_taken_over() {
        const LEASE: Duration = Duration::from_secs(60);
        let leases = LeaseEnds::default();
        let began = clock::stopwatch();
        let at = |secs: f64| began + Duration::from_secs_f64(secs);
        let ended = |secs: f64, leapt| leases.lock().have_ended(LEASE, leapt, at(secs));
        assert!(ended(0.0, false) && ended(14.9, false));
        assert!(!ended(29.9, false), "it stood still");
        assert!(!ended(34.8, false) && ended(34.9, false));
        assert!(ended(45.0, false) && ended(57.0, false));

        let (one, other) = (leases.keep_result(), leases.keep_result());
        drop(one);
        assert!(!ended(58.0, false));
        drop(other);
        assert!(ended(59.0, false));

        assert!(!ended(60.0, true));
        assert!(
            (61..120).all(|secs| !ended(f64::from(secs), false)) && ended(120.0, false),
            "leases of before the leap"
        );
    }
}
