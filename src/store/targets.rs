//! What an attempt needs to know of a webhook, kept in memory as long as [`super::revisions`] lets it be trusted: a change
//! on this node is seen at once, one made on another node within a second.

use std::{
    collections::HashMap,
    mem,
    sync::{Arc, Mutex, PoisonError, Weak},
    time::Instant,
};

use sea_orm::{ColumnTrait, EntityTrait, QueryFilter};
use tokio::sync::{mpsc, oneshot};
use url::Url;

use super::{Error, Inner, Store, entity::webhook, secrets, sql::Sql};
use crate::{
    clock,
    vault::Vault,
    webhook::{SigningKey, Tenant, Timestamp, WebhookStatus},
};

/// At most this many webhooks are known; beyond, all are forgotten and learned anew.
const MAX_TARGETS: usize = 50_000;
/// Who subscribes to what is known up to this many ids of webhooks, which is 44 MiB; beyond, all of it is forgotten and learned
/// anew.
const MAX_IDS: usize = 512 * 1024;
/// Of one tenant up to this many; beyond, only its own are forgotten. An event type that has more by itself, which needs a
/// `--max-webhooks` above that, is read for each of its publishes: nobody else is to be forgotten for it.
const MAX_IDS_PER_TENANT: usize = MAX_IDS / 4;
/// As so many more an event type counts: it takes memory also without any.
const IDS_PER_TYPE: usize = 8;

/// One query reads at most this many targets.
const MAX_READ: usize = 256;

/// Where the deliveries of a webhook go, and what signs them.
pub struct Target {
    /// Id of the webhook.
    pub webhook_id: String,
    /// Where to send; read once, and judged by whoever sends.
    pub url: Option<Url>,
    /// Whether deliveries go out.
    pub status: WebhookStatus,
    key: SigningKey,
    previous: Option<(SigningKey, Timestamp)>,
}

/// Subscribers of one event type of one tenant.
pub(super) type Subscribers = Arc<[Arc<str>]>;
pub(super) type Subscription = (Tenant, String);

/// The task that reads the targets that are not known. Those that are asked for while it waits for the database go into its
/// next query together: after an outage, or a change for which all are forgotten, that is not one for each delivery. What
/// waits for it is bounded by the attempts that may be under way, and test events, which are over that limit.
pub(super) struct TargetReader(mpsc::UnboundedSender<(Arc<str>, TargetAnswer)>);
type TargetAnswer = oneshot::Sender<Result<Option<Arc<Target>>, Error>>;

#[derive(Default)]
pub(super) struct Targets(Mutex<Known>);

#[derive(Default)]
struct Known {
    /// Counts changes, so that what was read before one is not remembered after it.
    generation: u64,
    /// With the moment before the database was asked.
    targets: HashMap<Arc<str>, (Instant, Option<Arc<Target>>)>,
    subscriptions: Subscriptions,
}

/// Who subscribes to what.
#[derive(Default)]
struct Subscriptions {
    tenants: HashMap<Tenant, TenantSubscriptions>,
    /// Of all of them.
    ids: usize,
}

#[derive(Default)]
struct TenantSubscriptions {
    /// By event type.
    subscribers: HashMap<String, (Instant, Subscribers)>,
    ids: usize,
}

impl Target {
    /// The keys that sign at `now`, the newest first.
    pub fn keys(&self, now: Timestamp) -> Vec<SigningKey> {
        let previous = self.previous.as_ref().filter(|(_, expires_at)| now < *expires_at);
        std::iter::once(&self.key).chain(previous.map(|(key, _)| key)).cloned().collect()
    }
}

impl TargetReader {
    /// Starts the task. It does not keep the store alive.
    fn start(store: Weak<Inner>) -> Self {
        let (queue, mut coming) = mpsc::unbounded_channel::<(Arc<str>, TargetAnswer)>();
        tokio::spawn(async move {
            while let Some((webhook_id, answer)) = coming.recv().await {
                let mut asked = HashMap::from([(webhook_id, vec![answer])]);
                while asked.len() < MAX_READ
                    && let Ok((webhook_id, answer)) = coming.try_recv()
                {
                    asked.entry(webhook_id).or_default().push(answer);
                }
                let Some(inner) = store.upgrade() else { return };
                // Apart, so that a panic ends no more than this.
                let read = tokio::spawn(async move { Store(inner).read_targets(asked).await }).await;
                if let Ok(Err(error @ Error::Unavailable(_))) = read {
                    // Who waits behind it is not to wait for the database a second time.
                    while let Ok((_, answer)) = coming.try_recv() {
                        let _ = answer.send(Err(error.clone()));
                    }
                }
            }
        });
        Self(queue)
    }
}

