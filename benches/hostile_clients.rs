//! What a client that does not behave costs the others: `cargo bench --bench hostile_clients [-- SECONDS]`.
//!
//! Starts the service on a SQLite file of its own. A quiet client asks 200 times a second for SECONDS (5 when not given),
//! alone and then beside each kind of abuser, which comes back as soon as it is dropped. What is printed is the quiet
//! client's latency from the moment when each request was due, how many of its requests failed, and how often the abuser
//! was dropped. The abuser is a process of its own with the lowest priority, since in life it has its own machine; what
//! it still takes here, the row of one that only computes shows.

#[path = "../tests/it/hostile_clients/wire.rs"]
#[allow(dead_code, reason = "the tests use more of it")]
mod wire;

use std::{
    process::Stdio,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use shortkit_webhooks::clock;
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::TcpStream,
    process::{Child, Command},
    task::JoinSet,
    time::MissedTickBehavior,
};

use self::wire::{
    CONTINUATION, END_HEADERS, END_STREAM, HEADERS, PING, RST_STREAM, SETTINGS, frame, get, opening, post,
};

/// Between two requests of the quiet client.
const PACE: Duration = Duration::from_millis(5);
/// Connections of the abuser at a time.
const CONNECTIONS: usize = 8;
/// The quiet client may become so many times slower.
const BAR: f64 = 2.0;

/// What an abuser writes: first when it connects, then again and again.
struct Abuser {
    name: &'static str,
    /// Whether it connects at all.
    connects: bool,
    first: Vec<u8>,
    next: fn(usize) -> Vec<u8>,
    reads: bool,
}

fn stream(index: usize) -> u32 {
    u32::try_from(2 * index + 1).unwrap_or(1)
}

fn abusers() -> Vec<Abuser> {
    let http2 = |name, next| Abuser { name, connects: true, first: opening(None), next, reads: true };
    vec![
        Abuser { connects: false, ..http2("one that computes", |_| Vec::new()) },
        http2("rapid reset", |index| {
            let reset = |stream| frame(RST_STREAM, 0, stream, &8_u32.to_be_bytes());
            let head = |stream| frame(HEADERS, END_HEADERS | END_STREAM, stream, &get("/v1/webhooks", ""));
            (50 * index..50 * (index + 1))
                .map(stream)
                .flat_map(|stream| [head(stream), reset(stream)].concat())
                .collect()
        }),
        http2("CONTINUATION flood", |index| match index {
            0 => frame(HEADERS, END_STREAM, 1, &get("/", "")),
            _ => frame(CONTINUATION, 0, 1, &[0; 64]).repeat(16),
        }),
        http2("ping flood", |_| frame(PING, 0, 0, &[0; 8]).repeat(64)),
        http2("settings flood", |_| frame(SETTINGS, 0, 0, &[]).repeat(64)),
        http2("10,000 streams", |index| {
            let head = |index| frame(HEADERS, END_HEADERS, stream(index), &post("/v1/events", ""));
            (100 * index..100 * (index + 1)).flat_map(head).collect()
        }),
        Abuser {
            name: "slowloris",
            connects: true,
            first: b"GET / HTTP/1.1\r\n".to_vec(),
            next: |_| b"x: y\r\n".to_vec(),
            reads: true,
        },
        Abuser {
            name: "never reads",
            connects: true,
            first: Vec::new(),
            next: |_| b"GET / HTTP/1.1\r\nhost: x\r\n\r\n".repeat(64),
            reads: false,
        },
        Abuser {
            name: "endless head",
            connects: true,
            first: b"GET / HTTP/1.1\r\nx: ".to_vec(),
            next: |_| vec![b'y'; 4096],
            reads: true,
        },
    ]
}

