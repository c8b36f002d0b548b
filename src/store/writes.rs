//! What the [`super::writer`] writes.

use std::sync::Arc;

use tokio::sync::oneshot;

use super::{
    Error, Store,
    leases::Release,
    publish::{Draft, Publish, Published, parts::Done},
    record::Finished,
};

/// Where the outcome of a write goes. Whoever left in the meantime misses only that: the write itself is done.
pub(super) type Answer<T> = oneshot::Sender<Result<T, Error>>;

/// Something to write.
pub(super) enum Write {
    Publish(Box<Publish>, Answer<Vec<Published>>),
    /// What goes on with a publish that is stored in parts.
    Draft(Box<Draft>, Done),
    /// Answered with whether the lease still held.
    Finish(Arc<Finished>, Answer<bool>),
    Release(Release, Answer<()>),
}

impl Write {
    /// Whether its caller was promised nothing yet, and waits.
    pub(super) fn may_be_refused(&self) -> bool {
        match self {
            Self::Publish(..) => true,
            Self::Draft(draft, _) => draft.is_whole(),
            Self::Finish(..) | Self::Release(..) => false,
        }
    }

    pub(super) fn organization(&self) -> Arc<str> {
        Arc::clone(match self {
            Self::Publish(publish, _) => publish.organization(),
            Self::Draft(draft, _) => draft.organization(),
            Self::Finish(finished, _) => finished.tenant.shared_organization(),
            Self::Release(release, _) => release.organization(),
        })
    }

    /// How much it is to write, in results or deliveries, as far as that is known.
    pub(super) fn weight(&self, store: &Store) -> usize {
        match self {
            Self::Publish(publish, _) => publish.weight(store.known_deliveries(publish.subscriptions())),
            Self::Draft(draft, _) => draft.weight(),
            Self::Finish(finished, _) => finished.weight(),
            Self::Release(..) => 1,
        }
    }
}
