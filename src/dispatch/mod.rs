//! The delivery engine: takes leased deliveries from `store`, attempts them, and fetches what falls due.

mod attempt;
mod claim;
mod order;
mod pace;
mod queue;
mod shares;

use std::{sync::Arc, time::Duration};

use tokio::{
    sync::mpsc,
    task::{JoinHandle, JoinSet},
};
use tokio_util::sync::CancellationToken;

pub use self::claim::LeaseEnds;
use self::{
    attempt::{Freed, Place, RECORD_AGAIN, Slot},
    queue::Queue,
    shares::Shares,
};
use crate::{
    egress,
    store::{Leased, Store},
    webhook::RetrySchedule,
};

/// Attempts that begin before everything else has a turn: one takes a tenth of a millisecond, and an event for many
/// webhooks, or many deliveries that are due at the same moment, are not to make others wait for all of theirs.
const MAX_STARTS: usize = 16;
/// A lease outlasts the request by this much: time to queue, and to record the result.
const LEASE_MARGIN: Duration = Duration::from_secs(30);

/// What the engine works with.
pub struct Engine {
    /// Where deliveries come from and results go.
    pub store: Store,
    /// The door to the receivers.
    pub client: egress::Client,
    /// When failed attempts are made again.
    pub schedule: RetrySchedule,
    /// How long one request may take.
    pub request_timeout: Duration,
    /// Attempts under way to one webhook at a time.
    pub max_in_flight_per_webhook: usize,
    /// How many files this process may have open, of which each attempt under way is one.
    pub open_files: usize,
    /// What is known of leases that run out.
    pub leases: LeaseEnds,
}

/// How long a lease is for requests that may take `request_timeout`.
pub fn lease_length(request_timeout: Duration) -> Duration {
    request_timeout + LEASE_MARGIN
}

impl Engine {
    /// Works until `stopping`, when it gives back what is not on the wire, without using up an attempt. What is on the
    /// wire finishes, and test events still go out, until `calls_ended`. The whole end takes at most `grace`.
    pub async fn run(self: Arc<Self>, stopping: CancellationToken, calls_ended: CancellationToken, grace: Duration) {
        let Some(mut ready) = self.store.ready() else { return };
        let mut claims = tokio::spawn(claim::run(Arc::clone(&self), stopping.clone()));
        let shares = Shares::new(self.max_in_flight_per_webhook, self.open_files);
        if shares.are_few() {
            let (open_files, attempts) = (self.open_files, shares.places);
            tracing::warn!(
                open_files,
                attempts,
                "few attempts may be under way; raise the limit of open files (ulimit -n)"
            );
        }
        let mut queue = Queue::new(shares);
        let (freed, mut free) = mpsc::unbounded_channel();
        let (mut running, mut more) = (JoinSet::new(), false);
        while !stopping.is_cancelled() {
            if !more {
                tokio::select! {
                    () = stopping.cancelled() => break,
                    _ = &mut claims => {
                        if !stopping.is_cancelled() {
                            // By a fault. Nothing would be retried or rescued any more: this ends, and the server by it.
                            return;
                        }
                    }
                    Some(leased) = ready.recv() => self.take(leased, &mut queue, &mut running),
                    Some(freed) = free.recv() => self.free(&freed, &mut queue),
                    Some(ended) = running.join_next() => log_panic(ended),
                }
            }
            // Everything that is there has its place in the order before the next one starts.
            while let Ok(leased) = ready.try_recv() {
                self.take(leased, &mut queue, &mut running);
            }
            while let Ok(freed) = free.try_recv() {
                self.free(&freed, &mut queue);
            }
            while let Some(ended) = running.try_join_next() {
                log_panic(ended);
            }
            more = false;
            for _ in 0..MAX_STARTS {
                let next = queue.pop();
                more = next.is_some();
                let Some((line, leased)) = next else { break };
                let place = (Slot::new(line, freed.clone()), Place::new(self.store.clone(), &leased));
                running.spawn(Arc::clone(&self).attempt(leased, Some(place)));
            }
            if more {
                tokio::task::yield_now().await;
            }
        }
        // Leases that are being given back.
        let mut unused = 0;
        let finish = self.finish(ready, claims, &mut queue, &mut running, &mut unused, calls_ended);
        if tokio::time::timeout(grace, finish).await.is_err() {
            while let Some(ended) = running.try_join_next() {
                log_panic(ended);
            }
            let (attempts, leases) = (running.len(), unused + queue.drain().len());
            tracing::warn!(
                attempts,
                leases,
                "attempts were cut off, or leases not given back; their leases will run out"
            );
        }
    }

    async fn finish(
        self: &Arc<Self>,
        mut ready: mpsc::UnboundedReceiver<Leased>,
        mut claims: JoinHandle<()>,
        queue: &mut Queue<Leased>,
        running: &mut JoinSet<()>,
        unused: &mut usize,
        calls_ended: CancellationToken,
    ) {
        // One at a time, beside what goes on: a database that fails does not keep tests from going out.
        let (mut release, mut ended) = (JoinSet::new(), false);
        loop {
            // What was claimed last is in `ready` when the claims have ended, what was published last when the calls have.
            let claimed = claims.is_finished();
            while let Ok(leased) = ready.try_recv() {
                self.take(leased, queue, running);
            }
            if release.is_empty() {
                let leases = queue.drain();
                *unused = leases.len();
                if !leases.is_empty() {
                    release.spawn(Arc::clone(self).give_back_all(leases));
                } else if claimed && ended {
                    break;
                }
            }
            tokio::select! {
                _ = &mut claims, if !claimed => {}
                // Calls that are still open may publish, and wait for a test; and a caller that left may have left parts
                // behind, which are stored as leased to this node.
                () = async { calls_ended.cancelled().await; self.store.all_published().await }, if !ended => ended = true,
                Some(leased) = ready.recv() => self.take(leased, queue, running),
                Some(ended) = running.join_next() => log_panic(ended),
                Some(released) = release.join_next() => log_panic(released),
            }
        }
        while let Some(ended) = running.join_next().await {
            log_panic(ended);
        }
    }

    /// Gives leases back in one commit. When it fails they are all tried again: whether it was done is not known, and a lease
    /// that was given back is not there a second time.
    async fn give_back_all(self: Arc<Self>, unused: Vec<Leased>) {
        while let Err(error) = self.store.release(&unused).await {
            tracing::warn!(%error, count = unused.len(), "leases could not be given back; trying again");
            tokio::time::sleep(RECORD_AGAIN).await;
        }
    }

    fn take(self: &Arc<Self>, leased: Leased, queue: &mut Queue<Leased>, running: &mut JoinSet<()>) {
        // Somebody waits for a test: it goes ahead of all others, and over their limit.
        if leased.done.is_some() {
            running.spawn(Arc::clone(self).attempt(leased, None));
        } else {
            let (tenant, webhook_id) = (leased.tenant.clone(), Arc::clone(&leased.webhook_id));
            queue.push(tenant.organization(), &webhook_id, leased);
        }
    }

    /// A place on the wire is free.
    fn free(&self, freed: &Freed, queue: &mut Queue<Leased>) {
        let (webhook_id, worth_holding) = queue.finished(freed.line, freed.ended);
        self.store.worth_holding(&webhook_id, worth_holding);
    }
}

fn log_panic(ended: Result<(), tokio::task::JoinError>) {
    if let Err(error) = ended {
        tracing::error!(%error, "an attempt ended the hard way; its lease will run out");
    }
}
