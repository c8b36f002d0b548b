//! What a client that does not behave costs the others: `cargo bench --bench hostile_clients [-- ROUNDS SECONDS NAME…]`.
//!
//! Starts the service on a SQLite file of its own. A quiet client asks 500 times a second; what is measured is its latency
//! from the moment when each request was due, and how many of its requests failed. For each kind of abuser (all, when no
//! NAME is given) each of ROUNDS (5) measures three times for SECONDS (2), one right after the other: with nobody beside,
//! with one that is as busy as an abuser but harmless, and with the abuser, which comes back as soon as it is dropped. The
//! medians of the rounds are printed, and of the ratios within each round.
//!
//! In life an abuser has its own machine. Here it takes processor time from the service, so it gets a fixed share of one
//! core, at the lowest priority, and the harmless one the same: `× busy` is what the abuse itself costs. The last columns
//! say how much of a core the service used meanwhile, and how often a second the abuser was dropped. Ends with 1 when one
//! abuser costs more than twice as much as the harmless one.

#[path = "../tests/it/hostile_clients/wire.rs"]
#[allow(dead_code, reason = "the tests use more of it")]
mod wire;

use std::{
    cell::Cell,
    fs,
    process::{ExitCode, Stdio},
    rc::Rc,
    time::{Duration, Instant},
};

use shortkit_webhooks::clock;
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::TcpStream,
    process::{Child, Command},
    task::{JoinSet, LocalSet},
    time::MissedTickBehavior,
};

use self::wire::{
    CONTINUATION, DATA, END_HEADERS, END_STREAM, HEADERS, PING, RST_STREAM, SETTINGS, WINDOW_UPDATE, frame, get,
    opening, post,
};

/// Between two requests of the quiet client.
const PACE: Duration = Duration::from_millis(2);
/// Connections of the abuser at a time.
const CONNECTIONS: usize = 8;
/// Of one core, for the abuser.
const SHARE: f64 = 0.2;
/// The quiet client may become so many times slower than beside one that is as busy.
const BAR: f64 = 2.0;
/// The harmless one.
const BUSY: &str = "busy";

/// What an abuser writes: first when it connects, then again and again.
struct Abuser {
    name: &'static str,
    first: Vec<u8>,
    next: fn(usize) -> Vec<u8>,
    /// Between two writes.
    pause: Duration,
    reads: bool,
}

fn stream(index: usize) -> u32 {
    u32::try_from(2 * index + 1).unwrap_or(1)
}

