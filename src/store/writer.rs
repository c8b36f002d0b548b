//! One task writes all that publishing and sending leave behind. What queues up while one commit runs is the next batch
//! (natural batching): a lone item waits for nobody, and a crowd shares the cost of the disk.

use std::{
    sync::{
        Arc, Weak,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use tokio::sync::{mpsc, oneshot};

pub(super) use super::writes::{Answer, Write};
use super::{
    Error, Inner, Store,
    batch::Batch,
    checkpoints::Checkpoints,
    commit_size::CommitSize,
    counts::Deltas,
    leases,
    log::Log,
    publish::{
        self, Draft,
        keeping::{self, Pieces},
        parts::{self, Done},
    },
    record::{self, Finished},
    rests::{Rests, Shares},
    script::{Expected, Outcome, Script},
    turns::Turns,
};
use crate::clock;

/// One commit takes no further item once it has this many deliveries and results; the rest is in the next. The more, the
/// less each costs; more than this, and SQLite's statements would take so much memory as to be made anew each time.
const MAX_BATCH: usize = 256;
/// So many bytes of an event's data, or of a receiver's answer, are as much to write as a delivery or a result.
pub(super) const BYTES_PER_ITEM: usize = 4 * 1024;
/// Between so many and so many, as [`CommitSize`] finds, while several organisations have something to write: what one of
/// them writes waits for the commit that is under way, which is to be short then, however much another has.
const MIN_SHARED_BATCH: usize = 8;
const MAX_SHARED_BATCH: usize = 128;
/// When one item of a batch that was refused takes the database this long by itself, the others are given up with it: each
/// would take as long, and everybody waits behind them.
const STALLED: Duration = Duration::from_secs(5);
/// When a commit has waited this long for a database that is away, so has whoever waits behind it, and is refused with it: one
/// commit after the other would have the last of them wait for minutes.
const AWAY: Duration = Duration::from_secs(1);
/// Organisations are taken to have something to write for so long after they had.
const SHARED: Duration = Duration::from_secs(1);
/// And when several had within this time, what is large is stored in parts: the first of those who come back after a pause is
/// not to wait for it either.
const SELDOM_SHARED: Duration = Duration::from_secs(10);

/// The way to the task. What waits is bounded by those who send: publishes by [`super::room::MAX_WAITING_BYTES`], the others
/// by what the node holds.
pub(super) struct Writer {
    queue: mpsc::UnboundedSender<Write>,
    shared: Arc<AtomicBool>,
}

/// What became of a commit.
enum Settled {
    /// All of it was done at the first try, which took so long.
    Done(Duration),
    /// None of it was.
    Failed(Error),
    /// It took more than one.
    Apart,
}

impl Writer {
    /// Starts the task. It does not keep the store, which has the writer, alive.
    pub(super) fn start(store: Weak<Inner>) -> Self {
        let (queue, mut coming) = mpsc::unbounded_channel::<Write>();
        let shared = Arc::new(AtomicBool::new(false));
        let is_shared = Arc::clone(&shared);
        tokio::spawn(async move {
            let (mut waiting, mut size, mut checkpoints) = (Turns::default(), None, Checkpoints::default());
            let mut rests = Rests::default();
            loop {
                let began = clock::stopwatch();
                if waiting.is_empty() {
                    let Some(first) = coming.recv().await else { return };
                    waiting.push(first.organization(), first);
                }
                let waited = began.elapsed();
                while let Ok(next) = coming.try_recv() {
                    waiting.push(next.organization(), next);
                }
                let shared = waiting.is_shared(SHARED);
                is_shared.store(shared, Ordering::Relaxed);
                let in_parts = waiting.is_shared(SELDOM_SHARED);
                // What the commits of one alone took says nothing of these: they were as large as they came.
                size = size.filter(|_| shared);
                let most = if shared {
                    size.get_or_insert_with(|| CommitSize::new(MIN_SHARED_BATCH..=MAX_SHARED_BATCH)).next()
                } else {
                    MAX_BATCH
                };
                // Everybody has a turn at least, so that with many of them a commit is as large as that takes.
                let everybody = waiting.organizations();
                let Some(inner) = store.upgrade() else { return };
                let store = Store(inner);
                let (mut writes, mut weight, mut shares) = (Vec::with_capacity(most), 0, Shares::default());
                while (weight < most || writes.len() < everybody && weight < MAX_BATCH)
                    && let Some(next) = waiting.pop()
                {
                    let its = next.weight(&store);
                    weight += its;
                    if shared && store.sqlite() {
                        shares.add(next.organization(), its);
                    }
                    writes.push(next);
                }
                let asked = clock::stopwatch();
                let settled = match store.draft(writes, &mut waiting, in_parts).await {
                    (batch, None) => {
                        weight = batch.weight;
                        store.settle(batch).await
                    }
                    (batch, Some(error)) => {
                        store.fail(batch, &error);
                        Settled::Failed(error)
                    }
                };
                let mut filed = 0;
                match settled {
                    Settled::Done(took) => {
                        filed = store.file_changes().await;
                        if let Some(size) = &mut size {
                            size.learn(weight, took);
                            if weight >= most {
                                rests.earn(shares, took);
                            }
                        }
                    }
                    Settled::Failed(error @ Error::Unavailable(_)) if asked.elapsed() >= AWAY => {
                        while let Ok(next) = coming.try_recv() {
                            waiting.push(next.organization(), next);
                        }
                        store.refuse(waiting.take(Write::may_be_refused), &error);
                    }
                    Settled::Failed(_) | Settled::Apart => {}
                }
                if checkpoints.after_commit(weight, filed, waited, !waiting.is_empty() || !coming.is_empty()) {
                    store.0.commits.checkpoint().await;
                }
                rests.take(&mut waiting, &mut coming, Write::organization).await;
            }
        });
        Self { queue, shared }
    }

    /// Whether several organisations had something to write when somebody last had.
    pub(super) fn is_shared(&self) -> bool {
        self.shared.load(Ordering::Relaxed)
    }

    /// Ends when the task has.
    pub(super) async fn died(&self) {
        self.queue.closed().await;
    }

    pub(super) fn send(&self, write: Write) -> Result<(), Error> {
        self.queue.send(write).map_err(|_| Error::Closed)
    }

    /// Has `write` made, which gets its answer through the other end of the channel.
    pub(super) async fn submit<T>(&self, write: impl FnOnce(Answer<T>) -> Write) -> Result<T, Error> {
        let (answer, written) = oneshot::channel();
        self.send(write(answer))?;
        written.await.map_err(|_| Error::Closed)?
    }
}

impl Store {
    /// Sorts `writes`, and finds out where new events go; with the error when the database does not say. What is more than it
    /// seemed, as an event for a thousand webhooks after one of them has changed, is put back among those that wait.
    async fn draft(&self, writes: Vec<Write>, waiting: &mut Turns<Write>, in_parts: bool) -> (Batch, Option<Error>) {
        let (mut batch, mut publishes) = Batch::of(writes);
        // Whoever left was promised nothing.
        publishes.retain(|(_, answer)| !answer.is_closed());
        for (draft, done) in &mut batch.drafts {
            // What is taken over is claimed: not all data that it needs is in it.
            if !matches!(done, Done::TakenOver(_)) {
                draft.begin_leases(&self.0.handoff);
            }
        }
        batch.weight =
            batch.finished.iter().map(|(finished, _)| finished.weight()).sum::<usize>() + batch.releases.len();
        // They were weighed when they were taken; publishes are not put back for them.
        let parts: usize = batch.drafts.iter().map(|(part, _)| part.weight()).sum();
        let wanted = publishes.iter().flat_map(|(publish, _)| publish.subscriptions()).map(|(of, _)| of);
        match self.subscribers(wanted).await {
            Ok(subscribers) => {
                let mut publishes = publishes.into_iter();
                while batch.weight < MAX_BATCH
                    && let Some((publish, answer)) = publishes.next()
                {
                    match self.draft_of(*publish, &subscribers, in_parts) {
                        Ok(draft) => {
                            batch.weight += draft.weight();
                            batch.drafts.push((draft, Done::Caller(answer)));
                        }
                        Err(refused) => drop(answer.send(Err(refused))),
                    }
                }
                for (publish, answer) in publishes.rev() {
                    waiting.put_back(Arc::clone(publish.organization()), Write::Publish(publish, answer));
                }
                batch.weight += parts;
                (batch, None)
            }
            Err(error) => {
                publishes.into_iter().for_each(|(_, answer)| drop(answer.send(Err(error.clone()))));
                (batch, Some(error))
            }
        }
    }

    /// Commits a batch and answers it. When the database refuses it for good, every item stands for itself, so that one
    /// cannot spoil the others.
    async fn settle(&self, batch: Batch) -> Settled {
        let (began, items) = (clock::stopwatch(), batch.len());
        let committed = self.commit(&batch).await;
        self.metrics().committed(items, began.elapsed(), &committed);
        match committed {
            Ok(lost) => {
                let settled = if lost.is_empty() { Settled::Done(began.elapsed()) } else { Settled::Apart };
                self.answer(batch, &lost);
                return settled;
            }
            Err(Error::Failed(_) | Error::TakenOver) if batch.len() > 1 => self.settle_apart(batch).await,
            Err(Error::Repeated) => {
                match self.repeated(batch.drafts.iter().filter_map(|(draft, _)| draft.kept())).await {
                    Ok(repeated) => {
                        let (rest, left_out) = batch.without(&repeated);
                        Box::pin(self.settle(rest)).await;
                        // After it, so that who asks what was kept finds what the rest has kept.
                        self.fail(left_out, &Error::Repeated);
                    }
                    Err(error) => self.fail(batch, &error),
                }
            }
            Err(error) => {
                self.fail(batch, &error);
                return Settled::Failed(error);
            }
        }
        Settled::Apart
    }

    /// Each item for itself, unless the database is too slow for one: then it is for all, who are not to wait one by one.
    async fn settle_apart(&self, batch: Batch) {
        let mut stalled = None;
        for alone in batch.split() {
            match &stalled {
                Some(error) => self.fail(alone, error),
                None => {
                    let began = clock::stopwatch();
                    Box::pin(self.settle(alone)).await;
                    stalled = (began.elapsed() >= STALLED).then_some(Error::Overloaded);
                }
            }
        }
    }

    /// Writes all of a batch, or nothing. Results whose leases were lost are left out, and answered with, by place.
    async fn commit(&self, batch: &Batch) -> Result<Vec<usize>, Error> {
        let all: Vec<&Finished> = batch.finished.iter().map(|(finished, _)| &**finished).collect();
        if self.try_commit(batch, &all).await? {
            return Ok(Vec::new());
        }
        let mut lost = Vec::new();
        let mut held = all;
        // Once more for each time that another node took leases over in between, which is rare enough.
        loop {
            let holds = self.holds(&held).await?;
            let before = held.len();
            held.retain(|finished| holds.contains(&finished.delivery_id));
            if held.len() == before {
                return Err(Error::Corrupt("lease"));
            }
            if self.try_commit(batch, &held).await? {
                lost.extend((0..batch.finished.len()).filter(|index| {
                    let id = &batch.finished[*index].0.delivery_id;
                    !held.iter().any(|finished| finished.delivery_id == *id)
                }));
                return Ok(lost);
            }
        }
    }

    /// False, and nothing is written, when one of the leases of `finished` was lost.
    async fn try_commit(&self, batch: &Batch, finished: &[&Finished]) -> Result<bool, Error> {
        let drafts = || batch.drafts.iter().map(|(draft, _)| draft);
        let (mut deltas, mut log) = (Deltas::default(), Log::default());
        drafts().for_each(|draft| draft.tell(&mut deltas, &mut log));
        finished.iter().for_each(|finished| finished.tell(&mut deltas, &mut log));
        let (backend, node, logged) = (self.0.commits.backend(), &self.0.node, log.len());
        let pieces = Pieces::of(backend, node, drafts())?;
        let script = self
            .keep(Script::default(), backend, drafts().filter_map(Draft::kept).collect())?
            .with_each(parts::remove_parts(backend), parts::to_remove(backend, node, drafts()), Expected::Part)
            .with(keeping::INSERT_DRAFTS, pieces.begun)
            .with_each(keeping::RENEW_DRAFTS, pieces.renewed, Expected::Part)
            .with_each(keeping::REMOVE_DRAFTS, pieces.accepted, Expected::Part)
            .with(keeping::INSERT_PARTS, pieces.parts)
            .with(publish::INSERT_EVENTS, publish::events(backend, drafts()))
            .with(publish::INSERT_DELIVERIES, publish::deliveries(backend, node, drafts()))
            .with_each(record::UPDATE, record::results(backend, node, finished), Expected::Lease)
            .with(record::INSERT_ATTEMPTS, record::failures(backend, finished))
            .with(leases::RELEASE, self.releases(batch.releases.iter().map(|(release, _)| release)))
            .tell(backend, deltas, log)?;
        batch.reached("before commit");
        let outcome = self.0.commits.run(script).await?;
        batch.reached("after commit");
        match outcome {
            Outcome::Done => {
                self.0.filing.logged(logged);
                Ok(true)
            }
            Outcome::Missed(Expected::Lease) => Ok(false),
            Outcome::Missed(Expected::Name) => Err(Error::Repeated),
            Outcome::Missed(Expected::Part) => Err(Error::TakenOver),
        }
    }

    fn answer(&self, batch: Batch, lost: &[usize]) {
        self.0.feed.announce();
        let mut waiting = Vec::new();
        for (draft, done) in batch.drafts {
            if draft.is_whole() {
                self.write_on(draft.after_piece(done));
                continue;
            }
            let (organization, deliveries) = draft.backlog();
            self.0.backlog.settle(organization, deliveries, true);
            self.metrics().created(deliveries);
            let published = draft.published();
            draft.hand_over(&self.0.ready, &mut waiting);
            done.send(Ok(published));
        }
        for (index, (finished, answer)) in batch.finished.into_iter().enumerate() {
            let holds = !lost.contains(&index);
            if holds {
                waiting.extend(finished.waiting());
            }
            let _ = answer.send(Ok(holds));
        }
        for (release, answer) in batch.releases {
            waiting.push(release.waiting());
            let _ = answer.send(Ok(()));
        }
        self.0.handoff.tell(waiting);
    }

    /// What follows comes back to the writer, and takes turns as everything does.
    fn write_on(&self, next: Vec<(Draft, Done)>) {
        for (draft, done) in next {
            if let Ok(writer) = self.writer() {
                let _ = writer.send(Write::Draft(Box::new(draft), done));
            }
        }
    }

    /// What is not written, nor will be.
    fn refuse(&self, writes: Vec<Write>, error: &Error) {
        let (batch, publishes) = Batch::of(writes);
        publishes.into_iter().for_each(|(_, answer)| drop(answer.send(Err(error.clone()))));
        self.fail(batch, error);
    }

    fn fail(&self, batch: Batch, error: &Error) {
        for (draft, done) in batch.drafts {
            let (organization, deliveries) = draft.backlog();
            self.0.backlog.settle(organization, deliveries, false);
            draft.give_back(&self.0.handoff);
            done.send(Err(error.clone()));
        }
        batch.finished.into_iter().for_each(|(_, answer)| drop(answer.send(Err(error.clone()))));
        batch.releases.into_iter().for_each(|(_, answer)| drop(answer.send(Err(error.clone()))));
    }
}

#[cfg(test)]
mod tests {
    use sea_orm::ConnectionTrait;

    use super::*;
    use crate::{
        store::{Lease, NewEvent, publish::Publish},
        webhook::{self, Attempt, DeliveryStatus, Environment, Event, EventData, Tenant, Transition},
    };

    /// What the writer took for little, since it did not know better, does not make a commit for which everybody waits.
    #[tokio::test]
    async fn what_is_more_than_it_seemed_waits() {
        let (_directory, store) = Store::fresh().await;
        for insert in [
            "INSERT INTO webhooks (id, organization, environment, url, events, status, secret, created_at_ms) \
             WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 200) \
             SELECT 'whk_' || i, 'acme', 'live', 'https://example.com/', '[]', 'active', '', 1 FROM n",
            "INSERT INTO subscriptions (organization, environment, event_type, webhook_id) \
             SELECT organization, environment, 'content.ready', id FROM webhooks",
        ] {
            store.0.write.execute_unprepared(insert).await.unwrap();
        }
        let tenant = Tenant::new("acme", Environment::Live).unwrap();
        let write = |events: usize| {
            let data = || EventData::parse("{}").unwrap();
            let events =
                (0..events).map(|_| NewEvent { event_type: "content.ready".to_owned(), data: data() }).collect();
            let lease = Lease { length: Duration::from_secs(60), first_wait: Duration::ZERO };
            let (answer, answered) = oneshot::channel();
            (Write::Publish(Box::new(Publish::of(tenant.clone(), events, lease)), answer), answered)
        };
        let (writes, _answered): (Vec<_>, Vec<_>) = (0..5).map(|_| write(1)).unzip();
        assert!(writes.iter().all(|write| write.weight(&store) == 1));
        let mut waiting = Turns::default();
        let (batch, None) = store.draft(writes, &mut waiting, false).await else { panic!("it is there") };
        assert_eq!((batch.drafts.len(), waiting.len()), (2, 3));
        assert_eq!(waiting.pop().unwrap().weight(&store), 200);
        assert_eq!(write(3).0.weight(&store), 600);
    }

    #[tokio::test]
    async fn results_with_long_answers_weigh_more() {
        let (_directory, store) = Store::fresh().await;
        let now = clock::now();
        let data = EventData::parse("{}").unwrap();
        let event = Event { id: "evt_1".to_owned(), event_type: "content.ready".to_owned(), data, created_at: now };
        let event = Arc::new(event);
        let write = |bytes: usize| {
            let answer = Some(webhook::Answer { status_code: 200, body: "x".repeat(bytes) });
            let finished = Finished {
                tenant: Tenant::new("acme", Environment::Live).unwrap(),
                webhook_id: "whk_1".into(),
                delivery_id: "del_1".to_owned(),
                event: Arc::clone(&event),
                attempt: Attempt { number: 1, started_at: now, duration_ms: 1, answer, error: None },
                transition: Transition { status: DeliveryStatus::Success, next_attempt_at: None },
                ended_at: now,
            };
            Write::Finish(Arc::new(finished), oneshot::channel().0)
        };
        let writes: Vec<Write> = [0, 2, 5_000, 16 * 1_024].map(write).into();
        assert_eq!(writes.iter().map(|write| write.weight(&store)).collect::<Vec<_>>(), [1, 1, 1, 4]);
        let (batch, _) = store.draft(writes, &mut Turns::default(), false).await;
        assert_eq!((batch.finished.len(), batch.weight), (4, 7));
    }
}
