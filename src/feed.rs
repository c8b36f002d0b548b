//! Live changes: a bell and rings.
//!
//! Committing rings the bell, whatever the number of watchers; one task then reads the new changes once and puts those of
//! each tenant that is watched into a bounded ring, which every watcher of that tenant reads at its own speed. Whoever
//! watches is woken by what is for it, and not by what happens elsewhere. A watcher that falls out of the ring is told so.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::sync::{Notify, broadcast};

use crate::webhook::{Change, Tenant};

/// A watcher may be this many batches behind, each of at most 128 changes; then it is told that it missed some.
const MAX_BEHIND: usize = 32;
/// An organisation may watch so many times on a node, in all of its environments; once more is refused.
const MAX_STREAMS: usize = 256;

/// Connects commits with watchers. Cheap to clone.
#[derive(Clone, Default)]
pub(crate) struct Feed {
    bell: Arc<Notify>,
    rings: Arc<Mutex<Rings>>,
}

/// Changes of a tenant that follow each other in the order of commits.
#[derive(Clone)]
pub(crate) struct Batch {
    /// Everything up to this place came before.
    pub(crate) after: i64,
    /// Everything up to this place has come now.
    pub(crate) upto: i64,
    /// What came in between.
    pub(crate) changes: Arc<[Change]>,
}

/// Watches a tenant until it is dropped.
pub(crate) struct Watching {
    feed: Feed,
    tenant: Tenant,
    batches: broadcast::Receiver<Batch>,
}

/// What comes after a moment for those who watch a tenant.
pub(crate) struct Tail(broadcast::Receiver<Batch>);

#[derive(Default)]
struct Rings {
    of: HashMap<Tenant, Ring>,
    /// How many times each organisation watches.
    streams: HashMap<Arc<str>, usize>,
    /// Everything up to this place was read, and is not to come again.
    place: i64,
}

struct Ring {
    batches: broadcast::Sender<Batch>,
    watchers: usize,
    /// What the tenant has up to this place was read before the ring was there, or is in it.
    upto: i64,
}

impl Feed {
    /// Says that changes were committed.
    pub(crate) fn announce(&self) {
        self.bell.notify_one();
    }

    /// Waits for [`Feed::announce`].
    pub(crate) async fn announced(&self) {
        self.bell.notified().await;
    }

    /// Whether anybody watches.
    pub(crate) fn is_watched(&self) -> bool {
        !self.lock().of.is_empty()
    }

    /// Reading begins after this place: whoever has seen less must look for the rest elsewhere.
    pub(crate) fn begin(&self, place: i64) {
        let mut rings = self.lock();
        rings.place = place;
        for ring in rings.of.values_mut() {
            ring.upto = place;
            ring.send(place, Vec::new());
        }
    }

    /// Everything up to this place was read, the last of it of this tenant. Whether it is watched, and what there is
    /// to be shown with [`Feed::show`]; whoever comes later finds it elsewhere.
    pub(crate) fn pass(&self, place: i64, tenant: &Tenant) -> bool {
        let mut rings = self.lock();
        rings.place = place;
        rings.of.contains_key(tenant)
    }

    /// Shows the watchers of a tenant what it has up to a place, since what they were shown last.
    pub(crate) fn show(&self, tenant: &Tenant, upto: i64, changes: Vec<Change>) {
        if let Some(ring) = self.lock().of.get_mut(tenant) {
            ring.send(upto, changes);
        }
    }

    /// Watches a tenant from now on, and wakes the task that reads. None when its organisation has [`MAX_STREAMS`].
    pub(crate) fn subscribe(&self, tenant: Tenant) -> Option<Watching> {
        let mut rings = self.lock();
        let streams = rings.streams.entry(Arc::clone(tenant.shared_organization())).or_default();
        if *streams >= MAX_STREAMS {
            return None;
        }
        *streams += 1;
        let place = rings.place;
        let new = || Ring { batches: broadcast::channel(MAX_BEHIND).0, watchers: 0, upto: place };
        let ring = rings.of.entry(tenant.clone()).or_insert_with(new);
        ring.watchers += 1;
        let batches = ring.batches.subscribe();
        drop(rings);
        self.announce();
        Some(Watching { feed: self.clone(), tenant, batches })
    }

