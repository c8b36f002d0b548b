//! Who did what: an entry for each change of a key, a webhook, a secret or a delivery that somebody asked for, written in
//! the transaction of the change. Entries are only ever added; the database refuses anything else.

use std::sync::Arc;

use sea_orm::{
    ColumnTrait, Condition, ConnectionTrait, DatabaseTransaction, EntityTrait, PaginatorTrait, QueryFilter, QueryOrder,
    QuerySelect, Value,
};

use super::{
    Error, Page, Store,
    entity::audit::{Column, Entity, Model},
    sql::Sql,
};
use crate::{
    clock,
    webhook::{Environment, Tenant, Timestamp},
};

/// The actor of whoever has the database and uses the command line.
const COMMAND_LINE: &str = "cli";

/// What was done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AuditAction {
    /// An API key was made.
    KeyCreated,
    /// An API key was ended.
    KeyRevoked,
    /// A webhook was registered.
    WebhookCreated,
    /// Fields of a webhook were changed.
    WebhookUpdated,
    /// A webhook was removed.
    WebhookDeleted,
    /// A webhook got a new secret.
    SecretRotated,
    /// The secrets of all webhooks were put under another master key.
    MasterKeyRotated,
    /// A failed delivery was granted one more attempt.
    DeliveryRetried,
}

/// Who asks for a change.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Actor {
    id: String,
    request_id: Option<String>,
}

/// One entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AuditEntry {
    /// `aud_` and a time-ordered unique part.
    pub id: String,
    /// What was done.
    pub action: AuditAction,
    /// Id of the key that did it, or `cli`.
    pub actor: String,
    /// Whose the resource is; none for a service key and a master key.
    pub organization: Option<String>,
    /// Its environment; none for a master key.
    pub environment: Option<Environment>,
    /// Id of what it was done to.
    pub resource_id: String,
    /// Id of the webhook concerned, if one is.
    pub webhook_id: Option<String>,
    /// Names of the fields that an update changed.
    pub changed_fields: Vec<String>,
    /// The request that did it, `req_…`; none for the command line.
    pub request_id: Option<String>,
    /// When.
    pub occurred_at: Timestamp,
}

/// Which entries to list; what is absent does not matter.
#[derive(Debug, Clone, Default)]
pub struct AuditFilter {
    /// Those about resources of this organisation.
    pub organization: Option<String>,
    /// Those about resources of this environment.
    pub environment: Option<Environment>,
    /// Those of this action.
    pub action: Option<AuditAction>,
    /// Those of this actor.
    pub actor: Option<String>,
    /// Those about this resource.
    pub resource_id: Option<String>,
    /// Those that concern this webhook: itself, its secret, its deliveries.
    pub webhook_id: Option<String>,
}

/// What a change says of itself.
pub(super) struct Record<'a> {
    pub(super) action: AuditAction,
    pub(super) organization: Option<&'a str>,
    pub(super) environment: Option<&'a str>,
    pub(super) resource_id: &'a str,
    pub(super) webhook_id: Option<&'a str>,
    pub(super) changed_fields: &'a [&'static str],
}

impl AuditAction {
    /// Every action.
    pub const ALL: [Self; 8] = [
        Self::KeyCreated,
        Self::KeyRevoked,
        Self::WebhookCreated,
        Self::WebhookUpdated,
        Self::WebhookDeleted,
        Self::SecretRotated,
        Self::MasterKeyRotated,
        Self::DeliveryRetried,
    ];

    /// The word for it in JSON, on the command line and in the database.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::KeyCreated => "key_created",
            Self::KeyRevoked => "key_revoked",
            Self::WebhookCreated => "webhook_created",
            Self::WebhookUpdated => "webhook_updated",
            Self::WebhookDeleted => "webhook_deleted",
            Self::SecretRotated => "secret_rotated",
            Self::MasterKeyRotated => "master_key_rotated",
            Self::DeliveryRetried => "delivery_retried",
        }
    }

    /// The action that a word names.
    pub fn parse(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|action| action.as_str() == word)
    }
}

impl Actor {
    /// Whoever uses the command line on this database.
    pub fn command_line() -> Self {
        Self { id: COMMAND_LINE.to_owned(), request_id: None }
    }

