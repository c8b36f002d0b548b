//! The delivery engine: takes leased deliveries from `store`, attempts them, and fetches what falls due.

mod attempt;
mod claim;
mod queue;

use std::{sync::Arc, time::Duration};

use tokio::{sync::mpsc, task::JoinSet};
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
    /// Works until `shutdown`; then finishes what is on the wire, for `grace` at most, and gives the rest back without
    /// using up an attempt.
    pub async fn run(self, shutdown: CancellationToken, grace: Duration) {
        let Some(mut ready) = self.store.ready() else { return };
        let claims = tokio::spawn(claim::run(self.store.clone(), self.request_timeout, shutdown.clone()));
        let mut queue = Queue::new(self.max_in_flight_per_webhook);
        let (freed, mut free) = mpsc::unbounded_channel::<String>();
        let mut running = JoinSet::new();
        while !shutdown.is_cancelled() {
            tokio::select! {
                () = shutdown.cancelled() => break,
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
        // Claims end first: what they have leased by then is in `ready`.
        let _ = claims.await;
        let mut unused = queue.drain();
        while let Ok(leased) = ready.try_recv() {
            unused.push(leased);
        }
        if let Err(error) = self.store.release(&unused).await {
            tracing::warn!(%error, count = unused.len(), "leases could not be given back; they will run out");
        }
        let finish = async { while running.join_next().await.is_some() {} };
        if tokio::time::timeout(grace, finish).await.is_err() {
            tracing::warn!(count = running.len(), "attempts were cut off; their leases will run out");
        }
    }

    fn take(&self, leased: Leased, queue: &mut Queue, running: &mut JoinSet<()>) {
        // Somebody waits for a test: it goes ahead of all others, and over their limit.
        if leased.done.is_some() {
            running.spawn(self.clone().attempt(leased, None));
        } else {
            queue.push(leased);
        }
    }

    fn start(&self, leased: Leased, running: &mut JoinSet<()>, freed: &mpsc::UnboundedSender<String>) {
        let slot = Slot::new(self.store.clone(), leased.webhook_id.clone(), freed.clone());
        running.spawn(self.clone().attempt(leased, Some(slot)));
    }
}
