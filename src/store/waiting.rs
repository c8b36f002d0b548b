//! Webhooks with deliveries in the database that nobody has leased.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    sync::Arc,
};

use sea_orm::ConnectionTrait;

use super::{Error, Store, sql::Sql};
use crate::webhook::Timestamp;

/// One of them.
#[derive(Debug, Clone)]
pub struct Waiting {
    /// Id of the webhook.
    pub webhook_id: Arc<str>,
    /// Whose it is.
    pub organization: Arc<str>,
    /// When the first of them is due.
    pub due_at: Timestamp,
}

impl Waiting {
    /// Adds it to those that are known; of each webhook only the earliest counts.
    pub fn add_to(self, known: &mut HashMap<Arc<str>, Waiting>) {
        let same = known.entry(Arc::clone(&self.webhook_id));
        same.and_modify(|same| same.due_at = same.due_at.min(self.due_at)).or_insert(self);
    }
}

impl Store {
    /// The active webhooks that have deliveries waiting, with the time of the earliest.
    ///
    /// It leaps from webhook to webhook through the index of what is due, so it costs a look-up per webhook, however
    /// many deliveries wait.
    pub async fn waiting(&self) -> Result<HashMap<Arc<str>, Waiting>, Error> {
        // Not by min(), for which PostgreSQL reads the whole queue as long as its statistics say that there is none, and not
        // by a join, for which it compares each with each as long as they say that there are few webhooks.
        const LEAP: &str = "\
            WITH RECURSIVE queue (webhook_id) AS (\
             SELECT * FROM (SELECT webhook_id FROM deliveries WHERE next_attempt_at_ms IS NOT NULL \
              ORDER BY webhook_id LIMIT 1) AS first \
             UNION ALL SELECT (SELECT d.webhook_id FROM deliveries d \
              WHERE d.next_attempt_at_ms IS NOT NULL AND d.webhook_id > queue.webhook_id ORDER BY d.webhook_id LIMIT 1) \
             FROM queue WHERE queue.webhook_id IS NOT NULL) \
            SELECT webhook_id, (SELECT w.organization FROM webhooks w \
             WHERE w.id = queue.webhook_id AND w.status = 'active' AND w.deleted_at_ms IS NULL) AS organization, \
             (SELECT d.next_attempt_at_ms FROM deliveries d \
             WHERE d.webhook_id = queue.webhook_id AND d.next_attempt_at_ms IS NOT NULL \
             ORDER BY d.next_attempt_at_ms LIMIT 1) AS due_at_ms \
            FROM queue WHERE webhook_id IS NOT NULL";
        let rows = self.0.read.query_all_raw(Sql::new(LEAP).build(self.0.read.get_database_backend())).await?;
        let mut waiting = HashMap::with_capacity(rows.len());
        for row in rows {
            let (webhook_id, organization, due_at): (String, Option<String>, Option<i64>) =
                row.try_get_many_by_index()?;
            if let (Some(organization), Some(due_at)) = (organization, due_at) {
                let (webhook_id, organization) = (Arc::from(webhook_id), Arc::from(organization));
                Waiting { webhook_id, organization, due_at: Timestamp::from_millis(due_at) }.add_to(&mut waiting);
            }
        }
        self.0.handoff.only_these_wait(&waiting);
        Ok(waiting)
    }
}

/// Webhooks in the order in which they get places: organisations take turns, and which one begins changes with time, so
/// that none is always the first.
pub(super) fn in_turns(webhooks: Vec<&Waiting>, now: Timestamp) -> Vec<&Waiting> {
    let mut organizations: BTreeMap<&str, VecDeque<&Waiting>> = BTreeMap::new();
    for webhook in webhooks {
        organizations.entry(&webhook.organization).or_default().push_back(webhook);
    }
    let mut queues: VecDeque<VecDeque<&Waiting>> = organizations.into_values().collect();
    let turn = usize::try_from(now.millis()).unwrap_or(0);
    for queue in &mut queues {
        queue.rotate_left(turn % queue.len());
    }
    if !queues.is_empty() {
        queues.rotate_left(turn % queues.len());
    }
    let mut turns = Vec::new();
    while let Some(mut queue) = queues.pop_front() {
        turns.extend(queue.pop_front());
        if !queue.is_empty() {
            queues.push_back(queue);
        }
    }
    turns
}
