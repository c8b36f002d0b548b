//! The delivery engine: takes leased deliveries from `store`, attempts them, and fetches what falls due.

mod attempt;
mod claim;
mod queue;

use std::{sync::Arc, time::Duration};

use tokio::{
    sync::mpsc,
    task::{JoinHandle, JoinSet},
};
use tokio_util::sync::CancellationToken;

use self::{attempt::Slot, queue::Queue};
use crate::{
    egress,
    store::{Leased, Store},
    webhook::RetrySchedule,
};

/// Attempts under way on this node, whatever the number of webhooks; more wait in the queue.
const MAX_IN_FLIGHT: usize = 2_048;
/// A lease outlasts the request by this much: time to queue, and to record the result.
const LEASE_MARGIN: Duration = Duration::from_secs(30);

/// What the engine works with.
#[derive(Clone)]
pub struct Engine {
    /// Where deliveries come from and results go.
    pub store: Store,
    /// The door to the receivers.
    pub client: egress::Client,
    /// When failed attempts are made again.
    pub schedule: Arc<RetrySchedule>,
    /// How long one request may take.
    pub request_timeout: Duration,
    /// Attempts under way to one webhook at a time.
    pub max_in_flight_per_webhook: usize,
}

/// How long a lease is for requests that may take `request_timeout`.
pub fn lease_length(request_timeout: Duration) -> Duration {
    request_timeout + LEASE_MARGIN
}

impl Engine {
    /// Works until `stopping`, when it gives back what is not on the wire, without using up an attempt. What is on the
    /// wire finishes, and test events still go out, until `calls_ended`. The whole end takes at most `grace`.
    pub async fn run(self, stopping: CancellationToken, calls_ended: CancellationToken, grace: Duration) {
        let Some(mut ready) = self.store.ready() else { return };
        let claims = tokio::spawn(claim::run(self.clone(), stopping.clone()));
        let mut queue = Queue::new(self.max_in_flight_per_webhook);
        let (freed, mut free) = mpsc::unbounded_channel::<Arc<str>>();
        let mut running = JoinSet::new();
        while !stopping.is_cancelled() {
            tokio::select! {
                () = stopping.cancelled() => break,
                Some(leased) = ready.recv() => self.take(leased, &mut queue, &mut running),
                Some(webhook_id) = free.recv() => queue.finished(&webhook_id),
                Some(ended) = running.join_next() => if let Err(error) = ended {
                    tracing::error!(%error, "an attempt ended the hard way; its lease will run out");
                },
            }
            while running.len() < MAX_IN_FLIGHT
                && let Some(leased) = queue.pop()
            {
                self.start(leased, &mut running, &freed);
            }
        }
        let finish = self.finish(ready, claims, queue, &mut running, calls_ended);
        if tokio::time::timeout(grace, finish).await.is_err() {
            tracing::warn!(count = running.len(), "attempts were cut off; their leases will run out");
        }
    }

    async fn finish(
        &self,
        mut ready: mpsc::UnboundedReceiver<Leased>,
        claims: JoinHandle<()>,
        mut queue: Queue,
        running: &mut JoinSet<()>,
        calls_ended: CancellationToken,
    ) {
        // What was claimed last is in `ready` when the claims have ended.
        let _ = claims.await;
        let mut ended = false;
        loop {
            while let Ok(leased) = ready.try_recv() {
                self.take(leased, &mut queue, running);
            }
            let unused = queue.drain();
            if let Err(error) = self.store.release(&unused).await {
                tracing::warn!(%error, count = unused.len(), "leases could not be given back; they will run out");
            }
            if ended {
                break;
            }
            // Calls that are still open may publish, and wait for a test.
            tokio::select! {
                () = calls_ended.cancelled() => ended = true,
                Some(leased) = ready.recv() => self.take(leased, &mut queue, running),
            }
        }
        while running.join_next().await.is_some() {}
    }

    fn take(&self, leased: Leased, queue: &mut Queue, running: &mut JoinSet<()>) {
        // Somebody waits for a test: it goes ahead of all others, and over their limit.
        if leased.done.is_some() {
            running.spawn(self.clone().attempt(leased, None));
        } else {
            queue.push(leased);
        }
    }

    fn start(&self, leased: Leased, running: &mut JoinSet<()>, freed: &mpsc::UnboundedSender<Arc<str>>) {
        let slot = Slot::new(self.store.clone(), &leased, freed.clone());
        running.spawn(self.clone().attempt(leased, Some(slot)));
    }
}
