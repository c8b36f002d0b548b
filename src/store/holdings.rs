//! The books about what organisations hold of something that a node has only so much of.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::sync::Notify;

use super::Error;

/// Who holds how much.
#[derive(Default)]
pub(super) struct Holdings(Arc<Books>);

#[derive(Default)]
struct Books {
    held: Mutex<Held>,
    /// Rung when nobody holds anything.
    none: Notify,
}

#[derive(Default)]
struct Held {
    total: usize,
    /// Of those that hold any.
    organizations: HashMap<Arc<str>, usize>,
}

/// What one holds, until this is dropped.
pub(super) struct Holding {
    books: Arc<Books>,
    organization: Arc<str>,
    amount: usize,
}

impl Holdings {
    /// So much more for an organisation, when `judge` agrees, who is told what all hold together and what it holds of that.
    pub(super) fn take(
        &self,
        organization: &Arc<str>,
        amount: usize,
        judge: impl FnOnce(usize, usize) -> Result<(), Error>,
    ) -> Result<Holding, Error> {
        let mut held = self.0.lock();
        judge(held.total, held.organizations.get(organization).copied().unwrap_or(0))?;
        held.total += amount;
        *held.organizations.entry(Arc::clone(organization)).or_default() += amount;
        Ok(Holding { books: Arc::clone(&self.0), organization: Arc::clone(organization), amount })
    }

    /// What all hold together.
    pub(super) fn total(&self) -> usize {
        self.0.lock().total
    }

    /// Ends when nobody holds anything; dropping the call changes nothing.
    pub(super) async fn none(&self) {
        let mut none = std::pin::pin!(self.0.none.notified());
        // Before the look, so that what ends after it is heard.
        none.as_mut().enable();
        if self.total() > 0 {
            none.await;
        }
    }

    /// What all hold together, and how many do.
    #[cfg(test)]
    pub(super) fn sums(&self) -> (usize, usize) {
        let held = self.0.lock();
        (held.total, held.organizations.len())
    }
}

impl Drop for Holding {
    fn drop(&mut self) {
        let mut held = self.books.lock();
        held.total -= self.amount;
        if let Some(its) = held.organizations.get_mut(&self.organization) {
            *its -= self.amount;
            if *its == 0 {
                held.organizations.remove(&self.organization);
            }
        }
        if held.total == 0 {
            self.books.none.notify_waiters();
        }
    }
}

impl Books {
    fn lock(&self) -> MutexGuard<'_, Held> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