    /// How many watch.
    pub(crate) fn streams(&self) -> usize {
        self.lock().streams.values().sum()
    }

    fn lock(&self) -> MutexGuard<'_, Rings> {
        self.rings.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Ring {
    fn send(&mut self, upto: i64, changes: Vec<Change>) {
        let after = std::mem::replace(&mut self.upto, upto);
        // Somebody receives, or the ring would not be there.
        let _ = self.batches.send(Batch { after, upto, changes: changes.into() });
    }
}

impl Watching {
    /// The next batch; dropping the call loses none.
    pub(crate) async fn next(&mut self) -> Result<Batch, broadcast::error::RecvError> {
        self.batches.recv().await
    }

    /// Where what comes later is found, for somebody else to begin again with [`Tail::now`].
    pub(crate) fn tail(&self) -> Tail {
        Tail(self.batches.resubscribe())
    }

    /// Goes on with what has come since then.
    pub(crate) fn go_on_from(&mut self, tail: Tail) {
        self.batches = tail.0;
    }
}

impl Tail {
    /// What comes from now on: after some was missed, what is left would be missed one by one as more comes.
    pub(crate) fn now(&self) -> Self {
        Self(self.0.resubscribe())
    }
}

impl Drop for Watching {
    fn drop(&mut self) {
        let mut rings = self.feed.lock();
        if let Some(ring) = rings.of.get_mut(&self.tenant) {
            ring.watchers -= 1;
            if ring.watchers == 0 {
                rings.of.remove(&self.tenant);
            }
        }
        let organization = self.tenant.shared_organization();
        if let Some(streams) = rings.streams.get_mut(organization) {
            *streams -= 1;
            if *streams == 0 {
                rings.streams.remove(organization);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;
    use crate::webhook::Environment;

    #[test]
    fn who_watches_is_woken_by_what_is_for_it() {
        let [acme, other] = ["acme", "other"].map(|name| Tenant::new(name, Environment::Live).unwrap());
        let feed = Feed::default();
        let mut first = feed.subscribe(acme.clone()).unwrap();
        feed.begin(10);
        let next = |watching: &mut Watching| watching.next().now_or_never().map(Result::unwrap);
        let places = |batch: Option<Batch>| batch.map(|batch| (batch.after, batch.upto));
        assert_eq!(places(next(&mut first)), Some((10, 10)), "what came before is not here");

        assert!(!feed.pass(20, &other) && feed.pass(30, &acme));
        // Between the two, somebody comes who reads what was passed elsewhere.
        let mut second = feed.subscribe(acme.clone()).unwrap();
        let mut third = feed.subscribe(other.clone()).unwrap();
        feed.show(&acme, 30, Vec::new());
        assert!(feed.pass(40, &other));
        feed.show(&other, 40, Vec::new());
        assert_eq!(
            [&mut first, &mut second, &mut third].map(|watching| places(next(watching))),
            [Some((10, 30)), Some((10, 30)), Some((30, 40))]
        );
        assert!([&mut first, &mut second, &mut third].map(next).iter().all(Option::is_none));

        drop(first);
        assert!(feed.pass(50, &acme), "one is left");
        drop(second);
        assert!(!feed.pass(60, &acme) && feed.is_watched());
        drop(third);
        assert!(!feed.is_watched());
    }

    #[test]
    fn an_organisation_has_so_many_streams() {
        let feed = Feed::default();
        let watch = |name, environment| feed.subscribe(Tenant::new(name, environment).unwrap());
        let mut streams: Vec<_> = (1..MAX_STREAMS).filter_map(|_| watch("acme", Environment::Live)).collect();
        streams.extend(watch("acme", Environment::Test));
        assert_eq!(streams.len(), MAX_STREAMS);
        assert!(watch("acme", Environment::Live).is_none() && watch("acme", Environment::Test).is_none());
        assert!(watch("other", Environment::Live).is_some());
        streams.pop();
        streams.extend(watch("acme", Environment::Live));
        assert!(streams.len() == MAX_STREAMS && watch("acme", Environment::Live).is_none());
        drop(streams);
        assert!(feed.lock().streams.is_empty());
    }
}
