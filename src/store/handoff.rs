//! How many deliveries this node holds in memory, in all and for each webhook: what it has leased and not finished.
//!
//! Publishing leases to the node only what there is room for. The rest stays in the database, due, until room comes
//! back: memory is bounded, and one slow receiver cannot fill it.

use std::{
    collections::HashMap,
    sync::{Mutex, PoisonError},
};

use tokio::sync::Notify;

/// The node holds at most this many deliveries; more wait in the database …
pub(super) const MAX_HELD: usize = 8_192;
/// … except that a webhook with fewer than this may go over it, so that those whose receivers hang, however many they
/// are, leave room for the others …
const RESERVED: usize = 8;
/// … up to this many in all.
const MAX_HELD_WITH_RESERVE: usize = 2 * MAX_HELD;
/// Of one webhook it holds at most this many.
pub(super) const MAX_HELD_PER_WEBHOOK: usize = 256;
/// It takes no more while the data of what it holds is longer than this.
const MAX_HELD_BYTES: usize = 64 * 1024 * 1024;

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
    bytes: usize,
    webhooks: HashMap<String, OfWebhook>,
}

#[derive(Default)]
struct OfWebhook {
    held: usize,
    /// Some of its deliveries had to stay in the database: newer ones must not overtake them for ever.
    waiting: bool,
}

impl Handoff {
    /// Takes a place for a new delivery of the webhook, of so many bytes; if there is none, it waits in the database.
    pub(crate) fn try_take(&self, webhook_id: &str, bytes: usize) -> bool {
        let mut held = self.lock();
        let room = held.room(webhook_id);
        let webhook = held.of(webhook_id);
        if webhook.waiting || room == 0 {
            webhook.waiting = true;
            return false;
        }
        webhook.held += 1;
        held.total += 1;
        held.bytes += bytes;
        true
    }

    /// Takes up to `wanted` places for deliveries that wait in the database.
    pub(crate) fn take_for_waiting(&self, webhook_id: &str, wanted: usize) -> usize {
        let mut held = self.lock();
        let taken = wanted.min(held.room(webhook_id));
        held.of(webhook_id).held += taken;
        held.total += taken;
        taken
    }

    /// Counts the data of deliveries that were fetched from the database.
    pub(crate) fn fetched(&self, bytes: usize) {
        self.lock().bytes += bytes;
    }

    /// A delivery of so many bytes is no longer held.
    pub(crate) fn let_go(&self, webhook_id: &str, bytes: usize) {
        let mut held = self.lock();
        held.bytes = held.bytes.saturating_sub(bytes);
        drop(held);
        self.give_back(webhook_id, 1);
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
        // At half, so that a long queue is fetched in large pieces; and where there was no room at all, at the first.
        if waiting && (left == MAX_HELD_PER_WEBHOOK / 2 || left < RESERVED) {
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
    /// How many more deliveries of the webhook may be held.
    fn room(&self, webhook_id: &str) -> usize {
        if self.bytes >= MAX_HELD_BYTES {
            return 0;
        }
        let held = self.webhooks.get(webhook_id).map_or(0, |webhook| webhook.held);
        let shared = MAX_HELD.saturating_sub(self.total).min(MAX_HELD_PER_WEBHOOK.saturating_sub(held));
        let reserve = MAX_HELD_WITH_RESERVE.saturating_sub(self.total).min(RESERVED.saturating_sub(held));
        shared.max(reserve)
    }

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
        let slow = (0..MAX_HELD).filter(|_| handoff.try_take("slow", 1)).count();
        assert_eq!(slow, MAX_HELD_PER_WEBHOOK);
        assert!(handoff.try_take("other", 1));
    }

    #[test]
    fn many_that_hang_leave_room_for_the_others() {
        let handoff = Handoff::default();
        for number in 0..MAX_HELD {
            while handoff.try_take(&format!("dead {}", number % 64), 1) {}
        }
        assert_eq!(handoff.lock().total, MAX_HELD + 64 * RESERVED - 32 * RESERVED);
        assert!(handoff.try_take("quiet", 1));
    }

    #[test]
    fn large_deliveries_fill_the_memory_sooner() {
        let handoff = Handoff::default();
        assert!(handoff.try_take("a", MAX_HELD_BYTES));
        assert!(!handoff.try_take("b", 1));
        handoff.let_go("a", MAX_HELD_BYTES);
        assert_eq!(handoff.take_for_waiting("b", 1), 1);
    }

    #[test]
    fn newer_deliveries_wait_behind_those_in_the_database() {
        let handoff = Handoff::default();
        while handoff.try_take("a", 1) {}
        handoff.give_back("a", 10);
        assert!(!handoff.try_take("a", 1));
        assert_eq!(handoff.take_for_waiting("a", 100), 10);
        handoff.caught_up("a");
        handoff.give_back("a", 1);
        assert!(handoff.try_take("a", 1));
    }
}