impl Subscriptions {
    fn of(&self, (tenant, event_type): &Subscription) -> Option<&(Instant, Subscribers)> {
        self.tenants.get(tenant)?.subscribers.get(event_type)
    }

    /// What is forgotten for it, to be dropped when nobody waits.
    fn remember(
        &mut self,
        (tenant, event_type): Subscription,
        asked_at: Instant,
        subscribers: Subscribers,
    ) -> Vec<TenantSubscriptions> {
        let mut forgotten = Vec::new();
        let ids_of = |subscribers: &Subscribers| IDS_PER_TYPE + subscribers.len();
        let ids = ids_of(&subscribers);
        if let Some(its) = self.tenants.get_mut(&tenant) {
            let before = its.subscribers.remove(&event_type).map_or(0, |(_, before)| ids_of(&before));
            its.ids -= before;
            self.ids -= before;
            if its.ids + ids > MAX_IDS_PER_TENANT {
                forgotten.extend(self.forget(&tenant));
            }
        }
        if ids > MAX_IDS_PER_TENANT {
            return forgotten;
        }
        if self.ids + ids > MAX_IDS {
            forgotten.extend(mem::take(self).tenants.into_values());
        }
        self.ids += ids;
        let its = self.tenants.entry(tenant).or_default();
        its.ids += ids;
        its.subscribers.insert(event_type, (asked_at, subscribers));
        forgotten
    }

    fn forget(&mut self, tenant: &Tenant) -> Option<TenantSubscriptions> {
        let its = self.tenants.remove(tenant)?;
        self.ids -= its.ids;
        Some(its)
    }
}

impl Targets {
    /// Forgets everything, because webhooks have changed.
    pub(super) fn forget(&self) {
        let mut known = self.lock();
        known.generation += 1;
        let forgotten = (mem::take(&mut known.targets), mem::take(&mut known.subscriptions));
        // Freeing them takes longer than anybody is to wait for the lock.
        drop(known);
        drop(forgotten);
    }

    /// Forgets what is known of webhooks that have changed, and who subscribes to what of their tenants.
    pub(super) fn forget_webhooks(&self, changed: &[(Tenant, Arc<str>)]) {
        let mut forgotten = Vec::new();
        let mut known = self.lock();
        known.generation += 1;
        for (tenant, webhook_id) in changed {
            known.targets.remove(webhook_id);
            forgotten.extend(known.subscriptions.forget(tenant));
        }
    }

