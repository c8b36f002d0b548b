//! `DeliveryService`.

use tonic::{Request, Response, Status};

use super::{Api, actor, convert, keep, principal, proto, status, tenant, token::Purpose, validate, watch};
use crate::{
    store::{ChangeFilter, DeliveryFilter, Published},
    webhook::{DeliveryStatus, Tenant, Webhook},
};

impl Api {
    /// The tenant's webhook of that id; another tenant's is as good as none.
    pub(super) async fn webhook(&self, tenant: &Tenant, id: &str) -> Result<Webhook, Status> {
        validate::id("webhook", id)?;
        let webhook = self.store.get_webhook(tenant, id).await.map_err(status::store)?;
        webhook.ok_or_else(|| status::not_found("webhook"))
    }

    /// What a cursor stands for.
    pub(super) fn cursor(&self, purpose: &Purpose<'_>, cursor: Option<&str>) -> Result<Option<String>, Status> {
        let Some(cursor) = cursor else { return Ok(None) };
        let opened = self.tokens.open(purpose, cursor);
        let refuse = || {
            let message = "cursor is not one that this list gave out".to_owned();
            status::invalid_parameter("cursor", "invalid", message)
        };
        opened.map(Some).ok_or_else(refuse)
    }
}

#[tonic::async_trait]
impl proto::delivery_service_server::DeliveryService for Api {
    async fn publish_event(
        &self,
        request: Request<proto::PublishEventRequest>,
    ) -> Result<Response<proto::PublishEventResponse>, Status> {
        let tenant = tenant(&request)?;
        let keep = keep(&request, |done: &Vec<Published>| accepted_one(done));
        let event = self.new_event("", request.into_inner())?;
        let published = self.store.publish(tenant, vec![event], self.lease.clone(), keep).await;
        Ok(Response::new(accepted_one(&published.map_err(status::store)?)))
    }

    async fn publish_events(
        &self,
        request: Request<proto::PublishEventsRequest>,
    ) -> Result<Response<proto::PublishEventsResponse>, Status> {
        let tenant = tenant(&request)?;
        let keep = keep(&request, |done: &Vec<Published>| accepted(done));
        let events = self.new_events(request.into_inner().events).await?;
        let published = self.store.publish(tenant, events, self.lease.clone(), keep).await;
        Ok(Response::new(accepted(&published.map_err(status::store)?)))
    }

    async fn list_deliveries(
        &self,
        request: Request<proto::ListDeliveriesRequest>,
    ) -> Result<Response<proto::ListDeliveriesResponse>, Status> {
        let tenant = tenant(&request)?;
        let request = request.into_inner();
        let webhook = self.webhook(&tenant, &request.webhook_id).await?;
        let limit = validate::limit(request.limit)?;
        let filter = DeliveryFilter { status: validate::delivery_status(request.status)?, event_type: request.event };
        if let Some(event_type) = &filter.event_type {
            self.event_filter(event_type)?;
        }
        let parts = filter_parts(&webhook.id, filter.status, filter.event_type.as_deref());
        let purpose = Purpose { call: "deliveries", tenant: &tenant, filter: &parts };
        let after = self.cursor(&purpose, request.cursor.as_deref())?;
        let page = self.store.list_deliveries(&tenant, &webhook.id, &filter, after.as_deref(), limit).await;
        let page = page.map_err(status::store)?;
        let last = page.items.last().filter(|_| page.more);
        Ok(Response::new(proto::ListDeliveriesResponse {
            next_cursor: last.map(|listed| self.tokens.seal(&purpose, &listed.delivery.id)),
            total: page.total,
            deliveries: page.items.into_iter().map(convert::delivery).collect(),
        }))
    }

    async fn get_delivery(
        &self,
        request: Request<proto::GetDeliveryRequest>,
    ) -> Result<Response<proto::GetDeliveryResponse>, Status> {
        let tenant = tenant(&request)?;
        let request = request.into_inner();
        let webhook = self.webhook(&tenant, &request.webhook_id).await?;
        validate::id("delivery", &request.delivery_id)?;
        let found = self.store.get_delivery(&tenant, &webhook.id, &request.delivery_id).await;
        let found = found.map_err(status::store)?;
        let detail = found.ok_or_else(|| status::not_found("delivery"))?;
        Ok(Response::new(proto::GetDeliveryResponse { delivery: Some(convert::detail(detail)) }))
    }

    async fn retry_delivery(
        &self,
        request: Request<proto::RetryDeliveryRequest>,
    ) -> Result<Response<proto::RetryDeliveryResponse>, Status> {
        let tenant = tenant(&request)?;
        let by = actor(&request)?;
        let request = request.into_inner();
        let webhook = self.webhook(&tenant, &request.webhook_id).await?;
        validate::id("delivery", &request.delivery_id)?;
        let retried = self.store.retry_delivery(&tenant, &webhook.id, &request.delivery_id, &by).await;
        let delivery = retried.map_err(status::retry)?;
        Ok(Response::new(proto::RetryDeliveryResponse {
            id: delivery.id,
            status: convert::status(delivery.status).into(),
            attempts: delivery.attempts,
            next_attempt_at: delivery.next_attempt_at.map(convert::timestamp),
        }))
    }

    type WatchDeliveriesStream = watch::Changes;

    async fn watch_deliveries(
        &self,
        request: Request<proto::WatchDeliveriesRequest>,
    ) -> Result<Response<watch::Changes>, Status> {
        let principal = principal(&request)?.clone();
        let tenant = principal.tenant.clone();
        let request = request.into_inner();
        let webhook_id = match request.webhook_id.as_str() {
            "" => None,
            id => Some(self.webhook(&tenant, id).await?.id),
        };
        if let Some(event_type) = &request.event {
            self.event_filter(event_type)?;
        }
        let status = validate::delivery_status(request.status)?;
        let filter = ChangeFilter { tenant, webhook_id, status, event_type: request.event };
        Ok(Response::new(watch::changes(self.clone(), principal, filter, request.resume_token).await?))
    }
}

fn accepted(published: &[Published]) -> proto::PublishEventsResponse {
    let one = |published: &Published| proto::PublishEventResponse {
        id: published.event_id.clone(),
        deliveries: i32::try_from(published.deliveries).unwrap_or(i32::MAX),
    };
    proto::PublishEventsResponse { events: published.iter().map(one).collect() }
}

/// The answer for the only event.
fn accepted_one(published: &[Published]) -> proto::PublishEventResponse {
    accepted(published).events.pop().unwrap_or_default()
}

/// A filter as parts of a token's purpose.
pub(super) fn filter_parts<'a>(
    webhook_id: &'a str,
    status: Option<DeliveryStatus>,
    event_type: Option<&'a str>,
) -> [&'a str; 3] {
    [webhook_id, status.map_or("", DeliveryStatus::as_str), event_type.unwrap_or_default()]
}