    /// The caller with the key of this id, by the request of this id.
    pub fn key(id: &str, request_id: Option<&str>) -> Self {
        Self { id: id.to_owned(), request_id: request_id.map(str::to_owned) }
    }
}

impl<'a> Record<'a> {
    /// Something done to a webhook of a tenant.
    pub(super) fn of_webhook(action: AuditAction, tenant: &'a Tenant, id: &'a str) -> Self {
        Self {
            action,
            organization: Some(tenant.organization()),
            environment: Some(tenant.environment().as_str()),
            resource_id: id,
            webhook_id: Some(id),
            changed_fields: &[],
        }
    }

    /// Adds it to the transaction of the change.
    pub(super) async fn write(self, transaction: &DatabaseTransaction, by: &Actor) -> Result<(), Error> {
        let text = |text: Option<&str>| Value::from(text.map(str::to_owned));
        let mut sql = Sql::new(
            "INSERT INTO audit (id, action, actor, organization, environment, resource_id, webhook_id, \
             changed_fields, request_id, occurred_at_ms) VALUES ",
        );
        sql.row([
            clock::new_id("aud").into(),
            self.action.as_str().into(),
            by.id.as_str().into(),
            text(self.organization),
            text(self.environment),
            self.resource_id.into(),
            text(self.webhook_id),
            serde_json::to_string(self.changed_fields).unwrap_or_default().into(),
            text(by.request_id.as_deref()),
            clock::now().millis().into(),
        ]);
        transaction.execute_raw(sql.build(transaction.get_database_backend())).await?;
        Ok(())
    }
}

impl Store {
    /// A page of the entries that `filter` matches, the newest first, after the one with id `after`.
    pub async fn list_audit(
        &self,
        filter: &AuditFilter,
        after: Option<&str>,
        limit: u64,
    ) -> Result<Page<AuditEntry>, Error> {
        let organization = filter.organization.as_deref().map(Arc::from);
        let _turn = match &organization {
            Some(organization) => Some(self.0.lanes.turn_to_read(organization).await?),
            None => None,
        };
        let all = Entity::find().filter(condition(filter));
        // Of a tenant, an action and a webhook an index has no more than is counted; nothing of it is written often.
        let total = i64::try_from(all.clone().count(&self.0.read).await?).unwrap_or(i64::MAX);
        let page = match after {
            Some(id) => all.filter(Column::Id.lt(id)),
            None => all,
        };
        let rows = page.order_by_desc(Column::Id).limit(limit + 1).all(&self.0.read).await?;
        let items = rows.into_iter().map(entry).collect::<Result<Vec<_>, _>>()?;
        Ok(Page::cut(items, limit, total))
    }
}

fn condition(filter: &AuditFilter) -> Condition {
    let AuditFilter { organization, environment, action, actor, resource_id, webhook_id } = filter;
    Condition::all()
        .add_option(organization.as_ref().map(|name| Column::Organization.eq(name)))
        .add_option(environment.map(|environment| Column::Environment.eq(environment.as_str())))
        .add_option(action.map(|action| Column::Action.eq(action.as_str())))
        .add_option(actor.as_ref().map(|id| Column::Actor.eq(id)))
        .add_option(resource_id.as_ref().map(|id| Column::ResourceId.eq(id)))
        .add_option(webhook_id.as_ref().map(|id| Column::WebhookId.eq(id)))
}

fn entry(row: Model) -> Result<AuditEntry, Error> {
    let environment = |word: &str| Environment::parse(word).ok_or(Error::Corrupt("environment"));
    Ok(AuditEntry {
        action: AuditAction::parse(&row.action).ok_or(Error::Corrupt("action"))?,
        environment: row.environment.as_deref().map(environment).transpose()?,
        changed_fields: serde_json::from_str(&row.changed_fields).map_err(|_| Error::Corrupt("list of fields"))?,
        occurred_at: Timestamp::from_millis(row.occurred_at_ms),
        id: row.id,
        actor: row.actor,
        organization: row.organization,
        resource_id: row.resource_id,
        webhook_id: row.webhook_id,
        request_id: row.request_id,
    })
}
