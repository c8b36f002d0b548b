//! Turns at reading and writing: how many calls of one organisation are at the database on this node, so that its lists,
//! streams and changes, however many, leave connections and processors to the others. Events and results have turns of their
//! own ([`super::turns`]).
//!
//! What is found by one key has no turns, but for a delivery with all that belongs to it: it takes no time, and a key that is
//! not known yet must not wait for lists.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::{Error, connections::MAX_WAIT_FOR_CONNECTION};

/// Of the connections for what tenants do, an organisation reads over one in so many at a time. Its other reads wait, and
/// after [`MAX_WAIT_FOR_CONNECTION`] end with [`Error::OrganizationBusy`] …
const CONNECTIONS_PER_SHARE: usize = 3;
/// … and all of them leave so many to what is found by one key. Those that wait for others as long end with
/// [`Error::Overloaded`].
const FOR_LOOK_UPS: usize = 1;
/// An organisation changes one thing at a time: a change holds the connection that all write by on SQLite, and the rows that
/// say what has changed on PostgreSQL. Its other changes wait, as its reads do.
const MAX_CHANGES: usize = 1;
/// The log is read for so many streams of an organisation at a time; the others wait, for as long as it takes.
const MAX_LOG_READS: usize = 2;
/// A stream rests for at most this long after a read of the log in which nothing was for it.
const MAX_REST: Duration = Duration::from_millis(100);

/// The turns of organisations at what they ask for.
pub(super) struct CallLanes {
    lists: Lanes,
    all: Arc<Semaphore>,
    log: Lanes,
    changes: Lanes,
}

/// A turn at reading, which ends when this is dropped.
pub(super) struct Turn {
    _of_all: Option<OwnedSemaphorePermit>,
    _of_organization: LaneTurn,
}

/// A lane for each organisation that reads: so many at a time, first come, first served.
struct Lanes {
    at_a_time: usize,
    of: Arc<Mutex<HashMap<Arc<str>, Lane>>>,
}

struct Lane {
    turns: Arc<Semaphore>,
    /// How many read or wait; without any, it goes.
    users: usize,
}

/// A turn in a lane, which ends when this is dropped.
pub(super) struct LaneTurn {
    _permit: Option<OwnedSemaphorePermit>,
    _user: User,
}

struct User {
    of: Arc<Mutex<HashMap<Arc<str>, Lane>>>,
    organization: Arc<str>,
}

impl CallLanes {
    /// Over so many connections.
    pub(super) fn over(connections: u32) -> Self {
        let connections = connections as usize;
        Self {
            lists: Lanes::new((connections / CONNECTIONS_PER_SHARE).max(1)),
            all: Arc::new(Semaphore::new(connections.saturating_sub(FOR_LOOK_UPS).max(1))),
            log: Lanes::new(MAX_LOG_READS),
            changes: Lanes::new(MAX_CHANGES),
        }
    }

    /// A turn at reading what a call asks for.
    pub(super) async fn turn_to_read(&self, organization: &Arc<str>) -> Result<Turn, Error> {
        let mut its_turn = false;
        let turn = async {
            let of_organization = self.lists.turn(organization).await;
            its_turn = true;
            self.turn_of_all(of_organization).await
        };
        let turn = tokio::time::timeout(MAX_WAIT_FOR_CONNECTION, turn).await;
        turn.map_err(|_| if its_turn { Error::Overloaded } else { Error::OrganizationBusy })
    }

    /// A turn at changing what a call asks for.
    pub(super) async fn turn_to_change(&self, organization: &Arc<str>) -> Result<LaneTurn, Error> {
        let turn = tokio::time::timeout(MAX_WAIT_FOR_CONNECTION, self.changes.turn(organization)).await;
        turn.map_err(|_| Error::OrganizationBusy)
    }

    /// The same as [`CallLanes::turn_to_read`] for a stream, which waits for as long as it takes.
    pub(super) async fn turn_of_stream(&self, organization: &Arc<str>) -> Turn {
        self.turn_of_all(self.lists.turn(organization).await).await
    }

    async fn turn_of_all(&self, of_organization: LaneTurn) -> Turn {
        Turn { _of_all: Arc::clone(&self.all).acquire_owned().await.ok(), _of_organization: of_organization }
    }

    /// A stream's turn at the log, within which it takes one at each read.
    pub(super) async fn turn_at_log(&self, organization: &Arc<str>) -> LaneTurn {
        self.log.turn(organization).await
    }

    /// How many read or wait for it, and how many of them are for its streams.
    #[cfg(test)]
    pub(super) fn under_way(&self, organization: &str) -> [usize; 2] {
        [&self.lists, &self.log].map(|lanes| lock(&lanes.of).get(organization).map_or(0, |lane| lane.users))
    }
}

