//! One row for each call of the API: what it is asked in the tests of [`super`]. **A new RPC needs a row here**, or the
//! suite fails and says which one is missing.
//!
//! A row is the request as JSON by the proto's names. Its ids come from [`Ids`], never from a literal: the tests put
//! there, in every combination, ids of the caller, of somebody else, and of nobody. REST needs nothing: its requests
//! are made from the same row by the annotations of the method.

use serde_json::{Value, json};

/// What a call may name; a call that names something else needs another field here, made in [`super::world`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Ids {
    /// A webhook.
    pub(super) webhook: String,
    /// A failed delivery of that webhook.
    pub(super) delivery: String,
}

/// What a call reaches.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Reach {
    /// What its ids name. Another tenant's is answered exactly as one that does not exist.
    Named,
    /// All of the caller's tenant. The answer has nothing of another's.
    Tenant,
}

/// One row.
pub(super) struct Call {
    /// Full name of the method.
    pub(super) method: &'static str,
    pub(super) reach: Reach,
    /// The request; one that its owner can make with success.
    pub(super) request: fn(&Ids) -> Value,
}

use Reach::{Named, Tenant};

/// Every call. A method may have several rows.
pub(super) const CALLS: &[Call] = &[
    row("shortkit.webhooks.v1.WebhookService.ListWebhooks", Tenant, |_| json!({})),
    row(
        "shortkit.webhooks.v1.WebhookService.CreateWebhook",
        Tenant,
        |_| json!({ "url": "https://example.com/", "events": ["export.ready"] }),
    ),
    row("shortkit.webhooks.v1.WebhookService.GetWebhook", Named, |ids| json!({ "id": ids.webhook })),
    row(
        "shortkit.webhooks.v1.WebhookService.UpdateWebhook",
        Named,
        |ids| json!({ "id": ids.webhook, "webhook": { "description": "changed" }, "update_mask": "description" }),
    ),
    row("shortkit.webhooks.v1.WebhookService.DeleteWebhook", Named, |ids| json!({ "id": ids.webhook })),
    row("shortkit.webhooks.v1.WebhookService.RotateSecret", Named, |ids| json!({ "id": ids.webhook })),
    row("shortkit.webhooks.v1.WebhookService.SendTestEvent", Named, |ids| json!({ "id": ids.webhook })),
    row(
        "shortkit.webhooks.v1.DeliveryService.PublishEvent",
        Tenant,
        |_| json!({ "event": "content.ready", "data": "{}" }),
    ),
    row(
        "shortkit.webhooks.v1.DeliveryService.PublishEvents",
        Tenant,
        |_| json!({ "events": [{ "event": "content.ready", "data": "{}" }] }),
    ),
    row("shortkit.webhooks.v1.DeliveryService.ListDeliveries", Named, |ids| json!({ "webhook_id": ids.webhook })),
    row(
        "shortkit.webhooks.v1.DeliveryService.GetDelivery",
        Named,
        |ids| json!({ "webhook_id": ids.webhook, "delivery_id": ids.delivery }),
    ),
    row(
        "shortkit.webhooks.v1.DeliveryService.RetryDelivery",
        Named,
        |ids| json!({ "webhook_id": ids.webhook, "delivery_id": ids.delivery }),
    ),
    row("shortkit.webhooks.v1.DeliveryService.WatchDeliveries", Named, |ids| json!({ "webhook_id": ids.webhook })),
    row("shortkit.webhooks.v1.DeliveryService.WatchDeliveries", Tenant, |_| json!({})),
    row("shortkit.webhooks.v1.AuditService.ListAuditEntries", Tenant, |_| json!({})),
    // A filter, not a name: of another's webhook there is nothing, which auditing.rs looks at.
    row("shortkit.webhooks.v1.AuditService.ListAuditEntries", Tenant, |ids| json!({ "webhook_id": ids.webhook })),
];

const fn row(method: &'static str, reach: Reach, request: fn(&Ids) -> Value) -> Call {
    Call { method, reach, request }
}

/// A call that gives out cursors or resume tokens. **A request with a field called `cursor`, `page_token` or
/// `resume_token` needs a row here.**
pub(super) struct Paged {
    /// Full name of the method.
    pub(super) method: &'static str,
    /// The field of the request that takes the token, and the field of the answer that gives it.
    pub(super) takes: &'static str,
    pub(super) gives: &'static str,
    /// The first request, which gets a token when two webhooks with two deliveries each are there.
    pub(super) first: fn(&Ids) -> Value,
    /// The same with another filter each, for which a token of `first` must not work.
    pub(super) other_filters: fn(&Ids) -> Vec<Value>,
}

/// Every call that gives out tokens.
pub(super) const PAGED: &[Paged] = &[
    Paged {
        method: "shortkit.webhooks.v1.WebhookService.ListWebhooks",
        takes: "cursor",
        gives: "next_cursor",
        first: |_| json!({ "limit": 1 }),
        other_filters: |_| vec![],
    },
    Paged {
        method: "shortkit.webhooks.v1.AuditService.ListAuditEntries",
        takes: "cursor",
        gives: "next_cursor",
        first: |_| json!({ "limit": 1 }),
        other_filters: |ids| {
            vec![json!({ "webhook_id": ids.webhook }), json!({ "action": "AUDIT_ACTION_WEBHOOK_CREATED" })]
        },
    },
    Paged {
        method: "shortkit.webhooks.v1.DeliveryService.ListDeliveries",
        takes: "cursor",
        gives: "next_cursor",
        first: |ids| json!({ "webhook_id": ids.webhook, "limit": 1 }),
        other_filters: |ids| {
            vec![
                json!({ "webhook_id": ids.webhook, "status": "DELIVERY_STATUS_FAILED" }),
                json!({ "webhook_id": ids.webhook, "event": "content.ready" }),
            ]
        },
    },
    Paged {
        method: "shortkit.webhooks.v1.DeliveryService.WatchDeliveries",
        takes: "resume_token",
        gives: "resume_token",
        first: |ids| json!({ "webhook_id": ids.webhook }),
        other_filters: |ids| {
            vec![
                json!({}),
                json!({ "webhook_id": ids.webhook, "status": "DELIVERY_STATUS_FAILED" }),
                json!({ "webhook_id": ids.webhook, "event": "content.ready" }),
            ]
        },
    },
];
