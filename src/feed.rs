//! Live changes: a bell and a ring.
//!
//! Committing rings the bell, whatever the number of watchers; one task then reads the new changes once and puts them
//! into a bounded ring that every watcher reads at its own speed. A watcher that falls out of the ring is told so.

use std::sync::Arc;

use tokio::sync::{Notify, broadcast};

use crate::webhook::{Change, Tenant};

/// A watcher may be this many batches behind, each of at most 128 changes; then its stream ends and it resumes by its token.
const MAX_BEHIND: usize = 256;

/// Connects commits with watchers. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Feed {
    bell: Arc<Notify>,
    ring: broadcast::Sender<Batch>,
}

/// Changes that follow each other in the order of commits.
#[derive(Clone)]
pub(crate) struct Batch {
    /// Everything up to this place came before.
    pub(crate) after: i64,
    /// Everything up to this place has come now.
    pub(crate) upto: i64,
    /// What came in between.
    pub(crate) changes: Arc<[(Tenant, Change)]>,
}

impl Default for Feed {
    fn default() -> Self {
        Self { bell: Arc::default(), ring: broadcast::channel(MAX_BEHIND).0 }
    }
}

impl Feed {
    /// Says that changes were committed.
    pub(crate) fn announce(&self) {
        self.bell.notify_one();
    }

    /// Waits for [`Feed::announce`].
    pub(crate) async fn announced(&self) {
        self.bell.notified().await;
    }

    /// Whether anybody watches.
    pub(crate) fn is_watched(&self) -> bool {
        self.ring.receiver_count() > 0
    }

    /// Shows a batch to all watchers.
    pub(crate) fn send(&self, batch: Batch) {
        // Nobody watching is no error.
        let _ = self.ring.send(batch);
    }

    /// Watches from now on, and wakes the task that reads.
    pub(crate) fn subscribe(&self) -> broadcast::Receiver<Batch> {
        let receiver = self.ring.subscribe();
        self.announce();
        receiver
    }
}
