//! How long reading takes when much is stored: `cargo bench --bench reads [-- COUNT]`.
//!
//! Starts the service on a SQLite file of its own, publishes COUNT events (100,000 when not given) to a receiver that
//! takes two of three, and then reads over REST: the same calls for the full webhook and for an empty one, so that the
//! ratio says what the history costs.

mod support;

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use axum::{Router, extract::State};
use futures_util::{StreamExt, stream};
use http::StatusCode;
use serde_json::{Value, json};
use shortkit_webhooks::clock;
use tokio::net::TcpListener;

use self::support::service::Service;

/// Deliveries when the command line names no number.
const DEFAULT_COUNT: usize = 100_000;
/// Calls of each kind.
const CALLS: usize = 200;
/// Publishes under way at a time.
const PUBLISHERS: usize = 64;

/// The service, and a caller of it over REST.
struct Caller {
    service: Service,
    http: reqwest::Client,
}

impl Caller {
    async fn start(directory: &std::path::Path) -> Self {
        let service = Service::start(directory, None, &["--log", "warn", "--retry-schedule", "0s"]).await;
        let _ = rustls::crypto::ring::default_provider().install_default();
        let http = reqwest::Client::builder().no_proxy().tcp_nodelay(true).build().expect("a client");
        Self { service, http }
    }

    async fn get(&self, path: &str) -> Value {
        let request = self.http.get(format!("{}{path}", self.service.base)).bearer_auth(&self.service.secret_key);
        let text = request.send().await.expect("an answer").error_for_status().expect("a success").text().await;
        serde_json::from_str(&text.expect("a body")).expect("JSON")
    }

    async fn post(&self, path: &str, body: String) -> Value {
        let request =
            self.http.post(format!("{}{path}", self.service.base)).bearer_auth(&self.service.secret_key).body(body);
        let request = request.header("content-type", "application/json");
        let text = request.send().await.expect("an answer").error_for_status().expect("a success").text().await;
        serde_json::from_str(&text.expect("a body")).expect("JSON")
    }

    async fn webhook(&self, url: &str, event: &str) -> String {
        let created = self.post("/v1/webhooks", json!({ "url": url, "events": [event] }).to_string()).await;
        created["data"]["id"].as_str().expect("an id").to_owned()
    }

    /// The median and the 99th percentile of [`CALLS`] calls.
    async fn time(&self, path: &str) -> (Duration, Duration) {
        let mut times = Vec::with_capacity(CALLS);
        for _ in 0..CALLS {
            let started = clock::stopwatch();
            self.get(path).await;
            times.push(started.elapsed());
        }
        times.sort();
        (times[CALLS / 2], times[CALLS * 99 / 100])
    }
}

/// Takes two of three requests.
async fn receiver() -> String {
    async fn answer(State(count): State<Arc<AtomicUsize>>) -> StatusCode {
        if count.fetch_add(1, Ordering::Relaxed) % 3 == 2 { StatusCode::BAD_GATEWAY } else { StatusCode::OK }
    }
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let url = format!("http://{}/", listener.local_addr().expect("an address"));
    let app = Router::new().fallback(answer).with_state(Arc::new(AtomicUsize::new(0)));
    tokio::spawn(async move { axum::serve(listener, app).await });
    url
}

#[tokio::main]
async fn main() {
    let count = std::env::args().find_map(|argument| argument.parse().ok()).unwrap_or(DEFAULT_COUNT);
    let directory = tempfile::tempdir().expect("a directory");
    let caller = Caller::start(directory.path()).await;
    let url = receiver().await;
    let full = caller.webhook(&url, "content.ready").await;
    let empty = caller.webhook(&url, "export.ready").await;

    let body = r#"{"event":"content.ready","data":{"contentId":"cnt_abc123","title":"My Video","duration":45.2}}"#;
    let mut published =
        stream::iter(0..count).map(|_| caller.post("/v1/events", body.to_owned())).buffer_unordered(PUBLISHERS);
    let mut done = 0;
    while published.next().await.is_some() {
        done += 1;
        if done % 10_000 == 0 {
            eprintln!("{done} of {count} published");
        }
    }
    drop(published);
    loop {
        let stats = caller.get(&format!("/v1/webhooks/{full}")).await["data"]["stats"].clone();
        let ended =
            stats["successfulDeliveries"].as_u64().unwrap_or(0) + stats["failedDeliveries"].as_u64().unwrap_or(0);
        if ended >= count as u64 {
            eprintln!("{stats}");
            break;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }

    let deep = {
        let mut path = format!("/v1/webhooks/{full}/deliveries?limit=100");
        for _ in 0..50 {
            let page = caller.get(&path).await;
            let cursor = page["meta"]["nextCursor"].as_str().expect("more pages").to_owned();
            path = format!("/v1/webhooks/{full}/deliveries?limit=100&cursor={cursor}");
        }
        path
    };
    println!("{:34} {:>10} {:>10} {:>10} {:>7}", "call", "p50 ms", "p99 ms", "empty p50", "ratio");
    let mut results = Vec::new();
    for (name, path) in [
        ("GetWebhook", ""),
        ("ListDeliveries", "/deliveries"),
        ("ListDeliveries limit=100", "/deliveries?limit=100"),
        ("ListDeliveries status=failed", "/deliveries?status=failed"),
        ("ListDeliveries status, event", "/deliveries?status=success&event=content.ready"),
        ("ListDeliveries limit=100, page 51", "deep"),
    ] {
        let (of_full, of_empty) = match path {
            "deep" => (deep.clone(), format!("/v1/webhooks/{empty}/deliveries?limit=100")),
            _ => (format!("/v1/webhooks/{full}{path}"), format!("/v1/webhooks/{empty}{path}")),
        };
        let (p50, p99) = caller.time(&of_full).await;
        let (base, _) = caller.time(&of_empty).await;
        let ms = |time: Duration| time.as_secs_f64() * 1e3;
        println!("{name:34} {:10.2} {:10.2} {:10.2} {:7.2}", ms(p50), ms(p99), ms(base), ms(p50) / ms(base));
        results.push(json!({ "call": name, "p50_ms": ms(p50), "p99_ms": ms(p99), "empty_p50_ms": ms(base) }));
    }
    println!("{}", json!({ "bench": "reads", "deliveries": count, "results": results }));
}
