//! Callers of the service.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use shortkit_webhooks::grpc::proto::{
    CreateWebhookRequest, PublishEventRequest, PublishEventsRequest, UpdateWebhookRequest, WatchDeliveriesRequest,
    WebhookStatus, WebhookUpdate, delivery_service_client::DeliveryServiceClient,
    webhook_service_client::WebhookServiceClient,
};
use tokio::task::JoinSet;
use tonic::{Request, Status, transport::Channel};

use super::receiver::now;

/// Before a publish that was refused is tried again …
const REFUSED: Duration = Duration::from_millis(50);
/// … and for how long.
const BUSY: Duration = Duration::from_secs(60);

/// Calls under way of somebody who registers many webhooks.
const REGISTERED_TOGETHER: usize = 32;
/// Calls under way of somebody who publishes many events.
const TOGETHER: usize = 256;
/// Connections that callers share; each takes a hundred calls at a time.
const CONNECTIONS: usize = 8;

/// Somebody who calls in the name of an organisation.
#[derive(Clone)]
pub(crate) struct Caller {
    channels: Vec<Channel>,
    key: String,
    organization: String,
}

impl Caller {
    /// A caller with connections of its own.
    pub(crate) async fn connect(base: &str, key: &str, organization: &str) -> Self {
        let mut channels = Vec::new();
        for _ in 0..CONNECTIONS {
            let endpoint = Channel::from_shared(base.to_owned()).expect("a URL");
            channels.push(endpoint.connect().await.expect("a connection"));
        }
        Self { channels, key: key.to_owned(), organization: organization.to_owned() }
    }

    /// Registers a webhook; its id.
    pub(crate) async fn webhook(&self, url: String, event: &str) -> String {
        let message = CreateWebhookRequest { url, events: vec![event.to_owned()], description: None };
        let mut client = WebhookServiceClient::new(self.channels[0].clone());
        let created = client.create_webhook(self.signed(message)).await.expect("a webhook");
        created.into_inner().webhook.expect("a webhook").id
    }

    /// Changes the description of a webhook.
    pub(crate) async fn describe(&self, id: String, description: String) {
        self.update(id, "description", WebhookUpdate { description: Some(description), ..Default::default() }).await;
    }

    /// Has nothing sent to a webhook any more.
    pub(crate) async fn disable(&self, id: String) {
        let status = Some(WebhookStatus::Disabled.into());
        self.update(id, "status", WebhookUpdate { status, ..Default::default() }).await;
    }

    async fn update(&self, id: String, field: &str, webhook: WebhookUpdate) {
        let update_mask = Some(prost_types::FieldMask { paths: vec![field.to_owned()] });
        let message = UpdateWebhookRequest { id, webhook: Some(webhook), update_mask };
        let mut client = WebhookServiceClient::new(self.channels[0].clone());
        client.update_webhook(self.signed(message)).await.expect("it is changed");
    }

    /// Opens live streams, and reads them for ever.
    pub(crate) async fn watch(&self, streams: usize) {
        for number in 0..streams {
            let mut client = DeliveryServiceClient::new(self.channels[number % CONNECTIONS].clone());
            let opened = client.watch_deliveries(self.signed(WatchDeliveriesRequest::default())).await;
            let mut changes = opened.expect("a stream").into_inner();
            tokio::spawn(async move { while let Ok(Some(_)) = changes.message().await {} });
        }
    }

    /// Registers `count` webhooks, many at a time.
    pub(crate) async fn webhooks(&self, count: usize, url: String, event: &'static str) {
        let mut calls = JoinSet::new();
        for number in 0..count {
            if calls.len() >= REGISTERED_TOGETHER {
                calls.join_next().await.expect("there are some").expect("a webhook");
            }
            if number > 0 && number % 10_000 == 0 {
                eprintln!("{number} of {count} webhooks registered");
            }
            let (caller, url) = (self.clone(), url.clone());
            calls.spawn(async move { caller.webhook(url, event).await });
        }
        calls.join_all().await;
    }

    /// Publishes, over the connection that is `number`'s turn.
    pub(crate) async fn publish(&self, number: usize, event: &str, data: String) -> Result<(), Status> {
        let message = PublishEventRequest { event: event.to_owned(), data };
        let mut client = DeliveryServiceClient::new(self.channels[number % CONNECTIONS].clone());
        client.publish_event(self.signed(message)).await.map(drop)
    }

    /// Publishes so many events together.
    async fn publish_together(&self, number: usize, event: &str, data: String, together: usize) -> Result<(), Status> {
        let event = PublishEventRequest { event: event.to_owned(), data };
        let message = PublishEventsRequest { events: vec![event; together] };
        let mut client = DeliveryServiceClient::new(self.channels[number % CONNECTIONS].clone());
        client.publish_events(self.signed(message)).await.map(drop)
    }

    /// Publishes until it is accepted, so many together: the service may be busy for a moment, and says so, but not for
    /// longer.
    pub(crate) async fn publish_surely(&self, number: usize, event: &str, data: String, together: usize) {
        let began = now();
        loop {
            let accepted = match together {
                1 => self.publish(number, event, data.clone()).await,
                _ => self.publish_together(number, event, data.clone(), together).await,
            };
            let Err(refused) = accepted else { return };
            assert!(began.elapsed() < BUSY, "the service refuses: {refused}");
            tokio::time::sleep(REFUSED).await;
        }
    }

    /// Makes `count` calls with so many events each, many at a time, or as many as go `until` then; how many.
    pub(crate) async fn publish_all(
        &self,
        count: usize,
        event: &'static str,
        together: usize,
        until: Arc<AtomicBool>,
    ) -> usize {
        let next = Arc::new(AtomicUsize::new(0));
        let mut loops = JoinSet::new();
        for number in 0..TOGETHER.div_ceil(together).max(CONNECTIONS) {
            let (caller, next, until) = (self.clone(), Arc::clone(&next), Arc::clone(&until));
            loops.spawn(async move {
                while !until.load(Ordering::Relaxed) && next.fetch_add(1, Ordering::Relaxed) < count {
                    caller
                        .publish_surely(number, event, format!("{{\"filler\":\"{}\"}}", "x".repeat(450)), together)
                        .await;
                }
            });
        }
        while loops.join_next().await.is_some() {}
        next.load(Ordering::Relaxed).min(count)
    }

    fn signed<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        let metadata = request.metadata_mut();
        metadata.insert("authorization", format!("Bearer {}", self.key).parse().expect("a header"));
        metadata.insert("x-shortkit-organization", self.organization.parse().expect("a header"));
        request
    }
}
