//! Which connections are kept open for the next request. reqwest bounds those of one host, but not how many hosts there
//! are: ten thousand that hear something twice a minute would be as many open files, and as many times the memory of a
//! connection.
//!
//! So there are several clients, which differ in how many idle connections they keep of each host: none, one, a few, or as
//! many as a webhook uses. A host goes over one of them, and what all may keep together is bounded, by what each may,
//! whether it does or not. Who has more requests under way than it may keep connections moves up while there is room, of
//! which a quarter is for the first of each host. Once in a while, all are looked at: who was not asked for is forgotten,
//! who needed less moves down, and while somebody gets nothing, those who used each of theirs least make room.

use std::{
    collections::HashMap,
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use url::{Position, Url};

use crate::clock;

/// How many idle connections of a host each of the clients keeps: as many as a webhook uses at a time, lest they be made anew
/// all the time, and more for a host that many webhooks share.
pub(super) const POOLS: [usize; 6] = [0, 1, 4, 12, 32, 128];
/// How often each connection of a host was used is counted in parts of so many: with the largest pool, one use of one of them.
const PARTS: usize = POOLS[POOLS.len() - 1];
/// The client that closes every connection behind its request.
const CLOSING: usize = 0;
/// The one for hosts that need one connection.
const FIRST: usize = 1;
/// Connections that all hosts may keep together, where enough files may be open …
const MAX_KEPT: usize = 4_096;
/// … which is when one of so many files is not more.
pub(super) const FILES_PER_KEPT: usize = 8;
/// One of so many is only for hosts that have none; and as many make room at a time while somebody gets nothing.
const KEPT_PER_FIRST: usize = 4;
/// Idle connections are closed after this time …
pub(super) const MAX_IDLE: Duration = Duration::from_secs(30);
/// … for which reqwest looks once in as long, so that after this time one that was not used is closed.
const CLOSED: Duration = MAX_IDLE.saturating_mul(2);

/// Who may keep how many.
pub(super) struct Kept {
    most: usize,
    hosts: Mutex<Hosts>,
}

struct Hosts {
    by_origin: HashMap<Box<str>, Host>,
    /// What all of them may keep.
    kept: usize,
    looked: Instant,
    /// Requests since then whose host may keep nothing.
    left_out: usize,
}

#[derive(Default)]
struct Host {
    pool: usize,
    /// What it may have left open in other pools, where it was since the last look, and the one before.
    left: [usize; 2],
    under_way: usize,
    /// The most requests that were under way at a time since the last look, and how many left a connection open.
    most: usize,
    used: usize,
    /// Whether it was ever connected to.
    is_there: bool,
}

/// A request, from before it is sent until its answer is read.
pub(super) struct Place<'a> {
    of: &'a Kept,
    origin: &'a str,
    pool: usize,
    /// Whether it is counted for its host.
    counts: bool,
    ended: Ended,
}

/// What is left of a request.
#[derive(Clone, Copy)]
enum Ended {
    /// Nothing, as far as anybody knows.
    Somehow,
    /// Nothing: there was no connection.
    Unconnected,
    /// An open connection.
    Open,
}

impl Kept {
    /// With so many files that may be open.
    pub(super) fn new(open_files: usize) -> Self {
        let hosts = Hosts { by_origin: HashMap::new(), kept: 0, looked: clock::stopwatch(), left_out: 0 };
        Self { most: MAX_KEPT.min(open_files / FILES_PER_KEPT), hosts: Mutex::new(hosts) }
    }

    /// Where a request to this URL goes.
    pub(super) fn place<'a>(&'a self, url: &'a Url) -> Place<'a> {
        let origin = &url[..Position::BeforePath];
        let mut hosts = self.lock();
        if hosts.looked.elapsed() >= CLOSED {
            hosts.look(self.most);
        }
        let (pool, counts) = hosts.begin(origin, self.most);
        Place { of: self, origin, pool, counts, ended: Ended::Somehow }
    }

