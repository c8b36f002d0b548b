//! Webhooks: made, shown, changed, removed.

use std::sync::Arc;

use sea_orm::{
    ActiveModelTrait, ColumnTrait, Condition, ConnectionTrait, DatabaseTransaction, EntityTrait, IntoActiveModel,
    PaginatorTrait, QueryFilter, QueryOrder, QuerySelect, Set,
};
use zeroize::Zeroizing;

use super::{
    Error, Page, Store,
    audit::{Actor, AuditAction, Record},
    entity::{subscription, webhook},
    idempotency::Keep,
    revisions::Changed,
    secrets::{self, OpenSecrets},
    sql::Sql,
};
use crate::{
    clock,
    webhook::{NewWebhook, Secret, Tenant, Timestamp, Webhook, WebhookStatus, WebhookUpdate},
};

/// How long the previous secret goes on signing after a rotation.
const ROTATION_OVERLAP: std::time::Duration = std::time::Duration::from_secs(60 * 60);

/// The result of a rotation.
pub struct Rotated {
    /// The new secret.
    pub secret: Secret,
    /// Until when the previous one signs too.
    pub previous_expires_at: Timestamp,
}

impl Store {
    /// Registers a webhook, makes its secret, and keeps what `keep` keeps, unless the tenant has `most` of them. Of those
    /// that are made at the same moment, a few more may get by.
    pub async fn create_webhook(
        &self,
        tenant: &Tenant,
        new: NewWebhook,
        most: u64,
        by: &Actor,
        keep: Option<Keep<(Webhook, Secret)>>,
    ) -> Result<(Webhook, Secret), Error> {
        let secret = new_secret();
        let webhook = Webhook {
            id: clock::new_id("whk"),
            url: new.url,
            events: new.events,
            description: new.description,
            status: WebhookStatus::Active,
            created_at: clock::now(),
        };
        let whose = [tenant.organization(), tenant.environment().as_str(), webhook.id.as_str()];
        let sealed = OpenSecrets { whose, secret: plain(&secret), previous: None }.seal(&self.vault()?);
        let row = webhook::ActiveModel {
            id: Set(webhook.id.clone()),
            organization: Set(tenant.organization().to_owned()),
            environment: Set(tenant.environment().as_str().to_owned()),
            url: Set(webhook.url.clone()),
            events: Set(events_column(&webhook.events)),
            description: Set(webhook.description.clone()),
            status: Set(webhook.status.as_str().to_owned()),
            secret: Set(sealed.secret),
            previous_secret: Set(sealed.previous),
            previous_secret_expires_at_ms: Set(None),
            created_at_ms: Set(webhook.created_at.millis()),
            deleted_at_ms: Set(None),
            master_key_id: Set(Some(sealed.master_key_id)),
        };
        let _turn = self.0.lanes.turn_to_change(tenant.shared_organization()).await?;
        let transaction = self.write().await?;
        if webhook::Entity::find().filter(of(tenant)).count(&transaction).await? >= most {
            return Err(Error::TooManyWebhooks(most));
        }
        let done = (webhook, secret);
        self.keep_answers(&transaction, keep.iter().map(|keep| keep.of(&done)).collect()).await?;
        webhook::Entity::insert(row).exec_without_returning(&transaction).await?;
        subscribe(&transaction, tenant, &done.0.id, &done.0.events).await?;
        Record::of_webhook(AuditAction::WebhookCreated, tenant, &done.0.id).write(&transaction, by).await?;
        self.commit_change(transaction, Changed::Webhook(tenant, &done.0.id)).await?;
        Ok(done)
    }

    /// One webhook of the tenant.
    pub async fn get_webhook(&self, tenant: &Tenant, id: &str) -> Result<Option<Webhook>, Error> {
        let found = webhook::Entity::find().filter(of(tenant)).filter(webhook::Column::Id.eq(id));
        found.one(&self.0.read).await?.map(webhook).transpose()
    }

