//! Publishes to the service, 500 bytes an event, and receives what it sends.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper_util::rt::{TokioExecutor, TokioIo};
use prost_types::FieldMask;
use shortkit_webhooks::{
    clock,
    grpc::proto::{
        CreateWebhookRequest, ListWebhooksRequest, PublishEventRequest, PublishEventsRequest, UpdateWebhookRequest,
        WebhookStatus, WebhookUpdate, delivery_service_client::DeliveryServiceClient,
        webhook_service_client::WebhookServiceClient,
    },
};
use tokio::{net::TcpListener, task::JoinSet};
use tonic::{Request, transport::Channel};

use super::{
    server::Server,
    service::{Service, cpu_secs},
};

/// Not measured: connections are made, caches filled.
pub(crate) const WARM_UP: Duration = Duration::from_secs(1);
/// Publishers of the saturating runs.
pub(crate) const PUBLISHERS: usize = 32;
/// The event type of what is published.
pub(crate) const EVENT: &str = "content.ready";

/// What the receiver has seen.
#[derive(Default)]
pub(crate) struct Seen {
    count: AtomicU64,
    measuring: AtomicBool,
    /// Nanoseconds from before the publish to the arrival.
    latencies: Mutex<Vec<u64>>,
}

/// A service, and a connection to it.
pub(crate) struct Target {
    pub(crate) service: Service,
    channel: Channel,
}

/// What a run found; times in nanoseconds, sorted.
pub(crate) struct Measured {
    pub(crate) deliveries_per_sec: f64,
    pub(crate) publish: Vec<u64>,
    pub(crate) delivery: Vec<u64>,
    pub(crate) service_cpu_ms: f64,
    pub(crate) database_cpu_ms: f64,
    /// Of this process: who publishes, and the receiver.
    pub(crate) others_cpu_ms: f64,
    pub(crate) resident_mib: f64,
}

/// A receiver that takes everything, on a thread of its own, and its URL.
pub(crate) fn receiver(start: Instant) -> (String, Arc<Seen>) {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    listener.set_nonblocking(true).expect("a socket");
    let url = format!("http://{}/", listener.local_addr().expect("an address"));
    let seen = Arc::new(Seen::default());
    let shared = Arc::clone(&seen);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let receiving = async move {
        let listener = TcpListener::from_std(listener).expect("a listener");
        while let Ok((stream, _)) = listener.accept().await {
            let seen = Arc::clone(&shared);
            let _ = stream.set_nodelay(true);
            tokio::spawn(async move {
                let service = hyper::service::service_fn(move |request: http::Request<hyper::body::Incoming>| {
                    let seen = Arc::clone(&seen);
                    async move {
                        let body = request.into_body().collect().await?.to_bytes();
                        seen.count.fetch_add(1, Ordering::Relaxed);
                        if seen.measuring.load(Ordering::Relaxed) {
                            note(&seen, &body, start);
                        }
                        Ok::<_, hyper::Error>(http::Response::new(Full::new(Bytes::from_static(b"OK"))))
                    }
                });
                let connection = hyper_util::server::conn::auto::Builder::new(TokioExecutor::new());
                let _ = connection.serve_connection(TokioIo::new(stream), service).await;
            });
        }
    };
    std::thread::spawn(move || runtime.block_on(receiving));
    (url, seen)
}

/// Nanoseconds since the start of this process.
fn now_ns(start: Instant) -> u64 {
    u64::try_from(start.elapsed().as_nanos()).unwrap_or(u64::MAX)
}

/// Notes how long ago the event was published: its data begins with `{"at":`.
fn note(seen: &Seen, body: &[u8], start: Instant) {
    const MARK: &[u8] = b"{\"at\":";
    let Some(place) = body.windows(MARK.len()).position(|window| window == MARK) else { return };
    let digits = body[place + MARK.len()..].iter().take_while(|byte| byte.is_ascii_digit());
    let at = digits.fold(0_u64, |number, digit| number.wrapping_mul(10).wrapping_add(u64::from(digit - b'0')));
    seen.latencies.lock().expect("no panic").push(now_ns(start).saturating_sub(at));
}

/// 500 bytes of data.
pub(crate) fn data(start: Instant) -> String {
    let head = format!("{{\"at\":{},\"filler\":\"", now_ns(start));
    let filler = "x".repeat(500 - head.len() - 2);
    format!("{head}{filler}\"}}")
}

impl Target {
    pub(crate) async fn connect(service: Service) -> Self {
        let endpoint = Channel::from_shared(service.base.clone()).expect("a URL");
        Self { channel: endpoint.connect().await.expect("a connection"), service }
    }

