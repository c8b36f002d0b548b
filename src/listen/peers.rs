//! What is held for each address, so that none can take everything: of all there is, one gets at most half.

use std::{
    collections::HashMap,
    net::{IpAddr, Ipv6Addr},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
};

/// Bits of an IPv6 address that stand for its owner: who has one address usually has all of its /64.
const IPV6_OWNER_BITS: u32 = 64;

/// Every address that has a connection.
pub(super) struct Peers {
    max_connections: usize,
    max_bytes: usize,
    all: Held,
    by_owner: Mutex<HashMap<IpAddr, Arc<Held>>>,
}

/// What is held for one address, or for all.
#[derive(Default)]
struct Held {
    connections: AtomicUsize,
    bytes: AtomicUsize,
}

/// A connection that may be there.
pub(super) struct Admitted {
    peers: Arc<Peers>,
    owner: IpAddr,
    held: Arc<Held>,
}

/// Bytes of one request that may be held.
pub(super) struct Reserved {
    connection: Arc<Admitted>,
    bytes: AtomicUsize,
}

impl Peers {
    pub(super) fn new(max_connections: usize, max_bytes: usize) -> Self {
        Self { max_connections, max_bytes, all: Held::default(), by_owner: Mutex::default() }
    }

    /// Room for one connection more, when there is any for this address.
    pub(super) fn admit(self: &Arc<Self>, address: IpAddr) -> Option<Admitted> {
        let owner = owner(address);
        let mut by_owner = self.by_owner();
        if !take(&self.all.connections, 1, self.max_connections) {
            return None;
        }
        let held = by_owner.entry(owner).or_default();
        if !take(&held.connections, 1, half(self.max_connections)) {
            give_back(&self.all.connections, 1);
            return None;
        }
        Some(Admitted { peers: Arc::clone(self), owner, held: Arc::clone(held) })
    }

    fn by_owner(&self) -> MutexGuard<'_, HashMap<IpAddr, Arc<Held>>> {
        self.by_owner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Admitted {
    fn drop(&mut self) {
        let mut by_owner = self.peers.by_owner();
        give_back(&self.peers.all.connections, 1);
        give_back(&self.held.connections, 1);
        if self.held.connections.load(Ordering::Relaxed) == 0 {
            by_owner.remove(&self.owner);
        }
    }
}

impl Reserved {
    pub(super) fn new(connection: Arc<Admitted>) -> Self {
        Self { connection, bytes: AtomicUsize::new(0) }
    }

    /// Takes room for more bytes, when there is any.
    pub(super) fn grow(&self, bytes: usize) -> bool {
        let Admitted { peers, held, .. } = &*self.connection;
        if !take(&peers.all.bytes, bytes, peers.max_bytes) {
            return false;
        }
        if !take(&held.bytes, bytes, half(peers.max_bytes)) {
            give_back(&peers.all.bytes, bytes);
            return false;
        }
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
        true
    }
}

impl Drop for Reserved {
    fn drop(&mut self) {
        let bytes = self.bytes.load(Ordering::Relaxed);
        give_back(&self.connection.peers.all.bytes, bytes);
        give_back(&self.connection.held.bytes, bytes);
    }
}

/// The address that stands for everything that one owner has.
fn owner(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V4(address) => IpAddr::V4(address),
        IpAddr::V6(address) => {
            IpAddr::V6(Ipv6Addr::from_bits(address.to_bits() & (u128::MAX << (u128::BITS - IPV6_OWNER_BITS))))
        }
    }
}

/// At least one, so that a limit of one lets one in.
fn half(all: usize) -> usize {
    all.div_ceil(2)
}

fn take(counter: &AtomicUsize, more: usize, most: usize) -> bool {
    let within = |held: usize| held.checked_add(more).filter(|held| *held <= most);
    counter.fetch_update(Ordering::Relaxed, Ordering::Relaxed, within).is_ok()
}

fn give_back(counter: &AtomicUsize, taken: usize) {
    counter.fetch_sub(taken, Ordering::Relaxed);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn one_address_gets_half() {
        let peers = Arc::new(Peers::new(4, 100));
        let first: Vec<_> = (0..3).map_while(|_| peers.admit(address("192.0.2.1"))).collect();
        assert_eq!(first.len(), 2);
        assert!(peers.admit(address("::ffff:192.0.2.1")).is_none(), "the same address");
        let other = peers.admit(address("2001:db8::1")).unwrap();
        let neighbour = peers.admit(address("2001:db8::2")).unwrap();
        assert!(peers.admit(address("192.0.2.2")).is_none(), "four are all");
        drop(first);
        assert!(peers.admit(address("2001:db8::3")).is_none(), "one /64 is one owner");
        assert!(peers.admit(address("2001:db8:0:1::3")).is_some());
        drop((other, neighbour));
        assert!(peers.by_owner().is_empty(), "nothing is kept of who has left");
        assert_eq!(peers.all.connections.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn bytes_are_shared_and_come_back() {
        let peers = Arc::new(Peers::new(4, 100));
        let connection = |text| Arc::new(peers.admit(address(text)).unwrap());
        let (first, second) = (connection("192.0.2.1"), connection("192.0.2.2"));
        let (a, b) = (Reserved::new(Arc::clone(&first)), Reserved::new(first));
        assert!(a.grow(30) && b.grow(20) && !b.grow(1) && !a.grow(usize::MAX));
        let c = Reserved::new(second);
        assert!(c.grow(50) && !c.grow(1));
        assert!(!Reserved::new(connection("192.0.2.3")).grow(1), "a hundred are all");
        drop(a);
        assert!(b.grow(30) && !b.grow(1));
        drop((b, c));
        assert_eq!(peers.all.bytes.load(Ordering::Relaxed), 0);
    }
}
