//! What is held for each address, so that none can take everything: of all there is, one gets at most half. Behind one
//! address may be a balancer with the calls of many: of the memory, an organization gets at most as much as the others leave.

use std::{
    collections::HashMap,
    net::{IpAddr, Ipv6Addr},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
};

use super::Caller;

/// Up to so many bytes of a call count for its address and not for its organization, whose calls have limits of their own. A
/// call without a key sends no more.
const SMALL_BYTES: usize = 16 * 1024;
/// Bits of an IPv6 address that stand for its owner: who has one address usually has all of its /64.
const IPV6_OWNER_BITS: u32 = 64;

/// Every address that has a connection.
pub(super) struct Peers {
    max_connections: usize,
    max_bytes: usize,
    all: Held,
    by_owner: Mutex<HashMap<IpAddr, Arc<OfOwner>>>,
}

/// What is held for one address, or for all.
#[derive(Default)]
struct Held {
    connections: AtomicUsize,
    /// By what they are of.
    bytes: [AtomicUsize; 2],
}

/// What is held for one address.
#[derive(Default)]
struct OfOwner {
    held: Held,
    /// The bytes of organizations that hold any at this address, by what they are of.
    by_organization: [Mutex<HashMap<Arc<str>, usize>>; 2],
}

/// What has no more room.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Full {
    /// The memory of all, or of all at one address.
    Memory,
    /// What an organization may have of it.
    Share,
    /// What a call may send without a key.
    Stranger,
}

/// What bytes are of; each has as much room as the other.
#[derive(Debug, Clone, Copy)]
pub(super) enum Memory {
    /// Requests that are received, or whose calls are under way.
    Bodies,
    /// Answers that wait for their readers.
    Answers,
}

/// A connection that may be there.
pub(super) struct Admitted {
    peers: Arc<Peers>,
    owner: IpAddr,
    of_owner: Arc<OfOwner>,
}

