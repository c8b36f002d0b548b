//! How much the engine delivers: `cargo bench --bench throughput [-- SECONDS]`, and for PostgreSQL as well
//! `SHORTKIT_BENCH_POSTGRES=postgres://… cargo bench --bench throughput`.
//!
//! The service runs in a process of its own with durable settings. This process publishes over gRPC, 500 bytes an event,
//! and receives. Everything is held against a bare loop of signed POSTs to the same receiver in the same run: machines
//! differ, the ratio hardly does. Prints a table for people and one JSON line for machines.

use std::{
    collections::HashMap,
    process::Stdio,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper_util::rt::{TokioExecutor, TokioIo};
use serde_json::{Value, json};
use shortkit_webhooks::{
    clock,
    grpc::proto::{
        CreateWebhookRequest, PublishEventRequest, delivery_service_client::DeliveryServiceClient,
        webhook_service_client::WebhookServiceClient,
    },
    webhook::{Secret, SigningKey, signature_headers},
};
use tokio::{
    io::{AsyncBufReadExt, BufReader},
    net::TcpListener,
    process::{Child, Command},
    task::JoinSet,
};
use tonic::{Request, transport::Channel};

/// How long each run measures when the command line names no time.
const DEFAULT_SECS: u64 = 5;
/// Not measured: connections are made, caches filled.
const WARM_UP: Duration = Duration::from_secs(1);
/// Publishers of the saturating runs, and POSTs under way in the bare loop.
const PUBLISHERS: usize = 32;
/// Events a second of the paced run.
const PACE: u32 = 50;

/// What the receiver has seen.
#[derive(Default)]
struct Seen {
    count: AtomicU64,
    measuring: AtomicBool,
    /// Nanoseconds from before the publish to the arrival.
    latencies: Mutex<Vec<u64>>,
}

/// Nanoseconds since the start of this process.
fn now_ns(start: Instant) -> u64 {
    u64::try_from(start.elapsed().as_nanos()).unwrap_or(u64::MAX)
}

async fn receiver(start: Instant) -> (String, Arc<Seen>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let url = format!("http://{}/", listener.local_addr().expect("an address"));
    let seen = Arc::new(Seen::default());
    let shared = Arc::clone(&seen);
    tokio::spawn(async move {
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
    });
    (url, seen)
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
fn data(start: Instant) -> String {
    let head = format!("{{\"at\":{},\"filler\":\"", now_ns(start));
    let filler = "x".repeat(500 - head.len() - 2);
    format!("{head}{filler}\"}}")
}

struct Service {
    child: Child,
    channel: Channel,
    key: String,
    _directory: tempfile::TempDir,
    started_in: Duration,
}

impl Service {
    async fn start(database_url: Option<&str>) -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        let started = clock::stopwatch();
        let mut command = Command::new(env!("CARGO_BIN_EXE_shortkit-webhooks"));
        command
            .args(["serve", "--dev", "--listen", "127.0.0.1:0", "--log", "warn", "--rate-limit", "off"])
            .current_dir(directory.path());
        if let Some(url) = database_url {
            command.args(["--database-url", url]);
        }
        let mut child = command.stdout(Stdio::piped()).kill_on_drop(true).spawn().expect("the service starts");
        let mut lines = BufReader::new(child.stdout.take().expect("piped")).lines();
        let (mut base, mut key, mut started_in) = (None, None, Duration::ZERO);
        while let Some(line) = lines.next_line().await.expect("the service prints") {
            if let Some(address) = line.strip_prefix("listening on ") {
                base = Some(address.to_owned());
                started_in = started.elapsed();
            }
            let rest = line.trim().strip_prefix("secret key");
            key = key.or(rest.and_then(|rest| rest.split_whitespace().next()).map(str::to_owned));
            if key.is_some() {
                break;
            }
        }
        let channel =
            Channel::from_shared(base.expect("an address")).expect("a URL").connect().await.expect("a connection");
        Self { child, channel, key: key.expect("a key"), _directory: directory, started_in }
    }

    fn authorized<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        let value = format!("Bearer {}", self.key).parse().expect("a header");
        request.metadata_mut().insert("authorization", value);
        request
    }

    async fn webhook(&self, url: &str) {
        let message =
            CreateWebhookRequest { url: url.to_owned(), events: vec!["content.ready".to_owned()], description: None };
        let mut client = WebhookServiceClient::new(self.channel.clone());
        client.create_webhook(self.authorized(message)).await.expect("a webhook");
    }

    async fn publish(&self, start: Instant) -> Duration {
        let message = PublishEventRequest { event: "content.ready".to_owned(), data: data(start) };
        let began = clock::stopwatch();
        let mut client = DeliveryServiceClient::new(self.channel.clone());
        client.publish_event(self.authorized(message)).await.expect("a publish");
        began.elapsed()
    }

    fn pid(&self) -> u32 {
        self.child.id().expect("it runs")
    }
}

