//! Whether a delivery costs the same however many are stored: `cargo bench --bench flat [-- COUNT [SECONDS]] [postgres]`,
//! on PostgreSQL where that is asked for: on one of our own, with durable settings, which is gone at the end, or on the one
//! that `SHORTKIT_BENCH_POSTGRES=postgres://…` names, beside whose database it makes two and drops them.
//!
//! Fills a store with COUNT finished deliveries (10,000,000 when not given, five weeks old, a twentieth of them failed, over
//! a hundred webhooks), and holds the service on it against the service on an empty store, in turns, each for SECONDS (5)
//! of as many publishes as go and as long of 50 a second. Then the same while retention removes what was filled in. What
//! counts is the ratio of the medians. Prints a table for people and one JSON line for machines.

mod store;
#[path = "../support/mod.rs"]
mod support;

use std::{
    process::ExitCode,
    sync::Arc,
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use shortkit_webhooks::clock;

use self::{
    store::{Store, WEBHOOKS},
    support::{
        load::{EVENT, Load, Seen, Target, measure, percentile_ms, receiver},
        server::Server,
        service::Service,
        told_to_end,
    },
};

const DEFAULT_COUNT: usize = 10_000_000;
/// How long each run measures when the command line names no time.
const DEFAULT_SECS: u64 = 5;
/// Turns of each store; the median counts.
const TURNS: usize = 5;
/// Events a second of the paced runs.
const PACE: u32 = 50;
/// What a turn finds: of the first, more is better; of the others, which are those of the paced runs, less.
const FIGURES: [&str; 5] =
    ["deliveries_per_sec", "publish_p50_ms", "publish_p99_ms", "delivery_p50_ms", "delivery_p99_ms"];

/// What every turn needs.
struct Bench {
    server: Option<Server>,
    seen: Arc<Seen>,
    time: Duration,
    start: Instant,
}

impl Bench {
    /// The figures of one turn, of a service that was started for it.
    async fn turn(&self, store: &Store, arguments: &[&str]) -> [f64; FIGURES.len()] {
        let arguments = [&["--log", "warn"], arguments].concat();
        let server = self.server.as_ref();
        let service = Service::start(store.directory.path(), store.database_url.as_deref(), &arguments).await;
        let target = Arc::new(Target::connect(service).await);
        let full = measure(&target, &self.seen, server, self.time, Load::Full(1), self.start).await;
        let paced = measure(&target, &self.seen, server, self.time, Load::Paced(PACE), self.start).await;
        let target = Arc::into_inner(target).expect("nobody else publishes");
        target.service.stop().await;
        let of = |times: &[u64], percent| percentile_ms(times, percent);
        [
            full.deliveries_per_sec,
            of(&paced.publish, 50),
            of(&paced.publish, 99),
            of(&paced.delivery, 50),
            of(&paced.delivery, 99),
        ]
    }

    /// Both stores in turns: the medians of each figure, and the ratios.
    async fn compare(&self, run: &str, empty: &Store, filled: &Store, arguments: &[&str]) -> Value {
        let mut found: [Vec<[f64; FIGURES.len()]>; 2] = [Vec::new(), Vec::new()];
        for _ in 0..TURNS {
            found[0].push(self.turn(empty, &[]).await);
            found[1].push(self.turn(filled, arguments).await);
        }
        let mut results = serde_json::Map::new();
        for (index, figure) in FIGURES.into_iter().enumerate() {
            let [empty, filled] = found.each_ref().map(|turns| {
                let mut values: Vec<f64> = turns.iter().map(|turn| turn[index]).collect();
                values.sort_by(f64::total_cmp);
                values[values.len() / 2]
            });
            let ratio = filled / empty;
            println!("{run:9} {figure:19} {empty:10.2} {filled:10.2} {ratio:7.3}");
            results.insert(figure.to_owned(), json!({ "empty": empty, "filled": filled, "ratio": ratio }));
        }
        Value::from(results)
    }
}

/// A store whose webhooks are there; the first gets what is published.
async fn prepare(server: Option<&Server>, url: &str) -> Store {
    let store = Store::new(server).await;
    let service = Service::start(store.directory.path(), store.database_url.as_deref(), &["--log", "warn"]).await;
    let target = Target::connect(service).await;
    for number in 0..WEBHOOKS {
        target.webhook(None, url, if number == 0 { EVENT } else { "export.ready" }).await;
    }
    target.service.stop().await;
    store
}

#[tokio::main]
async fn main() -> ExitCode {
    let server = match Server::if_asked().await {
        Ok(server) => server,
        Err(error) => {
            eprintln!("{error}");
            return ExitCode::from(2);
        }
    };
    tokio::select! {
        () = run(server) => ExitCode::SUCCESS,
        () = told_to_end() => ExitCode::from(130),
    }
}

async fn run(server: Option<Server>) {
    let mut numbers = std::env::args().filter_map(|argument| argument.parse::<usize>().ok());
    let count = numbers.next().unwrap_or(DEFAULT_COUNT);
    let time = Duration::from_secs(numbers.next().map_or(DEFAULT_SECS, |secs| secs as u64));
    let start = clock::stopwatch();
    let _ = rustls::crypto::ring::default_provider().install_default();
    let (url, seen) = receiver(start);
    let bench = Bench { server, seen, time, start };
    let server = bench.server.as_ref();
    let (empty, filled) = (prepare(server, &url).await, prepare(server, &url).await);

    let began = clock::stopwatch();
    filled.fill(count).await;
    let (fill_secs, bytes) = (began.elapsed().as_secs_f64(), filled.bytes().await);
    println!("{count} deliveries filled in within {fill_secs:.0} s, {:.2} GiB", bytes as f64 / f64::from(1 << 30));
    println!("{:9} {:19} {:>10} {:>10} {:>7}", "retention", "median", "empty", "filled", "ratio");
    let kept = bench.compare("off", &empty, &filled, &[]).await;
    let began = clock::stopwatch();
    let removing = bench.compare("behind", &empty, &filled, &["--retain", "7d"]).await;
    let (took, removed) = (began.elapsed().as_secs_f64(), filled.removed().await);
    println!("{removed} of {count} deliveries were removed in these {took:.0} s, half of which were the empty store's");
    if removed >= count as u64 {
        println!("retention caught up before the end: take more deliveries, or less time");
    }
    let database = if server.is_some() { "postgres" } else { "sqlite" };
    println!(
        "{}",
        json!({
            "bench": "flat", "database": database, "deliveries": count, "fill_secs": fill_secs, "bytes": bytes,
            "kept": kept, "removing": removing, "removed": removed,
        })
    );
    empty.remove(server).await;
    filled.remove(server).await;
}
