//! The books: what was published and how it was answered, what arrived, and what does not add up.

use std::{
    collections::{HashMap, HashSet},
    ops::Range,
    sync::{Mutex, MutexGuard},
    time::{Duration, Instant},
};

use shortkit_webhooks::clock;
use tokio::sync::Notify;

/// The first few say enough; no more are kept.
const MAX_VIOLATIONS: usize = 20;

/// How a publish ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// It is not over.
    Open,
    /// A 2xx: from now on the event must not be lost.
    Acknowledged,
    /// An error, with its status: the event may or may not be stored.
    Refused(u16),
    /// No answer: the event may or may not be stored.
    Unknown,
}

/// One publish.
#[derive(Debug, Clone)]
pub(crate) struct Publish {
    pub(crate) organization: &'static str,
    pub(crate) began: Instant,
    pub(crate) ended: Instant,
    pub(crate) outcome: Outcome,
    /// The event, as the first answer names it.
    event_id: Option<String>,
}

/// One request at the receiver.
#[derive(Debug, Clone)]
pub(crate) struct Arrival {
    pub(crate) number: u64,
    pub(crate) delivery_id: String,
    pub(crate) attempt: u32,
    pub(crate) at: Instant,
    /// Whether it was answered with a 2xx.
    pub(crate) accepted: bool,
}

#[derive(Default)]
pub(crate) struct Books {
    pub(crate) published: HashMap<u64, Publish>,
    /// What was published together: all of it, or nothing.
    together: Vec<Range<u64>>,
    pub(crate) arrivals: Vec<Arrival>,
    /// Numbers with an accepted arrival.
    arrived: HashSet<u64>,
    /// By number: the delivery that came first, and the only one that may.
    delivered_as: HashMap<u64, String>,
    /// How often something was published again with its key.
    pub(crate) asked_again: usize,
    /// When something went wrong on purpose.
    pub(crate) faults: Vec<Instant>,
    /// What must never be, as sentences.
    violations: Vec<String>,
}

/// The books of one scenario, written by publishers and receiver.
#[derive(Default)]
pub(crate) struct Ledger {
    books: Mutex<Books>,
    /// Rung at every arrival.
    pub(crate) arrived: Notify,
}

/// What the books say at the end.
#[derive(Default)]
pub(crate) struct Sums {
    pub(crate) faults: usize,
    pub(crate) published: usize,
    pub(crate) acknowledged: usize,
    /// Events of which at least one accepted request came.
    pub(crate) received: usize,
    /// Acknowledged and never received.
    pub(crate) lost: usize,
    /// Requests beyond the first for a delivery, less those that a refusal asked for.
    pub(crate) repeated: usize,
    /// The most of one delivery.
    pub(crate) most_repeated: usize,
    /// Deliveries seen.
    pub(crate) deliveries: usize,
    /// The longest time from a fault until everything acknowledged before it had arrived.
    pub(crate) recovered: Duration,
    pub(crate) together: Together,
    pub(crate) violations: Vec<String>,
}

/// What became of events that were published together.
#[derive(Default)]
pub(crate) struct Together {
    pub(crate) batches: usize,
    /// Not acknowledged: refused, or without an answer …
    pub(crate) unacknowledged: usize,
    /// … and stored all the same, as their arrivals tell.
    pub(crate) stored: usize,
    /// Of these some events came and some did not, however they were answered.
    pub(crate) in_part: usize,
}

