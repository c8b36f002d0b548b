//! A queue in which organisations take turns: whoever has much in it makes only itself wait.

use std::{
    collections::{HashMap, VecDeque},
    mem,
    sync::Arc,
    time::{Duration, Instant},
};

use crate::clock;

/// A line of things for each organisation. Whoever comes new is next after one turn of all others.
pub(super) struct Turns<T> {
    /// None of them is empty.
    lines: HashMap<Arc<str>, VecDeque<T>>,
    /// Each organisation that has a line, in the order of their turns.
    order: VecDeque<Arc<str>>,
    len: usize,
    /// Whose turn was last, and when it last was another's than the time before.
    last: Option<Arc<str>>,
    changed: Option<Instant>,
}

impl<T> Default for Turns<T> {
    fn default() -> Self {
        Self { lines: HashMap::new(), order: VecDeque::new(), len: 0, last: None, changed: None }
    }
}

impl<T> Turns<T> {
    pub(super) fn push(&mut self, organization: Arc<str>, item: T) {
        self.len += 1;
        if let Some(line) = self.lines.get_mut(&organization) {
            return line.push_back(item);
        }
        self.lines.insert(Arc::clone(&organization), VecDeque::from([item]));
        self.order.push_back(organization);
    }

    /// Puts something that was taken back where it was: its organisation is next, and it is the first.
    pub(super) fn put_back(&mut self, organization: Arc<str>, item: T) {
        self.len += 1;
        let line = self.lines.entry(Arc::clone(&organization)).or_default();
        line.push_front(item);
        self.order.retain(|other| *other != organization);
        self.order.push_front(organization);
    }

    /// The first thing in the line whose turn it is.
    pub(super) fn pop(&mut self) -> Option<T> {
        let organization = self.order.pop_front()?;
        let line = self.lines.get_mut(&organization)?;
        let item = line.pop_front();
        self.len -= 1;
        if self.last.as_ref() != Some(&organization) {
            self.changed = self.last.replace(Arc::clone(&organization)).map(|_| clock::stopwatch());
        }
        if line.is_empty() {
            self.lines.remove(&organization);
        } else {
            self.order.push_back(organization);
        }
        item
    }

    /// Takes out all that are such.
    pub(super) fn take(&mut self, such: impl Fn(&T) -> bool) -> Vec<T> {
        let mut taken = Vec::new();
        for line in self.lines.values_mut() {
            let (out, left): (Vec<T>, Vec<T>) = mem::take(line).into_iter().partition(&such);
            taken.extend(out);
            line.extend(left);
        }
        self.lines.retain(|_, line| !line.is_empty());
        self.order.retain(|organization| self.lines.contains_key(organization));
        self.len -= taken.len();
        taken
    }

    /// Lets all begin somewhere else, without a change of who follows whom.
    pub(super) fn rotate(&mut self, by: usize) {
        self.lines.values_mut().for_each(|line| line.rotate_left(by % line.len()));
        self.order.rotate_left(by % self.order.len().max(1));
    }

    /// Whether several had their turns within this time.
    pub(super) fn is_shared(&self, time: Duration) -> bool {
        self.order.len() > 1 || self.changed.is_some_and(|changed| changed.elapsed() < time)
    }

    /// Whether anybody else than `one` has something in it.
    pub(super) fn has_others(&self, one: &str) -> bool {
        self.order.iter().any(|organization| **organization != *one)
    }

    /// How many organisations have something in it.
    pub(super) fn organizations(&self) -> usize {
        self.order.len()
    }

    /// How many things are in it.
    pub(super) fn len(&self) -> usize {
        self.len
    }

    pub(super) fn is_empty(&self) -> bool {
        self.len == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn organisations_take_turns() {
        let mut turns = Turns::default();
        let (loud, quiet) = (|| Arc::from("loud"), || Arc::from("quiet"));
        (0..4).for_each(|number| turns.push(loud(), ("loud", number)));
        assert!(!turns.is_shared(Duration::MAX));
        turns.push(quiet(), ("quiet", 0));
        assert_eq!(turns.organizations(), 2);
        assert_eq!(turns.pop(), Some(("loud", 0)));
        turns.push(quiet(), ("quiet", 1));
        let rest: Vec<_> = std::iter::from_fn(|| turns.pop()).collect();
        assert_eq!(rest, [("quiet", 0), ("loud", 1), ("quiet", 1), ("loud", 2), ("loud", 3)]);
        assert!(turns.is_empty() && turns.lines.is_empty());
        assert!(turns.is_shared(Duration::MAX) && !turns.is_shared(Duration::ZERO));
        (0..3).for_each(|number| turns.push(loud(), ("loud", number)));
        turns.push(quiet(), ("quiet", 0));
        turns.rotate(5);
        let rest: Vec<_> = std::iter::from_fn(|| turns.pop()).collect();
        assert_eq!(rest, [("quiet", 0), ("loud", 2), ("loud", 0), ("loud", 1)]);
        turns.rotate(5);
        turns.push(loud(), ("loud", 5));
        turns.pop();
        assert!(turns.is_shared(Duration::MAX), "a moment ago");
        turns.push(quiet(), ("quiet", 2));
        assert_eq!(turns.pop(), Some(("quiet", 2)), "whoever had nothing left can come back");
        (3..5).for_each(|number| turns.push(quiet(), ("quiet", number)));
        turns.push(loud(), ("loud", 6));
        turns.put_back(quiet(), ("quiet", 2));
        turns.put_back(loud(), ("loud", 5));
        assert_eq!((turns.len(), turns.organizations()), (5, 2));
        let rest: Vec<_> = std::iter::from_fn(|| turns.pop()).collect();
        assert_eq!(rest, [("loud", 5), ("quiet", 2), ("loud", 6), ("quiet", 3), ("quiet", 4)]);
        (0..3).for_each(|number| turns.push(loud(), ("loud", number)));
        turns.push(quiet(), ("quiet", 7));
        assert_eq!(turns.take(|(_, number)| number % 2 == 1).len(), 2);
        assert_eq!((turns.len(), turns.organizations()), (2, 1), "who has nothing left has no turn");
        assert_eq!([turns.pop(), turns.pop(), turns.pop()], [Some(("loud", 0)), Some(("loud", 2)), None]);
    }
}