    /// Whether a webhook is known, and what its tenant subscribes to.
    #[cfg(test)]
    pub(super) fn know(&self, (tenant, webhook_id): &(Tenant, Arc<str>)) -> [bool; 2] {
        let known = self.lock();
        [known.targets.contains_key(webhook_id), known.subscriptions.tenants.contains_key(tenant)]
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Known> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Store {
    /// Where deliveries of a webhook go; none when it was deleted.
    pub async fn target(&self, webhook_id: &Arc<str>) -> Result<Option<Arc<Target>>, Error> {
        if let Some((asked_at, target)) = self.0.targets.lock().targets.get(webhook_id)
            && self.0.revisions.hold(*asked_at)
        {
            return Ok(target.clone());
        }
        let (answer, answered) = oneshot::channel();
        let reader = self.0.target_reader.get_or_init(|| TargetReader::start(Arc::downgrade(&self.0)));
        reader.0.send((Arc::clone(webhook_id), answer)).map_err(|_| Error::Closed)?;
        answered.await.map_err(|_| Error::Closed)?
    }

    /// Reads targets in one query, remembers them, and answers those who asked; with the error of the database, if any.
    async fn read_targets(&self, asked: HashMap<Arc<str>, Vec<TargetAnswer>>) -> Result<(), Error> {
        let (generation, asked_at) = (self.0.targets.lock().generation, clock::stopwatch());
        // As many as a power of two, some of them again: the database is to have the text prepared.
        let ids = asked.keys().cycle().take(asked.len().next_power_of_two());
        // Nothing is said of deleted ones: before it has statistics, PostgreSQL takes those that are not for few, and would
        // rather go through all of them.
        let find = webhook::Entity::find().filter(webhook::Column::Id.is_in(ids.map(|id| &**id)));
        let rows = self.looked_up(async { Ok(find.all(&self.0.engine_read).await?) }).await;
        let found = rows.and_then(|rows| {
            let vault = self.vault()?;
            let there = rows.into_iter().filter(|row| row.deleted_at_ms.is_none());
            Ok(there.map(|row| (row.id.clone(), target(&vault, row).map(Arc::new))).collect())
        });
        let found: HashMap<String, Result<Arc<Target>, Error>> = match found {
            Ok(found) => found,
            Err(error) => {
                asked.into_values().flatten().for_each(|answer| drop(answer.send(Err(error.clone()))));
                return Err(error);
            }
        };
        let mut known = self.0.targets.lock();
        if known.targets.len() + asked.len() > MAX_TARGETS {
            known.targets.clear();
        }
        for (webhook_id, answers) in asked {
            let target = found.get(&*webhook_id).cloned().transpose();
            answers.into_iter().for_each(|answer| drop(answer.send(target.clone())));
            if known.generation == generation
                && let Ok(target) = target
            {
                known.targets.insert(webhook_id, (asked_at, target));
            }
        }
        Ok(())
    }

    /// How many deliveries so many events for each make, as far as that is known.
    pub(super) fn known_deliveries<'a>(&self, wanted: impl Iterator<Item = &'a (Subscription, usize)>) -> usize {
        let known = self.0.targets.lock();
        let deliveries = |(of, events): &(Subscription, usize)| Some(known.subscriptions.of(of)?.1.len() * events);
        wanted.filter_map(deliveries).sum()
    }

    /// The active webhooks of each subscription, in one query for those that are not known.
    pub(super) async fn subscribers<'a>(
        &self,
        wanted: impl Iterator<Item = &'a Subscription>,
    ) -> Result<HashMap<Subscription, Subscribers>, Error> {
        let (mut found, mut unknown) = (HashMap::new(), HashMap::<Subscription, Vec<Arc<str>>>::new());
        let generation = {
            let known = self.0.targets.lock();
            for subscription in wanted {
                match known.subscriptions.of(subscription) {
                    Some((asked_at, ids)) if self.0.revisions.hold(*asked_at) => {
                        found.insert(subscription.clone(), Arc::clone(ids));
                    }
                    _ => drop(unknown.insert(subscription.clone(), Vec::new())),
                }
            }
            known.generation
        };
        if unknown.is_empty() {
            return Ok(found);
        }
        let asked_at = clock::stopwatch();
        self.looked_up(self.read_subscribers(&mut unknown)).await?;
        let mut forgotten = Vec::new();
        let mut known = self.0.targets.lock();
        for (subscription, ids) in unknown {
            let ids: Subscribers = ids.into();
            if known.generation == generation {
                forgotten.extend(known.subscriptions.remember(subscription.clone(), asked_at, Arc::clone(&ids)));
            }
            found.insert(subscription, ids);
        }
        Ok(found)
    }

    async fn read_subscribers(&self, unknown: &mut HashMap<Subscription, Vec<Arc<str>>>) -> Result<(), Error> {
        use sea_orm::ConnectionTrait;
        let mut sql = Sql::new(
            "SELECT s.organization, s.environment, s.event_type, s.webhook_id FROM subscriptions s \
             WHERE (SELECT w.status FROM webhooks w WHERE w.id = s.webhook_id AND w.deleted_at_ms IS NULL) = 'active' \
             AND (s.organization, s.environment, s.event_type) IN (VALUES ",
        );
        for (index, (tenant, event_type)) in unknown.keys().enumerate() {
            if index > 0 {
                sql.text(",");
            }
            sql.row([tenant.organization().into(), tenant.environment().as_str().into(), event_type.as_str().into()]);
        }
        sql.text(") ORDER BY s.webhook_id");
        let reader = &self.0.engine_read;
        for row in reader.query_all_raw(sql.build(reader.get_database_backend())).await? {
            let (organization, environment, event_type, webhook_id): (String, String, String, String) =
                row.try_get_many_by_index()?;
            let tenant = super::keys::tenant(&organization, &environment)?;
            if let Some(ids) = unknown.get_mut(&(tenant, event_type)) {
                ids.push(webhook_id.into());
            }
        }
        Ok(())
    }
}