fn abusers() -> Vec<Abuser> {
    let http2 = |name, next| Abuser { name, first: opening(None), next, pause: Duration::ZERO, reads: true };
    vec![
        http2("rapid-reset", |index| {
            let reset = |stream| frame(RST_STREAM, 0, stream, &8_u32.to_be_bytes());
            let head = |stream| frame(HEADERS, END_HEADERS | END_STREAM, stream, &get("/v1/webhooks", ""));
            (50 * index..50 * (index + 1))
                .map(stream)
                .flat_map(|stream| [head(stream), reset(stream)].concat())
                .collect()
        }),
        http2("continuation", |index| match index {
            0 => frame(HEADERS, END_STREAM, 1, &get("/", "")),
            _ => frame(CONTINUATION, 0, 1, &[0; 64]).repeat(16),
        }),
        http2("ping", |_| frame(PING, 0, 0, &[0; 8]).repeat(64)),
        http2("settings", |_| frame(SETTINGS, 0, 0, &[]).repeat(64)),
        http2("streams", |index| {
            let head = |index| frame(HEADERS, END_HEADERS, stream(index), &post("/v1/events", ""));
            (100 * index..100 * (index + 1)).flat_map(head).collect()
        }),
        http2("window-update", |_| frame(WINDOW_UPDATE, 0, 0, &1_u32.to_be_bytes()).repeat(64)),
        http2("reset-again", |index| match index {
            0 => frame(HEADERS, END_HEADERS | END_STREAM, 1, &get("/v1/webhooks", "")),
            _ => frame(RST_STREAM, 0, 1, &8_u32.to_be_bytes()).repeat(64),
        }),
        http2("bodies-without-a-key", |index| {
            let head = frame(HEADERS, END_HEADERS, stream(index), &post("/v1/events", ""));
            [head, frame(DATA, END_STREAM, stream(index), &[b'x'; 16 * 1024])].concat()
        }),
        // As `streams`, but each call is taken back as soon as it is under way.
        Abuser {
            // Long enough for the service to have begun.
            pause: Duration::from_millis(12),
            ..http2("cancelled", |index| {
                let streams = move || (90 * (index / 2)..90 * (index / 2 + 1)).map(stream);
                let head = |id| frame(HEADERS, END_HEADERS, id, &post("/v1/events", ""));
                let reset = |id| frame(RST_STREAM, 0, id, &8_u32.to_be_bytes());
                if index % 2 == 0 { streams().flat_map(head).collect() } else { streams().flat_map(reset).collect() }
            })
        },
        Abuser {
            name: "http1-bodies",
            first: Vec::new(),
            next: |_| {
                let head = b"POST /v1/events HTTP/1.1\r\nhost: x\r\ncontent-length: 65536\r\n\r\n";
                [&head[..], &[b'x'; 65_536]].concat()
            },
            pause: Duration::ZERO,
            reads: true,
        },
        Abuser {
            name: "reconnects",
            first: b"GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n".to_vec(),
            next: |_| Vec::new(),
            pause: Duration::ZERO,
            reads: true,
        },
        Abuser {
            name: "slowloris",
            first: b"GET / HTTP/1.1\r\n".to_vec(),
            next: |_| b"x: y\r\n".to_vec(),
            pause: Duration::from_millis(100),
            reads: true,
        },
        Abuser {
            name: "never-reads",
            first: Vec::new(),
            next: |_| b"GET / HTTP/1.1\r\nhost: x\r\n\r\n".repeat(64),
            pause: Duration::ZERO,
            reads: false,
        },
        Abuser {
            name: "endless-head",
            first: b"GET / HTTP/1.1\r\nx: ".to_vec(),
            next: |_| vec![b'y'; 4096],
            pause: Duration::ZERO,
            reads: true,
        },
    ]
}

impl Abuser {
    /// One connection, until it is dropped.
    async fn once(&self, address: &str, budget: &Budget) -> std::io::Result<()> {
        let (mut read, mut write) = TcpStream::connect(address).await?.into_split();
        write.write_all(&self.first).await?;
        let send = async {
            for index in 0.. {
                let next = (self.next)(index);
                if next.is_empty() {
                    return std::future::pending().await;
                }
                write.write_all(&next).await?;
                budget.keep();
                tokio::task::yield_now().await;
                if !self.pause.is_zero() {
                    tokio::time::sleep(self.pause).await;
                }
            }
            Ok(())
        };
        if !self.reads {
            return send.await;
        }
        let mut said = Vec::new();
        tokio::select! {
            ended = send => ended,
            ended = read.read_to_end(&mut said) => ended.map(drop),
        }
    }
}

/// Processor time of this process, which has one thread that counts.
struct Budget {
    started: Instant,
    looked: Cell<Instant>,
}

impl Budget {
    fn new() -> Self {
        Self { started: clock::stopwatch(), looked: Cell::new(clock::stopwatch()) }
    }

    /// Waits until no more than the share was used.
    fn keep(&self) {
        if self.looked.get().elapsed() < Duration::from_millis(1) {
            return;
        }
        let used = fs::read_to_string("/proc/thread-self/schedstat").expect("Linux keeps it");
        let nanos = used.split(' ').next().and_then(|text| text.parse().ok()).expect("nanoseconds");
        let earned_after = Duration::from_nanos(nanos).div_f64(SHARE);
        // The whole thread sleeps, whatever else it could do.
        std::thread::sleep(earned_after.saturating_sub(self.started.elapsed()));
        self.looked.set(clock::stopwatch());
    }
}

