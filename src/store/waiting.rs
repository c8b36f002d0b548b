//! Webhooks with deliveries in the database that nobody has leased, and whose turn it is to get places for them.

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    sync::Arc,
};

use sea_orm::{ConnectionTrait, Statement, Value};

use super::{
    Error, Store,
    entity::delivery,
    rows::{Column, Rows, int, text},
    turns::Turns,
};
use crate::{clock, webhook::Timestamp};

/// One look sees at most this many webhooks, so that what is known already is claimed in between.
const MAX_LOOK: i32 = 2_048;

const WEBHOOKS: &[Column] = &[text("webhook_id"), text("organization"), int("after_ms")];
/// Not by min(), for which PostgreSQL reads the whole queue as long as its statistics say that there is none.
const FIRST: &str = "SELECT rows.webhook_id, rows.organization, \
    (SELECT d.next_attempt_at_ms FROM deliveries d WHERE d.webhook_id = (SELECT w.id FROM webhooks w \
      WHERE w.id = rows.webhook_id AND w.status = 'active' AND w.deleted_at_ms IS NULL) \
     AND d.next_attempt_at_ms > rows.after_ms ORDER BY d.next_attempt_at_ms LIMIT 1) AS due_at_ms FROM {rows}";

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
    /// That a delivery waits, if it does.
    pub(super) fn of(row: &delivery::Model) -> Option<Self> {
        row.next_attempt_at_ms.map(|due_at_ms| Self {
            webhook_id: row.webhook_id.as_str().into(),
            organization: row.organization.as_str().into(),
            due_at: Timestamp::from_millis(due_at_ms),
        })
    }

    /// Adds it to those that are known; of each webhook only the earliest counts.
    pub(super) fn add_to(self, known: &mut HashMap<Arc<str>, Waiting>) {
        let same = known.entry(Arc::clone(&self.webhook_id));
        same.and_modify(|same| same.due_at = same.due_at.min(self.due_at)).or_insert(self);
    }
}

/// All that are known. A turn costs a few steps in ordered sets, however many wait, and a claim does not pass by those that
/// are due later or have no room.
#[derive(Default)]
pub struct Waitlist {
    webhooks: HashMap<Arc<str>, Known>,
    /// Those with nothing that is due yet.
    later: BTreeSet<(Timestamp, Arc<str>)>,
    /// Those with something that is due: organisations take turns, and within each its webhooks do.
    due: Turns<Arc<str>>,
    /// Those for which there was no room.
    aside: HashSet<Arc<str>>,
    /// Which sweep is under way, and how far it has come.
    sweep: u64,
    swept: Arc<str>,
}

struct Known {
    organization: Arc<str>,
    due_at: Timestamp,
    place: Place,
    /// The last sweep that saw it, or that was under way when somebody told of it.
    seen: u64,
}

/// Where a webhook stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    Later,
    Due,
    /// It has its turn.
    Out,
    Aside,
}

impl Waitlist {
    /// Adds one; of each webhook the earliest time counts.
    pub fn add(&mut self, waiting: Waiting) {
        self.put(waiting, Timestamp::min);
    }

    /// There is room again for a webhook that was put aside.
    pub fn has_room(&mut self, webhook_id: &Arc<str>) {
        if self.aside.remove(webhook_id) {
            self.move_from(Place::Aside, webhook_id);
        }
    }

    /// There may be room for those that were put aside, because others hold less now.
    pub fn may_have_room(&mut self) {
        for webhook_id in std::mem::take(&mut self.aside) {
            self.move_from(Place::Aside, &webhook_id);
        }
    }

    /// Whether a sweep has ended, so that none is missing that was there before.
    pub fn is_complete(&self) -> bool {
        self.sweep > 0
    }

    /// When the first of those is due that are not yet.
    pub fn next_due_at(&self) -> Option<Timestamp> {
        self.later.first().map(|(due_at, _)| *due_at)
    }

    /// Gives those a turn that have fallen due by now.
    pub(super) fn fall_due(&mut self, now: Timestamp) {
        while self.later.first().is_some_and(|(due_at, _)| *due_at <= now)
            && let Some((_, webhook_id)) = self.later.pop_first()
        {
            self.move_from(Place::Later, &webhook_id);
        }
    }

    /// How many there are.
    #[cfg(test)]
    pub(super) fn known(&self) -> usize {
        self.webhooks.len()
    }

    /// How many have something that is due and was not put aside.
    pub(super) fn due(&self) -> usize {
        self.due.len()
    }

