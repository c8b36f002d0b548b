//! How much the engine delivers: `cargo bench --bench throughput [-- SECONDS [ROUNDS]] [sqlite] [postgres] ["RUN" …]`, on
//! both databases or those named, all runs or those named. PostgreSQL is one of our own, with durable settings, which is
//! gone at the end, or the one whose empty database `SHORTKIT_BENCH_POSTGRES=postgres://…` names. Where none is installed,
//! that is said, and ends with 2 if it was asked for by name.
//!
//! The service runs in a process of its own with durable settings. This process publishes over gRPC, 500 bytes an event,
//! and receives. Everything is held against a bare loop of signed POSTs to the same receiver in the same run: machines
//! differ, the ratio hardly does. Several nodes run beside each other on it, with 32 publishers for each, and are held against
//! the same bare loop. Prints a table for people, after several rounds with the median and the range of each
//! figure, and one JSON line for machines.

mod support;

use std::{
    collections::BTreeMap,
    process::ExitCode,
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
use tokio::{runtime::Handle, task::JoinSet};

use self::support::{
    load::{EVENT, Load, Measured, PUBLISHERS, Target, Tenant, WARM_UP, data, measure, percentile_ms, receiver},
    postgres::Postgres,
    server::{self, Server},
    service::Service,
    told_to_end,
};

/// How long each run measures when the command line names no time.
const DEFAULT_SECS: u64 = 5;
/// Words that choose a database.
const DATABASES: [&str; 2] = ["sqlite", server::WORD];
/// What is measured.
struct Run {
    name: &'static str,
    /// Several share PostgreSQL only.
    nodes: usize,
    /// Of each organisation; not fewer than in the run before.
    webhooks: usize,
    load: Load,
}

/// The runs on each database.
const RUNS: [Run; 8] = [
    Run { name: "paced 50/s", nodes: 1, webhooks: 1, load: Load::Paced(50) },
    Run { name: "1 webhook", nodes: 1, webhooks: 1, load: Load::Full(1) },
    Run { name: "16 a call", nodes: 1, webhooks: 1, load: Load::Full(16) },
    Run { name: "100 tenants", nodes: 1, webhooks: 1, load: Load::Tenants(100) },
    Run { name: "1000 tenants", nodes: 1, webhooks: 1, load: Load::Tenants(1_000) },
    Run { name: "3 nodes 50/s", nodes: 3, webhooks: 1, load: Load::Paced(50) },
    Run { name: "3 nodes", nodes: 3, webhooks: 1, load: Load::Full(1) },
    Run { name: "fan-out 5", nodes: 1, webhooks: 5, load: Load::Full(1) },
];
/// What each run finds, as it stands in the table.
const FIGURES: [(&str, &str, usize); 10] = [
    ("deliveries_per_sec", "deliv/s", 0),
    ("ratio", "ratio", 3),
    ("publish_p50_ms", "pub p50", 2),
    ("publish_p99_ms", "pub p99", 2),
    ("delivery_p50_ms", "del p50", 2),
    ("delivery_p99_ms", "del p99", 2),
    ("service_cpu_ms", "cpu ms", 3),
    ("database_cpu_ms", "db ms", 3),
    ("others_cpu_ms", "others ms", 3),
    ("resident_mib", "MiB", 0),
];
type Figures = [f64; FIGURES.len()];

/// Signed POSTs, [`PUBLISHERS`] under way, with nothing else around them: how many a second.
async fn bare(url: String, time: Duration, start: Instant) -> f64 {
    let client = reqwest::Client::builder().no_proxy().tcp_nodelay(true).build().expect("a client");
    let key = SigningKey::new(&Secret::from_random(&clock::random()));
    let stop = Arc::new(AtomicBool::new(false));
    let count = Arc::new(AtomicU64::new(0));
    let mut loops = JoinSet::new();
    for _ in 0..PUBLISHERS {
        let (client, key, stop, count, url) =
            (client.clone(), key.clone(), Arc::clone(&stop), Arc::clone(&count), url.clone());
        loops.spawn(async move {
            while !stop.load(Ordering::Relaxed) {
                let body = data(clock::stopwatch(), start);
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

fn main() -> ExitCode {
    // Who publishes takes no more of the machine than it needs: the other threads would look for work all the time.
    let publishers = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    // The bare loop has all of it, as the service does.
    let all = tokio::runtime::Runtime::new().expect("a runtime");
    publishers.block_on(async {
        tokio::select! {
            code = run(all.handle()) => code,
            () = told_to_end() => ExitCode::from(130),
        }
    })
}

/// PostgreSQL; where there is none, what that comes to.
async fn postgres(asked: bool) -> (Option<Server>, ExitCode) {
    match Server::start().await {
        Ok(server) => (Some(server), ExitCode::SUCCESS),
        Err(error) => {
            eprintln!("{error}");
            let wanted = asked || Postgres::is_installed();
            (None, if wanted { ExitCode::from(2) } else { ExitCode::SUCCESS })
        }
    }
}

async fn run(all: &Handle) -> ExitCode {
    let mut numbers = std::env::args().filter_map(|argument| argument.parse::<u64>().ok());
    let time = Duration::from_secs(numbers.next().unwrap_or(DEFAULT_SECS));
    let rounds = numbers.next().unwrap_or(1);
    let words = std::env::args().skip(1).filter(|word| !word.starts_with('-') && word.parse::<u64>().is_err());
    let (asked, chosen): (Vec<String>, Vec<String>) = words.partition(|word| DATABASES.contains(&&**word));
    let wanted = |run: &str| chosen.is_empty() || chosen.iter().any(|name| name == run);
    if let Some(name) = chosen.iter().find(|name| RUNS.iter().all(|run| run.name != *name)) {
        let runs = RUNS.map(|run| run.name);
        eprintln!("there is no run {name:?}; there are {runs:?}");
        return ExitCode::from(2);
    }
    let needs_postgres = RUNS.iter().find(|run| run.nodes > 1 && chosen.iter().any(|name| name == run.name));
    let of = |database: &str| asked.is_empty() || asked.iter().any(|name| name == database);
    let (server, code) = if of(DATABASES[1]) { postgres(!asked.is_empty()).await } else { (None, ExitCode::SUCCESS) };
    if let (Some(run), None) = (needs_postgres, &server) {
        eprintln!("the run {:?} needs PostgreSQL, which is not among what is measured", run.name);
        return ExitCode::from(2);
    }
    let start = clock::stopwatch();
    let _ = rustls::crypto::ring::default_provider().install_default();
    let (url, seen) = receiver(start);
    // Each has its directory for all rounds, since there are its keys.
    let directory = || tempfile::tempdir().expect("a directory");
    let mut databases = Vec::new();
    if of(DATABASES[0]) {
        databases.push((DATABASES[0], None, directory()));
    }
    databases.extend(server.as_ref().map(|server| (DATABASES[1], Some(server), directory())));
    if databases.is_empty() {
        return code;
    }
    let mut found: BTreeMap<(&str, &str), Vec<Figures>> = BTreeMap::new();
    let (mut bares, mut first_answers) = (Vec::new(), BTreeMap::<&str, Vec<f64>>::new());
    for _ in 0..rounds {
        let bare = all.spawn(bare(url.clone(), time, start)).await.expect("the bare loop");
        println!("bare loop of signed POSTs: {bare:.0}/s");
        bares.push(bare);
        heading();
        for (database, server, directory) in &databases {
            let database_url = server.map(|server| &*server.url);
            let start_node = async || {
                Target::connect(Service::start(directory.path(), database_url, &["--log", "warn"]).await).await
            };
            let mut target = Arc::new(start_node().await);
            let first_answer = target.first_answer().await.as_secs_f64() * 1e3;
            first_answers.entry(*database).or_default().push(first_answer);
            let mut webhooks = Vec::new();
            let played = |run: &Run| wanted(run.name) && (run.nodes == 1 || server.is_some());
            for Run { name, nodes, webhooks: each, load } in RUNS.into_iter().filter(played) {
                scale(Arc::get_mut(&mut target).expect("nobody publishes"), nodes, start_node).await;
                register(&target, &mut webhooks, &url, each, load).await;
                let measured = measure(&target, &seen, *server, time, load, start).await;
                let figures = figures(&measured, bare);
                line(database, name, &figures);
                found.entry((database, name)).or_default().push(figures);
            }
            println!("{database:10} first answer {first_answer:.0} ms after its start");
            // Not deleted: what goes with a webhook would be removed beside the next round.
            for (tenant, webhook) in webhooks {
                target.disable(tenant, webhook).await;
            }
            let mut target = Arc::into_inner(target).expect("nobody else publishes");
            scale(&mut target, 1, start_node).await;
            target.service.stop().await;
        }
    }
    if rounds > 1 {
        summarize(&found);
    }
    let results = found.iter().map(|((database, run), rounds)| {
        let rounds: Vec<Value> = rounds.iter().map(named).collect();
        json!({ "database": database, "run": run, "rounds": rounds })
    });
    let results: Vec<Value> = results.collect();
    println!(
        "{}",
        json!({ "bench": "throughput", "bare_per_sec": bares, "first_answer_ms": first_answers, "results": results })
    );
    code
}

/// Starts and stops nodes until there are so many.
async fn scale(target: &mut Target, nodes: usize, start: impl AsyncFn() -> Target) {
    while target.others.len() + 1 < nodes {
        target.others.push(start().await);
    }
    for node in target.others.drain(nodes - 1..) {
        node.service.stop().await;
    }
}

/// Registers what is missing until all that publish have so many webhooks each.
async fn register(target: &Target, webhooks: &mut Vec<(Tenant, String)>, url: &str, each: usize, load: Load) {
    let tenants = match load {
        Load::Tenants(count) => (0..count).map(Some).collect(),
        Load::Paced(_) | Load::Full(_) => vec![None],
    };
    for tenant in tenants {
        let has = webhooks.iter().filter(|(of, _)| *of == tenant).count();
        for _ in has..each {
            webhooks.push((tenant, target.webhook(tenant, url, EVENT).await));
        }
    }
}

fn named(figures: &Figures) -> Value {
    FIGURES.iter().zip(figures).map(|((name, ..), value)| ((*name).to_owned(), json!(value))).collect()
}

fn heading() {
    let names: String = FIGURES.iter().map(|(_, name, _)| format!(" {name:>9}")).collect();
    println!("{:10} {:12}{names}", "database", "run");
}

fn line(database: &str, run: &str, figures: &Figures) {
    let values = FIGURES.iter().zip(figures).map(|((.., digits), value)| format!(" {value:9.digits$}"));
    println!("{database:10} {run:12}{}", values.collect::<String>());
}

/// The median of each figure over all rounds, and how far it went.
fn summarize(found: &BTreeMap<(&str, &str), Vec<Figures>>) {
    println!("\nmedians, then the least and the most");
    heading();
    for ((database, run), rounds) in found {
        let sorted: Vec<Vec<f64>> = (0..FIGURES.len())
            .map(|index| {
                let mut values: Vec<f64> = rounds.iter().map(|figures| figures[index]).collect();
                values.sort_by(f64::total_cmp);
                values
            })
            .collect();
        let at = |place: fn(usize) -> usize| std::array::from_fn(|index| sorted[index][place(rounds.len())]);
        line(database, run, &at(|count| count / 2));
        line("", "", &at(|_| 0));
        line("", "", &at(|count| count - 1));
    }
}

fn figures(measured: &Measured, bare: f64) -> Figures {
    [
        measured.deliveries_per_sec,
        measured.deliveries_per_sec / bare,
        percentile_ms(&measured.publish, 50),
        percentile_ms(&measured.publish, 99),
        percentile_ms(&measured.delivery, 50),
        percentile_ms(&measured.delivery, 99),
        measured.service_cpu_ms,
        measured.database_cpu_ms,
        measured.others_cpu_ms,
        measured.resident_mib,
    ]
}
