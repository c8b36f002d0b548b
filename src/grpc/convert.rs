//! Domain types as generated ones.

use super::proto;
use crate::{
    store::{AuditAction, AuditEntry, DeliveryDetail, ListedDelivery, Stats},
    webhook::{Attempt, Change, ChangeKind, DeliveryStatus, Secret, Timestamp, Webhook, WebhookStatus},
};

pub(super) fn timestamp(at: Timestamp) -> prost_types::Timestamp {
    let millis = at.millis();
    prost_types::Timestamp { seconds: millis / 1000, nanos: i32::try_from(millis % 1000).unwrap_or(0) * 1_000_000 }
}

pub(super) fn webhook(webhook: Webhook, secret: Option<&Secret>, stats: Option<Stats>) -> proto::Webhook {
    proto::Webhook {
        id: webhook.id,
        url: webhook.url,
        events: webhook.events,
        description: webhook.description,
        secret: secret.map(|secret| secret.expose().to_owned()),
        status: match webhook.status {
            WebhookStatus::Active => proto::WebhookStatus::Active,
            WebhookStatus::Disabled => proto::WebhookStatus::Disabled,
        }
        .into(),
        stats: stats.map(|stats| proto::WebhookStats {
            total_deliveries: stats.total,
            successful_deliveries: stats.successful,
            failed_deliveries: stats.failed,
            last_delivery_at: stats.last_attempt_at.map(timestamp),
        }),
        created_at: Some(timestamp(webhook.created_at)),
    }
}

pub(super) fn status(status: DeliveryStatus) -> proto::DeliveryStatus {
    match status {
        DeliveryStatus::Pending => proto::DeliveryStatus::Pending,
        DeliveryStatus::Success => proto::DeliveryStatus::Success,
        DeliveryStatus::Failed => proto::DeliveryStatus::Failed,
    }
}

pub(super) fn delivery(listed: ListedDelivery) -> proto::Delivery {
    let delivery = listed.delivery;
    let payload = listed
        .data
        .map(|data| proto::DeliveryPayload { event: delivery.event_type.clone(), data: data.as_str().to_owned() });
    proto::Delivery {
        // The document shows the time of an attempt beside its error, and not on a success.
        last_attempt_at: delivery.last_attempt_at.filter(|_| delivery.last_error.is_some()).map(timestamp),
        id: delivery.id,
        event: delivery.event_type,
        status: status(delivery.status).into(),
        status_code: delivery.status_code.map(i32::from),
        attempts: delivery.attempts,
        // Without an answer there is no time of one; the attempt log says how long it took to fail.
        response_time: delivery.response_time_ms.filter(|_| delivery.status_code.is_some()),
        payload,
        last_error: delivery.last_error,
        next_attempt_at: delivery.next_attempt_at.map(timestamp),
        created_at: Some(timestamp(delivery.created_at)),
        attempt_log: Vec::new(),
    }
}

pub(super) fn detail(detail: DeliveryDetail) -> proto::Delivery {
    proto::Delivery { attempt_log: detail.attempts.into_iter().map(attempt).collect(), ..delivery(detail.listed) }
}

fn attempt(attempt: Attempt) -> proto::Attempt {
    let (status_code, response) = match attempt.answer {
        Some(answer) => (Some(i32::from(answer.status_code)), Some(answer.body)),
        None => (None, None),
    };
    proto::Attempt {
        number: attempt.number,
        started_at: Some(timestamp(attempt.started_at)),
        status_code,
        response_time: attempt.duration_ms,
        response,
        error: attempt.error,
    }
}

pub(super) fn audit_action(action: AuditAction) -> proto::AuditAction {
    match action {
        AuditAction::KeyCreated => proto::AuditAction::KeyCreated,
        AuditAction::KeyRevoked => proto::AuditAction::KeyRevoked,
        AuditAction::WebhookCreated => proto::AuditAction::WebhookCreated,
        AuditAction::WebhookUpdated => proto::AuditAction::WebhookUpdated,
        AuditAction::WebhookDeleted => proto::AuditAction::WebhookDeleted,
        AuditAction::SecretRotated => proto::AuditAction::SecretRotated,
        AuditAction::MasterKeyRotated => proto::AuditAction::MasterKeyRotated,
        AuditAction::DeliveryRetried => proto::AuditAction::DeliveryRetried,
    }
}

pub(super) fn audit_entry(entry: AuditEntry) -> proto::AuditEntry {
    proto::AuditEntry {
        id: entry.id,
        action: audit_action(entry.action).into(),
        actor: entry.actor,
        resource_id: entry.resource_id,
        webhook_id: entry.webhook_id,
        changed_fields: entry.changed_fields,
        request_id: entry.request_id,
        occurred_at: Some(timestamp(entry.occurred_at)),
    }
}

pub(super) fn change(change: Change, resume_token: String) -> proto::WatchDeliveriesResponse {
    proto::WatchDeliveriesResponse {
        resume_token,
        change: match change.kind {
            ChangeKind::Created => proto::DeliveryChange::Created,
            ChangeKind::Attempted => proto::DeliveryChange::Attempted,
            ChangeKind::Retried => proto::DeliveryChange::Retried,
        }
        .into(),
        webhook_id: change.webhook_id,
        delivery_id: change.delivery_id,
        event: change.event_type,
        status: status(change.status).into(),
        attempts: change.attempts,
        status_code: change.status_code.map(i32::from),
        response_time: change.response_time_ms,
        last_error: change.last_error,
        next_attempt_at: change.next_attempt_at.map(timestamp),
        occurred_at: Some(timestamp(change.occurred_at)),
    }
}