    /// Whose turn it is, organisation and webhook, and since when something of it is due.
    pub(super) fn next(&mut self) -> Option<(Arc<str>, Arc<str>, Timestamp)> {
        let webhook_id = self.due.pop()?;
        let known = self.webhooks.get_mut(&webhook_id)?;
        known.place = Place::Out;
        Some((Arc::clone(&known.organization), webhook_id, known.due_at))
    }

    /// One that had its turn has another one, after the others.
    pub(super) fn again(&mut self, webhook_id: &Arc<str>) {
        self.move_from(Place::Out, webhook_id);
    }

    /// There was no room for one that had its turn: it gets none until there is.
    pub(super) fn put_aside(&mut self, webhook_id: Arc<str>) {
        if let Some(known) = self.webhooks.get_mut(&webhook_id) {
            known.place = Place::Aside;
            self.aside.insert(webhook_id);
        }
    }

    /// Somebody else has what was to be claimed, and goes through those that are due in the same order: this node goes on
    /// somewhere else.
    pub(super) fn evade(&mut self) {
        self.due.rotate(usize::from_ne_bytes(clock::random()));
    }

    /// One that had its turn has nothing more that is due; whose it is.
    pub(super) fn caught_up(&mut self, webhook_id: &Arc<str>) -> Option<Arc<str>> {
        self.webhooks.remove(webhook_id).map(|known| known.organization)
    }

    fn move_from(&mut self, place: Place, webhook_id: &Arc<str>) {
        if let Some(known) = self.webhooks.get_mut(webhook_id)
            && known.place == place
        {
            known.place = Place::Due;
            self.due.push(Arc::clone(&known.organization), Arc::clone(webhook_id));
        }
    }

    /// A look sees it in the database; what was due before is not there any more.
    fn see(&mut self, waiting: Waiting) {
        self.put(waiting, |_, due_at| due_at);
    }

    /// Adds one, or changes when the known one is due.
    fn put(&mut self, waiting: Waiting, time: impl FnOnce(Timestamp, Timestamp) -> Timestamp) {
        let Waiting { webhook_id, organization, due_at } = waiting;
        let Self { webhooks, later, sweep, .. } = self;
        let known = webhooks.entry(Arc::clone(&webhook_id)).or_insert_with(|| {
            later.insert((due_at, Arc::clone(&webhook_id)));
            Known { organization, due_at, place: Place::Later, seen: *sweep }
        });
        known.seen = *sweep;
        let before = known.due_at;
        known.due_at = time(before, due_at);
        if known.place == Place::Later && before != known.due_at {
            later.remove(&(before, Arc::clone(&webhook_id)));
            later.insert((known.due_at, webhook_id));
        }
    }

    /// The next look begins another sweep. What this one did not see is not there any more; whoever stands among those that
    /// are due finds out when it has its turn.
    fn end_sweep(&mut self) {
        let Self { webhooks, later, aside, sweep, .. } = self;
        webhooks.retain(|webhook_id, known| {
            let stays = known.seen == *sweep || known.place == Place::Due;
            if !stays {
                later.remove(&(known.due_at, Arc::clone(webhook_id)));
                aside.remove(webhook_id);
            }
            stays
        });
        self.sweep += 1;
        self.swept = Arc::default();
    }
}

