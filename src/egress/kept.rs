//! Which connections are kept open for the next request. reqwest bounds those of one host, but not how many hosts there
//! are: ten thousand that hear something twice a minute would be as many open files, and as many times the memory of a
//! connection.
//!
//! A host has a place for each request that was under way to it at a time, since that is how many of its connections can
//! be left open: of those that are idle, the one that was used last is used next. Without a place, a request goes over a
//! connection that is closed behind it. The places are shared by what is free, as attempts are (see `dispatch/shares.rs`),
//! with a quarter of them for the first of each host: a few hosts get as many as they can use, many get one each, and who
//! comes when there is none left waits for one whose connection was idle for so long that it is closed.

use std::{
    collections::HashMap,
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use url::{Position, Url};

use crate::clock;

/// Connections that are kept for all hosts together, where enough files may be open …
const MAX_KEPT: usize = 4_096;
/// … which is when one of so many files is not more.
pub(super) const FILES_PER_KEPT: u64 = 8;
/// Idle connections kept for each host: as many as a webhook uses at a time, lest they be made anew all the time.
pub(super) const MAX_KEPT_PER_HOST: usize = 32;
/// One of so many places is only for hosts that have none.
const PLACES_PER_FIRST: usize = 4;
/// Idle connections are closed after this time …
pub(super) const MAX_IDLE: Duration = Duration::from_secs(30);
/// … for which reqwest looks once in as long, so that after this time one that was not used is closed.
const CLOSED: Duration = MAX_IDLE.saturating_mul(2);

/// The places of all hosts.
pub(super) struct Kept {
    most: usize,
    hosts: Mutex<Hosts>,
}

struct Hosts {
    /// Places of all of them.
    places: usize,
    /// None is without a place.
    by_origin: HashMap<Box<str>, Host>,
    counted: Instant,
}

#[derive(Default)]
struct Host {
    places: usize,
    under_way: usize,
    /// The most requests that were under way at a time since it was counted.
    most: usize,
}

/// A request that may leave its connection open.
pub(super) struct Place<'a> {
    kept: &'a Kept,
    origin: &'a str,
}

impl Kept {
    /// With so many files that may be open.
    pub(super) fn new(open_files: u64) -> Self {
        let files = usize::try_from(open_files / FILES_PER_KEPT).unwrap_or(usize::MAX);
        let hosts = Hosts { places: 0, by_origin: HashMap::new(), counted: clock::stopwatch() };
        Self { most: MAX_KEPT.min(files), hosts: Mutex::new(hosts) }
    }

    /// A place for a request to this URL, until it is dropped; none when its connection is to be closed.
    pub(super) fn take<'a>(&'a self, url: &'a Url) -> Option<Place<'a>> {
        let origin = &url[..Position::BeforePath];
        let mut hosts = self.lock();
        hosts.count_again();
        let free = self.most.saturating_sub(hosts.places);
        let spare = free.saturating_sub(self.most / PLACES_PER_FIRST);
        let may = (spare * PLACES_PER_FIRST * MAX_KEPT_PER_HOST).div_ceil(self.most.max(1)).min(MAX_KEPT_PER_HOST);
        let known = hosts.by_origin.get_mut(origin);
        let (places, under_way) = known.as_ref().map_or((0, 0), |host| (host.places, host.under_way));
        let all_used = under_way >= places;
        let new = all_used && if places == 0 { free > 0 } else { places < may };
        // Of those that are more than it keeps of a host, reqwest closes the rest.
        if all_used && !new && places < MAX_KEPT_PER_HOST {
            return None;
        }
        match known {
            Some(host) => host.begin(new),
            None => hosts.by_origin.entry(origin.into()).or_default().begin(new),
        }
        hosts.places += usize::from(new);
        Some(Place { kept: self, origin })
    }

    fn lock(&self) -> MutexGuard<'_, Hosts> {
        self.hosts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Hosts {
    /// Takes back, once in a while, what belongs to connections that are closed by now.
    fn count_again(&mut self) {
        if self.counted.elapsed() >= CLOSED {
            self.counted = clock::stopwatch();
            self.by_origin.retain(|_, host| host.count_again() > 0);
            self.places = self.by_origin.values().map(|host| host.places).sum();
        }
    }
}

impl Host {
    fn begin(&mut self, new_place: bool) {
        self.places += usize::from(new_place);
        self.under_way += 1;
        self.most = self.most.max(self.under_way);
    }

