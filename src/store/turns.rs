//! What waits to be written, in one line for each organisation: whoever has much to write makes only itself wait.

use std::{
    collections::{HashMap, VecDeque},
    sync::Arc,
    time::{Duration, Instant},
};

use crate::clock;

/// Lines of things that take their turns. Whoever comes new is next after one turn of all others.
pub(super) struct Waiting<T> {
    /// None of them is empty.
    lines: HashMap<Arc<str>, VecDeque<T>>,
    /// Each organisation that has a line, in the order of their turns.
    turns: VecDeque<Arc<str>>,
    /// Whose turn was last, and when it last was another's than the time before.
    last: Option<Arc<str>>,
    changed: Option<Instant>,
}

impl<T> Waiting<T> {
    pub(super) fn new() -> Self {
        Self { lines: HashMap::new(), turns: VecDeque::new(), last: None, changed: None }
    }

    pub(super) fn push(&mut self, organization: Arc<str>, item: T) {
        if let Some(line) = self.lines.get_mut(&organization) {
            return line.push_back(item);
        }
        self.lines.insert(Arc::clone(&organization), VecDeque::from([item]));
        self.turns.push_back(organization);
    }

    /// The first thing in the line whose turn it is.
    pub(super) fn pop(&mut self) -> Option<T> {
        let organization = self.turns.pop_front()?;
        let line = self.lines.get_mut(&organization)?;
        let item = line.pop_front();
        if self.last.as_ref() != Some(&organization) {
            self.changed = self.last.replace(Arc::clone(&organization)).map(|_| clock::stopwatch());
        }
        if line.is_empty() {
            self.lines.remove(&organization);
        } else {
            self.turns.push_back(organization);
        }
        item
    }

    /// Whether several had their turns within this time.
    pub(super) fn is_shared(&self, time: Duration) -> bool {
        self.turns.len() > 1 || self.changed.is_some_and(|changed| changed.elapsed() < time)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.turns.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn organisations_take_turns() {
        let mut waiting = Waiting::new();
        let (loud, quiet) = (|| Arc::from("loud"), || Arc::from("quiet"));
        (0..4).for_each(|number| waiting.push(loud(), ("loud", number)));
        assert!(!waiting.is_shared(Duration::MAX));
        waiting.push(quiet(), ("quiet", 0));
        assert_eq!(waiting.pop(), Some(("loud", 0)));
        waiting.push(quiet(), ("quiet", 1));
        let rest: Vec<_> = std::iter::from_fn(|| waiting.pop()).collect();
        assert_eq!(rest, [("quiet", 0), ("loud", 1), ("quiet", 1), ("loud", 2), ("loud", 3)]);
        assert!(waiting.is_empty() && waiting.lines.is_empty());
        assert!(waiting.is_shared(Duration::MAX) && !waiting.is_shared(Duration::ZERO));
        waiting.push(loud(), ("loud", 5));
        waiting.pop();
        assert!(waiting.is_shared(Duration::MAX), "a moment ago");
        waiting.push(quiet(), ("quiet", 2));
        assert_eq!(waiting.pop(), Some(("quiet", 2)), "whoever had nothing left can come back");
    }
}