    /// A page of the tenant's webhooks, the newest first, after the one with id `after`.
    pub async fn list_webhooks(
        &self,
        tenant: &Tenant,
        after: Option<&str>,
        limit: u64,
    ) -> Result<Page<Webhook>, Error> {
        let _turn = self.0.lanes.turn_to_read(tenant.shared_organization()).await?;
        let all = webhook::Entity::find().filter(of(tenant));
        // An index-only count of the tenant's own webhooks, which are few; deliveries are counted as they change.
        let total = i64::try_from(all.clone().count(&self.0.read).await?).unwrap_or(i64::MAX);
        let page = match after {
            Some(id) => all.filter(webhook::Column::Id.lt(id)),
            None => all,
        };
        let rows = page.order_by_desc(webhook::Column::Id).limit(limit + 1).all(&self.0.read).await?;
        let items = rows.into_iter().map(webhook).collect::<Result<Vec<_>, _>>()?;
        Ok(Page::cut(items, limit, total))
    }

    /// Changes what `update` names.
    pub async fn update_webhook(
        &self,
        tenant: &Tenant,
        id: &str,
        update: WebhookUpdate,
        by: &Actor,
    ) -> Result<Option<Webhook>, Error> {
        let _turn = self.0.lanes.turn_to_change(tenant.shared_organization()).await?;
        let transaction = self.write().await?;
        let Some(found) = self.find_for_update(&transaction, tenant, id).await? else { return Ok(None) };
        let changed_fields = changed_fields(&update);
        let mut row = found.into_active_model();
        if let Some(events) = &update.events {
            row.events = Set(events_column(events));
            unsubscribe(&transaction, id).await?;
            subscribe(&transaction, tenant, id, events).await?;
        }
        if let Some(url) = update.url {
            row.url = Set(url);
        }
        if let Some(description) = update.description {
            row.description = Set(description);
        }
        if let Some(status) = update.status {
            row.status = Set(status.as_str().to_owned());
        }
        let changed = row.update(&transaction).await?;
        let record = Record::of_webhook(AuditAction::WebhookUpdated, tenant, id);
        Record { changed_fields: &changed_fields, ..record }.write(&transaction, by).await?;
        self.commit_change(transaction, Changed::Webhook(tenant, id)).await?;
        if update.status == Some(WebhookStatus::Active) {
            // What it held is due, or will be. If this fails, the next sweep finds it.
            let webhook = (changed.id.as_str().into(), Arc::clone(tenant.shared_organization()));
            match self.first_waiting(&[webhook], Timestamp::from_millis(0)).await {
                Ok(waiting) => self.0.handoff.tell(waiting),
                Err(error) => {
                    tracing::warn!(%error, "what waits for a webhook that is active again was not looked for")
                }
            }
        }
        Ok(Some(webhook(changed)?))
    }

    /// Removes a webhook from sight at once; its deliveries are removed in small steps by [`Store::remove_deleted`].
    pub async fn delete_webhook(&self, tenant: &Tenant, id: &str, by: &Actor) -> Result<bool, Error> {
        let _turn = self.0.lanes.turn_to_change(tenant.shared_organization()).await?;
        let transaction = self.write().await?;
        let Some(found) = self.find_for_update(&transaction, tenant, id).await? else { return Ok(false) };
        let mut row = found.into_active_model();
        row.deleted_at_ms = Set(Some(clock::now().millis()));
        row.update(&transaction).await?;
        unsubscribe(&transaction, id).await?;
        Record::of_webhook(AuditAction::WebhookDeleted, tenant, id).write(&transaction, by).await?;
        self.commit_change(transaction, Changed::Webhook(tenant, id)).await?;
        Ok(true)
    }

