//! What an attempt needs to know of a webhook, kept in memory as long as [`super::revisions`] lets it be trusted: a change
//! on this node is seen at once, one made on another node within a second.

use std::{
    collections::HashMap,
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

/// At most this many webhooks, and tenants with what they subscribe to, are known; beyond, all are forgotten and learned anew.
const MAX_ENTRIES: usize = 50_000;

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
    /// By tenant, then by event type.
    subscribers: HashMap<Tenant, HashMap<String, (Instant, Subscribers)>>,
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

impl Known {
    fn subscribers_of(&self, (tenant, event_type): &Subscription) -> Option<&(Instant, Subscribers)> {
        self.subscribers.get(tenant)?.get(event_type)
    }
}

impl Targets {
    /// Forgets everything, because webhooks have changed.
    pub(super) fn forget(&self) {
        let mut known = self.lock();
        known.generation += 1;
        known.targets.clear();
        known.subscribers.clear();
    }

    /// Forgets what is known of webhooks that have changed, and who subscribes to what of their tenants.
    pub(super) fn forget_webhooks(&self, changed: &[(Tenant, Arc<str>)]) {
        let mut known = self.lock();
        known.generation += 1;
        for (tenant, webhook_id) in changed {
            known.targets.remove(webhook_id);
            known.subscribers.remove(tenant);
        }
    }

    /// Whether a webhook is known, and what its tenant subscribes to.
    #[cfg(test)]
    pub(super) fn know(&self, (tenant, webhook_id): &(Tenant, Arc<str>)) -> [bool; 2] {
        let known = self.lock();
        [known.targets.contains_key(webhook_id), known.subscribers.contains_key(tenant)]
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
        if known.targets.len() + asked.len() > MAX_ENTRIES {
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
        let deliveries = |(of, events): &(Subscription, usize)| Some(known.subscribers_of(of)?.1.len() * events);
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
                match known.subscribers_of(subscription) {
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
        let mut known = self.0.targets.lock();
        if known.subscribers.len() >= MAX_ENTRIES {
            known.subscribers.clear();
        }
        for (subscription, ids) in unknown {
            let ids: Subscribers = ids.into();
            if known.generation == generation {
                let (tenant, event_type) = subscription.clone();
                known.subscribers.entry(tenant).or_default().insert(event_type, (asked_at, Arc::clone(&ids)));
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
