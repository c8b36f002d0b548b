//! Whose turn it is: organisations take turns, as [`super::order`] says, and within each its webhooks, of which those with the
//! fewest attempts under way come first. [`super::shares`] says who may.
//!
//! A turn costs a few steps in ordered sets, whatever waits: webhooks with as many attempts under way may start another one
//! or none may, so of each such kind the first is asked; only organisations that have more than their share are passed over,
//! and of those there cannot be many. Quick and slow webhooks have an order each and go by turns.
//!
//! Nobody starves: an organisation with something waiting that may start has its turn after at most twice as many turns as
//! organisations wait, and within it a webhook either has an attempt under way, which ends, or stands among the first
//! attempts, where every other gets at most one turn before it does.

use std::{
    collections::{BTreeSet, HashMap, VecDeque},
    sync::Arc,
};

use slab::Slab;

use super::{
    order::{Order, Place},
    pace::{BySpeed, Ended, Pace, Speed},
    shares::{InFlight, Level, Shares},
};

/// Receivers that get less than new ones are remembered while nothing is sent to them, up to this many; beyond, all of them
/// are forgotten. So are as many of those that get more, apart from them; who is forgotten proves itself anew in no time.
const MAX_REMEMBERED: usize = 16_384;

/// What waits for its turn. Bounded by what the store lets this node hold.
pub(super) struct Queue<T> {
    shares: Shares,
    lines: Slab<Line<T>>,
    webhooks: HashMap<Arc<str>, usize>,
    organizations: Slab<Organization>,
    names: HashMap<Arc<str>, usize>,
    /// Organisations with a webhook that waits.
    orders: BySpeed<Order>,
    /// Which of the two is looked at first.
    next: Speed,
    in_flight: InFlight,
    last_ticket: u64,
    wary_of: HashMap<Arc<str>, Pace>,
    proven: HashMap<Arc<str>, Pace>,
}

/// The turn of a webhook among those of its organisation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Turn {
    level: Level,
    /// Drawn after the last turn.
    ticket: u64,
    who: usize,
}

/// The deliveries of one webhook.
struct Line<T> {
    webhook_id: Arc<str>,
    organization: usize,
    waiting: VecDeque<T>,
    in_flight: usize,
    pace: Pace,
    /// As `in_flight` is counted.
    speed: Speed,
    ticket: u64,
    turn: Option<(Speed, Turn)>,
}

/// The webhooks of one organisation.
struct Organization {
    name: Arc<str>,
    lines: usize,
    in_flight: InFlight,
    turns: BySpeed<Turns>,
}

/// Webhooks of one speed that wait, and the place of their organisation in its order.
#[derive(Default)]
struct Turns {
    webhooks: BTreeSet<Turn>,
    ticket: u64,
    place: Option<Place>,
}

impl<T> Queue<T> {
    pub(super) fn new(shares: Shares) -> Self {
        Self {
            shares,
            lines: Slab::new(),
            webhooks: HashMap::new(),
            organizations: Slab::new(),
            names: HashMap::new(),
            orders: BySpeed::default(),
            next: Speed::Quick,
            in_flight: InFlight::default(),
            last_ticket: 0,
            wary_of: HashMap::new(),
            proven: HashMap::new(),
        }
    }

    /// Lets something wait for its turn.
    pub(super) fn push(&mut self, organization: &str, webhook_id: &Arc<str>, item: T) {
        let index = match self.webhooks.get(webhook_id) {
            Some(index) => *index,
            None => self.open(organization, webhook_id),
        };
        self.lines[index].waiting.push_back(item);
        self.place(index);
    }

    /// What to attempt next, and the line that it counts for until [`Queue::finished`].
    pub(super) fn pop(&mut self) -> Option<(usize, T)> {
        let index = self.first(self.next).or_else(|| self.first(self.next.other()))?;
        self.next = self.next.other();
        let line = &mut self.lines[index];
        let item = line.waiting.pop_front()?;
        self.last_ticket += 1;
        line.in_flight += 1;
        line.ticket = self.last_ticket;
        self.in_flight[line.speed] += 1;
        let organization = &mut self.organizations[line.organization];
        organization.in_flight[line.speed] += 1;
        organization.turns[line.speed].ticket = self.last_ticket;
        self.orders[line.speed].go_on();
        self.place(index);
        Some((index, item))
    }