impl Store {
    /// Looks for active webhooks that have deliveries waiting, with the time of the earliest: for [`MAX_LOOK`] of them, from
    /// where the look before came to. Answers whether it came to the end, where a sweep over all of them begins anew.
    ///
    /// It leaps from webhook to webhook through the index of what is due, so it costs a look-up per webhook, however
    /// many deliveries wait.
    pub async fn look(&self, list: &mut Waitlist) -> Result<bool, Error> {
        // Not by a join, for which PostgreSQL compares each with each as long as its statistics say that there are few
        // webhooks.
        const LEAP: &str = "\
            WITH RECURSIVE queue (webhook_id, number) AS (\
             SELECT (SELECT d.webhook_id FROM deliveries d \
              WHERE d.next_attempt_at_ms IS NOT NULL AND d.webhook_id > $1 ORDER BY d.webhook_id LIMIT 1), 1 \
             UNION ALL SELECT (SELECT d.webhook_id FROM deliveries d \
              WHERE d.next_attempt_at_ms IS NOT NULL AND d.webhook_id > queue.webhook_id ORDER BY d.webhook_id LIMIT 1), \
              number + 1 FROM queue WHERE webhook_id IS NOT NULL AND number < $2) \
            SELECT webhook_id, (SELECT w.organization FROM webhooks w \
             WHERE w.id = queue.webhook_id AND w.status = 'active' AND w.deleted_at_ms IS NULL) AS organization, \
             (SELECT d.next_attempt_at_ms FROM deliveries d \
             WHERE d.webhook_id = queue.webhook_id AND d.next_attempt_at_ms IS NOT NULL \
             ORDER BY d.next_attempt_at_ms LIMIT 1) AS due_at_ms \
            FROM queue WHERE webhook_id IS NOT NULL ORDER BY number";
        let reader = &self.0.engine_read;
        let values = [Value::from(&*list.swept), MAX_LOOK.into()];
        let statement = Statement::from_sql_and_values(reader.get_database_backend(), LEAP, values);
        let rows = self.heard(async { Ok(reader.query_all_raw(statement).await?) }).await?;
        let ended = rows.len() < usize::try_from(MAX_LOOK).unwrap_or(usize::MAX);
        let mut same = Arc::<str>::default();
        for row in rows {
            let (webhook_id, organization, due_at): (String, Option<String>, Option<i64>) =
                row.try_get_many_by_index()?;
            list.swept = webhook_id.into();
            if let (Some(organization), Some(due_at)) = (organization, due_at) {
                // Many webhooks in a row may be of the same one, whose name is kept once then.
                if *organization != *same {
                    same = organization.into();
                }
                let (webhook_id, organization) = (Arc::clone(&list.swept), Arc::clone(&same));
                list.see(Waiting { webhook_id, organization, due_at: Timestamp::from_millis(due_at) });
            }
        }
        if ended {
            list.end_sweep();
            self.0.handoff.only_these_wait(|webhook_id| list.webhooks.contains_key(webhook_id));
        }
        Ok(ended)
    }

