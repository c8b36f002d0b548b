//! How many deliveries this node holds in memory, in all and for each webhook: what it has leased and not finished.
//!
//! Publishing leases to the node only what there is room for. The rest stays in the database, due, until room comes
//! back: memory is bounded, and one slow receiver cannot fill it.

use std::{
    collections::HashMap,
    sync::{Mutex, PoisonError},
};

use tokio::sync::Notify;

/// The node holds at most this many deliveries; more wait in the database.
pub(super) const MAX_HELD: usize = 8_192;
/// Of one webhook it holds at most this many.
pub(super) const MAX_HELD_PER_WEBHOOK: usize = 1_024;

/// The books about what is held.
#[derive(Default)]
pub(crate) struct Handoff {
    held: Mutex<Held>,
    /// Rung when something in the database may be due and there is room for it.
    pub(crate) due: Notify,
}

#[derive(Default)]
struct Held {
    total: usize,
    webhooks: HashMap<String, OfWebhook>,
}

#[derive(Default)]
struct OfWebhook {
    held: usize,
    /// Some of its deliveries had to stay in the database: newer ones must not overtake them for ever.
    waiting: bool,
}

impl Handoff {
    /// Takes a place for a new delivery of the webhook; if there is none, it waits in the database.
    pub(crate) fn try_take(&self, webhook_id: &str) -> bool {
        let mut held = self.lock();
        let full = held.total >= MAX_HELD;
        let webhook = held.of(webhook_id);
        if full || webhook.waiting || webhook.held >= MAX_HELD_PER_WEBHOOK {
            webhook.waiting = true;
            return false;
        }
        webhook.held += 1;
        held.total += 1;
        true
    }

    /// Takes up to `wanted` places for deliveries that wait in the database.
    pub(crate) fn take_for_waiting(&self, webhook_id: &str, wanted: usize) -> usize {
        let mut held = self.lock();
        let room = MAX_HELD.saturating_sub(held.total);
        let webhook = held.of(webhook_id);
        let taken = wanted.min(room).min(MAX_HELD_PER_WEBHOOK.saturating_sub(webhook.held));
        webhook.held += taken;
        held.total += taken;
        taken
    }

    /// Gives `places` back, because deliveries ended or none were found for them.
    pub(crate) fn give_back(&self, webhook_id: &str, places: usize) {
        let mut held = self.lock();
        held.total = held.total.saturating_sub(places);
        let webhook = held.of(webhook_id);
        webhook.held = webhook.held.saturating_sub(places);
        let (left, waiting) = (webhook.held, webhook.waiting);
        if left == 0 && !waiting {
            held.webhooks.remove(webhook_id);
        }
        drop(held);
        // At half, so that a long queue is fetched in large pieces.
        if waiting && (left == MAX_HELD_PER_WEBHOOK / 2 || left == 0) {
            self.due.notify_one();
        }
    }

    /// Nothing of the webhook is due in the database any more.
    pub(crate) fn caught_up(&self, webhook_id: &str) {
        let mut held = self.lock();
        let webhook = held.of(webhook_id);
        webhook.waiting = false;
        if webhook.held == 0 {
            held.webhooks.remove(webhook_id);
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Held> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Held {
    fn of(&mut self, webhook_id: &str) -> &mut OfWebhook {
        if !self.webhooks.contains_key(webhook_id) {
            self.webhooks.insert(webhook_id.to_owned(), OfWebhook::default());
        }
        self.webhooks.get_mut(webhook_id).expect("it was just put there")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_webhook_cannot_fill_the_memory() {
        let handoff = Handoff::default();
        let slow = (0..MAX_HELD).filter(|_| handoff.try_take("slow")).count();
        assert_eq!(slow, MAX_HELD_PER_WEBHOOK);
        assert!(handoff.try_take("other"));
    }

    #[test]
    fn newer_deliveries_wait_behind_those_in_the_database() {
        let handoff = Handoff::default();
        while handoff.try_take("a") {}
        handoff.give_back("a", 10);
        assert!(!handoff.try_take("a"));
        assert_eq!(handoff.take_for_waiting("a", 100), 10);
        handoff.caught_up("a");
        handoff.give_back("a", 1);
        assert!(handoff.try_take("a"));
    }
}
