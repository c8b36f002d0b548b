//! Whether a delivery costs the same however many are stored: `cargo bench --bench flat [-- COUNT [SECONDS]] [postgres]`,
//! on PostgreSQL where that is asked for: on one of our own, with durable settings, which is gone at the end, or on the one
//! that `SHORTKIT_BENCH_POSTGRES=postgres://…` names, beside whose database it makes two and drops them.
//!
//! Fills a store with COUNT finished deliveries (10,000,000 when not given, five weeks old, a twentieth of them failed, over
//! a hundred webhooks), and holds the service on it against the service on an empty store, in turns, each for SECONDS (5)
//! of as many publishes as go and as long of 50 a second. Then the same while retention removes what was filled in.
//!
//! Of the deliveries a second, the median of the turns counts; of what publishes and deliveries at 50 a second take, the
//! percentiles of all turns together: one turn has too few for a 99th. Without retention each must be within a tenth of
//! what it is on the empty store, in a line with PASS or FAIL. While retention removes, and of the worst turn's p99 of
//! publishing under full load, which shows whether it stalls, the ratio is only told. Then one JSON line for machines. Ends
//! with 1 when a bar is missed, and with 2 when there is no PostgreSQL to measure on.

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
/// Turns of each store.
const TURNS: usize = 5;
/// Events a second of the paced runs.
const PACE: u32 = 50;
/// What a full store may make worse.
const TOLERANCE: f64 = 0.1;
/// What the turns find, and what is asked of it; the figures of the paced runs, but for the first and the last.
const FIGURES: [(&str, Bar); 6] = [
    ("deliveries_per_sec", Bar::AtLeast),
    ("publish_p50_ms", Bar::AtMost),
    ("publish_p99_ms", Bar::AtMost),
    ("delivery_p50_ms", Bar::AtMost),
    ("delivery_p99_ms", Bar::AtMost),
    ("worst_full_publish_p99_ms", Bar::None),
];

/// How a filled store's figure is held against the empty one's.
#[derive(Clone, Copy)]
enum Bar {
    AtLeast,
    AtMost,
    None,
}

/// What one turn finds; times in nanoseconds, sorted.
struct Turn {
    deliveries_per_sec: f64,
    full_publish: Vec<u64>,
    paced_publish: Vec<u64>,
    paced_delivery: Vec<u64>,
}

/// What every turn needs.
struct Bench {
    server: Option<Server>,
    seen: Arc<Seen>,
    time: Duration,
    start: Instant,
}

impl Bench {
    /// One turn, of a service that was started for it.
    async fn turn(&self, store: &Store, arguments: &[&str]) -> Turn {
        let arguments = [&["--log", "warn"], arguments].concat();
        let server = self.server.as_ref();
        let service = Service::start(store.directory.path(), store.database_url.as_deref(), &arguments).await;
        let target = Arc::new(Target::connect(service).await);
        let full = measure(&target, &self.seen, server, self.time, Load::Full(1), self.start).await;
        let paced = measure(&target, &self.seen, server, self.time, Load::Paced(PACE), self.start).await;
        let target = Arc::into_inner(target).expect("nobody else publishes");
        target.service.stop().await;
        Turn {
            deliveries_per_sec: full.deliveries_per_sec,
            full_publish: full.publish,
            paced_publish: paced.publish,
            paced_delivery: paced.delivery,
        }
    }

    /// Both stores in turns: each figure, the ratios, and how many bars were missed, if there are any.
    async fn compare(&self, run: &str, stores: [&Store; 2], arguments: &[&str], judged: bool) -> (Value, usize) {
        let mut turns: [Vec<Turn>; 2] = Default::default();
        for _ in 0..TURNS {
            for (turns, (store, arguments)) in turns.iter_mut().zip(stores.into_iter().zip([&[][..], arguments])) {
                turns.push(self.turn(store, arguments).await);
            }
        }
        let [empty, filled] = turns.each_ref().map(|turns| figures(turns));
        let (mut results, mut missed) = (serde_json::Map::new(), 0);
        for (index, (figure, bar)) in FIGURES.into_iter().enumerate() {
            let (empty, filled) = (empty[index], filled[index]);
            let ratio = filled / empty;
            let passed = match bar {
                Bar::AtLeast => Some(ratio >= 1.0 - TOLERANCE),
                Bar::AtMost => Some(ratio <= 1.0 + TOLERANCE),
                Bar::None => None,
            };
            let passed = passed.filter(|_| judged);
            missed += usize::from(passed == Some(false));
            let verdict = passed.map_or("", |passed| if passed { "PASS" } else { "FAIL" });
            println!("{run:9} {figure:25} {empty:10.2} {filled:10.2} {ratio:7.3}  {verdict}");
            let found = json!({ "empty": empty, "filled": filled, "ratio": ratio, "passed": passed });
            results.insert(figure.to_owned(), found);
        }
        (Value::from(results), missed)
    }
}

/// What several turns come to.
fn figures(turns: &[Turn]) -> [f64; FIGURES.len()] {
    let mut rates: Vec<f64> = turns.iter().map(|turn| turn.deliveries_per_sec).collect();
    rates.sort_by(f64::total_cmp);
    let together = |times: fn(&Turn) -> &Vec<u64>| {
        let mut times: Vec<u64> = turns.iter().flat_map(times).copied().collect();
        times.sort_unstable();
        times
    };
    let publish = together(|turn| &turn.paced_publish);
    let delivery = together(|turn| &turn.paced_delivery);
    [
        rates[rates.len() / 2],
        percentile_ms(&publish, 50),
        percentile_ms(&publish, 99),
        percentile_ms(&delivery, 50),
        percentile_ms(&delivery, 99),
        turns.iter().map(|turn| percentile_ms(&turn.full_publish, 99)).fold(0.0, f64::max),
    ]
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
    tokio::select! {
        code = run() => code,
        () = told_to_end() => ExitCode::from(130),
    }
}

async fn run() -> ExitCode {
    let server = match Server::if_asked().await {
        Ok(server) => server,
        Err(error) => {
            eprintln!("{error}");
            return ExitCode::from(2);
        }
    };
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
    println!("{:9} {:25} {:>10} {:>10} {:>7}", "retention", "figure", "empty", "filled", "ratio");
    let (kept, missed) = bench.compare("off", [&empty, &filled], &[], true).await;
    let began = clock::stopwatch();
    let (removing, _) = bench.compare("behind", [&empty, &filled], &["--retain", "7d"], false).await;
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
            "missed": missed,
        })
    );
    empty.remove(server).await;
    filled.remove(server).await;
    if missed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
