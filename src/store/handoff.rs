//! How many deliveries this node holds in memory, in all and for each webhook: what it has leased and not finished.
//!
//! Publishing leases to the node only what there is room for. The rest stays in the database, due, until room comes
//! back: memory is bounded, and slow receivers, however many, cannot fill it. What is held is counted in places of
//! [`PLACE_BYTES`]; a longer delivery takes several.
//!
//! A webhook may take places while it has fewer than a share of the *free* ones, so that some are always left for those
//! that come new (the rule of dynamic thresholds, see `dispatch/shares.rs`), and fewer than the engine finds worth
//! holding: what cannot be attempted soon would only let its lease run out. One that holds few may take a place over the
//! limit, up to a hard one. By the same rule an organisation has fewer than are free, so that its webhooks, however many hang,
//! leave half of all places to others.
//!
//! Whoever leaves something in the database says so here, so that the engine need not look for it.

use std::{
    collections::{HashMap, VecDeque},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::sync::Notify;

use super::waiting::Waiting;

/// The node holds deliveries of at most this many places; more wait in the database …
pub(super) const MAX_HELD: usize = 8_192;
/// … except that a webhook with fewer than this may go over it …
const FEW: usize = 8;
/// … up to this many in all …
const MAX_HELD_WITH_FEW: usize = 2 * MAX_HELD;
/// … of which the last are for what waits in the database: new deliveries, which come at any time, would take them all.
const FOR_WAITING: usize = 128;
/// Of one webhook it holds at most this many, when its receiver is known to take them quickly …
pub(super) const MAX_HELD_PER_WEBHOOK: usize = 1_024;
/// … and this many, when it is not …
const MAX_HELD_UNPROVEN: usize = 256;
/// … and fewer than the free ones divided by how many webhooks could have as many as they may.
const fn free_per_held(worth: usize) -> usize {
    MAX_HELD / if worth > MAX_HELD_UNPROVEN { MAX_HELD_PER_WEBHOOK } else { MAX_HELD_UNPROVEN }
}
/// An organisation that has fewer is not limited.
const MIN_PER_ORGANIZATION: usize = 64;
/// Deliveries are fetched from the database when at least one in so many of the places that their webhook may have is free.
const PLACES_PER_FETCH: usize = 8;
/// Data of so many bytes is in one place.
const PLACE_BYTES: usize = 8 * 1024;

/// The books about what is held.
#[derive(Default)]
pub(crate) struct Handoff {
    held: Mutex<Held>,
    news: Mutex<News>,
    /// Rung when there is news, or room for something in the database that is known to be due.
    pub(crate) due: Notify,
}

/// What has changed about what waits in the database since somebody asked.
#[derive(Debug, Default)]
pub struct News {
    /// What this node left there, with the time of the earliest: no more than there are webhooks.
    pub waiting: HashMap<Arc<str>, Waiting>,
    /// Webhooks for which there was no room, and is again.
    pub room: Vec<Arc<str>>,
}

#[derive(Default)]
struct Held {
    total: usize,
    webhooks: HashMap<String, OfWebhook>,
    organizations: HashMap<Arc<str>, OfOrganization>,
    /// Whether the bell is to be rung when anybody may have a place.
    wanted: bool,
}

#[derive(Default)]
struct OfOrganization {
    held: usize,
    /// Webhooks for which it had no room, and the bell is to be rung when it has.
    aside: VecDeque<String>,
}

struct OfWebhook {
    organization: Arc<str>,
    held: usize,
    /// How many are worth holding.
    worth: usize,
    /// Some of its deliveries had to stay in the database: newer ones must not overtake them for ever.
    waiting: bool,
    /// Whether the bell is to be rung for it.
    wanted: bool,
    /// Whether its organisation has put it aside.
    aside: bool,
}

/// How many places data takes.
fn places(bytes: usize) -> usize {
    1 + bytes / PLACE_BYTES
}

impl Handoff {
    /// Takes places for a new delivery of the webhook, of so many bytes; if there are none, it waits in the database.
    pub(crate) fn try_take(&self, organization: &Arc<str>, webhook_id: &str, bytes: usize) -> bool {
        let mut held = self.lock();
        let room = held.room(organization, webhook_id);
        let webhook = held.of(organization, webhook_id);
        if webhook.waiting || room == 0 {
            webhook.waiting = true;
            return false;
        }
        held.take(webhook_id, places(bytes));
        true
    }

    /// Places that are taken.
    pub(crate) fn held(&self) -> usize {
        self.lock().total
    }

    /// Whether there is no place for anything that waits in the database, until the bell is rung.
    pub(crate) fn is_full(&self) -> bool {
        let mut held = self.lock();
        held.wanted = held.total >= MAX_HELD_WITH_FEW;
        held.wanted
    }

    /// Takes up to `most` places for deliveries that wait in the database, unless [`Handoff::is_full`]. If there are none for
    /// this webhook, which holds some then, its newer ones wait as well, and the bell is rung for it when there are again.
    pub(crate) fn take_for_waiting(&self, organization: &Arc<str>, webhook_id: &str, most: usize) -> usize {
        let mut held = self.lock();
        let its_own = held.room_to_fetch(webhook_id);
        let taken = its_own.min(held.room_within(organization)).min(most);
        let webhook = held.of(organization, webhook_id);
        if taken == 0 {
            webhook.waiting = true;
            webhook.wanted |= its_own == 0;
            if its_own > 0 && !std::mem::replace(&mut webhook.aside, true) {
                held.organizations.entry(Arc::clone(organization)).or_default().aside.push_back(webhook_id.to_owned());
            }
        }
        held.take(webhook_id, taken);
        taken
    }

    /// A delivery of so many bytes was fetched into a place, and takes more when it is long.
    pub(crate) fn fetched(&self, webhook_id: &str, bytes: usize) {
        let more = places(bytes) - 1;
        if more > 0 {
            self.lock().take(webhook_id, more);
        }
    }

    /// A delivery of so many bytes is no longer held.
    pub(crate) fn let_go(&self, webhook_id: &str, bytes: usize) {
        self.give_back(webhook_id, places(bytes));
    }

    /// Learns how many deliveries of a webhook are worth holding. Remembered while some are held or wait.
    pub(crate) fn learn(&self, webhook_id: &str, worth: usize) {
        if let Some(webhook) = self.lock().webhooks.get_mut(webhook_id) {
            webhook.worth = worth.clamp(1, MAX_HELD_PER_WEBHOOK);
        }
    }

    /// Gives `places` back, because deliveries ended or none were found for them.
    pub(crate) fn give_back(&self, webhook_id: &str, places: usize) {
        let mut held = self.lock();
        let room = held.give_back(webhook_id, places);
        let any = held.total < MAX_HELD_WITH_FEW && std::mem::take(&mut held.wanted);
        drop(held);
        let has_room = !room.is_empty();
        if has_room {
            self.lock_news().room.extend(room);
        }
        if has_room || any {
            self.due.notify_one();
        }
    }

    /// These wait in the database.
    pub(crate) fn tell(&self, all: impl IntoIterator<Item = Waiting>) {
        let mut all = all.into_iter().peekable();
        if all.peek().is_some() {
            let mut news = self.lock_news();
            all.for_each(|waiting| waiting.add_to(&mut news.waiting));
            drop(news);
            self.due.notify_one();
        }
    }

    /// What was told since the last time.
    pub(crate) fn news(&self) -> News {
        std::mem::take(&mut self.lock_news())
    }

    /// There is more of the webhook, which holds some, in the database than there are places.
    pub(crate) fn waits(&self, webhook_id: &str) {
        if let Some(webhook) = self.lock().webhooks.get_mut(webhook_id) {
            webhook.waiting = true;
        }
    }

    /// Nothing of the webhook is due in the database any more.
    pub(crate) fn caught_up(&self, webhook_id: &str) {
        let mut held = self.lock();
        if let Some(webhook) = held.webhooks.get_mut(webhook_id) {
            (webhook.waiting, webhook.wanted) = (false, false);
            if webhook.held == 0 {
                held.webhooks.remove(webhook_id);
            }
        }
    }

    /// As far as a look could see, of all webhooks only these have something in the database: what another node took, or
    /// went with its webhook, is not waited for.
    pub(crate) fn only_these_wait(&self, waits: impl Fn(&str) -> bool) {
        self.lock().webhooks.retain(|webhook_id, webhook| {
            webhook.waiting &= waits(webhook_id);
            webhook.wanted &= webhook.waiting;
            webhook.waiting || webhook.held > 0
        });
    }

    fn lock(&self) -> MutexGuard<'_, Held> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock_news(&self) -> MutexGuard<'_, News> {
        self.news.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Held {
    /// How many more places the webhook may take for a new delivery.
    fn room(&self, organization: &str, webhook_id: &str) -> usize {
        const MOST: usize = MAX_HELD_WITH_FEW - FOR_WAITING;
        let few = if self.total < MOST { FEW } else { 0 };
        let (held, most) = self.held_and_most(webhook_id, few);
        most.saturating_sub(held).min(self.room_within(organization))
    }

    /// How many more it may take for those that wait in the database, when it is worth a statement: a long queue is fetched
    /// in large pieces. Some, whenever it holds none, if its organisation has room.
    fn room_to_fetch(&self, webhook_id: &str) -> usize {
        let (held, most) = self.held_and_most(webhook_id, FEW);
        let room = most.saturating_sub(held);
        if room >= most / PLACES_PER_FETCH { room } else { 0 }
    }

    /// How many places it has, and may have, which is at least `few` if it is worth it.
    fn held_and_most(&self, webhook_id: &str, few: usize) -> (usize, usize) {
        let (held, worth) =
            self.webhooks.get(webhook_id).map_or((0, MAX_HELD_UNPROVEN), |webhook| (webhook.held, webhook.worth));
        let free = MAX_HELD.saturating_sub(self.total);
        (held, (free / free_per_held(worth)).max(few).min(worth))
    }

    /// How many more places an organisation may take.
    fn room_within(&self, organization: &str) -> usize {
        let held = self.organizations.get(organization).map_or(0, |organization| organization.held);
        MAX_HELD.saturating_sub(self.total).max(MIN_PER_ORGANIZATION).saturating_sub(held)
    }

    fn of(&mut self, organization: &Arc<str>, webhook_id: &str) -> &mut OfWebhook {
        if !self.webhooks.contains_key(webhook_id) {
            let (organization, worth) = (Arc::clone(organization), MAX_HELD_UNPROVEN);
            let new = OfWebhook { organization, held: 0, worth, waiting: false, wanted: false, aside: false };
            self.webhooks.insert(webhook_id.to_owned(), new);
        }
        self.webhooks.get_mut(webhook_id).expect("it was just put there")
    }

    fn take(&mut self, webhook_id: &str, places: usize) {
        let Some(webhook) = self.webhooks.get_mut(webhook_id).filter(|_| places > 0) else { return };
        webhook.held += places;
        self.total += places;
        match self.organizations.get_mut(&webhook.organization) {
            Some(organization) => organization.held += places,
            None => {
                let new = OfOrganization { held: places, ..OfOrganization::default() };
                self.organizations.insert(Arc::clone(&webhook.organization), new);
            }
        }
    }

    /// Answers for which webhooks there is room by it.
    fn give_back(&mut self, webhook_id: &str, places: usize) -> Vec<Arc<str>> {
        let Some(webhook) = self.webhooks.get_mut(webhook_id) else { return Vec::new() };
        let places = places.min(webhook.held);
        webhook.held -= places;
        self.total -= places;
        let (wanted, done) = (webhook.wanted, webhook.held == 0 && !webhook.waiting);
        let organization = Arc::clone(&webhook.organization);
        let mut room = self.room_in_organization(&organization, places);
        if wanted && self.room_to_fetch(webhook_id) > 0 {
            if let Some(webhook) = self.webhooks.get_mut(webhook_id) {
                webhook.wanted = false;
            }
            room.push(webhook_id.into());
        }
        if done {
            self.webhooks.remove(webhook_id);
        }
        room
    }

    /// An organisation has so many places less: which of the webhooks that it put aside may have them.
    fn room_in_organization(&mut self, name: &str, places: usize) -> Vec<Arc<str>> {
        let Some(organization) = self.organizations.get_mut(name) else { return Vec::new() };
        organization.held = organization.held.saturating_sub(places);
        let (is_empty, aside) = (organization.held == 0, organization.aside.len());
        // All, when it has nothing left whose end could ring for the others.
        let most = if is_empty { aside } else { self.room_within(name).min(places).min(aside) };
        let Some(organization) = self.organizations.get_mut(name) else { return Vec::new() };
        let rung: Vec<String> = organization.aside.drain(..most).collect();
        if is_empty {
            self.organizations.remove(name);
        }
        let mut is_there = |webhook_id: &str| {
            let webhook = self.webhooks.get_mut(webhook_id);
            webhook.map(|webhook| webhook.aside = false).is_some()
        };
        rung.into_iter().filter(|webhook_id| is_there(webhook_id)).map(Arc::from).collect()
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;
    use proptest::prelude::*;

    use super::*;

    /// For a webhook of an organisation of its own.
    fn try_take(handoff: &Handoff, webhook_id: &str, bytes: usize) -> bool {
        handoff.try_take(&webhook_id.into(), webhook_id, bytes)
    }

    fn take_for_waiting(handoff: &Handoff, webhook_id: &str, most: usize) -> usize {
        handoff.take_for_waiting(&webhook_id.into(), webhook_id, most)
    }

    fn fill(handoff: &Handoff, webhook_id: &str) -> usize {
        std::iter::from_fn(|| try_take(handoff, webhook_id, 1).then_some(())).count()
    }

    #[test]
    fn one_webhook_cannot_fill_the_memory() {
        let handoff = Handoff::default();
        let slow = fill(&handoff, "slow");
        assert!((200..=MAX_HELD_UNPROVEN).contains(&slow), "{slow}");
        assert!(try_take(&handoff, "other", 1));
    }

    #[test]
    fn a_quick_receiver_may_have_more() {
        let handoff = Handoff::default();
        assert!(try_take(&handoff, "quick", 1));
        handoff.learn("quick", 10_000);
        assert!((800..MAX_HELD_PER_WEBHOOK).contains(&fill(&handoff, "quick")));
    }

    #[test]
    fn many_that_hang_leave_room_for_the_others() {
        for (count, left) in [(64, 32), (1_000, FEW), (20_000, 0)] {
            let handoff = Handoff::default();
            for number in 0..count {
                fill(&handoff, &format!("dead {number}"));
            }
            let other = fill(&handoff, "other");
            assert!(other >= left, "{other} beside {count}");
            assert!(handoff.lock().total < MAX_HELD_WITH_FEW + FEW);
        }
    }

    #[test]
    fn one_organisation_leaves_half_to_the_others() {
        let handoff = Handoff::default();
        let (large, other) = (Arc::from("large"), Arc::from("other"));
        let webhooks: Vec<String> = (0..20_000).map(|number| format!("dead {number}")).collect();
        let held = webhooks.iter().filter(|webhook_id| handoff.try_take(&large, webhook_id, 1)).count();
        assert_eq!(held, MAX_HELD / 2);
        assert!(handoff.try_take(&other, "quick", 1));
        handoff.learn("quick", 10_000);
        let quick = std::iter::from_fn(|| handoff.try_take(&other, "quick", 1).then_some(())).count();
        assert!(quick > 400, "{quick}");
        handoff.give_back("quick", quick + 1);
        let others = (0..200).map(|number| number.to_string()).collect::<Vec<_>>();
        assert!(others.iter().all(|webhook_id| (0..FEW).all(|_| handoff.try_take(&other, webhook_id, 1))));

        // Those that it has no room for are rung for as it has, and all of them when nothing of it is held any more.
        let rung = || handoff.due.notified().now_or_never().map(|()| handoff.news().room).unwrap_or_default();
        let (held, aside) = webhooks.split_at(held);
        for webhook_id in aside.iter().chain(aside) {
            assert_eq!(handoff.take_for_waiting(&large, webhook_id, 1), 0);
        }
        assert!(rung().is_empty());
        let room = |given_back: &str| -> usize {
            handoff.let_go(given_back, 1);
            rung().len()
        };
        let mut rings: Vec<usize> = held.iter().map(|webhook_id| room(webhook_id)).collect();
        let last = rings.pop().unwrap();
        assert!(rings.iter().all(|rung| *rung <= 1), "one for each that ends");
        assert_eq!(rings.iter().sum::<usize>() + last, aside.len(), "each once");
        assert!(!handoff.lock().organizations.contains_key(&large));
    }

    #[test]
    fn no_more_is_held_than_is_worth_it() {
        let handoff = Handoff::default();
        fill(&handoff, "slow");
        handoff.learn("slow", 3);
        handoff.give_back("slow", 200);
        let left = handoff.lock().webhooks["slow"].held;
        assert_eq!(take_for_waiting(&handoff, "slow", 100), 0);
        handoff.give_back("slow", left);
        assert_eq!(take_for_waiting(&handoff, "slow", 100), 3);
    }

    #[test]
    fn large_deliveries_fill_the_memory_sooner() {
        let handoff = Handoff::default();
        let large = std::iter::from_fn(|| try_take(&handoff, "a", 1024 * 1024).then_some(())).count();
        assert_eq!(large, 2, "129 places each");
        assert!(try_take(&handoff, "b", 1024 * 1024), "which keeps nobody else off");
        (0..large).for_each(|_| handoff.let_go("a", 1024 * 1024));
        assert!(handoff.lock().total == places(1024 * 1024));
    }

    #[test]
    fn newer_deliveries_wait_behind_those_in_the_database() {
        let handoff = Handoff::default();
        fill(&handoff, "a");
        handoff.give_back("a", 40);
        assert!(!try_take(&handoff, "a", 1));
        assert!(matches!(take_for_waiting(&handoff, "a", 100), 40..=42));
        handoff.caught_up("a");
        handoff.give_back("a", 3);
        assert!(try_take(&handoff, "a", 1));
    }

    #[test]
    fn who_waits_for_nothing_is_forgotten() {
        let handoff = Handoff::default();
        for webhook_id in ["deleted", "taken by others", "waiting"] {
            take_for_waiting(&handoff, webhook_id, 1);
            handoff.waits(webhook_id);
        }
        ["deleted", "waiting"].iter().for_each(|webhook_id| handoff.let_go(webhook_id, 1));
        handoff.only_these_wait(|webhook_id| webhook_id == "waiting");
        assert!(!handoff.lock().webhooks.contains_key("deleted"));
        assert!(try_take(&handoff, "taken by others", 1) && !try_take(&handoff, "waiting", 1));
    }

    /// One that has none is rung for when it has room worth a statement, and all are when there is any again.
    #[test]
    fn the_bell_is_rung_for_those_who_had_no_room() {
        let handoff = Handoff::default();
        let rung = || handoff.due.notified().now_or_never().map(|()| handoff.news().room).unwrap_or_default();
        let most = fill(&handoff, "a");
        assert_eq!((take_for_waiting(&handoff, "a", 1), handoff.is_full()), (0, false));
        let rings: Vec<_> = (0..most).map(|_| (handoff.let_go("a", 1), rung()).1).collect();
        let first = rings.iter().position(|room| *room == [Arc::from("a")]).unwrap();
        assert!((most / 10..most / 4).contains(&first) && rings.iter().flatten().count() == 1, "{rings:?}");

        handoff.caught_up("a");
        let new = (0..MAX_HELD_WITH_FEW).filter(|number| try_take(&handoff, &number.to_string(), 1)).count();
        assert_eq!((new, handoff.is_full()), (MAX_HELD_WITH_FEW - FOR_WAITING, false), "the last are not for new ones");
        assert_eq!(
            (0..FOR_WAITING).map(|number| take_for_waiting(&handoff, &number.to_string(), 1)).sum::<usize>(),
            128
        );
        assert!(handoff.is_full());
        handoff.let_go("7", 1);
        assert!(handoff.due.notified().now_or_never().is_some() && handoff.news().room.is_empty());
        handoff.let_go("8", 1);
        assert!(handoff.due.notified().now_or_never().is_none(), "nobody has come for the first");
        assert_eq!((handoff.is_full(), take_for_waiting(&handoff, "a", 100)), (false, FEW));
    }

    proptest! {
        #[test]
        fn the_books_balance(steps in prop::collection::vec((0..8_usize, 0..40_000_000_usize, 0..4), 0..400)) {
            let handoff = Handoff::default();
            let mut held = Vec::new();
            for (webhook, bytes, step) in steps {
                let webhook_id = webhook.to_string();
                match step {
                    0 if try_take(&handoff, &webhook_id, bytes) => held.push((webhook_id, bytes)),
                    1 if !handoff.is_full() => {
                        let taken = take_for_waiting(&handoff, &webhook_id, 100);
                        (0..taken).for_each(|_| handoff.fetched(&webhook_id, bytes / 100));
                        held.extend(std::iter::repeat_n((webhook_id, bytes / 100), taken));
                    }
                    2 | 3 if !held.is_empty() => {
                        let (webhook_id, bytes) = held.swap_remove(bytes % held.len());
                        handoff.learn(&webhook_id, webhook * 40);
                        handoff.let_go(&webhook_id, bytes);
                    }
                    _ => {}
                }
                let wanted = handoff.lock().webhooks.values().all(|webhook| !webhook.wanted || webhook.held > 0);
                prop_assert!(wanted, "whoever waits for the bell has something whose end rings it");
                prop_assert_eq!(handoff.lock().total, held.iter().map(|(_, bytes)| places(*bytes)).sum::<usize>());
            }
            for (webhook_id, bytes) in held {
                handoff.let_go(&webhook_id, bytes);
                handoff.caught_up(&webhook_id);
            }
            (0..8).for_each(|webhook: usize| handoff.caught_up(&webhook.to_string()));
            prop_assert!(handoff.lock().webhooks.is_empty() && handoff.lock().total == 0);
        }
    }
}