    /// An attempt of the line has ended, or was not made. Answers whose it was, and how many deliveries of that webhook
    /// are worth holding.
    pub(super) fn finished(&mut self, index: usize, ended: Option<Ended>) -> (Arc<str>, usize) {
        let line = &mut self.lines[index];
        if let Some(ended) = ended {
            line.pace.learn(ended, line.in_flight, self.shares.max_per_webhook);
        }
        let (before, speed) = (line.speed, line.pace.speed());
        line.speed = speed;
        let its = &mut self.organizations[line.organization].in_flight;
        for counted in [&mut self.in_flight, its] {
            counted[before] -= line.in_flight;
            counted[speed] += line.in_flight - 1;
        }
        line.in_flight -= 1;
        let its = &self.organizations[line.organization].in_flight;
        let may = self.shares.of_webhook(speed, its, &self.in_flight).min(line.pace.window());
        let answer = (Arc::clone(&line.webhook_id), line.pace.worth_holding(may));
        if line.in_flight == 0 && line.waiting.is_empty() {
            self.close(index);
        } else {
            self.place(index);
        }
        answer
    }

    /// Everything that still waits.
    pub(super) fn drain(&mut self) -> Vec<T> {
        let indices: Vec<usize> = self.lines.iter().map(|(index, _)| index).collect();
        let mut drained = Vec::new();
        for index in indices {
            drained.extend(self.lines[index].waiting.drain(..));
            self.place(index);
            if self.lines[index].in_flight == 0 {
                self.close(index);
            }
        }
        drained
    }

    /// The first webhook of this speed that may start another attempt.
    fn first(&self, speed: Speed) -> Option<usize> {
        let may = |level| self.shares.allow(level, speed, &self.in_flight);
        let who = self.orders[speed].first(may, |place| {
            let its = &self.organizations[place.who].in_flight;
            self.shares.allow_within(place.level, speed, its, &self.in_flight)
        });
        self.organizations[who?].turns[speed].webhooks.first().map(|turn| turn.who)
    }

    /// Puts a webhook where it belongs in the turns, or takes it out.
    fn place(&mut self, index: usize) {
        let line = &mut self.lines[index];
        let waits = !line.waiting.is_empty() && line.in_flight < line.pace.window();
        let turn = Turn { level: Level::of(line.in_flight), ticket: line.ticket, who: index };
        let wanted = waits.then_some((line.speed, turn));
        // It is another one with its first attempt and with its last, by which its organisation has some, or none, under way.
        if line.turn == wanted {
            return;
        }
        let who = line.organization;
        let organization = &mut self.organizations[who];
        let before = std::mem::replace(&mut line.turn, wanted);
        if let Some((speed, turn)) = before {
            organization.turns[speed].webhooks.remove(&turn);
        }
        if let Some((speed, turn)) = wanted {
            organization.turns[speed].webhooks.insert(turn);
        }
        self.place_organization(who);
    }

    /// As [`Queue::place`] does with a webhook.
    fn place_organization(&mut self, who: usize) {
        let organization = &mut self.organizations[who];
        let is_busy = organization.in_flight.total() > 0;
        for speed in [Speed::Quick, Speed::Slow] {
            let turns = &mut organization.turns[speed];
            let first = turns.webhooks.first();
            let wanted = first.map(|first| Place { is_busy, level: first.level, ticket: turns.ticket, who });
            self.orders[speed].replace(std::mem::replace(&mut turns.place, wanted), wanted);
        }
    }