    fn authorized<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        let value = format!("Bearer {}", self.service.secret_key).parse().expect("a header");
        request.metadata_mut().insert("authorization", value);
        request
    }

    /// Asks for something; how long after the start of the service it answered.
    pub(crate) async fn first_answer(&self) -> Duration {
        let mut client = WebhookServiceClient::new(self.channel.clone());
        client.list_webhooks(self.authorized(ListWebhooksRequest::default())).await.expect("a list");
        self.service.started.elapsed()
    }

    /// Registers a webhook for events of a type; its id.
    pub(crate) async fn webhook(&self, url: &str, event: &str) -> String {
        let message = CreateWebhookRequest { url: url.to_owned(), events: vec![event.to_owned()], description: None };
        let mut client = WebhookServiceClient::new(self.channel.clone());
        let answer = client.create_webhook(self.authorized(message)).await.expect("a webhook");
        answer.into_inner().webhook.expect("a webhook").id
    }

    /// Leaves a webhook without new deliveries.
    pub(crate) async fn disable(&self, id: String) {
        let webhook = WebhookUpdate { status: Some(WebhookStatus::Disabled.into()), ..WebhookUpdate::default() };
        let update_mask = FieldMask { paths: vec!["status".to_owned()] };
        let message = UpdateWebhookRequest { id, webhook: Some(webhook), update_mask: Some(update_mask) };
        let mut client = WebhookServiceClient::new(self.channel.clone());
        client.update_webhook(self.authorized(message)).await.expect("it is disabled");
    }

    /// Publishes so many events in one call.
    async fn publish(&self, events: usize, start: Instant) -> Duration {
        let event = || PublishEventRequest { event: EVENT.to_owned(), data: data(start) };
        let began = clock::stopwatch();
        let mut client = DeliveryServiceClient::new(self.channel.clone());
        if events == 1 {
            client.publish_event(self.authorized(event())).await.expect("a publish");
        } else {
            let events = (0..events).map(|_| event()).collect();
            client.publish_events(self.authorized(PublishEventsRequest { events })).await.expect("a publish");
        }
        began.elapsed()
    }
}

/// Milliseconds below which so many percent of sorted times are.
pub(crate) fn percentile_ms(sorted: &[u64], percent: usize) -> f64 {
    sorted.get(sorted.len().saturating_sub(1) * percent / 100).map_or(0.0, |ns| *ns as f64 / 1e6)
}

/// How events are published.
#[derive(Clone, Copy)]
pub(crate) enum Load {
    /// So many a second.
    Paced(u32),
    /// As many as go, by [`PUBLISHERS`], with so many in each call.
    Full(usize),
}

/// Publishes for `time` after the warm-up and measures what arrives.
pub(crate) async fn measure(
    target: &Arc<Target>,
    seen: &Arc<Seen>,
    server: Option<&Server>,
    time: Duration,
    load: Load,
    start: Instant,
) -> Measured {
    let (publishers, pace, events) = match load {
        Load::Paced(pace) => (1, Some(pace), 1),
        Load::Full(events) => (PUBLISHERS, None, events),
    };
    let stop = Arc::new(AtomicBool::new(false));
    let mut publishing = JoinSet::new();
    for _ in 0..publishers {
        let (target, stop, seen) = (Arc::clone(target), Arc::clone(&stop), Arc::clone(seen));
        publishing.spawn(async move {
            let mut took = Vec::new();
            let mut ticks = pace.map(|pace| tokio::time::interval(Duration::from_secs(1) / pace));
            while !stop.load(Ordering::Relaxed) {
                if let Some(ticks) = &mut ticks {
                    ticks.tick().await;
                }
                let one = target.publish(events, start).await;
                if seen.measuring.load(Ordering::Relaxed) {
                    took.push(u64::try_from(one.as_nanos()).unwrap_or(u64::MAX));
                }
            }
            took
        });
    }
    tokio::time::sleep(WARM_UP).await;
    let service = &target.service;
    let database_cpu = || server.map_or(0.0, Server::cpu_secs);
    let others_cpu = || cpu_secs(std::process::id());
    let (before, cpu, db_cpu, others, began) =
        (seen.count.load(Ordering::Relaxed), service.cpu_secs(), database_cpu(), others_cpu(), clock::stopwatch());
    seen.measuring.store(true, Ordering::Relaxed);
    tokio::time::sleep(time).await;
    seen.measuring.store(false, Ordering::Relaxed);
    let count = (seen.count.load(Ordering::Relaxed) - before) as f64;
    let elapsed = began.elapsed().as_secs_f64();
    // This process first: it looks for those of the database.
    let (others, cpu, db_cpu) = (others_cpu() - others, service.cpu_secs() - cpu, database_cpu() - db_cpu);
    let resident_mib = service.resident_mib();
    stop.store(true, Ordering::Relaxed);
    let mut publish: Vec<u64> = publishing.join_all().await.concat();
    publish.sort_unstable();
    let mut delivery = std::mem::take(&mut *seen.latencies.lock().expect("no panic"));
    delivery.sort_unstable();
    // What is still on its way must not disturb the next run.
    let mut last = 0;
    while last != seen.count.load(Ordering::Relaxed) {
        last = seen.count.load(Ordering::Relaxed);
        tokio::time::sleep(Duration::from_millis(300)).await;
    }
    Measured {
        deliveries_per_sec: count / elapsed,
        publish,
        delivery,
        service_cpu_ms: cpu * 1e3 / count,
        database_cpu_ms: db_cpu * 1e3 / count,
        others_cpu_ms: others * 1e3 / count,
        resident_mib,
    }
}
