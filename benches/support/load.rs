//! Publishes to the service, 500 bytes an event, and receives what it sends.

use std::{
    iter,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
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
use tokio::{net::TcpListener, sync::mpsc, task::JoinSet};
use tonic::{Request, transport::Channel};

use super::{
    server::Server,
    service::{Service, cpu_secs},
};

/// Not measured: connections are made, caches filled.
pub(crate) const WARM_UP: Duration = Duration::from_secs(1);
/// Publishers of the saturating runs, for each node.
pub(crate) const PUBLISHERS: usize = 32;
/// The event type of what is published.
pub(crate) const EVENT: &str = "content.ready";

/// In whose name a call is made: of the organisation of the secret key, or of one of many, by its number.
pub(crate) type Tenant = Option<usize>;

/// What the receiver has seen.
#[derive(Default)]
pub(crate) struct Seen {
    count: AtomicU64,
    measuring: AtomicBool,
    /// Nanoseconds from when the publish was due to the arrival.
    latencies: Mutex<Vec<u64>>,
}

/// A node, a connection to it, and the others.
pub(crate) struct Target {
    pub(crate) service: Service,
    channel: Channel,
    /// Further nodes on the same database. Calls that publish go to all in turn, as through a load balancer.
    pub(crate) others: Vec<Self>,
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
    /// Of the node that has most.
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

fn nanoseconds(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

/// Notes how long ago the event was published: its data begins with `{"at":`.
fn note(seen: &Seen, body: &[u8], start: Instant) {
    const MARK: &[u8] = b"{\"at\":";
    let Some(place) = body.windows(MARK.len()).position(|window| window == MARK) else { return };
    let digits = body[place + MARK.len()..].iter().take_while(|byte| byte.is_ascii_digit());
    let at = digits.fold(0_u64, |number, digit| number.wrapping_mul(10).wrapping_add(u64::from(digit - b'0')));
    seen.latencies.lock().expect("no panic").push(nanoseconds(start.elapsed()).saturating_sub(at));
}

/// 500 bytes of data, published at `at`.
pub(crate) fn data(at: Instant, start: Instant) -> String {
    let head = format!("{{\"at\":{},\"filler\":\"", nanoseconds(at.duration_since(start)));
    let filler = "x".repeat(500 - head.len() - 2);
    format!("{head}{filler}\"}}")
}

impl Target {
    pub(crate) async fn connect(service: Service) -> Self {
        let endpoint = Channel::from_shared(service.base.clone()).expect("a URL");
        Self { channel: endpoint.connect().await.expect("a connection"), service, others: Vec::new() }
    }

    fn nodes(&self) -> impl Iterator<Item = &Self> {
        iter::once(self).chain(&self.others)
    }

    /// Seconds of CPU that all nodes have used.
    fn cpu_secs(&self) -> f64 {
        self.nodes().map(|node| node.service.cpu_secs()).sum()
    }

    fn authorized<T>(&self, tenant: Tenant, message: T) -> Request<T> {
        let mut request = Request::new(message);
        let metadata = request.metadata_mut();
        let key = if tenant.is_some() { &self.service.service_key } else { &self.service.secret_key };
        metadata.insert("authorization", format!("Bearer {key}").parse().expect("a header"));
        if let Some(number) = tenant {
            metadata.insert("x-shortkit-organization", format!("tenant{number}").parse().expect("a header"));
        }
        request
    }

    /// Asks for something; how long after the start of the service it answered.
    pub(crate) async fn first_answer(&self) -> Duration {
        let mut client = WebhookServiceClient::new(self.channel.clone());
        client.list_webhooks(self.authorized(None, ListWebhooksRequest::default())).await.expect("a list");
        self.service.started.elapsed()
    }

    /// Registers a webhook for events of a type; its id.
    pub(crate) async fn webhook(&self, tenant: Tenant, url: &str, event: &str) -> String {
        let message = CreateWebhookRequest { url: url.to_owned(), events: vec![event.to_owned()], description: None };
        let mut client = WebhookServiceClient::new(self.channel.clone());
        let answer = client.create_webhook(self.authorized(tenant, message)).await.expect("a webhook");
        answer.into_inner().webhook.expect("a webhook").id
    }

    /// Leaves a webhook without new deliveries.
    pub(crate) async fn disable(&self, tenant: Tenant, id: String) {
        let webhook = WebhookUpdate { status: Some(WebhookStatus::Disabled.into()), ..WebhookUpdate::default() };
        let update_mask = FieldMask { paths: vec!["status".to_owned()] };
        let message = UpdateWebhookRequest { id, webhook: Some(webhook), update_mask: Some(update_mask) };
        let mut client = WebhookServiceClient::new(self.channel.clone());
        client.update_webhook(self.authorized(tenant, message)).await.expect("it is disabled");
    }

    /// Makes a call, by its number, that publishes so many events; how long after `due` it is answered.
    async fn publish(&self, call: usize, tenant: Tenant, events: usize, due: Instant, start: Instant) -> Duration {
        let event = || PublishEventRequest { event: EVENT.to_owned(), data: data(due, start) };
        let node = self.nodes().nth(call % (1 + self.others.len())).expect("one of the nodes");
        let mut client = DeliveryServiceClient::new(node.channel.clone());
        if events == 1 {
            client.publish_event(self.authorized(tenant, event())).await.expect("a publish");
        } else {
            let events = (0..events).map(|_| event()).collect();
            let message = PublishEventsRequest { events };
            client.publish_events(self.authorized(tenant, message)).await.expect("a publish");
        }
        due.elapsed()
    }
}

/// When to publish, so many times a second, also when nobody was there to take the last ones. From a thread that sleeps:
/// the timers of the runtime are late by up to two milliseconds, which would count as the service's.
fn ticks(pace: u32) -> mpsc::Receiver<Instant> {
    let (send, ticks) = mpsc::channel(1);
    std::thread::spawn(move || {
        let mut due = clock::stopwatch();
        while send.blocking_send(due).is_ok() {
            due += Duration::from_secs(1) / pace;
            std::thread::sleep(due.saturating_duration_since(clock::stopwatch()));
        }
    });
    ticks
}

/// Milliseconds below which so many percent of sorted times are.
pub(crate) fn percentile_ms(sorted: &[u64], percent: usize) -> f64 {
    sorted.get(sorted.len().saturating_sub(1) * percent / 100).map_or(0.0, |ns| *ns as f64 / 1e6)
}

/// How events are published.
#[derive(Clone, Copy)]
pub(crate) enum Load {
    /// So many a second, by one publisher. Each is timed from when it was due: one that starts late, since the one before
    /// took long, is late, and would otherwise hide how long that is (coordinated omission).
    Paced(u32),
    /// As many as go, by [`PUBLISHERS`] for each node, with so many in each call.
    Full(usize),
    /// The same with one in each call, in the name of so many organisations in turn.
    Tenants(usize),
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
    let (publishers, pace, events, tenants) = match load {
        Load::Paced(pace) => (1, Some(pace), 1, None),
        Load::Full(events) => (PUBLISHERS * target.nodes().count(), None, events, None),
        Load::Tenants(tenants) => (PUBLISHERS * target.nodes().count(), None, 1, Some(tenants)),
    };
    let turn = Arc::new(AtomicUsize::new(0));
    let stop = Arc::new(AtomicBool::new(false));
    let mut publishing = JoinSet::new();
    for _ in 0..publishers {
        let (target, stop, seen, turn) = (Arc::clone(target), Arc::clone(&stop), Arc::clone(seen), Arc::clone(&turn));
        publishing.spawn(async move {
            let mut took = Vec::new();
            let mut ticks = pace.map(ticks);
            while !stop.load(Ordering::Relaxed) {
                let due = match &mut ticks {
                    Some(ticks) => ticks.recv().await.expect("it ticks on"),
                    None => clock::stopwatch(),
                };
                let call = turn.fetch_add(1, Ordering::Relaxed);
                let one = target.publish(call, tenants.map(|tenants| call % tenants), events, due, start).await;
                if seen.measuring.load(Ordering::Relaxed) {
                    took.push(nanoseconds(one));
                }
            }
            took
        });
    }
    tokio::time::sleep(WARM_UP).await;
    let database_cpu = || server.map_or(0.0, Server::cpu_secs);
    let others_cpu = || cpu_secs(std::process::id());
    let (before, cpu, db_cpu, others, began) =
        (seen.count.load(Ordering::Relaxed), target.cpu_secs(), database_cpu(), others_cpu(), clock::stopwatch());
    seen.measuring.store(true, Ordering::Relaxed);
    tokio::time::sleep(time).await;
    seen.measuring.store(false, Ordering::Relaxed);
    let count = (seen.count.load(Ordering::Relaxed) - before) as f64;
    let elapsed = began.elapsed().as_secs_f64();
    // This process first: it looks for those of the database.
    let (others, cpu, db_cpu) = (others_cpu() - others, target.cpu_secs() - cpu, database_cpu() - db_cpu);
    let resident_mib = target.nodes().map(|node| node.service.resident_mib()).fold(0.0, f64::max);
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