/// Abuses until its input ends, then says how often it was dropped.
async fn abuse(name: &str, address: &str) {
    let (budget, dropped) = (Rc::new(Budget::new()), Rc::new(Cell::new(0)));
    let attack = LocalSet::new();
    for _ in 0..CONNECTIONS {
        let abuser = abusers().into_iter().find(|abuser| abuser.name == name);
        let (address, budget, dropped) = (address.to_owned(), Rc::clone(&budget), Rc::clone(&dropped));
        attack.spawn_local(async move {
            loop {
                match &abuser {
                    // A reset is as good an end as any.
                    Some(abuser) => drop(abuser.once(&address, &budget).await),
                    None => drop(std::hint::black_box((0..10_000_u64).fold(0, |sum, next| sum ^ next))),
                }
                dropped.set(dropped.get() + usize::from(abuser.is_some()));
                budget.keep();
                tokio::task::yield_now().await;
            }
        });
    }
    let mut nothing = Vec::new();
    let _ = attack.run_until(tokio::io::stdin().read_to_end(&mut nothing)).await;
    println!("{}", dropped.get());
}

/// Runs this program as an abuser, with the lowest priority.
fn start_abuser(name: &str, address: &str) -> Child {
    let program = std::env::current_exe().expect("this program");
    let mut command = Command::new("nice");
    command.args(["-n", "19"]).arg(program).args(["abuse", name, address]);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).kill_on_drop(true).spawn().expect("nice is installed")
}

/// The service, and how to reach it.
struct Service {
    process: Child,
    base: String,
    key: String,
    http: reqwest::Client,
    _directory: tempfile::TempDir,
}

/// What was measured beside somebody.
#[derive(Clone, Copy)]
struct Measured {
    p50_ms: f64,
    p99_ms: f64,
    failed: usize,
    /// Of a core.
    service_percent: f64,
    dropped_per_sec: f64,
}

impl Service {
    async fn start() -> Self {
        let directory = tempfile::tempdir().expect("a folder");
        let mut process = Command::new(env!("CARGO_BIN_EXE_shortkit-webhooks"))
            .args(["serve", "--dev", "--listen", "127.0.0.1:0", "--log", "error", "--rate-limit", "off"])
            .current_dir(directory.path())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .expect("the service starts");
        let mut lines = BufReader::new(process.stdout.take().expect("piped")).lines();
        let (mut base, mut key) = (None, None);
        while key.is_none() {
            let line = lines.next_line().await.expect("the service prints").expect("a key");
            base = base.or(line.strip_prefix("listening on ").map(str::to_owned));
            let rest = line.trim().strip_prefix("secret key");
            key = rest.and_then(|rest| rest.split_whitespace().next()).map(str::to_owned);
        }
        let http = reqwest::Client::builder().no_proxy().tcp_nodelay(true).build().expect("a client");
        let (base, key) = (base.expect("an address"), key.expect("a key"));
        Self { process, base, key, http, _directory: directory }
    }