    /// How many places it still has: connections that so many requests did not need were idle all the time.
    fn count_again(&mut self) -> usize {
        self.places = self.places.min(self.most);
        self.most = self.under_way;
        self.places
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        if let Some(host) = self.kept.lock().by_origin.get_mut(self.origin) {
            host.under_way = host.under_way.saturating_sub(1);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn host(number: usize) -> Url {
        format!("https://{number}.example/path/{number}?query").parse().unwrap()
    }

    /// As if the time had passed.
    fn later(kept: &Kept) {
        let mut hosts = kept.lock();
        hosts.counted = hosts.counted.checked_sub(CLOSED).unwrap();
    }

    fn places(kept: &Kept, url: &Url) -> usize {
        kept.lock().by_origin.get(&url[..Position::BeforePath]).map_or(0, |host| host.places)
    }

    #[test]
    fn a_few_hosts_keep_as_many_as_they_use_and_many_one_each() {
        let kept = Kept::new(u64::MAX);
        assert_eq!((kept.most, Kept::new(1_024).most), (MAX_KEPT, 128));
        let quick = host(0);
        let all: Option<Vec<_>> = (0..40).map(|_| kept.take(&quick)).collect();
        assert!(all.is_some(), "what is more is closed by reqwest");
        assert_eq!(places(&kept, &quick), MAX_KEPT_PER_HOST);
        let urls: Vec<Url> = (1..=2 * MAX_KEPT).map(host).collect();
        let taken = urls.iter().filter(|url| kept.take(url).is_some()).count();
        assert_eq!(taken, MAX_KEPT - MAX_KEPT_PER_HOST);
        assert_eq!(kept.lock().places, MAX_KEPT);
        assert!(kept.take(&urls[0]).is_some(), "it has one");
        assert!(kept.take(&urls[2 * MAX_KEPT - 1]).is_none());
    }

    #[test]
    fn a_host_that_needs_many_leaves_places_for_the_others() {
        let kept = Kept::new(64 * FILES_PER_KEPT);
        let urls: Vec<Url> = (0..20).map(host).collect();
        let all: Vec<_> =
            urls.iter().flat_map(|url| (0..40).map_while(|_| kept.take(url)).collect::<Vec<_>>()).collect();
        assert!(all.len() >= 60, "{}", all.len());
        for url in &urls {
            assert!(places(&kept, url) >= 1, "{url}");
        }
    }

    #[test]
    fn places_come_back_when_their_connections_are_closed() {
        let kept = Kept::new(2 * FILES_PER_KEPT);
        let (one, two, three) = (host(1), host(2), host(3));
        let long = kept.take(&one);
        assert!(long.is_some() && kept.take(&two).is_some() && kept.take(&three).is_none());
        later(&kept);
        assert!(kept.take(&three).is_none(), "one that was used a moment ago may still be open");
        later(&kept);
        assert!(kept.take(&three).is_some() && kept.take(&two).is_none());
        drop(long);
        assert_eq!([&one, &two, &three].map(|url| places(&kept, url)), [1, 0, 1]);
    }

    proptest! {
        #[test]
        fn no_more_is_kept_than_may_be(steps in prop::collection::vec((0..12_usize, 0..5_usize), 0..300), most in 1..20_u64) {
            let kept = Kept::new(most * FILES_PER_KEPT);
            let urls: Vec<Url> = (0..12).map(host).collect();
            let mut under_way: Vec<Place<'_>> = Vec::new();
            for (number, what) in steps {
                match what {
                    0 => later(&kept),
                    1 | 2 if !under_way.is_empty() => drop(under_way.swap_remove(number % under_way.len())),
                    _ => under_way.extend(kept.take(&urls[number])),
                }
                let hosts = kept.lock();
                let all: usize = hosts.by_origin.values().map(|host| host.places).sum();
                prop_assert!(all == hosts.places && all <= kept.most, "{all} of {}", kept.most);
                for host in hosts.by_origin.values() {
                    prop_assert!(host.places > 0 && host.under_way <= host.places.max(host.most));
                    prop_assert!(host.places >= host.under_way.min(MAX_KEPT_PER_HOST));
                }
            }
            drop(under_way);
            later(&kept);
            drop(kept.take(&urls[0]));
            later(&kept);
            drop(kept.take(&urls[0]));
            prop_assert_eq!(kept.lock().by_origin.len(), 1);
        }
    }
}