impl Abuser {
    /// One connection, until it is dropped.
    async fn once(&self, address: &str) -> std::io::Result<()> {
        if !self.connects {
            std::hint::black_box((0..100_000_u64).sum::<u64>());
            tokio::task::yield_now().await;
            return Ok(());
        }
        let (mut read, mut write) = TcpStream::connect(address).await?.into_split();
        write.write_all(&self.first).await?;
        let send = async {
            for index in 0.. {
                write.write_all(&(self.next)(index)).await?;
                tokio::task::yield_now().await;
                if self.name == "slowloris" {
                    tokio::time::sleep(Duration::from_millis(100)).await;
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

/// Latencies of the quiet client in order of size, and how many of its requests failed.
async fn quiet(base: &str, key: &str, time: Duration) -> (Vec<Duration>, usize) {
    let http = reqwest::Client::builder().no_proxy().tcp_nodelay(true).build().expect("a client");
    let mut ticks = tokio::time::interval(PACE);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Burst);
    let mut calls = JoinSet::new();
    let started = clock::stopwatch();
    while started.elapsed() < time {
        let due = ticks.tick().await;
        let request = http.get(format!("{base}/v1/webhooks")).bearer_auth(key);
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

/// Abuses for ever, and says at each end of a connection how many there were.
async fn abuse(name: &str, address: String) {
    let abuser = Arc::new(abusers().into_iter().find(|abuser| abuser.name == name).expect("an abuser"));
    let dropped = Arc::new(AtomicUsize::new(0));
    let mut attack = JoinSet::new();
    for _ in 0..CONNECTIONS {
        let (abuser, dropped, address) = (Arc::clone(&abuser), Arc::clone(&dropped), address.clone());
        attack.spawn(async move {
            loop {
                // A reset is as good an end as any.
                let _ = abuser.once(&address).await;
                let count = dropped.fetch_add(1, Ordering::Relaxed) + 1;
                if abuser.connects {
                    println!("{count}");
                }
            }
        });
    }
    attack.join_all().await;
}

/// Runs this program as an abuser, with the lowest priority.
fn start_abuser(name: &str, address: &str) -> Child {
    let program = std::env::current_exe().expect("this program");
    let mut command = Command::new("nice");
    command.args(["-n", "19"]).arg(program).args(["abuse", name, address]);
    command.stdout(Stdio::piped()).kill_on_drop(true).spawn().expect("nice is installed")
}

#[tokio::main]
async fn main() {
    let _ = rustls::crypto::ring::default_provider().install_default();
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if let [word, name, address] = arguments.as_slice()
        && word == "abuse"
    {
        return abuse(name, address.clone()).await;
    }
    // `cargo bench` adds a flag of its own.
    let seconds = arguments.iter().find_map(|argument| argument.parse().ok()).unwrap_or(5);
    let time = Duration::from_secs(seconds);
    let directory = tempfile::tempdir().expect("a folder");
    let mut service = Command::new(env!("CARGO_BIN_EXE_shortkit-webhooks"))
        .args(["serve", "--dev", "--listen", "127.0.0.1:0", "--log", "error", "--rate-limit", "off"])
        .current_dir(directory.path())
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .expect("the service starts");
    let mut lines = BufReader::new(service.stdout.take().expect("piped")).lines();
    let (mut base, mut key) = (None, None);
    while key.is_none() {
        let line = lines.next_line().await.expect("the service prints").expect("a key");
        base = base.or(line.strip_prefix("listening on ").map(str::to_owned));
        let rest = line.trim().strip_prefix("secret key");
        key = rest.and_then(|rest| rest.split_whitespace().next()).map(str::to_owned);
    }
    let (base, key) = (base.expect("an address"), key.expect("a key"));
    let address = base.trim_start_matches("http://").to_owned();

    quiet(&base, &key, Duration::from_secs(1)).await;
    println!("{:20} {:>9} {:>9} {:>9} {:>9} {:>9}", "beside", "p50 ms", "p99 ms", "p99 ×", "failed", "dropped");
    let mut alone = None;
    for abuser in std::iter::once(None).chain(abusers().into_iter().map(Some)) {
        let name = abuser.map_or("nobody", |abuser| abuser.name);
        let mut attack = (name != "nobody").then(|| start_abuser(name, &address));
        let (latencies, failed) = quiet(&base, &key, time).await;
        let mut dropped = String::new();
        if let Some(attack) = &mut attack {
            attack.start_kill().expect("it runs");
            let mut said = String::new();
            attack.stdout.take().expect("piped").read_to_string(&mut said).await.expect("numbers");
            attack.wait().await.expect("it ends");
            said.lines().last().unwrap_or_default().clone_into(&mut dropped);
        }
        let millis = |percent: usize| {
            let index = latencies.len().saturating_sub(1) * percent / 100;
            latencies.get(index).map_or(f64::NAN, |latency| latency.as_secs_f64() * 1000.0)
        };
        let times = millis(99) / *alone.get_or_insert(millis(99));
        let verdict = if times > BAR || failed > 0 { "above the bar" } else { "" };
        println!("{name:20} {:9.2} {:9.2} {times:9.2} {failed:9} {dropped:>9} {verdict}", millis(50), millis(99));
    }
}