    fn lock(&self) -> MutexGuard<'_, Hosts> {
        self.hosts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Hosts {
    /// The pool of a request, and whether it is counted.
    fn begin(&mut self, origin: &str, most: usize) -> (usize, bool) {
        let free = most.saturating_sub(self.kept);
        let spare = free.saturating_sub(most / KEPT_PER_FIRST);
        if free == 0 && !self.by_origin.contains_key(origin) {
            self.left_out += 1;
            return (CLOSING, false);
        }
        let host = match self.by_origin.get_mut(origin) {
            Some(host) => host,
            None => self.by_origin.entry(origin.into()).or_default(),
        };
        host.under_way += 1;
        host.most = host.most.max(host.under_way);
        // Who had to make room does not come back before it has.
        let is_out = host.pool == CLOSING && host.left != [0; 2];
        let room = |pool: &usize| POOLS[*pool] <= if *pool == FIRST { free } else { spare };
        if !is_out && let Some(pool) = (host.pool + 1..=host.wanted()).rev().find(room) {
            host.move_to(pool);
            self.kept += POOLS[pool];
        }
        self.left_out += usize::from(host.pool == CLOSING && !is_out);
        (host.pool, true)
    }

    /// Looks who needs what.
    fn look(&mut self, most: usize) {
        self.looked = clock::stopwatch();
        // What nobody asked for was idle all the time.
        self.by_origin.retain(|_, host| host.most > 0);
        self.by_origin.values_mut().for_each(|host| host.left = [0, host.left[0]]);
        self.kept = self.by_origin.values().map(Host::may_keep).sum();
        let mut idle = Vec::with_capacity(self.by_origin.len());
        for host in self.by_origin.values_mut() {
            let needs = host.wanted();
            // Until what it has is closed, it may keep both.
            if needs < host.pool && self.kept + POOLS[needs] <= most {
                self.kept += POOLS[needs];
                host.move_to(needs);
            }
            let used = std::mem::take(&mut host.used);
            host.most = host.under_way;
            // What is under way comes back to its pool, whenever that is.
            if host.pool > CLOSING && host.under_way == 0 {
                let used_by_each = used * PARTS / POOLS[host.pool];
                idle.push((used_by_each, host));
            }
        }
        if std::mem::take(&mut self.left_out) > 0 {
            idle.sort_unstable_by_key(|(used, _)| *used);
            let mut room = most - self.kept;
            for (_, host) in idle {
                if room >= most / KEPT_PER_FIRST {
                    break;
                }
                room += POOLS[host.pool];
                host.move_to(CLOSING);
            }
        }
    }

    /// A request has ended.
    fn end(&mut self, origin: &str, ended: Ended) {
        let Some(host) = self.by_origin.get_mut(origin) else { return };
        host.under_way = host.under_way.saturating_sub(1);
        host.is_there |= !matches!(ended, Ended::Unconnected);
        host.used += usize::from(matches!(ended, Ended::Open));
        if !host.is_there && host.under_way == 0 {
            // However many there are that nobody reaches, they leave nothing open.
            self.kept -= host.may_keep();
            self.by_origin.remove(origin);
        }
    }
}

impl Host {
    /// The pool that keeps as many as it needs.
    fn wanted(&self) -> usize {
        POOLS.iter().position(|keeps| *keeps >= self.most).unwrap_or(POOLS.len() - 1)
    }

    fn move_to(&mut self, pool: usize) {
        self.left[0] += POOLS[self.pool];
        self.pool = pool;
    }

    fn may_keep(&self) -> usize {
        POOLS[self.pool] + self.left[0] + self.left[1]
    }
}

impl Place<'_> {
    /// Which of [`POOLS`] it goes over.
    pub(super) fn pool(&self) -> usize {
        self.pool
    }

    /// There was no connection to be made.
    pub(super) fn is_unconnected(&mut self) {
        self.ended = Ended::Unconnected;
    }