impl Ledger {
    pub(crate) fn books(&self) -> MutexGuard<'_, Books> {
        self.books.lock().expect("no panic while it was held")
    }

    /// Begins a publish of so many events together; their numbers are in their data.
    pub(crate) fn begin(&self, organization: &'static str, count: u64) -> Range<u64> {
        let mut books = self.books();
        let first = books.published.len() as u64;
        let now = clock::stopwatch();
        let publish = Publish { organization, began: now, ended: now, outcome: Outcome::Open, event_id: None };
        books.published.extend((first..first + count).map(|number| (number, publish.clone())));
        if count > 1 {
            books.together.push(first..first + count);
        }
        first..first + count
    }

    pub(crate) fn end(&self, numbers: Range<u64>, outcome: Outcome) {
        let mut books = self.books();
        for number in numbers {
            // What was acknowledged once stays so.
            if let Some(publish) = books.published.get_mut(&number)
                && publish.outcome != Outcome::Acknowledged
            {
                (publish.outcome, publish.ended) = (outcome, clock::stopwatch());
            }
        }
    }

    /// Notes the events that an answer names, in their order; the same ones each time.
    pub(crate) fn named(&self, numbers: Range<u64>, ids: &[&str]) {
        let mut violations = Vec::new();
        if ids.len() as u64 != numbers.end - numbers.start {
            violations.push(format!("the answer to the events {numbers:?} names {}", ids.len()));
        }
        let mut books = self.books();
        for (number, id) in numbers.zip(ids) {
            let Some(publish) = books.published.get_mut(&number) else { continue };
            let first = publish.event_id.get_or_insert_with(|| (*id).to_owned());
            if first != id {
                violations.push(format!("event {number} was answered as {first} and as {id}"));
            }
        }
        drop(books);
        violations.into_iter().for_each(|violation| self.violation(violation));
    }

    /// Notes that something is published again, with the key that it had.
    pub(crate) fn asked_again(&self) {
        self.books().asked_again += 1;
    }

    /// Notes that something goes wrong now.
    pub(crate) fn fault(&self) {
        self.books().faults.push(clock::stopwatch());
    }

    pub(crate) fn violation(&self, sentence: String) {
        let mut books = self.books();
        if books.violations.len() < MAX_VIOLATIONS {
            books.violations.push(sentence);
        }
    }

    /// Notes a request at the receiver of `organization`.
    pub(crate) fn arrival(&self, organization: &str, arrival: Arrival) {
        let mut books = self.books();
        let violation = match books.published.get(&arrival.number) {
            None => Some(format!("event {} was received and never published", arrival.number)),
            Some(publish) if publish.organization != organization => {
                Some(format!("{organization} received event {} of {}", arrival.number, publish.organization))
            }
            Some(_) => None,
        };
        let Books { delivered_as, violations, .. } = &mut *books;
        let first = delivered_as.entry(arrival.number).or_insert_with(|| arrival.delivery_id.clone());
        let again = (*first != arrival.delivery_id)
            .then(|| format!("event {} came as {first} and as {}", arrival.number, arrival.delivery_id));
        violations.extend(violation.into_iter().chain(again).take(MAX_VIOLATIONS.saturating_sub(violations.len())));
        if arrival.accepted {
            books.arrived.insert(arrival.number);
        }
        books.arrivals.push(arrival);
        drop(books);
        self.arrived.notify_waiters();
    }

    /// How many acknowledged events have not arrived.
    pub(crate) fn missing(&self) -> usize {
        self.books().missing().count()
    }

    /// How many of these events have.
    #[cfg(feature = "failpoints")]
    pub(crate) fn arrived_of(&self, numbers: Range<u64>) -> u64 {
        self.books().arrived_of(&numbers)
    }

    /// How many requests came.
    pub(crate) fn arrivals(&self) -> usize {
        self.books().arrivals.len()
    }

    /// How long after `moment` the first publish that began after it was acknowledged; none when none was.
    pub(crate) fn acknowledged_after(&self, moment: Instant) -> Option<Duration> {
        let books = self.books();
        let later = books.acknowledged().filter(|(_, publish)| publish.began >= moment);
        later.map(|(_, publish)| publish.ended - moment).min()
    }

    pub(crate) fn sums(&self) -> Sums {
        let books = self.books();
        let mut first = HashMap::new();
        let mut deliveries: HashMap<&str, (usize, usize)> = HashMap::new();
        for arrival in &books.arrivals {
            let (requests, refused) = deliveries.entry(&arrival.delivery_id).or_default();
            *requests += 1;
            *refused += usize::from(!arrival.accepted);
            if arrival.accepted {
                first.entry(arrival.number).or_insert(arrival.at);
            }
        }
        let late = |fault: &Instant| {
            let before = books.acknowledged().filter(|(_, publish)| publish.ended <= *fault);
            let arrived = before.filter_map(|(number, _)| first.get(number)).filter(|at| *at > fault);
            arrived.map(|at| *at - *fault).max().unwrap_or_default()
        };
        let repeats =
            || deliveries.values().map(|(requests, refused): &(usize, usize)| requests.saturating_sub(1 + refused));
        Sums {
            faults: books.faults.len(),
            published: books.published.len(),
            acknowledged: books.acknowledged().count(),
            received: books.arrived.len(),
            lost: books.missing().count(),
            repeated: repeats().sum(),
            most_repeated: repeats().max().unwrap_or_default(),
            deliveries: deliveries.len(),
            recovered: books.faults.iter().map(late).max().unwrap_or_default(),
            together: books.together(),
            violations: books.violations.clone(),
        }
    }
}

impl Sums {
    /// Adds what another part of the scenario came to; the longest time counts.
    #[cfg(feature = "failpoints")]
    pub(crate) fn add(&mut self, other: &Self) {
        self.faults += other.faults;
        self.published += other.published;
        self.acknowledged += other.acknowledged;
        self.received += other.received;
        self.lost += other.lost;
        self.repeated += other.repeated;
        self.most_repeated = self.most_repeated.max(other.most_repeated);
        self.deliveries += other.deliveries;
        self.recovered = self.recovered.max(other.recovered);
        self.together.batches += other.together.batches;
        self.together.unacknowledged += other.together.unacknowledged;
        self.together.stored += other.together.stored;
        self.together.in_part += other.together.in_part;
    }
}

impl Books {
    fn acknowledged(&self) -> impl Iterator<Item = (&u64, &Publish)> {
        self.published.iter().filter(|(_, publish)| publish.outcome == Outcome::Acknowledged)
    }

    fn missing(&self) -> impl Iterator<Item = &u64> {
        self.acknowledged().map(|(number, _)| number).filter(|number| !self.arrived.contains(number))
    }

    fn arrived_of(&self, numbers: &Range<u64>) -> u64 {
        numbers.clone().filter(|number| self.arrived.contains(number)).count() as u64
    }

    fn together(&self) -> Together {
        let mut together = Together::default();
        for batch in &self.together {
            let arrived = self.arrived_of(batch);
            let acknowledged = self.published[&batch.start].outcome == Outcome::Acknowledged;
            together.batches += 1;
            together.unacknowledged += usize::from(!acknowledged);
            together.stored += usize::from(!acknowledged && arrived > 0);
            together.in_part += usize::from((1..batch.end - batch.start).contains(&arrived));
        }
        together
    }
}
