//! How much the engine delivers: `cargo bench --bench throughput [-- SECONDS]`, and for PostgreSQL as well
//! `SHORTKIT_BENCH_POSTGRES=postgres://… cargo bench --bench throughput`.
//!
//! The service runs in a process of its own with durable settings. This process publishes over gRPC, 500 bytes an event,
//! and receives. Everything is held against a bare loop of signed POSTs to the same receiver in the same run: machines
//! differ, the ratio hardly does. Prints a table for people and one JSON line for machines.

mod support;

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use shortkit_webhooks::{
    clock,
    webhook::{Secret, SigningKey, signature_headers},
};
use tokio::task::JoinSet;

use self::support::{
    load::{EVENT, Measured, PUBLISHERS, Target, WARM_UP, data, measure, percentile_ms, receiver},
    service::Service,
};

/// How long each run measures when the command line names no time.
const DEFAULT_SECS: u64 = 5;
/// Events a second of the paced run.
const PACE: u32 = 50;

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
        let directory = tempfile::tempdir().expect("a directory");
        let service = Service::start(directory.path(), url_of, &["--log", "warn"]).await;
        let target = Arc::new(Target::connect(service).await);
        target.webhook(&url, EVENT).await;
        for (run, fan_out, pace) in [("paced 50/s", 1, Some(PACE)), ("1 webhook", 1, None), ("fan-out 5", 5, None)] {
            for _ in 1..fan_out {
                target.webhook(&url, EVENT).await;
            }
            let measured = measure(&target, &seen, url_of, time, pace, start).await;
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
        println!("{database:10} listening after {:.0} ms", target.service.started_in.as_secs_f64() * 1e3);
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