    /// Makes a new secret. The previous one goes on signing for [`ROTATION_OVERLAP`]; one before that is dropped.
    pub async fn rotate_secret(
        &self,
        tenant: &Tenant,
        id: &str,
        by: &Actor,
        keep: Option<Keep<Rotated>>,
    ) -> Result<Option<Rotated>, Error> {
        let secret = new_secret();
        let vault = self.vault()?;
        let previous_expires_at = clock::now().after(ROTATION_OVERLAP);
        let _turn = self.0.lanes.turn_to_change(tenant.shared_organization()).await?;
        let transaction = self.write().await?;
        let Some(found) = self.find_for_update(&transaction, tenant, id).await? else { return Ok(None) };
        let rotated = Rotated { secret, previous_expires_at };
        self.keep_answers(&transaction, keep.iter().map(|keep| keep.of(&rotated)).collect()).await?;
        let opened = secrets::open(&vault, &found)?;
        let secrets =
            OpenSecrets { whose: opened.whose, secret: plain(&rotated.secret), previous: Some(opened.secret) };
        let sealed = secrets.seal(&vault);
        let mut row = found.into_active_model();
        row.secret = Set(sealed.secret);
        row.previous_secret = Set(sealed.previous);
        row.master_key_id = Set(Some(sealed.master_key_id));
        row.previous_secret_expires_at_ms = Set(Some(previous_expires_at.millis()));
        row.update(&transaction).await?;
        Record::of_webhook(AuditAction::SecretRotated, tenant, id).write(&transaction, by).await?;
        self.commit_change(transaction, Changed::Webhook(tenant, id)).await?;
        Ok(Some(rotated))
    }

    async fn find_for_update(
        &self,
        transaction: &DatabaseTransaction,
        tenant: &Tenant,
        id: &str,
    ) -> Result<Option<webhook::Model>, Error> {
        let mut find = webhook::Entity::find().filter(of(tenant)).filter(webhook::Column::Id.eq(id));
        // SQLite has one writer and no row locks.
        if !self.sqlite() {
            find = find.lock_exclusive();
        }
        Ok(find.one(transaction).await?)
    }
}

fn new_secret() -> Secret {
    Secret::from_random(&Zeroizing::new(clock::random()))
}

fn plain(secret: &Secret) -> Zeroizing<Vec<u8>> {
    Zeroizing::new(secret.expose().as_bytes().to_vec())
}

/// Names of what an update sets, in the order of the webhook's own fields.
fn changed_fields(update: &WebhookUpdate) -> Vec<&'static str> {
    let fields = [
        ("url", update.url.is_some()),
        ("events", update.events.is_some()),
        ("description", update.description.is_some()),
        ("status", update.status.is_some()),
    ];
    fields.into_iter().filter(|(_, set)| *set).map(|(name, _)| name).collect()
}

fn of(tenant: &Tenant) -> Condition {
    Condition::all()
        .add(webhook::Column::Organization.eq(tenant.organization()))
        .add(webhook::Column::Environment.eq(tenant.environment().as_str()))
        .add(webhook::Column::DeletedAtMs.is_null())
}

async fn subscribe(
    transaction: &DatabaseTransaction,
    tenant: &Tenant,
    webhook_id: &str,
    events: &[String],
) -> Result<(), Error> {
    let rows = events.iter().map(|event_type| subscription::ActiveModel {
        organization: Set(tenant.organization().to_owned()),
        environment: Set(tenant.environment().as_str().to_owned()),
        event_type: Set(event_type.clone()),
        webhook_id: Set(webhook_id.to_owned()),
    });
    subscription::Entity::insert_many(rows).exec_without_returning(transaction).await?;
    Ok(())
}

async fn unsubscribe(transaction: &DatabaseTransaction, webhook_id: &str) -> Result<(), Error> {
    let mut sql = Sql::new("DELETE FROM subscriptions WHERE webhook_id = ");
    sql.value(webhook_id);
    transaction.execute_raw(sql.build(transaction.get_database_backend())).await?;
    Ok(())
}

fn events_column(events: &[String]) -> String {
    serde_json::to_string(events).unwrap_or_default()
}

fn webhook(row: webhook::Model) -> Result<Webhook, Error> {
    Ok(Webhook {
        events: serde_json::from_str(&row.events).map_err(|_| Error::Corrupt("list of events"))?,
        status: WebhookStatus::parse(&row.status).ok_or(Error::Corrupt("webhook status"))?,
        created_at: Timestamp::from_millis(row.created_at_ms),
        id: row.id,
        url: row.url,
        description: row.description,
    })
}
