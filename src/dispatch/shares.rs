//! How many attempts may be under way, so that nobody's receivers take the wire from the others.
//!
//! Fixed caps cannot do it: 256 receivers that never answer, with 32 attempts each, fill 8,192 places for half a minute.
//! The rule is that of dynamic thresholds, by which switches share their memory (A. K. Choudhury and E. L. Hahne,
//! "Dynamic queue length thresholds for shared-memory packet switches", IEEE/ACM Transactions on Networking 6(2), 1998):
//! whoever has something on the wire may add to it only while that is less than a multiple α of what is *free*. A few get
//! a lot, many get little each, and something is always free for one that comes new, with no list of who is to blame.
//!
//! For a webhook with `n` attempts under way, of an organisation with `m`:
//!
//! ```text
//! free  = places − all under way              for slow ones at most  slow places − slow ones under way
//! first attempt (n = 0):  while all under way < hard cap;  for slow ones while those are fewer than the slow places
//! another (n ≥ 1):        while n < α × free   and   n < its window  ≤  the configured maximum
//! and, when m ≥ 64:       while n < α × (free − m)
//! ```
//!
//! where n counts as the next lower power of two, of which there are few for the queue to tell apart. α for webhooks is such that one may
//! reach the maximum, or a quarter of the places if that is less, while a quarter of them is free. α for organisations is 1, so that one alone leaves half; what it
//! may still take, m < free, its webhooks share by the same rule, so that those of one organisation leave room for each
//! other, too. Slow webhooks, see [`super::pace`], have half of the places: they need many at a time for little traffic,
//! quick ones few for a lot.

use super::pace::{BySpeed, Speed};

/// Attempts under way on this node which the webhooks share, where enough files may be open. At 15 s each, the half that
/// slow receivers may have is 270 deliveries a second, and that of it which one organisation may have is 135.
const PLACES: usize = 8_192;
/// One for every so many places is for slow receivers …
const PLACES_PER_SLOW: usize = 2;
/// … and first attempts of webhooks may exceed them by one for every so many.
const PLACES_PER_EXTRA: usize = 4;
/// Each attempt is a file, and so are callers, the database, and idle connections (see `egress/kept.rs`): attempts may have
/// one of every so many.
const FILES_PER_ATTEMPT: usize = 2;
/// So many places there are, however few files.
const MIN_PLACES: usize = 64;
/// An organisation with fewer under way is not limited …
const MIN_PER_ORGANIZATION: usize = 64;
/// … or than one for every so many places, where there are few of those.
const PLACES_PER_ORGANIZATION: usize = 16;

/// The limits of one node.
#[derive(Debug, Clone)]
pub(super) struct Shares {
    pub(super) max_per_webhook: usize,
    pub(super) places: usize,
    pub(super) slow_places: usize,
    pub(super) hard_cap: usize,
    pub(super) min_per_organization: usize,
}

/// Attempts under way.
pub(super) type InFlight = BySpeed<usize>;

/// A webhook's attempts under way as the queue tells them apart: 0, 1, 2 to 3, 4 to 7, …
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Level(u32);

impl InFlight {
    pub(super) fn total(&self) -> usize {
        self.quick + self.slow
    }
}

impl Level {
    pub(super) fn of(in_flight: usize) -> Self {
        Self(usize::BITS - in_flight.leading_zeros())
    }

    /// The fewest attempts of this level.
    fn least(self) -> usize {
        if self.0 == 0 { 0 } else { 1 << (self.0 - 1) }
    }
}

impl Shares {
    /// For a process that may have so many files open.
    pub(super) fn new(max_per_webhook: usize, files: usize) -> Self {
        let attempts = files / FILES_PER_ATTEMPT;
        let places = (attempts / (PLACES_PER_EXTRA + 1)).saturating_mul(PLACES_PER_EXTRA).clamp(MIN_PLACES, PLACES);
        Self {
            max_per_webhook,
            places,
            slow_places: places / PLACES_PER_SLOW,
            hard_cap: places + places / PLACES_PER_EXTRA,
            min_per_organization: MIN_PER_ORGANIZATION.min(places / PLACES_PER_ORGANIZATION),
        }
    }

    /// Whether there are by far fewer places than there could be.
    pub(super) fn are_few(&self) -> bool {
        self.places < PLACES / 2
    }

    /// Whether webhooks of this speed and level may start another attempt.
    pub(super) fn allow(&self, level: Level, speed: Speed, all: &InFlight) -> bool {
        match (level.least(), speed) {
            (0, Speed::Quick) => all.total() < self.hard_cap,
            (0, Speed::Slow) => all.total() < self.hard_cap && all.slow < self.slow_places,
            (least, _) => least * self.free_places_per_attempt() < self.free(speed, all),
        }
    }

    /// Whether webhooks of this speed and level of an organisation may, when those of others may.
    pub(super) fn allow_within(&self, level: Level, speed: Speed, its: &InFlight, all: &InFlight) -> bool {
        its[speed] < self.min_per_organization
            || level.least() * self.free_places_per_attempt() < self.free_within(speed, its, all)
    }

