//! Whether anybody's receivers or events slow the others down: `cargo bench --bench fairness [-- short] [SCENARIO…]`,
//! with the scenarios `dead`, `slow`, `flood`, `calls`, `recovery`, `outage`, `watched` and `changed`; with
//! `postgres` on PostgreSQL: on one of our own, with durable settings, which is gone at the end, or on the one that
//! `SHORTKIT_BENCH_POSTGRES=postgres://…` names, beside whose database each scenario makes one and drops it.
//!
//! The service runs in a process of its own. Organisation `others` publishes at a steady pace to a receiver that answers
//! at once; what its deliveries take, from before the publish to the arrival, is measured first alone and then while the
//! disturbance lasts, in the same run of the service, three times each; the median counts. Those who disturb have a process
//! of their own (see [`disturber`]). `short` takes about seven minutes instead of half an hour: it measures for a shorter time,
//! scales the slow receivers to a fifth of their time and five times their traffic, and takes fewer that recover.
//!
//! Prints a line for each bar, PASS or FAIL, and one JSON line. Ends with 1 when a bar is missed, and with 2
//! when there is no PostgreSQL to measure on.

mod bystanders;
mod caller;
mod disturber;
mod receiver;
mod report;
mod stage;
#[path = "../support/mod.rs"]
mod support;