impl LaneTurn {
    /// Rests within the turn for as long as a read took, with waiting for a connection, in which nothing was for the stream:
    /// those of an organisation that go through much in vain use half of their turns, however many they are.
    pub(super) async fn rest(self, took: Duration) {
        tokio::time::sleep(took.min(MAX_REST)).await;
    }
}

impl Lanes {
    fn new(at_a_time: usize) -> Self {
        Self { at_a_time, of: Arc::default() }
    }

    async fn turn(&self, organization: &Arc<str>) -> LaneTurn {
        let (turns, user) = self.enter(organization);
        LaneTurn { _permit: turns.acquire_owned().await.ok(), _user: user }
    }

    fn enter(&self, organization: &Arc<str>) -> (Arc<Semaphore>, User) {
        let mut of = lock(&self.of);
        let new = || Lane { turns: Arc::new(Semaphore::new(self.at_a_time)), users: 0 };
        let lane = of.entry(Arc::clone(organization)).or_insert_with(new);
        lane.users += 1;
        let user = User { of: Arc::clone(&self.of), organization: Arc::clone(organization) };
        (Arc::clone(&lane.turns), user)
    }
}

impl Drop for User {
    fn drop(&mut self) {
        let mut of = lock(&self.of);
        if let Some(lane) = of.get_mut(&self.organization) {
            lane.users -= 1;
            if lane.users == 0 {
                of.remove(&self.organization);
            }
        }
    }
}

fn lock(of: &Mutex<HashMap<Arc<str>, Lane>>) -> MutexGuard<'_, HashMap<Arc<str>, Lane>> {
    of.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use futures_util::{
        FutureExt,
        future::{join_all, join3},
    };

    use super::*;
    use crate::{
        store::{Actor, Lease, NewEvent, Store},
        webhook::{Environment, EventData, Tenant},
    };

    /// What is published waits for the connection behind one change of an organisation, and not behind all that it has.
    #[tokio::test]
    async fn an_organisation_changes_one_thing_at_a_time() {
        let (_directory, store) = Store::fresh().await;
        let [loud, quiet] = ["loud", "quiet"].map(|name| Tenant::new(name, Environment::Live).unwrap());
        let (changed, by) = (Cell::new(0), Actor::command_line());
        let change = async || {
            assert!(!store.delete_webhook(&loud, "whk_1", &by).await.unwrap(), "there is none");
            changed.set(changed.get() + 1);
        };
        let publish = async {
            let event = NewEvent { event_type: "content.ready".to_owned(), data: EventData::parse("{}").unwrap() };
            let lease = Lease { length: Duration::from_secs(60), first_wait: Duration::ZERO };
            store.publish(quiet, vec![event], lease, None).await.unwrap();
            changed.get()
        };
        let busy = store.write().await.unwrap();
        let (_, before, ()) = join3(join_all((0..100).map(|_| change())), publish, async { drop(busy) }).await;
        // A few more may be made while it finds out whose subscribers there are.
        assert!(before < 50 && changed.get() == 100, "{before}");
    }

    #[test]
    fn an_organisation_reads_over_a_third_and_all_leave_one() {
        let lanes = CallLanes::over(9);
        let [loud, other, third, fourth] = ["loud", "other", "third", "fourth"].map(Arc::from);
        let turn = |organization| lanes.turn_of_stream(organization).now_or_never();
        let held: Vec<_> = (0..9).map_while(|_| turn(&loud)).collect();
        assert_eq!(held.len(), 3);
        let others: Vec<_> = [&other, &third].into_iter().flat_map(|name| (0..9).map_while(|_| turn(name))).collect();
        assert_eq!(others.len(), 5);
        assert!(turn(&fourth).is_none());
        drop(held);
        assert!(turn(&fourth).is_some() && CallLanes::over(2).turn_of_stream(&loud).now_or_never().is_some());
    }

    #[test]
    fn an_organisation_has_so_many_turns_at_a_time() {
        let lanes = Lanes::new(2);
        let [loud, quiet] = ["loud", "quiet"].map(Arc::from);
        let turn = |organization| lanes.turn(organization).now_or_never();
        let held: Vec<_> = [turn(&loud), turn(&loud), turn(&quiet), turn(&quiet)].into_iter().flatten().collect();
        assert_eq!(held.len(), 4);
        let [mut first, mut second] = [(); 2].map(|()| Box::pin(lanes.turn(&loud)));
        assert!(first.as_mut().now_or_never().is_none() && second.as_mut().now_or_never().is_none());
        let mut held = held.into_iter();
        drop(held.next());
        assert!(second.as_mut().now_or_never().is_none(), "the other was first");
        let third = first.as_mut().now_or_never().unwrap();
        drop(first);
        assert!(turn(&loud).is_none(), "whoever does not wait any more has left no turn behind");
        drop((third, held));
        assert!(second.as_mut().now_or_never().is_some());
        drop(second);
        assert!(lock(&lanes.of).is_empty());
    }
}
