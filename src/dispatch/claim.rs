//! Fetches what falls due, and what dead nodes left.

use std::time::{Duration, Instant};

use tokio_util::sync::CancellationToken;

use super::{Engine, lease_length};
use crate::{
    clock,
    store::{Error, Store},
    webhook::RetrySchedule,
};

/// How often the database is looked at for what other nodes left to do.
const POLL: Duration = Duration::from_secs(1);

/// After looking, nothing is looked for during this many times as long: looking costs more the more webhooks wait, and
/// every attempt that ends may ring the bell.
const REST: u32 = 8;

/// Claims until `shutdown`. A database that fails is asked again after [`POLL`].
pub(super) async fn run(engine: Engine, shutdown: CancellationToken) {
    let Engine { store, schedule, request_timeout, .. } = engine;
    let mut rescued = None;
    while !shutdown.is_cancelled() {
        // Leases run out by the clock, not by what happens here: looking once in a while is enough.
        let rescue = rescued.is_none_or(|at: Instant| at.elapsed() >= POLL);
        if rescue {
            rescued = Some(clock::stopwatch());
        }
        let began = clock::stopwatch();
        let wait = match round(&store, rescue.then_some(&*schedule), lease_length(request_timeout)).await {
            Ok(wait) => wait.min(POLL),
            Err(error) => {
                tracing::warn!(%error, "due deliveries could not be claimed; trying again");
                POLL
            }
        };
        if wait.is_zero() {
            continue;
        }
        let rest = (began.elapsed() * REST).min(POLL / 5);
        tokio::select! {
            () = shutdown.cancelled() => {}
            () = async {
                tokio::time::sleep(rest).await;
                store.due().await;
            } => {}
            () = tokio::time::sleep(wait.max(rest)) => {}
        }
    }
}

/// Claims what is due and there is room for; answers how long nothing more will be.
async fn round(store: &Store, rescue: Option<&RetrySchedule>, lease: Duration) -> Result<Duration, Error> {
    let mut rescued = 0;
    if let Some(schedule) = rescue {
        // A node that is gone may have held thousands, and one step takes only so many.
        while let more @ 1.. = store.rescue(false, schedule).await? {
            rescued += more;
        }
    }
    if rescued > 0 {
        tracing::warn!(count = rescued, "deliveries of a node that is gone were taken over");
    }
    let waiting = store.waiting().await?;
    let now = clock::now();
    if store.claim(&waiting, now, lease).await? {
        return Ok(Duration::ZERO);
    }
    // What is due and was not claimed has no room: freeing some rings the bell.
    let next = waiting.iter().map(|webhook| webhook.due_at).filter(|due_at| *due_at > now).min();
    Ok(next.map_or(POLL, |due_at| now.until(due_at)))
}
