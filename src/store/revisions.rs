//! How a node learns that webhooks or keys were changed somewhere else.
//!
//! A change adds to its counter in its own transaction, and that of a webhook says there which one it is. Every node reads
//! all counters in one query every [`POLL`] and forgets what it knows of the things that changed. What it knows is trusted
//! only while the last reading, or the look-up itself, is younger than [`MAX_AGE`]: a node that cannot read the counters
//! asks the database each time what it has not just learned, and says so when it gets no answer. So a change holds
//! everywhere within [`MAX_AGE`].

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use sea_orm::{ConnectionTrait, DatabaseTransaction, DbBackend};
use tokio::sync::watch;

use super::{Error, Store, keys::tenant, sql::Sql};
use crate::{clock, webhook::Tenant};

/// Between two readings of the counters.
const POLL: Duration = Duration::from_millis(300);
/// What was not known to hold within this time is asked for again.
const MAX_AGE: Duration = Duration::from_secs(1);

/// More changes of webhooks than this since the last reading are taken for a change of all.
const MAX_CHANGES: i64 = 1_000;
/// So many of the latest changes of webhooks are kept: a node that reads a second late finds them.
const KEPT_CHANGES: i64 = 10_000;

/// The counter for where deliveries go, and which webhooks subscribe to what.
const WEBHOOKS: &str = "webhooks";
/// The counter for which keys open the door.
const KEYS: &str = "keys";
/// The counter for what nodes that stopped gave back.
pub(super) const GIVEN_BACK: &str = "given_back";

/// What a transaction changes.
#[derive(Debug, Clone, Copy)]
pub(super) enum Changed<'a> {
    /// A webhook.
    Webhook(&'a Tenant, &'a str),
    /// A key.
    Keys,
}

/// When the counters were last read, and who waits for a change.
#[derive(Default)]
pub(super) struct Revisions {
    /// The moment before the last question that was answered: a later change may be missing from the answer.
    read_at: Mutex<Option<Instant>>,
    keys_changed: watch::Sender<()>,
}

impl Revisions {
    /// Whether what the database was asked at `asked_at`, and what was not forgotten since, may be trusted.
    pub(super) fn hold(&self, asked_at: Instant) -> bool {
        let read_at = *self.read_at.lock().unwrap_or_else(PoisonError::into_inner);
        read_at.map_or(asked_at, |read_at| read_at.max(asked_at)).elapsed() < MAX_AGE
    }
}

impl Store {
    /// Learns of the changes that others make, until the database fails.
    pub async fn follow_revisions(&self) -> Result<(), Error> {
        let mut last = HashMap::new();
        let mut interval = tokio::time::interval(POLL);
        interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            interval.tick().await;
            let asked_at = clock::stopwatch();
            last = self.0.silence.judge(self.learn_since(&last)).await?;
            // Last: from here on, what is still known is as fresh as the reading.
            *self.0.revisions.read_at.lock().unwrap_or_else(PoisonError::into_inner) = Some(asked_at);
        }
    }

    /// Forgets what has changed since the counters stood like this; how they stand now.
    async fn learn_since(&self, last: &HashMap<String, i64>) -> Result<HashMap<String, i64>, Error> {
        let read = self.read_revisions().await?;
        // Not only when one grew: a database restored from a backup counts from an earlier number.
        if last.get(KEYS) != read.get(KEYS) {
            self.forget_keys();
        }
        if let (Some(last), Some(read)) = (last.get(GIVEN_BACK), read.get(GIVEN_BACK))
            && last < read
        {
            self.hear_of_given_back(*last, *read).await?;
        }
        match (last.get(WEBHOOKS), read.get(WEBHOOKS)) {
            (last, read) if last == read => {}
            (Some(last), Some(read)) if (1..=MAX_CHANGES).contains(&(read - last)) => {
                let changed = self.changed_webhooks(*last, *read).await?;
                // A node of before says that there was a change, and not of what.
                if i64::try_from(changed.len()) == Ok(read - last) {
                    self.0.targets.forget_webhooks(&changed);
                } else {
                    self.0.targets.forget();
                }
            }
            _ => self.0.targets.forget(),
        }
        Ok(read)
    }

    /// Says from now on when keys may have changed.
    pub fn key_changes(&self) -> watch::Receiver<()> {
        self.0.revisions.keys_changed.subscribe()
    }

    /// Commits a change, so that it holds on this node at once and on the others within [`MAX_AGE`].
    pub(super) async fn commit_change(
        &self,
        transaction: DatabaseTransaction,
        changed: Changed<'_>,
    ) -> Result<(), Error> {
        // The last statement: on PostgreSQL, all that change the same thing take turns from here to the commit.
        for sql in note(changed, transaction.get_database_backend()) {
            transaction.execute_raw(sql.build(transaction.get_database_backend())).await?;
        }
        let committed = transaction.commit().await;
        // Also after a failure: a commit whose reply was lost may have happened.
        match changed {
            Changed::Webhook(tenant, id) => self.0.targets.forget_webhooks(&[(tenant.clone(), id.into())]),
            Changed::Keys => self.forget_keys(),
        }
        Ok(committed?)
    }

    /// Removes all but the latest notes of changed webhooks.
    pub(super) async fn forget_webhook_changes(&self) -> Result<(), Error> {
        let mut sql =
            Sql::new("DELETE FROM webhook_changes WHERE number <= (SELECT number FROM revisions WHERE name = ");
        sql.value(WEBHOOKS).text(") - ").value(KEPT_CHANGES);
        self.run(sql).await.map(drop)
    }

    async fn read_revisions(&self) -> Result<HashMap<String, i64>, Error> {
        let sql = Sql::new("SELECT name, number FROM revisions");
        let reader = &self.0.revisions_read;
        let rows = reader.query_all_raw(sql.build(reader.get_database_backend())).await?;
        Ok(rows.iter().map(sea_orm::QueryResult::try_get_many_by_index).collect::<Result<_, _>>()?)
    }

    /// The webhooks that were changed after one number and up to another, as far as that was noted.
    async fn changed_webhooks(&self, after: i64, upto: i64) -> Result<Vec<(Tenant, Arc<str>)>, Error> {
        let mut sql = Sql::new("SELECT organization, environment, webhook_id FROM webhook_changes WHERE number > ");
        sql.value(after).text(" AND number <= ").value(upto);
        let reader = &self.0.revisions_read;
        let rows = reader.query_all_raw(sql.build(reader.get_database_backend())).await?;
        let changed = rows.into_iter().map(|row| {
            let (organization, environment, webhook_id): (String, String, String) = row.try_get_many_by_index()?;
            Ok((tenant(&organization, &environment)?, webhook_id.into()))
        });
        changed.collect()
    }

    fn forget_keys(&self) {
        self.0.known_keys.forget();
        self.0.revisions.keys_changed.send_replace(());
    }
}

