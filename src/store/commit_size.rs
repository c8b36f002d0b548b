//! How many items a commit should have: as many as double the time that it takes anyway, for the flush of a disk. Fewer would
//! mostly flush; more would mostly make others wait. Where a flush takes long that is many, where it is short few.

use std::{ops::RangeInclusive, time::Duration};

/// How much of what is known is forgotten with each commit.
const FORGET: f64 = 0.98;
/// Commits whose numbers of items vary less than this, as a part of their square, tell more of noise than of what one costs.
/// Then the next ones are smaller, until they do.
const MIN_VARIANCE: f64 = 1.0 / 16.0;

/// What commits took that were made at the first try: the line `time = fixed + items × each` through the last of them
/// (least squares, older ones counting less and less).
pub(super) struct CommitSize {
    range: RangeInclusive<usize>,
    best: usize,
    /// Sums over all commits.
    weight: f64,
    items: f64,
    secs: f64,
    items_squared: f64,
    items_secs: f64,
}

impl CommitSize {
    /// The least until something is known.
    pub(super) fn new(range: RangeInclusive<usize>) -> Self {
        let best = *range.start();
        Self { range, best, weight: 0.0, items: 0.0, secs: 0.0, items_squared: 0.0, items_secs: 0.0 }
    }

    /// A commit of so many items took so long.
    pub(super) fn learn(&mut self, items: usize, took: Duration) {
        let (items, secs) = (items as f64, took.as_secs_f64());
        for (sum, new) in [
            (&mut self.weight, 1.0),
            (&mut self.items, items),
            (&mut self.secs, secs),
            (&mut self.items_squared, items * items),
            (&mut self.items_secs, items * secs),
        ] {
            *sum = *sum * FORGET + new;
        }
        let variance = self.weight * self.items_squared - self.items * self.items;
        let each = (self.weight * self.items_secs - self.items * self.secs) / variance;
        let fixed = (self.secs - each * self.items) / self.weight;
        let best = if variance < MIN_VARIANCE * self.items * self.items {
            self.best - self.best.div_ceil(32)
        } else if each > 0.0 {
            // A float that is too large, or negative, becomes the nearest number there is.
            (fixed / each) as usize
        } else {
            self.best
        };
        self.best = best.clamp(*self.range.start(), *self.range.end());
    }

    /// How many items a commit should have.
    pub(super) fn best(&self) -> usize {
        self.best
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Commits of 1 to `most` items that take this many microseconds, and this many for each item.
    fn learned(size: &mut CommitSize, most: usize, fixed: u64, each: u64) -> usize {
        for round in 0..500_u64 {
            let items = 1 + (round as usize * 7) % most;
            // A quarter more or less.
            let noise = 75 + round * 13 % 50;
            size.learn(items, Duration::from_micros((fixed + each * items as u64) * noise / 100));
        }
        size.best()
    }

    #[test]
    fn a_slow_flush_is_shared_by_many() {
        let mut size = CommitSize::new(16..=128);
        assert_eq!(size.best(), 16);
        assert_eq!(learned(&mut size, 16, 300, 40), 16);
        assert!((70..=130).contains(&learned(&mut size, 64, 5_000, 50)), "{}", size.best());
        assert_eq!(learned(&mut size, 128, 100_000, 50), 128);
        assert_eq!(learned(&mut size, 128, 300, 40), 16);
    }

    #[test]
    fn what_is_always_the_same_is_made_smaller() {
        let mut size = CommitSize::new(16..=128);
        learned(&mut size, 64, 2_000, 50);
        let before = size.best();
        assert!(before > 16);
        (0..1_000).for_each(|_| size.learn(16, Duration::from_micros(2_800)));
        assert_eq!(size.best(), 16);
    }
}