/// Opens the secrets of a webhook and prepares its keys.
fn target(vault: &Vault, row: webhook::Model) -> Result<Target, Error> {
    let opened = secrets::open(vault, &row)?;
    let key = |plain: &[u8]| Ok::<_, Error>(SigningKey::new(&secrets::secret(plain)?));
    let previous = match (&opened.previous, row.previous_secret_expires_at_ms) {
        (Some(plain), Some(expires_at)) => Some((key(plain)?, Timestamp::from_millis(expires_at))),
        _ => None,
    };
    Ok(Target {
        key: key(&opened.secret)?,
        previous,
        status: WebhookStatus::parse(&row.status).ok_or(Error::Corrupt("webhook status"))?,
        webhook_id: row.id,
        url: Url::parse(&row.url).ok(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::webhook::Environment;

    fn of(tenant: &str, event_type: &str) -> Subscription {
        (Tenant::new(tenant, Environment::Live).unwrap(), event_type.to_owned())
    }

    fn remember(known: &mut Subscriptions, tenant: &str, event_type: &str, count: usize) {
        let subscribers: Subscribers = vec![Arc::from("whk_1"); count].into();
        known.remember(of(tenant, event_type), clock::stopwatch(), subscribers);
    }

    fn check(known: &Subscriptions) {
        for its in known.tenants.values() {
            assert_eq!(its.ids, its.subscribers.values().map(|(_, ids)| IDS_PER_TYPE + ids.len()).sum::<usize>());
            assert!(0 < its.ids && its.ids <= MAX_IDS_PER_TENANT, "{}", its.ids);
        }
        assert_eq!(known.ids, known.tenants.values().map(|its| its.ids).sum::<usize>());
        assert!(known.ids <= MAX_IDS, "{}", known.ids);
    }

    #[test]
    fn who_has_very_many_subscribers_is_forgotten_alone() {
        let mut known = Subscriptions::default();
        remember(&mut known, "quiet", "a", 1);
        let is_known = |known: &Subscriptions| ["a", "b", "c"].map(|event| known.of(&of("loud", event)).is_some());
        let half = MAX_IDS_PER_TENANT / 2 - IDS_PER_TYPE;
        for (event, count, then) in [
            ("a", half, [true, false, false]),
            ("b", half, [true, true, false]),
            // What takes the place of another is not counted beside it.
            ("b", half, [true, true, false]),
            ("c", 0, [false, false, true]),
            ("a", 2 * half + IDS_PER_TYPE, [true, false, false]),
            // It is read each time.
            ("a", 2 * half + IDS_PER_TYPE + 1, [false; 3]),
            ("a", 2 * half + IDS_PER_TYPE + 1, [false; 3]),
            ("b", 1, [false, true, false]),
        ] {
            remember(&mut known, "loud", event, count);
            check(&known);
            assert_eq!(is_known(&known), then, "{event} {count}");
        }
        for round in 0..100 {
            remember(&mut known, "loud", &format!("type.{round}"), half);
            check(&known);
        }
        assert!(known.of(&of("quiet", "a")).is_some(), "whatever it is, nobody else pays for it");
    }

    #[test]
    fn all_are_forgotten_together_when_they_are_too_many() {
        let mut known = Subscriptions::default();
        let tenants = MAX_IDS / (IDS_PER_TYPE + 1);
        for number in 0..tenants {
            remember(&mut known, &number.to_string(), "a", 1);
        }
        check(&known);
        assert_eq!(known.tenants.len(), tenants, "also those with few subscribers count");
        remember(&mut known, "one-more", "a", 1);
        check(&known);
        assert_eq!(known.tenants.len(), 1);
        known.forget(&of("one-more", "a").0);
        known.forget(&of("one-more", "a").0);
        assert_eq!((known.tenants.len(), known.ids), (0, 0));
    }
}
