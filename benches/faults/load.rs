//! Publishers at work, one in four of whom publishes many events together; with idempotency keys or without.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use shortkit_webhooks::clock;
use tokio::{sync::watch, task::JoinSet};

use crate::{
    ledger::Ledger,
    world::{Caller, ORGANIZATIONS, World},
};

/// One of so many publishers publishes together …
const ONE_IN: usize = 4;
/// … at most so many events: some of it is so large that it is kept first, and stored in parts.
const MAX_TOGETHER: u64 = 100;
/// Between two looks for a node that is there.
const NOBODY: Duration = Duration::from_millis(20);

/// Between two tries of what has a key …
const AGAIN: Duration = Duration::from_millis(200);
/// … after so many of which it is given up, which nothing here is to come to.
const MAX_TRIES: usize = 100;

/// Which publishes have an idempotency key.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Keys {
    None,
    EveryOther,
}

/// Publishers at work; they end when it is dropped.
pub(crate) struct Load {
    stop: watch::Sender<bool>,
    publishers: JoinSet<()>,
}

/// One of them.
struct Publisher {
    ledger: Arc<Ledger>,
    caller: Caller,
    organization: &'static str,
    together: bool,
    /// After each event.
    pause: Duration,
    keys: Keys,
    /// The next door, of all publishers.
    turn: Arc<AtomicUsize>,
}

impl Load {
    pub(crate) fn start(world: &World, count: usize, pause: Duration, keys: Keys) -> Self {
        let (stop, turn) = (watch::Sender::new(false), Arc::default());
        let mut publishers = JoinSet::new();
        for index in 0..count {
            let publisher = Publisher {
                ledger: Arc::clone(&world.ledger),
                caller: world.caller.clone(),
                // So that who publishes together is not always the same organisation.
                organization: ORGANIZATIONS[(index + index / ONE_IN) % ORGANIZATIONS.len()],
                together: index % ONE_IN == 0,
                pause,
                keys,
                turn: Arc::clone(&turn),
            };
            publishers.spawn(publisher.work(stop.subscribe()));
        }
        Self { stop, publishers }
    }

    /// Lets every publish under way end.
    pub(crate) async fn stop(self) {
        self.stop.send_replace(true);
        self.publishers.join_all().await;
    }
}

impl Publisher {
    async fn work(self, mut stopped: watch::Receiver<bool>) {
        let mut named = false;
        while !*stopped.borrow() {
            if !self.caller.is_open() {
                tokio::time::sleep(NOBODY).await;
                continue;
            }
            // Mostly few, sometimes many.
            let count = if self.together { 1 + below(1 + below(MAX_TOGETHER)) } else { 1 };
            named = self.keys == Keys::EveryOther && !named;
            self.publish(count, named).await;
            // As long as they would have taken one by one, so that scenarios choose how much is published.
            let pause = self.pause * u32::try_from(count).unwrap_or(1);
            let _ = tokio::time::timeout(pause, stopped.wait_for(|stop| *stop)).await;
        }
    }

    /// Publishes, and what has a key again and again until its outcome is known.
    async fn publish(&self, count: u64, named: bool) {
        let numbers = self.ledger.begin(self.organization, count);
        let key = named.then(|| format!("publish-{}", numbers.start));
        for _ in 0..MAX_TRIES {
            let door = self.turn.fetch_add(1, Ordering::Relaxed);
            let (organization, numbers) = (self.organization, numbers.clone());
            let answer = self.caller.publish_again(&self.ledger, door, organization, numbers, key.as_deref()).await;
            if key.is_none() || matches!(answer, Some((..500, _))) {
                return;
            }
            self.ledger.asked_again();
            tokio::time::sleep(AGAIN).await;
        }
        self.ledger.violation(format!("the outcome of {numbers:?}, which have a key, is not to be known"));
    }
}

/// A random number below `bound`.
pub(crate) fn below(bound: u64) -> u64 {
    u64::from_be_bytes(clock::random()) % bound
}