use std::{
    process::ExitCode,
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use serde_json::{Value, json};

use self::{
    disturber::{Disturber, Role},
    receiver::{Recovery, Report as Recovered, never_accepts, now},
    report::{Latency, Report},
    stage::{Stage, WARM_UP, group, keep_publishing},
    support::{server::Server, told_to_end},
};

/// Events a second of those who are not to be disturbed, each for four webhooks …
const PACE: u32 = 100;
/// … and of the quiet one in a flood.
const QUIET_PACE: u32 = 20;
/// Webhooks that never answer, in as many groups; each has more waiting than it may have under way.
const DEAD: usize = 64;
const DEAD_GROUPS: usize = 16;
const DEAD_EVENTS: usize = 48;
/// When attempts on them are over: the request timeout of the service, and a moment.
const GIVEN_UP: Duration = Duration::from_secs(31);
/// Events a second for their groups, each for four of them as those of the others are: a fifth of all.
const DEAD_PACE: u32 = PACE / 4;
/// Webhooks of the slow scenario, in as many groups as there are event types for them.
const SLOW: usize = 1_000;
const GROUPS: usize = 50;
/// Webhooks whose receiver recovers, with many events each.
const RECOVERING: usize = 10;
/// Events of the loud organisation: more than it can publish while it is measured; the rest is given up then.
const FLOOD_EVENTS: usize = 1_000_000;
/// Events in a call, where there are many.
const MOST_TOGETHER: usize = 1_000;
/// The per-webhook limit of the service.
const MAX_IN_FLIGHT: usize = 32;

/// How large everything is.
struct Size {
    measure: Duration,
    /// How long the slow receivers take, and the pace of events for their groups.
    slow: Duration,
    slow_pace: u32,
    recovering_events: usize,
    /// Webhooks with one delivery each, all of the same event, whose receivers recover at the same moment.
    outage: usize,
    /// From the first refusal to the recovery.
    down: Duration,
}

const LONG: Size = Size {
    measure: Duration::from_secs(30),
    slow: Duration::from_millis(14_900),
    slow_pace: 5,
    recovering_events: 100_000,
    outage: 100_000,
    down: Duration::from_secs(180),
};
const SHORT: Size = Size {
    measure: Duration::from_secs(10),
    slow: Duration::from_millis(2_980),
    slow_pace: 25,
    recovering_events: 10_000,
    outage: 10_000,
    down: Duration::from_secs(20),
};

/// A fifth of the traffic goes to receivers that take connections, or not even those, and never answer. The bar is nearer to
/// what is found without them than two measurements of the same are to each other, some minutes apart; so there is a second one
/// without them, when they are gone.
async fn dead(size: &Size, server: Option<&Server>) -> Report {
    let mut stage = Stage::new(server, &[]).await;
    let before = stage.rounds(size.measure, PACE).await;
    let receiver = Disturber::start(&Role::Receive { slow: size.slow, recovery: Recovery::default() }).await;
    let caller = stage.caller("dead").await;
    let (deaf, _listener) = never_accepts();
    let mut webhooks = Vec::new();
    for number in 0..DEAD {
        let url = if number % 2 == 0 { format!("{}/hang", receiver.said) } else { deaf.clone() };
        webhooks.push(caller.webhook(url, &group(number % DEAD_GROUPS)).await);
    }
    // All places that they can get are taken from the first moment.
    for number in 0..DEAD_EVENTS * DEAD_GROUPS {
        caller.publish_surely(number, &group(number % DEAD_GROUPS), "{}".to_owned(), 1).await;
    }
    let stop = keep_publishing(caller.clone(), DEAD_PACE, |number| group(number % DEAD_GROUPS));
    let with = stage.median(size.measure, PACE).await;
    stop.store(true, Ordering::Relaxed);
    for webhook in webhooks {
        caller.disable(webhook).await;
    }
    tokio::time::sleep(GIVEN_UP).await;
    let after = stage.rounds(size.measure, PACE).await;
    let [first, again] = [&before, &after].map(|rounds| Latency::median(rounds).p99_ms);
    stage.report.note("dead", "p99 without", first, again);
    stage.report.latencies("dead", Latency::median(&[before, after].concat()), with, 1.2);
    stage.end().await
}

/// A thousand receivers that answer, but late.
async fn slow(size: &Size, server: Option<&Server>) -> Report {
    let mut stage = Stage::new(server, &[]).await;
    let receiver = Disturber::start(&Role::Receive { slow: size.slow, recovery: Recovery::default() }).await;
    let caller = stage.caller("slow").await;
    for number in 0..SLOW {
        caller.webhook(format!("{}/slow", receiver.said), &group(number % GROUPS)).await;
    }
    let without = stage.median(size.measure, PACE).await;
    let memory = stage.service.resident_mib();
    let stop = keep_publishing(caller, size.slow_pace, |number| group(number % GROUPS));
    tokio::time::sleep(size.slow * 2).await;
    let with = stage.median(size.measure, PACE).await;
    let memory_with = stage.service.resident_mib();
    stop.store(true, Ordering::Relaxed);
    stage.report.latencies("slow", without, with, 1.5);
    stage.report.bar("slow", "memory MiB", memory, memory_with, 1.3);
    stage.end().await
}

/// One organisation publishes as fast as it can, so many events a call.
async fn flood(size: &Size, server: Option<&Server>, scenario: &'static str, together: usize) -> Report {
    let mut stage = Stage::new(server, &[]).await;
    let without = stage.median(size.measure, QUIET_PACE).await;
    let memory = stage.service.resident_mib();
    // Its receiver is here: one that had no time would hold up the flood.
    stage.caller("loud").await.webhook(format!("{}/loud", stage.base), "content.ready").await;
    let (base, key) = (stage.service.base.clone(), stage.service.service_key.clone());
    let flood = Disturber::start(&Role::Flood { base, key, together, most: FLOOD_EVENTS / together }).await;
    tokio::time::sleep(WARM_UP).await;
    let with = stage.median(size.measure, QUIET_PACE).await;
    let memory_with = stage.service.resident_mib();
    let rate = flood.stop().await.parse().unwrap_or(0.0);
    stage.report.latencies(scenario, without, with, 2.0);
    stage.report.note(scenario, "memory MiB", memory, memory_with);
    stage.report.found(scenario, "events/s", rate);
    stage.end().await
}

/// A receiver that was down comes back when everything for it falls due at the same moment: a few webhooks with many
/// deliveries each, or many with one.
async fn recovery(size: &Size, server: Option<&Server>, scenario: &str, webhooks: usize, deliveries: usize) -> Report {
    let mut stage = Stage::new(server, &["--retry-schedule", "0s,1s,1s", "--max-webhooks", "1000000"]).await;
    let without = stage.median(size.measure, PACE).await;
    let recovery = Recovery { down: size.down, refusals: deliveries };
    let receiver = Disturber::start(&Role::Receive { slow: size.slow, recovery }).await;
    let report = async || -> Recovered {
        let answer = reqwest::get(format!("{}/report", receiver.said)).await.expect("an answer");
        serde_json::from_slice(&answer.bytes().await.expect("a body")).expect("a report")
    };
    let caller = stage.caller("recovering").await;
    caller.webhooks(webhooks, format!("{}/down", receiver.said), "export.ready").await;
    caller.publish_all(deliveries / webhooks, "export.ready", 1, Arc::default()).await;
    let mut found = report().await;
    while found.refused < deliveries && !found.back_in.is_zero() {
        tokio::time::sleep(Duration::from_millis(100)).await;
        found = report().await;
    }
    let waiting = found.refused;
    tokio::time::sleep(found.back_in.saturating_sub(Duration::from_secs(1))).await;
    let began = now();
    // The first of several would have all of it.
    let with = stage.measure(2 * size.measure, PACE).await;
    let mut found = report().await;
    while found.accepted < deliveries && began.elapsed() < 10 * size.measure {
        tokio::time::sleep(Duration::from_millis(100)).await;
        found = report().await;
    }
    stage.report.found(scenario, "due", waiting as f64);
    if deliveries > webhooks {
        stage.report.at_most(scenario, "in flight", found.most_under_way, MAX_IN_FLIGHT);
    }
    stage.report.at_most(scenario, "missing", deliveries.saturating_sub(found.accepted), 0);
    stage.report.found(scenario, "seconds", found.took.as_secs_f64());
    stage.report.latencies(scenario, without, with, 2.0);
    stage.end().await
}

#[tokio::main]
async fn main() -> ExitCode {
    let _ = rlimit::increase_nofile_limit(u64::MAX);
    let _ = rustls::crypto::ring::default_provider().install_default();
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if let [first, role] = &arguments[..]
        && first == disturber::ARGUMENT
    {
        disturber::run(role).await;
        return ExitCode::SUCCESS;
    }
    tokio::select! {
        code = play(&arguments) => code,
        () = told_to_end() => ExitCode::from(130),
    }
}

/// Plays the scenarios that are named, or all.
async fn play(arguments: &[String]) -> ExitCode {
    let server = match Server::if_asked().await {
        Ok(server) => server,
        Err(error) => {
            eprintln!("{error}");
            return ExitCode::from(2);
        }
    };
    let server = server.as_ref();
    let given = |name: &str| arguments.iter().any(|argument| argument == name);
    let size = if given("short") { SHORT } else { LONG };
    let all = !["dead", "slow", "flood", "calls", "recovery", "outage", "watched", "changed"].into_iter().any(given);
    println!("{:9} {:12} {:>10} {:>10} {:>7} {:>5}", "scenario", "figure", "without", "with", "ratio", "bar");
    let began: Instant = now();
    let mut reports = Vec::new();
    if all || given("dead") {
        reports.push(dead(&size, server).await);
    }
    if all || given("slow") {
        reports.push(slow(&size, server).await);
    }
    if all || given("flood") {
        reports.push(flood(&size, server, "flood", 1).await);
    }
    if all || given("calls") {
        reports.push(flood(&size, server, "calls", MOST_TOGETHER).await);
    }
    if all || given("recovery") {
        reports.push(recovery(&size, server, "recovery", RECOVERING, size.recovering_events).await);
    }
    if all || given("outage") {
        reports.push(recovery(&size, server, "outage", size.outage, size.outage).await);
    }
    if all || given("watched") {
        reports.push(bystanders::watched(&size, server).await);
    }
    if all || given("changed") {
        reports.push(bystanders::changed(&size, server).await);
    }
    let missed: usize = reports.iter().map(|report| report.missed).sum();
    let lines: Vec<Value> = reports.into_iter().flat_map(|report| report.lines).collect();
    let seconds = began.elapsed().as_secs();
    let database = if server.is_some() { "postgres" } else { "sqlite" };
    println!(
        "{}",
        json!({ "bench": "fairness", "database": database, "short": given("short"), "seconds": seconds, "missed": missed, "lines": lines })
    );
    if missed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