    /// Processor time that it has used.
    fn cpu(&self) -> Duration {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.process.id().expect("it runs"))).expect("Linux");
        // After the name, which may hold anything: user and system time in hundredths of a second.
        let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
        Duration::from_millis(fields[11..13].iter().map(|ticks| 10 * ticks.parse::<u64>().expect("ticks")).sum())
    }

    /// Latencies of the quiet client in order of size, and how many of its requests failed.
    async fn quiet(&self, time: Duration) -> (Vec<Duration>, usize) {
        let mut ticks = tokio::time::interval(PACE);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Burst);
        let mut calls = JoinSet::new();
        let started = clock::stopwatch();
        while started.elapsed() < time {
            let due = ticks.tick().await;
            let request = self.http.get(format!("{}/v1/webhooks", self.base)).bearer_auth(&self.key);
            calls.spawn(async move {
                let answer = request.send().await.ok().filter(|answer| answer.status().is_success());
                let whole = match answer {
                    Some(answer) => answer.bytes().await.is_ok(),
                    None => false,
                };
                whole.then(|| due.elapsed())
            });
        }
        let answers = calls.join_all().await;
        let mut latencies: Vec<Duration> = answers.iter().flatten().copied().collect();
        latencies.sort_unstable();
        let failed = answers.len() - latencies.len();
        (latencies, failed)
    }

    async fn measure(&self, beside: Option<&str>, time: Duration) -> Measured {
        let mut attack = beside.map(|name| start_abuser(name, self.base.trim_start_matches("http://")));
        let (started, before) = (clock::stopwatch(), self.cpu());
        let (latencies, failed) = self.quiet(time).await;
        let (elapsed, used) = (started.elapsed(), self.cpu() - before);
        let mut dropped = String::new();
        if let Some(attack) = &mut attack {
            drop(attack.stdin.take());
            attack.stdout.take().expect("piped").read_to_string(&mut dropped).await.expect("a number");
            attack.wait().await.expect("it ends");
        }
        let millis = |percent: usize| {
            let index = latencies.len().saturating_sub(1) * percent / 100;
            latencies.get(index).map_or(f64::NAN, |latency| latency.as_secs_f64() * 1000.0)
        };
        Measured {
            p50_ms: millis(50),
            p99_ms: millis(99),
            failed,
            service_percent: 100.0 * used.as_secs_f64() / elapsed.as_secs_f64(),
            dropped_per_sec: dropped.trim().parse().unwrap_or(0.0) / elapsed.as_secs_f64(),
        }
    }
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// One line of the table; `times` is how many times slower than alone, and than beside one that is as busy. Whether it is
/// within the bar.
fn print(name: &str, rounds: &[Measured], times: Option<(f64, f64)>) -> bool {
    let of = |field: fn(&Measured) -> f64| median(rounds.iter().map(field));
    let failed: usize = rounds.iter().map(|round| round.failed).sum();
    let ratios = times.map(|(alone, busy)| format!("{alone:8.2} {busy:8.2}")).unwrap_or_else(|| " ".repeat(17));
    let above = failed > 0 || times.is_some_and(|(_, busy)| busy > BAR);
    println!(
        "{name:22} {:8.2} {:8.2} {ratios} {failed:7} {:9.0} {:10.0} {}",
        of(|round| round.p50_ms),
        of(|round| round.p99_ms),
        of(|round| round.service_percent),
        of(|round| round.dropped_per_sec),
        if above { "above the bar" } else { "" }
    );
    !above
}

/// Whether all are within the bar.
async fn measure_all(rounds: usize, time: Duration, names: &[String]) -> bool {
    let service = Service::start().await;
    service.quiet(Duration::from_secs(1)).await;
    println!(
        "{:22} {:>8} {:>8} {:>8} {:>8} {:>7} {:>9} {:>10}",
        "beside", "p50 ms", "p99 ms", "× alone", "× busy", "failed", "service %", "dropped/s"
    );
    let (mut all_alone, mut all_busy, mut within) = (Vec::new(), Vec::new(), true);
    for abuser in abusers().iter().filter(|abuser| names.is_empty() || names.iter().any(|name| name == abuser.name)) {
        let (mut beside, mut times) = (Vec::new(), Vec::new());
        for _ in 0..rounds {
            let alone = service.measure(None, time).await;
            let busy = service.measure(Some(BUSY), time).await;
            let abused = service.measure(Some(abuser.name), time).await;
            times.push((abused.p99_ms / alone.p99_ms, abused.p99_ms / busy.p99_ms));
            beside.push(abused);
            all_alone.push(alone);
            all_busy.push(busy);
        }
        let ratio = |pick: fn(&(f64, f64)) -> f64| median(times.iter().map(pick));
        within &= print(abuser.name, &beside, Some((ratio(|times| times.0), ratio(|times| times.1))));
    }
    print("nobody", &all_alone, None);
    print("one that is busy", &all_busy, None);
    within
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let _ = rustls::crypto::ring::default_provider().install_default();
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if let [word, name, address] = arguments.as_slice()
        && word == "abuse"
    {
        abuse(name, address).await;
        return ExitCode::SUCCESS;
    }
    let mut numbers = arguments.iter().filter_map(|argument| argument.parse().ok());
    let (rounds, seconds) = (numbers.next().unwrap_or(5), numbers.next().unwrap_or(2));
    // `cargo bench` adds a flag of its own.
    let names = arguments.iter().filter(|text| !text.starts_with('-') && text.parse::<u64>().is_err());
    let rounds = usize::try_from(rounds).expect("a number of rounds");
    let within = measure_all(rounds.max(1), Duration::from_secs(seconds), &names.cloned().collect::<Vec<_>>()).await;
    if within { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
