//! `WebhookService`.

use tonic::{Request, Response, Status};

use super::{
    Api, actor, convert, keep, proto, status, tenant,
    token::Purpose,
    validate::{self, sample},
};
use crate::{
    store::{NewEvent, Rotated},
    webhook::{DeliveryStatus, Secret, Webhook},
};

#[tonic::async_trait]
impl proto::webhook_service_server::WebhookService for Api {
    async fn list_webhooks(
        &self,
        request: Request<proto::ListWebhooksRequest>,
    ) -> Result<Response<proto::ListWebhooksResponse>, Status> {
        let tenant = tenant(&request)?;
        let request = request.into_inner();
        let limit = validate::limit(request.limit)?;
        let purpose = Purpose { call: "webhooks", tenant: &tenant, filter: &[] };
        let after = self.cursor(&purpose, request.cursor.as_deref())?;
        let page = self.store.list_webhooks(&tenant, after.as_deref(), limit).await.map_err(status::store)?;
        let last = page.items.last().filter(|_| page.more);
        Ok(Response::new(proto::ListWebhooksResponse {
            next_cursor: last.map(|webhook| self.tokens.seal(&purpose, &webhook.id)),
            total: page.total,
            webhooks: page.items.into_iter().map(|webhook| convert::webhook(webhook, None, None)).collect(),
        }))
    }

    async fn create_webhook(
        &self,
        request: Request<proto::CreateWebhookRequest>,
    ) -> Result<Response<proto::CreateWebhookResponse>, Status> {
        let tenant = tenant(&request)?;
        let by = actor(&request)?;
        let keep = keep(&request, created);
        let new = self.new_webhook(request.into_inner()).await?;
        let created_one = self.store.create_webhook(&tenant, new, self.max_webhooks, &by, keep).await;
        let done = created_one.map_err(status::store)?;
        Ok(Response::new(created(&done)))
    }

    async fn get_webhook(
        &self,
        request: Request<proto::GetWebhookRequest>,
    ) -> Result<Response<proto::GetWebhookResponse>, Status> {
        let tenant = tenant(&request)?;
        let webhook = self.webhook(&tenant, &request.into_inner().id).await?;
        let stats = self.store.stats(&webhook.id).await.map_err(status::store)?;
        let webhook = Some(convert::webhook(webhook, None, Some(stats)));
        Ok(Response::new(proto::GetWebhookResponse { webhook }))
    }

    async fn update_webhook(
        &self,
        request: Request<proto::UpdateWebhookRequest>,
    ) -> Result<Response<proto::UpdateWebhookResponse>, Status> {
        let tenant = tenant(&request)?;
        let by = actor(&request)?;
        let request = request.into_inner();
        // Before the look at the fields: of a webhook that is not there, nothing else matters.
        let id = self.webhook(&tenant, &request.id).await?.id;
        let update = self.update(request).await?;
        let updated = self.store.update_webhook(&tenant, &id, update, &by).await.map_err(status::store)?;
        let webhook = updated.ok_or_else(|| status::not_found("webhook"))?;
        let webhook = Some(convert::webhook(webhook, None, None));
        Ok(Response::new(proto::UpdateWebhookResponse { webhook }))
    }

    async fn delete_webhook(
        &self,
        request: Request<proto::DeleteWebhookRequest>,
    ) -> Result<Response<proto::DeleteWebhookResponse>, Status> {
        let tenant = tenant(&request)?;
        let by = actor(&request)?;
        let id = request.into_inner().id;
        validate::id("webhook", &id)?;
        if !self.store.delete_webhook(&tenant, &id, &by).await.map_err(status::store)? {
            return Err(status::not_found("webhook"));
        }
        Ok(Response::new(proto::DeleteWebhookResponse { id, deleted: true }))
    }

    async fn rotate_secret(
        &self,
        request: Request<proto::RotateSecretRequest>,
    ) -> Result<Response<proto::RotateSecretResponse>, Status> {
        let tenant = tenant(&request)?;
        let by = actor(&request)?;
        let id = request.get_ref().id.clone();
        validate::id("webhook", &id)?;
        let keep = {
            let id = id.clone();
            keep(&request, move |done| rotated(&id, done))
        };
        let done = self.store.rotate_secret(&tenant, &id, &by, keep).await.map_err(status::store)?;
        let done = done.ok_or_else(|| status::not_found("webhook"))?;
        Ok(Response::new(rotated(&id, &done)))
    }

    async fn send_test_event(
        &self,
        request: Request<proto::SendTestEventRequest>,
    ) -> Result<Response<proto::SendTestEventResponse>, Status> {
        let tenant = tenant(&request)?;
        let request = request.into_inner();
        let webhook = self.webhook(&tenant, &request.id).await?;
        let event_type = match request.event {
            Some(event_type) => {
                self.event_type(&event_type)?;
                event_type
            }
            None => webhook.events.first().cloned().unwrap_or_default(),
        };
        let event = NewEvent { data: sample(&event_type), event_type };
        let published = self.store.publish_test(tenant, &webhook.id, event, self.lease.clone()).await;
        let (delivery_id, attempted) = published.map_err(status::store)?;
        let attempt = attempted.await.map_err(|_| status::interrupted())?;
        let failed = attempt.error.is_some();
        let outcome = if failed { DeliveryStatus::Failed } else { DeliveryStatus::Success };
        Ok(Response::new(proto::SendTestEventResponse {
            delivery_id,
            status: convert::status(outcome).into(),
            status_code: attempt.answer.as_ref().map(|answer| answer.status_code.into()),
            response_time: Some(attempt.duration_ms),
            response: attempt.answer.map(|answer| answer.body),
            last_error: attempt.error,
        }))
    }
}

fn created((webhook, secret): &(Webhook, Secret)) -> proto::CreateWebhookResponse {
    proto::CreateWebhookResponse { webhook: Some(convert::webhook(webhook.clone(), Some(secret), None)) }
}

fn rotated(id: &str, rotated: &Rotated) -> proto::RotateSecretResponse {
    proto::RotateSecretResponse {
        id: id.to_owned(),
        secret: rotated.secret.expose().to_owned(),
        previous_secret_expires_at: Some(convert::timestamp(rotated.previous_expires_at)),
    }
}