/// Seconds of CPU that a process has used, with those of its children that it has waited for.
fn cpu_secs(pid: u32) -> f64 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let after = stat.rsplit(')').next().unwrap_or_default();
    let fields: Vec<f64> = after.split_whitespace().map(|field| field.parse().unwrap_or(0.0)).collect();
    // utime and stime, in hundredths of a second.
    fields.get(11..13).map_or(0.0, |times| times.iter().sum::<f64>() / 100.0)
}

/// The processes of the PostgreSQL that listens on the port of `url`.
fn postgres_pids(url: &str) -> Vec<u32> {
    let port = url.rsplit(':').next().and_then(|rest| rest.split('/').next()).unwrap_or_default();
    let processes = || std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let pid = |entry: &std::fs::DirEntry| entry.file_name().to_string_lossy().parse::<u32>().ok();
    let leader = processes().filter_map(|entry| pid(&entry)).find(|pid| {
        let line = std::fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        line.contains("postgres") && line.contains(&format!("port={port}"))
    });
    let Some(leader) = leader else { return Vec::new() };
    let parent = |pid: &u32| {
        let status = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        status.rsplit(')').next().and_then(|rest| rest.split_whitespace().nth(1)?.parse::<u32>().ok())
    };
    processes().filter_map(|entry| pid(&entry)).filter(|pid| *pid == leader || parent(pid) == Some(leader)).collect()
}

fn resident_mib(pid: u32) -> f64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap_or_default();
    line.trim().trim_end_matches(" kB").parse::<f64>().unwrap_or(0.0) / 1024.0
}

fn percentile_ms(sorted: &[u64], percent: usize) -> f64 {
    sorted.get(sorted.len().saturating_sub(1) * percent / 100).map_or(0.0, |ns| *ns as f64 / 1e6)
}

struct Measured {
    deliveries_per_sec: f64,
    publish: Vec<u64>,
    delivery: Vec<u64>,
    service_cpu_ms: f64,
    database_cpu_ms: f64,
    resident_mib: f64,
}

/// Publishes for `time` after the warm-up, as `publish` says, and measures what arrives.
async fn measure(
    service: &Arc<Service>,
    seen: &Seen,
    database: Option<&str>,
    time: Duration,
    pace: Option<u32>,
    start: Instant,
) -> Measured {
    let stop = Arc::new(AtomicBool::new(false));
    let mut publishers = JoinSet::new();
    for _ in 0..if pace.is_some() { 1 } else { PUBLISHERS } {
        let (service, stop) = (Arc::clone(service), Arc::clone(&stop));
        publishers.spawn(async move {
            let mut took = Vec::new();
            let mut ticks = pace.map(|pace| tokio::time::interval(Duration::from_secs(1) / pace));
            while !stop.load(Ordering::Relaxed) {
                if let Some(ticks) = &mut ticks {
                    ticks.tick().await;
                }
                took.push(u64::try_from(service.publish(start).await.as_nanos()).unwrap_or(u64::MAX));
            }
            took
        });
    }
    tokio::time::sleep(WARM_UP).await;
    let database_cpu = || database.map(postgres_pids).unwrap_or_default().into_iter().map(cpu_secs).sum::<f64>();
    let (before, cpu, db_cpu, began) =
        (seen.count.load(Ordering::Relaxed), cpu_secs(service.pid()), database_cpu(), clock::stopwatch());
    seen.measuring.store(true, Ordering::Relaxed);
    tokio::time::sleep(time).await;
    seen.measuring.store(false, Ordering::Relaxed);
    let count = (seen.count.load(Ordering::Relaxed) - before) as f64;
    let elapsed = began.elapsed().as_secs_f64();
    let (cpu, db_cpu) = (cpu_secs(service.pid()) - cpu, database_cpu() - db_cpu);
    let resident_mib = resident_mib(service.pid());
    stop.store(true, Ordering::Relaxed);
    let mut publish: Vec<u64> = publishers.join_all().await.concat();
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
        resident_mib,
    }
}