    /// The first deliveries of some webhooks, given with their organisations, that are due after a time.
    pub(super) async fn first_waiting(
        &self,
        webhooks: &[(Arc<str>, Arc<str>)],
        after: Timestamp,
    ) -> Result<Vec<Waiting>, Error> {
        let mut rows = Rows::new(self.0.engine_read.get_database_backend(), WEBHOOKS);
        for (webhook_id, organization) in webhooks {
            rows.push([webhook_id.into(), organization.into(), after.millis().into()]);
        }
        let mut waiting = Vec::new();
        for statement in rows.statements(FIRST) {
            for row in self.heard(async { Ok(self.0.engine_read.query_all_raw(statement).await?) }).await? {
                let (webhook_id, organization, due_at): (Option<String>, Option<String>, Option<i64>) =
                    row.try_get_many_by_index()?;
                // SQLite has a row of NULL for each place that is not used.
                if let (Some(webhook_id), Some(organization), Some(due_at)) = (webhook_id, organization, due_at) {
                    let (webhook_id, organization) = (webhook_id.into(), organization.into());
                    waiting.push(Waiting { webhook_id, organization, due_at: Timestamp::from_millis(due_at) });
                }
            }
        }
        Ok(waiting)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(millis: i64) -> Timestamp {
        Timestamp::from_millis(millis)
    }

    fn waiting(organization: &str, webhook_id: &str, due_at_ms: i64) -> Waiting {
        Waiting { webhook_id: webhook_id.into(), organization: organization.into(), due_at: at(due_at_ms) }
    }

    fn turn(list: &mut Waitlist) -> Option<String> {
        list.next().map(|(_, webhook_id, _)| webhook_id.to_string())
    }

    #[test]
    fn organisations_and_their_webhooks_take_turns() {
        let mut list = Waitlist::default();
        for (organization, webhook_id, due_at) in
            [("loud", "a", 1), ("loud", "b", 2), ("loud", "c", 3), ("quiet", "d", 4), ("quiet", "later", 10)]
        {
            list.add(waiting(organization, webhook_id, due_at));
        }
        list.fall_due(at(9));
        assert_eq!((list.due(), list.next_due_at()), (4, Some(at(10))));
        let mut turns = Vec::new();
        for _ in 0..6 {
            let (_, webhook_id, _) = list.next().unwrap();
            list.again(&webhook_id);
            turns.push(webhook_id.to_string());
        }
        assert_eq!(turns, ["a", "d", "b", "d", "c", "d"]);
        list.add(waiting("quiet", "later", 7));
        assert_eq!(list.next_due_at(), Some(at(7)));
        list.add(waiting("quiet", "later", 8));
        list.fall_due(at(7));
        assert_eq!((list.due(), list.next_due_at()), (5, None), "the earliest time counts");
    }

    #[test]
    fn who_has_no_room_is_passed_by_until_there_is() {
        let mut list = Waitlist::default();
        ["a", "b"].into_iter().for_each(|webhook_id| list.add(waiting("acme", webhook_id, 5)));
        list.fall_due(at(5));
        let (acme, a, _) = list.next().unwrap();
        list.put_aside(Arc::clone(&a));
        list.add(waiting("acme", "a", 3));
        assert_eq!((turn(&mut list).as_deref(), turn(&mut list)), (Some("b"), None));
        list.has_room(&"b".into());
        assert_eq!(turn(&mut list), None, "it was not put aside");
        list.has_room(&a);
        assert_eq!(list.next(), Some((Arc::clone(&acme), Arc::clone(&a), at(3))));
        list.put_aside(Arc::clone(&a));
        list.may_have_room();
        assert_eq!(list.next(), Some((Arc::clone(&acme), Arc::clone(&a), at(3))));
        assert_eq!((list.caught_up(&a).as_deref(), list.known()), (Some("acme"), 1));
    }

    #[test]
    fn a_sweep_forgets_what_it_did_not_see() {
        let mut list = Waitlist::default();
        for (webhook_id, due_at) in [("due", 1), ("aside", 2), ("gone", 50), ("seen", 60), ("told", 70)] {
            list.add(waiting("acme", webhook_id, due_at));
        }
        list.fall_due(at(2));
        list.end_sweep();
        assert_eq!(list.known(), 5, "all were told of while it was under way");
        let (_, aside) = (list.next(), list.next().unwrap().0);
        list.again(&"due".into());
        list.put_aside(aside);
        list.see(waiting("acme", "seen", 80));
        list.add(waiting("acme", "told", 90));
        list.end_sweep();
        let mut left: Vec<&str> = list.webhooks.keys().map(|webhook_id| &**webhook_id).collect();
        left.sort_unstable();
        assert_eq!(left, ["due", "seen", "told"]);
        let times = list.later.iter().map(|(due_at, _)| *due_at);
        assert!(times.eq([at(70), at(80)]), "what the sweep saw counts, of what was told the earliest");
        assert!(list.aside.is_empty());
    }

    #[tokio::test]
    async fn a_sweep_takes_as_many_looks_as_it_needs() {
        let (_directory, store) = Store::fresh().await;
        let most = i64::from(MAX_LOOK);
        for insert in [
            "INSERT INTO events (id, event_type, data, created_at_ms) VALUES ('evt_1', 'content.ready', '{}', 1)",
            &format!(
                "INSERT INTO webhooks (id, organization, environment, url, description, events, status, secret, \
                 created_at_ms) WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {most} * 2 + 9) \
                 SELECT printf('whk_%06d', i), 'acme', 'live', 'https://example.com/', '', '[]', \
                 CASE WHEN i % 10 > 0 THEN 'active' ELSE 'disabled' END, '', 1 FROM n"
            ),
            "INSERT INTO deliveries (webhook_id, id, organization, environment, event_id, event_type, status, attempts, \
             granted, once, lost_leases, next_attempt_at_ms, created_at_ms) \
             SELECT w.id, 'del_' || k, 'acme', 'live', 'evt_1', 'content.ready', 'pending', 0, FALSE, FALSE, 0, k, 1 \
             FROM webhooks w CROSS JOIN (SELECT 7 AS k UNION ALL SELECT 5 UNION ALL SELECT 9) AS k",
        ] {
            store.0.write.execute_unprepared(insert).await.unwrap();
        }
        let mut list = Waitlist::default();
        for ended in [false, false, true] {
            assert_eq!(store.look(&mut list).await.unwrap(), ended);
        }
        assert_eq!(list.known(), usize::try_from((most * 2 + 9) * 9 / 10).unwrap() + 1);
        assert!(list.webhooks.values().all(|known| known.due_at == at(5)));
        let some = ["whk_000001", "whk_none", "whk_000010"].map(|webhook_id| (webhook_id.into(), "acme".into()));
        for (after, due_at) in [(0, vec![at(5)]), (5, vec![at(7)]), (9, Vec::new())] {
            let first = store.first_waiting(&some, at(after)).await.unwrap();
            assert_eq!(first.iter().map(|waiting| waiting.due_at).collect::<Vec<_>>(), due_at);
        }
    }
}