    fn open(&mut self, name: &str, webhook_id: &Arc<str>) -> usize {
        self.last_ticket += 1;
        let organization = match self.names.get(name) {
            Some(organization) => *organization,
            None => {
                let name: Arc<str> = name.into();
                let organization = self.organizations.insert(Organization::new(Arc::clone(&name), self.last_ticket));
                self.names.insert(name, organization);
                organization
            }
        };
        self.organizations[organization].lines += 1;
        let remembered = self.wary_of.remove(webhook_id).or_else(|| self.proven.remove(webhook_id));
        let pace = remembered.unwrap_or_else(|| Pace::unknown(self.shares.max_per_webhook));
        let index = self.lines.insert(Line {
            webhook_id: Arc::clone(webhook_id),
            organization,
            waiting: VecDeque::new(),
            in_flight: 0,
            speed: pace.speed(),
            pace,
            ticket: self.last_ticket,
            turn: None,
        });
        self.webhooks.insert(Arc::clone(webhook_id), index);
        index
    }

    /// Forgets a webhook with nothing waiting and nothing under way, except its pace.
    fn close(&mut self, index: usize) {
        let line = self.lines.remove(index);
        self.webhooks.remove(&line.webhook_id);
        let organization = &mut self.organizations[line.organization];
        organization.lines -= 1;
        if organization.lines == 0 {
            self.names.remove(&organization.name);
            self.organizations.remove(line.organization);
        } else {
            self.place_organization(line.organization);
        }
        if line.pace.is_remarkable(self.shares.max_per_webhook) {
            self.remember(line.webhook_id, line.pace);
        }
    }

    fn remember(&mut self, webhook_id: Arc<str>, pace: Pace) {
        let wary = pace.is_wary(self.shares.max_per_webhook);
        let remembered = if wary { &mut self.wary_of } else { &mut self.proven };
        if remembered.len() >= MAX_REMEMBERED {
            remembered.clear();
        }
        remembered.insert(webhook_id, pace);
    }
}