    /// Its connection is open when it ends.
    pub(super) fn stays_open(&mut self) {
        self.ended = Ended::Open;
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        if self.counts {
            self.of.lock().end(self.origin, self.ended);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const LAST: usize = POOLS.len() - 1;

    fn host(number: usize) -> Url {
        format!("https://{number}.example/path/{number}?query").parse().unwrap()
    }

    /// As if the time had passed.
    fn later(kept: &Kept) {
        kept.lock().look(kept.most);
    }

    /// The pool of a request that was answered.
    fn request(kept: &Kept, url: &Url) -> usize {
        let mut place = kept.place(url);
        place.stays_open();
        place.pool()
    }

    fn is_empty(kept: &Kept) -> bool {
        let hosts = kept.lock();
        hosts.by_origin.is_empty() && hosts.kept == 0
    }

    #[test]
    fn who_has_many_under_way_moves_up_and_down_again() {
        let kept = Kept::new(usize::MAX);
        assert_eq!((kept.most, Kept::new(1_024).most), (MAX_KEPT, 128));
        let url = host(1);
        let mut places: Vec<Place<'_>> = (0..40).map(|_| kept.place(&url)).collect();
        let pools: Vec<usize> = places.iter().map(Place::pool).collect();
        assert_eq!((&pools[..6], pools[12], pools[31], pools[39]), (&[1, 2, 2, 2, 3, 3][..], 4, 4, 5));
        places.iter_mut().for_each(Place::stays_open);
        drop(places);
        assert_eq!(kept.lock().kept, 1 + 4 + 12 + 32 + 128);
        assert_eq!(request(&kept, &url), LAST, "as it needed a moment ago");
        for (pool, may_keep) in [(LAST, 1 + 4 + 12 + 32 + 128), (FIRST, 1 + 128), (FIRST, 1 + 128), (FIRST, 1)] {
            later(&kept);
            assert_eq!((request(&kept, &url), kept.lock().kept), (pool, may_keep));
        }
        later(&kept);
        later(&kept);
        assert!(is_empty(&kept));
    }

    #[test]
    fn a_few_keep_what_they_need_and_many_one_each() {
        let kept = Kept::new(usize::MAX);
        let urls: Vec<Url> = (0..MAX_KEPT).map(host).collect();
        let busy: Vec<_> =
            urls[..200].iter().flat_map(|url| (0..30).map(|_| kept.place(url)).collect::<Vec<_>>()).collect();
        let many = busy.iter().filter(|place| place.pool() == LAST - 1).count() / 18;
        assert!((45..=96).contains(&many), "{many} have all that they need, and what they had on the way");
        let one = urls[200..].iter().filter(|url| request(&kept, url) == FIRST).count();
        assert!(one >= MAX_KEPT / KEPT_PER_FIRST - 200, "{one}");
        assert!(kept.lock().kept <= MAX_KEPT);
    }

    #[test]
    fn who_uses_theirs_least_make_room_for_those_who_have_none() {
        let kept = Kept::new(8 * FILES_PER_KEPT);
        let (idlers, busy): (Vec<Url>, Url) = ((0..8).map(host).collect(), host(8));
        assert!(idlers.iter().all(|url| request(&kept, url) == FIRST));
        (0..3).for_each(|_| assert!(request(&kept, &idlers[0]) == FIRST));
        assert_eq!(request(&kept, &busy), CLOSING);
        let mut got = Vec::new();
        for _ in 0..4 {
            later(&kept);
            (0..3).for_each(|_| assert!(request(&kept, &idlers[0]) == FIRST));
            got.push((0..5).map(|_| request(&kept, &busy)).max().unwrap());
            let _all: Vec<usize> = idlers.iter().map(|url| request(&kept, url)).collect();
        }
        // Two make room, which they have when their connections are closed.
        assert_eq!(got, [CLOSING, CLOSING, FIRST, FIRST]);
        assert_eq!(request(&kept, &idlers[0]), FIRST, "it uses its own");
    }

    #[test]
    fn who_uses_one_often_keeps_it_before_who_uses_many_seldom() {
        let kept = Kept::new(22 * FILES_PER_KEPT);
        let (bursts, steady) = (host(0), host(1));
        for _ in 0..2 {
            let mut burst: Vec<Place<'_>> = (0..12).map(|_| kept.place(&bursts)).collect();
            burst.iter_mut().for_each(Place::stays_open);
        }
        // Fewer in all, and more of each connection.
        (0..20).for_each(|_| assert_eq!(request(&kept, &steady), FIRST));
        kept.lock().left_out = 1;
        later(&kept);
        assert_eq!((request(&kept, &bursts), request(&kept, &steady)), (CLOSING, FIRST));
    }

    #[test]
    fn who_is_not_reached_keeps_nothing() {
        let kept = Kept::new(2 * FILES_PER_KEPT);
        for number in 0..10 {
            let url = host(number);
            let mut place = kept.place(&url);
            assert_eq!(place.pool(), FIRST);
            place.is_unconnected();
        }
        assert!(is_empty(&kept));
    }

    proptest! {
        #[test]
        fn no_more_is_kept_than_may_be(steps in prop::collection::vec((0..12_usize, 0..6_usize), 0..400), most in 1..60_usize) {
            let kept = Kept::new(most * FILES_PER_KEPT);
            let urls: Vec<Url> = (0..12).map(host).collect();
            let mut under_way: Vec<Place<'_>> = Vec::new();
            for (number, what) in steps {
                match what {
                    0 => later(&kept),
                    1 if !under_way.is_empty() => {
                        let mut place = under_way.swap_remove(number % under_way.len());
                        if number < 3 {
                            place.is_unconnected();
                        }
                    }
                    2 if !under_way.is_empty() => {
                        let index = number % under_way.len();
                        under_way.swap_remove(index).stays_open();
                    }
                    _ => under_way.push(kept.place(&urls[number])),
                }
                let hosts = kept.lock();
                let all: usize = hosts.by_origin.values().map(Host::may_keep).sum();
                prop_assert!(all == hosts.kept && all <= kept.most, "{all} of {}", kept.most);
                let counted = under_way.iter().filter(|place| place.counts).count();
                prop_assert_eq!(hosts.by_origin.values().map(|host| host.under_way).sum::<usize>(), counted);
            }
            drop(under_way);
            (0..3).for_each(|_| later(&kept));
            prop_assert!(is_empty(&kept));
        }
    }
}