/// Bytes of one call that may be held.
pub(super) struct Reserved {
    connection: Arc<Admitted>,
    caller: Caller,
    memory: Memory,
    bytes: AtomicUsize,
    /// Those of them that count for its organization.
    charged: AtomicUsize,
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
        let of_owner = by_owner.entry(owner).or_default();
        if !take(&of_owner.held.connections, 1, half(self.max_connections)) {
            give_back(&self.all.connections, 1);
            return None;
        }
        Some(Admitted { peers: Arc::clone(self), owner, of_owner: Arc::clone(of_owner) })
    }

    fn by_owner(&self) -> MutexGuard<'_, HashMap<IpAddr, Arc<OfOwner>>> {
        self.by_owner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl OfOwner {
    fn by_organization(&self, memory: Memory) -> MutexGuard<'_, HashMap<Arc<str>, usize>> {
        self.by_organization[memory as usize].lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Admitted {
    fn drop(&mut self) {
        let mut by_owner = self.peers.by_owner();
        give_back(&self.peers.all.connections, 1);
        give_back(&self.of_owner.held.connections, 1);
        if self.of_owner.held.connections.load(Ordering::Relaxed) == 0 {
            by_owner.remove(&self.owner);
        }
    }
}

impl Reserved {
    pub(super) fn new(connection: Arc<Admitted>, caller: Caller, memory: Memory) -> Self {
        Self { connection, caller, memory, bytes: AtomicUsize::new(0), charged: AtomicUsize::new(0) }
    }

    /// Takes room for more bytes, when there is any.
    pub(super) fn grow(&self, more: usize) -> Result<(), Full> {
        let (Admitted { peers, of_owner, .. }, kind) = (&*self.connection, self.memory as usize);
        if !take(&peers.all.bytes[kind], more, peers.max_bytes) {
            return Err(Full::Memory);
        }
        if !take(&of_owner.held.bytes[kind], more, half(peers.max_bytes)) {
            give_back(&peers.all.bytes[kind], more);
            return Err(Full::Memory);
        }
        let before = self.bytes.fetch_add(more, Ordering::Relaxed);
        let charged = self.charge(before + more);
        if charged.is_err() {
            self.give_back(more);
        }
        charged
    }

    /// Gives all room back.
    pub(super) fn clear(&self) {
        let charged = self.charged.swap(0, Ordering::Relaxed);
        if charged > 0
            && let Some(organization) = self.caller.organization()
        {
            let mut by_organization = self.connection.of_owner.by_organization(self.memory);
            if let Some(its) = by_organization.get_mut(organization) {
                *its -= charged;
                if *its == 0 {
                    by_organization.remove(organization);
                }
            }
        }
        let bytes = self.bytes.load(Ordering::Relaxed);
        if bytes > 0 {
            self.give_back(bytes);
        }
    }

    /// Counts the bytes of a call for its organization, unless that has more here then than is free for its address. A call
    /// of nobody known sends no more than does not count.
    fn charge(&self, bytes: usize) -> Result<(), Full> {
        if bytes <= SMALL_BYTES {
            return Ok(());
        }
        let Some(organization) = self.caller.organization() else {
            // Of what needs no key, only reflection takes more than one message, and those are short.
            return if matches!(self.memory, Memory::Bodies) { Err(Full::Stranger) } else { Ok(()) };
        };
        let more = bytes - self.charged.load(Ordering::Relaxed);
        let Admitted { peers, of_owner, .. } = &*self.connection;
        let held = of_owner.held.bytes[self.memory as usize].load(Ordering::Relaxed);
        let mut by_organization = of_owner.by_organization(self.memory);
        let its = by_organization.get(organization).copied().unwrap_or_default() + more;
        if its > half(peers.max_bytes).saturating_sub(held) {
            return Err(Full::Share);
        }
        by_organization.insert(Arc::clone(organization), its);
        self.charged.fetch_add(more, Ordering::Relaxed);
        Ok(())
    }

    fn give_back(&self, bytes: usize) {
        give_back(&self.connection.peers.all.bytes[self.memory as usize], bytes);
        give_back(&self.connection.of_owner.held.bytes[self.memory as usize], bytes);
        give_back(&self.bytes, bytes);
    }
}

impl Drop for Reserved {
    fn drop(&mut self) {
        self.clear();
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
    fn a_call_without_a_key_sends_little() {
        let peers = Arc::new(Peers::new(4, 1024 * 1024));
        let connection = Arc::new(peers.admit(address("192.0.2.1")).unwrap());
        for (organization, memory, more) in
            [("", Memory::Bodies, Err(Full::Stranger)), ("", Memory::Answers, Ok(())), ("acme", Memory::Bodies, Ok(()))]
        {
            let call = call(&connection, organization, memory);
            assert_eq!((call.grow(SMALL_BYTES), call.grow(1)), (Ok(()), more), "{organization} {memory:?}");
        }
    }

    /// A call of this organization, or of nobody known.
    fn call(connection: &Arc<Admitted>, organization: &str, memory: Memory) -> Reserved {
        let caller = Caller::default();
        if !organization.is_empty() {
            caller.accept(&Arc::from(organization));
        }
        Reserved::new(Arc::clone(connection), caller, memory)
    }

    #[test]
    fn bytes_are_shared_and_come_back() {
        let peers = Arc::new(Peers::new(4, 100));
        let connection = |text| Arc::new(peers.admit(address(text)).unwrap());
        let (first, second) = (connection("192.0.2.1"), connection("192.0.2.2"));
        let bodies = |connection| call(connection, "", Memory::Bodies);
        let (fits, full) = (Ok(()), Err(Full::Memory));
        let (a, b) = (bodies(&first), bodies(&first));
        assert_eq!([a.grow(30), b.grow(20), b.grow(1), a.grow(usize::MAX)], [fits, fits, full, full]);
        assert_eq!(call(&first, "", Memory::Answers).grow(50), fits, "they have room of their own");
        let c = bodies(&second);
        assert_eq!([c.grow(50), c.grow(1)], [fits, full]);
        assert_eq!(bodies(&connection("192.0.2.3")).grow(1), full, "a hundred are all");
        drop(a);
        assert_eq!([b.grow(30), b.grow(1)], [fits, full]);
        drop((b, c));
        for bytes in &peers.all.bytes {
            assert_eq!(bytes.load(Ordering::Relaxed), 0);
        }
    }

    #[test]
    fn an_organization_leaves_as_much_as_it_has() {
        const KIB: usize = 1024;
        let peers = Arc::new(Peers::new(4, 2048 * KIB));
        let balancer = Arc::new(peers.admit(address("192.0.2.1")).unwrap());
        let elsewhere = Arc::new(peers.admit(address("192.0.2.2")).unwrap());
        let of = |organization| call(&balancer, organization, Memory::Bodies);
        let (fits, full) = (Ok(()), Err(Full::Share));
        let (a, b) = (of("loud"), of("loud"));
        assert_eq!(
            [a.grow(SMALL_BYTES), a.grow(240 * KIB), b.grow(256 * KIB)],
            [fits; 3],
            "half of what one address has"
        );
        assert_eq!([b.grow(1), of("loud").grow(SMALL_BYTES + 1)], [full; 2]);
        assert_eq!(of("loud").grow(SMALL_BYTES), fits, "what is small is not counted");
        let there = call(&elsewhere, "loud", Memory::Bodies);
        assert_eq!([there.grow(512 * KIB), there.grow(1)], [fits, full], "at each address by itself");
        let (c, d) = (of("other"), of("third"));
        assert_eq!([c.grow(256 * KIB), c.grow(KIB), d.grow(128 * KIB), d.grow(KIB)], [fits, full, fits, full]);
        b.clear();
        assert_eq!([d.grow(KIB), a.grow(KIB), a.grow(256 * KIB)], [fits, fits, full], "beside what others have");
        drop((a, b, c, d, there));
        for connection in [balancer, elsewhere] {
            assert!(connection.of_owner.by_organization(Memory::Bodies).is_empty());
        }
        assert_eq!(peers.all.bytes[0].load(Ordering::Relaxed), 0);
    }
}
