//! How many items a commit should have: as many as take half as long again as the fewest, which mostly wait for the flush of
//! a disk. Where that takes long it is many, and fewer would mostly flush; where it is short it is few, since more would
//! make others wait.

use std::{ops::RangeInclusive, time::Duration};

/// Every so many commits, one has the least number of items, to see how long that takes.
const PROBE: usize = 8;
/// The quickest of so many of those says how long it takes when nothing else is in its way.
const REMEMBERED: usize = 8;
/// It grows and shrinks by this part of itself.
const PACE: usize = 16;

/// Follows what commits take.
pub(super) struct CommitSize {
    range: RangeInclusive<usize>,
    best: usize,
    commits: usize,
    /// Whether the next one is to be as small as it may.
    probing: bool,
    /// What the last of those, and others as small, took; and the place for the next one.
    smallest: [Duration; REMEMBERED],
    place: usize,
}

impl CommitSize {
    /// The least until something is known.
    pub(super) fn new(range: RangeInclusive<usize>) -> Self {
        let best = *range.start();
        Self { range, best, commits: 0, probing: false, smallest: [Duration::MAX; REMEMBERED], place: 0 }
    }

    /// How many items the next commit may have.
    pub(super) fn next(&mut self) -> usize {
        self.commits = self.commits.wrapping_add(1);
        self.probing = self.commits.is_multiple_of(PROBE);
        if self.probing { *self.range.start() } else { self.best }
    }

    /// A commit of so many items took so long.
    pub(super) fn learn(&mut self, items: usize, took: Duration) {
        // Also when it became larger, because one item was large, or because everybody had a turn.
        if self.probing || items <= *self.range.start() {
            self.smallest[self.place] = took;
            self.place = (self.place + 1) % REMEMBERED;
        }
        let quickest = self.smallest.iter().min().copied().unwrap_or_default();
        if !self.probing && items >= self.best && quickest < Duration::MAX {
            let step = self.best.div_ceil(PACE);
            let changed = if took < quickest.saturating_mul(3) / 2 { self.best + step } else { self.best - step };
            self.best = changed.clamp(*self.range.start(), *self.range.end());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The size after 500 commits, each as large as it may be, which take this many microseconds, and this many for each
    /// item.
    fn learned(size: &mut CommitSize, fixed: u64, each: u64) -> usize {
        for round in 0..500_u64 {
            let items = size.next();
            // A quarter more or less.
            let noise = 75 + round * 13 % 50;
            size.learn(items, Duration::from_micros((fixed + each * items as u64) * noise / 100));
        }
        size.best
    }

    #[test]
    fn it_follows_what_a_flush_takes() {
        let mut size = CommitSize::new(16..=128);
        assert_eq!(size.next(), 16);
        let quick = learned(&mut size, 300, 40);
        assert!((16..=32).contains(&quick), "{quick}");
        let slower = learned(&mut size, 10_000, 50);
        assert!((quick + 1..=64).contains(&slower), "{slower}");
        let slowest = learned(&mut size, 100_000, 50);
        assert!(slowest > 100, "{slowest}");
        assert!(learned(&mut size, 300, 40) <= quick + 2);
    }

    /// However slow a few commits are for other reasons, others wait no longer for the next ones.
    #[test]
    fn what_slows_all_of_them_makes_none_larger() {
        let mut size = CommitSize::new(16..=128);
        let before = learned(&mut size, 300, 40);
        (0..6).for_each(|_| size.learn(16, Duration::from_millis(10)));
        (0..6).for_each(|_| size.learn(before, Duration::from_millis(10)));
        assert!(size.best <= before, "{} {before}", size.best);
    }

    #[test]
    fn where_none_is_small_it_goes_by_the_smallest() {
        let mut size = CommitSize::new(8..=128);
        for _ in 0..500 {
            let items = size.next().max(40);
            size.learn(items, Duration::from_micros(300 + 40 * items as u64));
        }
        assert!((40..=70).contains(&size.best), "{}", size.best);
    }

    #[test]
    fn small_commits_change_nothing() {
        let mut size = CommitSize::new(16..=128);
        let before = learned(&mut size, 2_000, 50);
        (0..100).for_each(|_| size.learn(17, Duration::from_micros(10)));
        assert_eq!(size.best, before);
    }
}
