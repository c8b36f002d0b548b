//! The books about what organisations hold of something that a node has only so much of.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use super::Error;

/// Who holds how much.
#[derive(Default)]
pub(super) struct Holdings(Arc<Mutex<Held>>);

#[derive(Default)]
struct Held {
    total: usize,
    /// Of those that hold any.
    organizations: HashMap<Arc<str>, usize>,
}

/// What one holds, until this is dropped.
pub(super) struct Holding {
    held: Arc<Mutex<Held>>,
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
        let mut held = lock(&self.0);
        judge(held.total, held.organizations.get(organization).copied().unwrap_or(0))?;
        held.total += amount;
        *held.organizations.entry(Arc::clone(organization)).or_default() += amount;
        Ok(Holding { held: Arc::clone(&self.0), organization: Arc::clone(organization), amount })
    }

    /// What all hold together.
    pub(super) fn total(&self) -> usize {
        lock(&self.0).total
    }

    /// What all hold together, and how many do.
    #[cfg(test)]
    pub(super) fn sums(&self) -> (usize, usize) {
        let held = lock(&self.0);
        (held.total, held.organizations.len())
    }
}

impl Drop for Holding {
    fn drop(&mut self) {
        let mut held = lock(&self.held);
        held.total -= self.amount;
        if let Some(its) = held.organizations.get_mut(&self.organization) {
            *its -= self.amount;
            if *its == 0 {
                held.organizations.remove(&self.organization);
            }
        }
    }
}

fn lock(held: &Mutex<Held>) -> MutexGuard<'_, Held> {
    held.lock().unwrap_or_else(PoisonError::into_inner)
}