/// The statements that note a change. On PostgreSQL it is one: others wait from there on.
fn note(changed: Changed<'_>, backend: DbBackend) -> Vec<Sql> {
    let name = match changed {
        Changed::Webhook(..) => WEBHOOKS,
        Changed::Keys => KEYS,
    };
    let mut count = Sql::new("UPDATE revisions SET number = number + 1 WHERE name = ");
    count.value(name);
    let Changed::Webhook(tenant, id) = changed else { return vec![count] };
    let insert = |mut sql: Sql| {
        sql.text("INSERT INTO webhook_changes (number, webhook_id, organization, environment) SELECT number, ");
        sql.value(id).text(", ").value(tenant.organization()).text(", ").value(tenant.environment().as_str());
        sql
    };
    if backend == DbBackend::Postgres {
        let mut sql = Sql::new("WITH counted AS (UPDATE revisions SET number = number + 1 WHERE name = ");
        sql.value(name).text(" RETURNING number) ");
        sql = insert(sql);
        sql.text(" FROM counted");
        vec![sql]
    } else {
        let mut sql = insert(Sql::new(""));
        sql.text(" FROM revisions WHERE name = ").value(name);
        vec![count, sql]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        store::Actor,
        vault::Vault,
        webhook::{Environment, NewWebhook, WebhookUpdate},
    };

    #[tokio::test]
    async fn only_what_changed_is_forgotten() {
        let (directory, store) = Store::fresh().await;
        store.unlock(Vault::parse("dGVzdHMgaGF2ZSBhIG1hc3RlciBrZXkgb2YgMzIgYnk=").unwrap()).await.unwrap();
        let by = Actor::command_line();
        let mut webhooks = Vec::new();
        for name in ["acme", "other"] {
            let tenant = Tenant::new(name, Environment::Live).unwrap();
            let events = vec!["content.ready".to_owned()];
            let new = NewWebhook { url: "https://example.com/".to_owned(), events, description: None };
            let (webhook, _) = store.create_webhook(&tenant, new, 1, &by, None).await.unwrap();
            webhooks.push((tenant, Arc::<str>::from(webhook.id)));
        }
        let learn = async || {
            for (_, id) in &webhooks {
                store.target(id).await.unwrap().unwrap();
            }
            let of = |(tenant, _): &(Tenant, Arc<str>)| (tenant.clone(), "content.ready".to_owned());
            let wanted: Vec<_> = webhooks.iter().map(of).collect();
            store.subscribers(wanted.iter()).await.unwrap();
        };
        let known = || {
            [0, 1].map(|index| {
                let [target, subscribers] = store.0.targets.know(&webhooks[index]);
                assert_eq!(target, subscribers);
                target
            })
        };
        let url = format!("sqlite://{}", directory.path().join("test.db").display());
        let elsewhere = Store::connect(&url).await.unwrap();
        let change = async |count: usize| {
            for _ in 0..count {
                let (tenant, id) = &webhooks[1];
                let update = WebhookUpdate { description: Some(None), ..WebhookUpdate::default() };
                elsewhere.update_webhook(tenant, id, update, &by).await.unwrap().unwrap();
            }
        };

        learn().await;
        let mut last = store.learn_since(&HashMap::new()).await.unwrap();
        assert_eq!(known(), [false, false], "at the start nothing is known to hold");
        learn().await;
        change(2).await;
        assert_eq!(known(), [true, true]);
        last = store.learn_since(&last).await.unwrap();
        assert_eq!(known(), [true, false]);
        learn().await;
        store.0.write.execute_unprepared("UPDATE revisions SET number = number + 1").await.unwrap();
        change(1).await;
        last = store.learn_since(&last).await.unwrap();
        assert_eq!(known(), [false, false], "nobody said what the one before was of");
        learn().await;
        let (tenant, id) = &webhooks[0];
        store.delete_webhook(tenant, id, &by).await.unwrap();
        assert_eq!(known(), [false, true], "here at once");
        store.learn_since(&last).await.unwrap();
        assert_eq!(known(), [false, true]);
    }
}