impl Organization {
    fn new(name: Arc<str>, ticket: u64) -> Self {
        let turns = || Turns { ticket, ..Turns::default() };
        Self { name, lines: 0, in_flight: InFlight::default(), turns: BySpeed { quick: turns(), slow: turns() } }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;

    const ORGANIZATIONS: usize = 4;
    const QUICK: Ended = Ended { took: Duration::from_millis(5), answered: true };
    const SLOW: Ended = Ended { took: Duration::from_secs(14), answered: true };
    const HUNG: Ended = Ended { took: Duration::from_secs(30), answered: false };

    /// So small that every limit is met.
    fn small() -> Shares {
        Shares { max_per_webhook: 3, places: 24, slow_places: 10, hard_cap: 32, min_per_organization: 4 }
    }

    fn organization(webhook: usize) -> String {
        format!("org {}", webhook % ORGANIZATIONS)
    }

    fn number(queue: &Queue<usize>, line: usize) -> usize {
        queue.lines[line].webhook_id.parse().unwrap()
    }

    fn is_empty<T>(queue: &Queue<T>) -> bool {
        let Queue { lines, webhooks, organizations, names, orders, .. } = queue;
        lines.is_empty()
            && webhooks.is_empty()
            && organizations.is_empty()
            && names.is_empty()
            && orders.quick.is_empty()
            && orders.slow.is_empty()
    }

    #[test]
    fn organisations_take_turns_whatever_they_have_waiting() {
        let mut queue = Queue::new(Shares::new(32, usize::MAX));
        for _ in 0..50 {
            queue.push("loud", &"a".into(), "a");
            queue.push("loud", &"b".into(), "b");
        }
        queue.push("quiet", &"c".into(), "c");
        queue.push("quiet", &"c".into(), "c");
        let first: Vec<_> = (0..5).filter_map(|_| queue.pop()).map(|(_, item)| item).collect();
        assert_eq!(first, ["a", "c", "b", "c", "a"]);
    }

    /// How many attempts a webhook of an organisation of its own gets in two seconds, for 100 deliveries a second whose
    /// receiver takes 100 ms, so that ten are to be under way, while others always have more waiting than can be begun.
    fn begun_beside(others: impl Iterator<Item = (String, String)>) -> usize {
        let mut queue = Queue::new(Shares::new(32, usize::MAX));
        let push = |queue: &mut Queue<_>, organization: &str, webhook: &str| {
            queue.push(organization, &webhook.into(), (organization.to_owned(), webhook.to_owned()));
        };
        let others: Vec<(String, String)> = others.collect();
        (0..20).for_each(|_| others.iter().for_each(|(organization, webhook)| push(&mut queue, organization, webhook)));
        let (mut begun, mut under_way) = (0, Vec::<(u64, usize, u64)>::new());
        for millis in 0..2_000 {
            let (ended, rest): (Vec<_>, _) = under_way.into_iter().partition(|(ends_at, ..)| *ends_at <= millis);
            under_way = rest;
            for (_, line, took) in ended {
                queue.finished(line, Some(Ended { took: Duration::from_millis(took), answered: true }));
            }
            if millis % 10 == 0 {
                push(&mut queue, "steady", "steady");
            }
            // All that the node can begin in this time.
            for _ in 0..10 {
                let (line, (organization, webhook)) = queue.pop().expect("others wait");
                let is_steady = organization == "steady";
                let took = if is_steady { 100 } else { 1 };
                under_way.push((millis + took, line, took));
                begun += usize::from(is_steady);
                if !is_steady {
                    push(&mut queue, &organization, &webhook);
                }
            }
        }
        begun
    }

    #[test]
    fn who_needs_ten_at_a_time_gets_them_beside_a_thousand_webhooks_of_another_organisation() {
        let begun = begun_beside((0..1_000).map(|number| ("loud".to_owned(), format!("loud {number}"))));
        assert!(begun >= 195, "{begun} of 200");
    }

    #[test]
    fn who_needs_ten_at_a_time_gets_them_beside_organisations_that_are_quick() {
        let begun = begun_beside((0..20).map(|number| (format!("quick {number}"), format!("quick {number}"))));
        assert!(begun >= 195, "{begun} of 200");
    }

    #[test]
    fn who_has_nothing_under_way_waits_for_nobody_who_has() {
        let mut queue = Queue::new(Shares::new(32, usize::MAX));
        let push = |queue: &mut Queue<_>, number: usize| {
            (0..4).for_each(|_| queue.push(&format!("org {number}"), &format!("webhook {number}").into(), number));
        };
        (0..1_000).for_each(|number| push(&mut queue, number));
        (0..1_500).for_each(|_| assert!(queue.pop().is_some()));
        push(&mut queue, 1_000);
        let first: Vec<usize> = (0..2).filter_map(|_| queue.pop()).map(|(_, number)| number).collect();
        assert!(first.contains(&1_000), "{first:?}");
    }

    #[test]
    fn a_quick_receiver_has_room_beside_thousands_that_hang() {
        let mut queue = Queue::new(Shares::new(32, usize::MAX));
        for webhook in 0..12_000 {
            (0..10).for_each(|_| queue.push(&format!("org {}", webhook % 100), &format!("dead {webhook}").into(), ()));
        }
        let mut under_way: VecDeque<usize> = VecDeque::new();
        // Half a minute later those that had their turn are known.
        for _ in 0..3 {
            under_way.extend(std::iter::from_fn(|| queue.pop()).map(|(line, ())| line));
            for _ in 0..under_way.len() {
                queue.finished(under_way.pop_front().unwrap(), Some(HUNG));
            }
        }
        under_way.extend(std::iter::from_fn(|| queue.pop()).map(|(line, ())| line));
        (0..60).for_each(|_| queue.push("org 7", &"alive".into(), ()));
        let alive = queue.webhooks["alive"];
        // The first answers prove that it takes more.
        for expected in [8, 16, 32] {
            let lines: Vec<usize> = std::iter::from_fn(|| queue.pop()).map(|(line, ())| line).collect();
            let (its, others): (Vec<usize>, Vec<usize>) = lines.into_iter().partition(|line| *line == alive);
            under_way.extend(others);
            assert_eq!(its.len(), expected);
            its.into_iter().for_each(|line| drop(queue.finished(line, Some(QUICK))));
        }
    }

    #[test]
    fn who_is_known_is_remembered_and_nobody_is_forgotten_for_those_who_are_quick() {
        let mut queue = Queue::new(Shares::new(32, usize::MAX));
        // As many under way at a time as the webhook gets.
        let mut attempt = |webhook_id: &str, ended| {
            (0..8).for_each(|_| queue.push("acme", &webhook_id.into(), ()));
            let lines: Vec<usize> = std::iter::from_fn(|| queue.pop()).map(|(line, ())| line).collect();
            lines.into_iter().for_each(|line| drop(queue.finished(line, ended)));
            assert!(is_empty(&queue));
            [queue.wary_of.len(), queue.proven.len()]
        };
        assert_eq!(attempt("new", None), [0, 0]);
        for number in 0..MAX_REMEMBERED {
            assert_eq!(attempt(&format!("slow {number}"), Some(SLOW)), [number + 1, 0]);
        }
        for number in 0..MAX_REMEMBERED {
            assert_eq!(attempt(&format!("quick {number}"), Some(QUICK)), [MAX_REMEMBERED, number + 1]);
        }
        assert_eq!(attempt("one more", Some(QUICK)), [MAX_REMEMBERED, 1]);
        assert_eq!(attempt("slow 7", Some(QUICK)), [MAX_REMEMBERED - 1, 2], "it has changed");
        queue.push("acme", &"slow 8".into(), ());
        assert!(queue.orders.quick.is_empty() && !queue.orders.slow.is_empty());
    }

    #[derive(Debug, Clone)]
    enum Step {
        Push(usize),
        Pop,
        Finish(usize, Option<Ended>),
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let ended = prop::sample::select(vec![None, Some(QUICK), Some(SLOW), Some(HUNG)]);
        let step = prop_oneof![
            4 => (0..20_usize).prop_map(Step::Push),
            4 => Just(Step::Pop),
            2 => (any::<usize>(), ended).prop_map(|(which, ended)| Step::Finish(which, ended)),
        ];
        prop::collection::vec(step, 0..600)
    }

    proptest! {
        #[test]
        fn no_limit_is_exceeded_nothing_is_lost_and_no_place_is_left_empty_for_nothing(steps in steps()) {
            let mut queue = Queue::new(small());
            let mut waiting: HashMap<usize, VecDeque<usize>> = HashMap::new();
            let mut under_way: Vec<usize> = Vec::new();
            for (item, step) in steps.into_iter().enumerate() {
                match step {
                    Step::Push(webhook) => {
                        queue.push(&organization(webhook), &webhook.to_string().into(), item);
                        waiting.entry(webhook).or_default().push_back(item);
                    }
                    Step::Pop => match queue.pop() {
                        Some((line, popped)) => {
                            prop_assert_eq!(waiting.get_mut(&number(&queue, line)).unwrap().pop_front(), Some(popped));
                            under_way.push(line);
                        }
                        None => for (_, line) in &queue.lines {
                            let its = &queue.organizations[line.organization].in_flight;
                            let may = queue.shares.allow(Level::of(line.in_flight), line.speed, &queue.in_flight)
                                && queue.shares.allow_within(Level::of(line.in_flight), line.speed, its, &queue.in_flight)
                                && line.in_flight < line.pace.window();
                            prop_assert!(line.waiting.is_empty() || !may);
                        },
                    },
                    Step::Finish(_, _) if under_way.is_empty() => {}
                    Step::Finish(which, ended) => {
                        let line = under_way.swap_remove(which % under_way.len());
                        let (webhook_id, worth) = queue.finished(line, ended);
                        prop_assert!(worth > 0 && webhook_id.parse::<usize>().is_ok());
                    }
                }
                prop_assert_eq!(queue.in_flight.total(), under_way.len());
                prop_assert!(under_way.len() <= queue.shares.hard_cap);
                for (_, organization) in &queue.organizations {
                    let BySpeed { quick, slow } = &organization.turns;
                    let is_busy = organization.in_flight.total() > 0;
                    prop_assert!([quick.place, slow.place].into_iter().flatten().all(|place| place.is_busy == is_busy));
                }
                let mut of_webhook = HashMap::<usize, usize>::new();
                under_way.iter().for_each(|line| *of_webhook.entry(*line).or_default() += 1);
                prop_assert!(of_webhook.values().all(|count| *count <= queue.shares.max_per_webhook));
            }
            let mut left: Vec<usize> = waiting.into_values().flatten().collect();
            let mut drained = queue.drain();
            left.sort_unstable();
            drained.sort_unstable();
            prop_assert_eq!(drained, left);
            under_way.into_iter().for_each(|line| drop(queue.finished(line, None)));
            prop_assert!(is_empty(&queue));
        }

        /// Everybody always has more to send, and attempts end in the order in which they began: then all that are under
        /// way have ended after as many turns as there may be, and every webhook has had one after a multiple of that.
        #[test]
        fn nobody_starves(manners in prop::collection::vec(prop::sample::select(vec![QUICK, SLOW, HUNG]), 1..60)) {
            let mut queue = Queue::new(small());
            for webhook in 0..manners.len() {
                (0..2).for_each(|_| queue.push(&organization(webhook), &webhook.to_string().into(), webhook));
            }
            let most = manners.len().div_ceil(ORGANIZATIONS);
            let patience = most * (queue.shares.hard_cap + 2 * ORGANIZATIONS);
            let mut last = vec![0; manners.len()];
            let mut under_way = VecDeque::new();
            for turn in 0..20 * patience {
                while let Some((line, webhook)) = queue.pop() {
                    last[webhook] = turn;
                    queue.push(&organization(webhook), &webhook.to_string().into(), webhook);
                    under_way.push_back((line, webhook));
                }
                let (line, webhook) = under_way.pop_front().unwrap();
                queue.finished(line, Some(manners[webhook]));
                prop_assert!(last.iter().all(|last| turn - last <= patience), "{turn}: {last:?}");
            }
        }

        /// Whatever anybody has under way, and whenever it ends: who may start, but does not, sees others start at most
        /// twice as often as there are organisations.
        #[test]
        fn who_may_start_does_after_twice_as_many_turns_as_organisations_wait(
            webhooks in prop::collection::vec(1..30_usize, 1..12),
            ends in prop::collection::vec(any::<prop::sample::Index>(), 400),
        ) {
            let mut queue = Queue::new(Shares::new(32, usize::MAX));
            let push = |queue: &mut Queue<_>, organization: usize, webhook: usize| {
                let webhook_id = format!("{organization} {webhook}").into();
                queue.push(&organization.to_string(), &webhook_id, (organization, webhook));
            };
            for (organization, count) in webhooks.iter().enumerate() {
                (0..*count).for_each(|webhook| (0..2).for_each(|_| push(&mut queue, organization, webhook)));
            }
            let mut under_way = Vec::new();
            let mut passed = vec![0; webhooks.len()];
            for end in ends {
                let may: Vec<usize> = queue.organizations.iter().filter(|(_, it)| it.turns.quick.place.is_some())
                    .map(|(_, it)| it.name.parse().unwrap()).collect();
                let Some((line, (organization, webhook))) = queue.pop() else { unreachable!("more is allowed") };
                push(&mut queue, organization, webhook);
                under_way.push(line);
                for (other, passed) in passed.iter_mut().enumerate() {
                    *passed = if other != organization && may.contains(&other) { *passed + 1 } else { 0 };
                    prop_assert!(*passed < 2 * webhooks.len(), "{other} of {webhooks:?}");
                }
                // As many at a time as keep everybody busy, or nearly.
                if under_way.len() > 2 * webhooks.len() {
                    queue.finished(under_way.swap_remove(end.index(under_way.len())), Some(QUICK));
                }
            }
        }
    }
}