/// Signed POSTs, [`PUBLISHERS`] under way, with nothing else around them: how many a second.
async fn bare(url: &str, time: Duration, start: Instant) -> f64 {
    let client = reqwest::Client::builder().no_proxy().tcp_nodelay(true).build().expect("a client");
    let key = SigningKey::new(&Secret::from_random(&clock::random()));
    let stop = Arc::new(AtomicBool::new(false));
    let count = Arc::new(AtomicU64::new(0));
    let mut loops = JoinSet::new();
    for _ in 0..PUBLISHERS {
        let (client, key, stop, count, url) =
            (client.clone(), key.clone(), Arc::clone(&stop), Arc::clone(&count), url.to_owned());
        loops.spawn(async move {
            while !stop.load(Ordering::Relaxed) {
                let body = data(start);
                let now = clock::now();
                let (shortform, standard) =
                    signature_headers(std::slice::from_ref(&key), "del_1", now, body.as_bytes());
                let request = client.post(&url).header("x-shortform-signature", shortform);
                let answer = request.header("webhook-signature", standard).body(body).send().await.expect("an answer");
                answer.bytes().await.expect("a body");
                count.fetch_add(1, Ordering::Relaxed);
            }
        });
    }
    tokio::time::sleep(WARM_UP).await;
    let (before, began) = (count.load(Ordering::Relaxed), clock::stopwatch());
    tokio::time::sleep(time).await;
    let rate = (count.load(Ordering::Relaxed) - before) as f64 / began.elapsed().as_secs_f64();
    stop.store(true, Ordering::Relaxed);
    while loops.join_next().await.is_some() {}
    rate
}

#[tokio::main]
async fn main() {
    let secs = std::env::args().find_map(|argument| argument.parse().ok()).unwrap_or(DEFAULT_SECS);
    let time = Duration::from_secs(secs);
    let start = clock::stopwatch();
    let _ = rustls::crypto::ring::default_provider().install_default();
    let (url, seen) = receiver(start).await;
    let bare = bare(&url, time, start).await;
    println!("bare loop of signed POSTs: {bare:.0}/s");
    println!(
        "{:10} {:12} {:>10} {:>7} {:>9} {:>9} {:>9} {:>9} {:>9} {:>9} {:>6}",
        "database", "run", "deliv/s", "ratio", "pub p50", "pub p99", "del p50", "del p99", "cpu ms", "db ms", "MiB"
    );
    let mut results = Vec::new();
    let postgres = std::env::var("SHORTKIT_BENCH_POSTGRES").ok();
    for (database, url_of) in [("sqlite", None), ("postgres", postgres.as_deref())] {
        if database == "postgres" && url_of.is_none() {
            continue;
        }
        let service = Arc::new(Service::start(url_of).await);
        service.webhook(&url).await;
        for (run, fan_out, pace) in [("paced 50/s", 1, Some(PACE)), ("1 webhook", 1, None), ("fan-out 5", 5, None)] {
            for _ in 1..fan_out {
                service.webhook(&url).await;
            }
            let measured = measure(&service, &seen, url_of, time, pace, start).await;
            let row = row(&measured, bare);
            let value = |name: &str| row[name];
            println!(
                "{database:10} {run:12} {:10.0} {:7.3} {:9.2} {:9.2} {:9.2} {:9.2} {:9.3} {:9.3} {:6.0}",
                value("deliveries_per_sec"),
                value("ratio"),
                value("publish_p50_ms"),
                value("publish_p99_ms"),
                value("delivery_p50_ms"),
                value("delivery_p99_ms"),
                value("service_cpu_ms"),
                value("database_cpu_ms"),
                value("resident_mib"),
            );
            results.push(json!({ "database": database, "run": run, "figures": row }));
        }
        println!("{database:10} listening after {:.0} ms", service.started_in.as_secs_f64() * 1e3);
    }
    println!("{}", json!({ "bench": "throughput", "bare_per_sec": bare, "results": Value::from(results) }));
}

fn row(measured: &Measured, bare: f64) -> HashMap<&'static str, f64> {
    HashMap::from([
        ("deliveries_per_sec", measured.deliveries_per_sec),
        ("ratio", measured.deliveries_per_sec / bare),
        ("publish_p50_ms", percentile_ms(&measured.publish, 50)),
        ("publish_p99_ms", percentile_ms(&measured.publish, 99)),
        ("delivery_p50_ms", percentile_ms(&measured.delivery, 50)),
        ("delivery_p99_ms", percentile_ms(&measured.delivery, 99)),
        ("service_cpu_ms", measured.service_cpu_ms),
        ("database_cpu_ms", measured.database_cpu_ms),
        ("resident_mib", measured.resident_mib),
    ])
}
