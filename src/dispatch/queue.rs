//! Whose turn it is: organisations take turns, within each its webhooks do, and no webhook has more than its share on
//! the wire.

use std::collections::{HashMap, VecDeque};

use crate::store::Leased;

/// Leased deliveries that wait for their turn. Bounded by what the store lets this node hold.
pub(super) struct Queue {
    max_in_flight: usize,
    /// Organisations with a webhook that may send, in the order of their turns.
    turns: VecDeque<String>,
    organizations: HashMap<String, VecDeque<String>>,
    webhooks: HashMap<String, Line>,
}

/// The deliveries of one webhook.
#[derive(Default)]
struct Line {
    organization: String,
    waiting: VecDeque<Leased>,
    in_flight: usize,
    /// Whether it stands in its organisation's turns.
    listed: bool,
}

impl Queue {
    pub(super) fn new(max_in_flight: usize) -> Self {
        Self { max_in_flight, turns: VecDeque::new(), organizations: HashMap::new(), webhooks: HashMap::new() }
    }

    /// Lets a delivery wait for its turn.
    pub(super) fn push(&mut self, leased: Leased) {
        let webhook_id = leased.webhook_id.to_string();
        let line = self.webhooks.entry(webhook_id.clone()).or_default();
        if line.organization.is_empty() {
            leased.tenant.organization().clone_into(&mut line.organization);
        }
        line.waiting.push_back(leased);
        self.list(&webhook_id);
    }

    /// The next delivery to attempt; its webhook has one more on the wire until [`Queue::finished`].
    pub(super) fn pop(&mut self) -> Option<Leased> {
        let organization = self.turns.pop_front()?;
        let webhooks = self.organizations.get_mut(&organization)?;
        let webhook_id = webhooks.pop_front()?;
        if webhooks.is_empty() {
            self.organizations.remove(&organization);
        } else {
            self.turns.push_back(organization);
        }
        let line = self.webhooks.get_mut(&webhook_id)?;
        line.listed = false;
        let leased = line.waiting.pop_front()?;
        line.in_flight += 1;
        self.list(&webhook_id);
        Some(leased)
    }

    /// An attempt for the webhook has ended.
    pub(super) fn finished(&mut self, webhook_id: &str) {
        if let Some(line) = self.webhooks.get_mut(webhook_id) {
            line.in_flight = line.in_flight.saturating_sub(1);
            if line.in_flight == 0 && line.waiting.is_empty() {
                self.webhooks.remove(webhook_id);
            } else {
                self.list(webhook_id);
            }
        }
    }

    /// Everything that still waits.
    pub(super) fn drain(&mut self) -> Vec<Leased> {
        self.webhooks.values_mut().flat_map(|line| line.waiting.drain(..)).collect()
    }

    /// Gives the webhook a turn, if it has something to send and may.
    fn list(&mut self, webhook_id: &str) {
        let Some(line) = self.webhooks.get_mut(webhook_id) else { return };
        if line.listed || line.waiting.is_empty() || line.in_flight >= self.max_in_flight {
            return;
        }
        line.listed = true;
        let webhooks = self.organizations.entry(line.organization.clone()).or_default();
        if webhooks.is_empty() {
            self.turns.push_back(line.organization.clone());
        }
        webhooks.push_back(webhook_id.to_owned());
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::webhook::{Environment, Event, EventData, Plan, Tenant, Timestamp};

    fn leased(organization: &str, webhook_id: &str) -> Leased {
        let at = Timestamp::from_millis(0);
        Leased {
            tenant: Tenant::new(organization, Environment::Live).unwrap(),
            webhook_id: webhook_id.into(),
            delivery_id: "del_1".to_owned(),
            event: Arc::new(Event {
                id: "evt_1".to_owned(),
                event_type: "content.ready".to_owned(),
                data: EventData::parse("{}").unwrap(),
                created_at: at,
            }),
            attempt: 1,
            plan: Plan::Schedule,
            expires_at: at,
            done: None,
        }
    }

    fn next(queue: &mut Queue) -> Option<String> {
        queue.pop().map(|leased| leased.webhook_id.to_string())
    }

    #[test]
    fn organisations_take_turns_whatever_they_have_waiting() {
        let mut queue = Queue::new(100);
        for _ in 0..50 {
            queue.push(leased("loud", "a"));
            queue.push(leased("loud", "b"));
        }
        queue.push(leased("quiet", "c"));
        let first: Vec<_> = (0..4).filter_map(|_| next(&mut queue)).collect();
        assert_eq!(first, ["a", "c", "b", "a"]);
    }

    #[test]
    fn a_webhook_sends_no_more_than_its_share() {
        let mut queue = Queue::new(2);
        (0..5).for_each(|_| queue.push(leased("acme", "slow")));
        assert_eq!((next(&mut queue).is_some(), next(&mut queue).is_some(), next(&mut queue)), (true, true, None));
        queue.push(leased("acme", "other"));
        assert_eq!(next(&mut queue).as_deref(), Some("other"));
        queue.finished("slow");
        assert_eq!(next(&mut queue).as_deref(), Some("slow"));
        assert_eq!(queue.drain().len(), 2);
    }

    #[test]
    fn nothing_is_remembered_of_webhooks_that_are_done() {
        let mut queue = Queue::new(2);
        queue.push(leased("acme", "a"));
        assert!(queue.pop().is_some());
        queue.finished("a");
        assert!(queue.webhooks.is_empty() && queue.organizations.is_empty() && queue.turns.is_empty());
    }
}