    /// How many attempts a webhook of this speed may have as things stand, at least one.
    pub(super) fn of_webhook(&self, speed: Speed, its: &InFlight, all: &InFlight) -> usize {
        let few = its[speed] < self.min_per_organization;
        let free = if few { self.free(speed, all) } else { self.free_within(speed, its, all) };
        (free / self.free_places_per_attempt()).clamp(1, self.max_per_webhook)
    }

    /// What an organisation may still take.
    fn free_within(&self, speed: Speed, its: &InFlight, all: &InFlight) -> usize {
        self.free(speed, all).saturating_sub(its[speed])
    }

    fn free(&self, speed: Speed, all: &InFlight) -> usize {
        let free = self.places.saturating_sub(all.total());
        match speed {
            Speed::Quick => free,
            Speed::Slow => free.min(self.slow_places.saturating_sub(all.slow)),
        }
    }

    /// 1 / α.
    fn free_places_per_attempt(&self) -> usize {
        (self.places / 4 / self.max_per_webhook).max(1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What `count` webhooks of organisations of their own have under way when each always has more to send.
    fn saturate(shares: &Shares, count: usize, speed: Speed) -> (Vec<usize>, InFlight) {
        let (mut webhooks, mut all) = (vec![0; count], InFlight::default());
        while let Some(least) = webhooks.iter_mut().filter(|count| **count < shares.max_per_webhook).min()
            && shares.allow(Level::of(*least), speed, &all)
        {
            *least += 1;
            all[speed] += 1;
        }
        (webhooks, all)
    }

    #[test]
    fn few_get_a_lot_and_many_leave_room() {
        let shares = Shares::new(32, usize::MAX);
        for speed in [Speed::Quick, Speed::Slow] {
            assert_eq!(saturate(&shares, 8, speed).0, [32; 8]);
        }
        // What a quick webhook may have beside so many that hang, before and after they are known to be slow.
        for (count, beside_quick, beside_slow) in
            [(256, 16, 32), (1_024, 4, 32), (4_000, 1, 32), (PLACES + 1_000, 1, 32)]
        {
            for (speed, expected) in [(Speed::Quick, beside_quick), (Speed::Slow, beside_slow)] {
                let (_, all) = saturate(&shares, count, speed);
                assert!(shares.allow(Level::of(0), Speed::Quick, &all), "{count} {speed:?}");
                let may = shares.of_webhook(Speed::Quick, &InFlight::default(), &all);
                assert!(may >= expected, "{count} {speed:?}: {may}");
            }
        }
    }

    #[test]
    fn an_organisation_leaves_half_and_its_webhooks_leave_room_for_each_other() {
        let shares = Shares::new(32, usize::MAX);
        let (mut webhooks, mut all) = ([0; 200], InFlight::default());
        while let Some(least) = webhooks.iter_mut().filter(|count| **count < 32).min()
            && shares.allow_within(Level::of(*least), Speed::Quick, &all, &all)
        {
            *least += 1;
            all.quick += 1;
        }
        assert!((PLACES / 4..=PLACES / 2).contains(&all.total()), "{all:?}");
        assert!(shares.allow_within(Level::of(0), Speed::Quick, &all, &all));
        assert!(shares.of_webhook(Speed::Quick, &all, &all) >= 4);
        assert_eq!(shares.of_webhook(Speed::Quick, &InFlight::default(), &all), 32, "of another organisation");
    }

    #[test]
    fn attempts_take_half_of_the_files_and_organisations_half_of_those() {
        for files in [256, 1_024, 4_096, 16_384, usize::MAX] {
            let shares = Shares::new(32, files);
            let (_, all) = saturate(&shares, PLACES / 4 * 5 + 1, Speed::Quick);
            assert_eq!(all.total(), shares.hard_cap);
            assert!(all.total() <= files / 2 && all.total() <= PLACES / 4 * 5, "{files}: {all:?}");
            assert_eq!(shares.are_few(), files < 10_240);
            // One organisation that takes all it can.
            for speed in [Speed::Quick, Speed::Slow] {
                let mut its = InFlight::default();
                while shares.allow(Level::of(1), speed, &its) && shares.allow_within(Level::of(1), speed, &its, &its) {
                    its[speed] += 1;
                }
                let most = if speed == Speed::Slow { shares.slow_places } else { shares.places };
                assert!((most / 4..=most / 2).contains(&its.total()), "{files} {speed:?}: {its:?}");
            }
        }
        assert_eq!(Shares::new(32, 0).places, MIN_PLACES, "too few for anything to work, but not none");
    }

    #[test]
    fn a_large_maximum_can_be_reached() {
        let shares = Shares::new(1_024, usize::MAX);
        assert!(saturate(&shares, 1, Speed::Quick).0[0] >= 1_024);
    }
}
