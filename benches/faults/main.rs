//! What the service survives: `cargo bench --bench faults [-- short] [SCENARIO…]`; `-- list` names the scenarios.
//!
//! Real processes of the service on databases of their own, publishers, and a receiver that verifies and remembers
//! everything, while something goes wrong on purpose. Whatever it is: what was acknowledged arrives, nothing that was
//! not published or is another tenant's arrives, of what is published together all arrives or nothing, every signature
//! verifies, a repeat carries the same delivery id.
//! `short` plays a few faults of each kind, several scenarios at a time, as the test command does. Prints a table for
//! people and one JSON line for machines; the exit code is 0 only when nothing failed. What cannot be played here is
//! named, which is a failure only for what was asked for by name.
//!
//! Needs PostgreSQL's programs in /usr/lib/postgresql, libfaketime, and root (or sudo) to mount a disk of 2 MB. The
//! scenarios `crash-steps-…` and `poison` need the feature `failpoints`: `cargo bench --features failpoints --bench faults`.

mod ledger;
mod load;
mod lossy_proxy;
mod node;
mod receiver;
mod report;
mod scenarios;
#[path = "../support/mod.rs"]
mod support;
mod world;

use std::process::ExitCode;

use futures_util::{StreamExt, stream};
use serde_json::{Value, json};
use shortkit_webhooks::clock;

use self::{
    report::Report,
    scenarios::{Form, SCENARIOS, Scenario},
    support::{postgres, told_to_end},
};

/// Scenarios of the short form that run at a time: most of each is waiting.
const AT_A_TIME: usize = 4;
/// These take longest then, and so begin first: none of them is left to run alone at the end.
const LONGEST: [&str; 6] =
    ["frozen-node", "lost-reply", "clock-jump", "crash-loop-postgres", "crash-steps-postgres", "postgres-silence"];

#[tokio::main]
async fn main() -> ExitCode {
    // Cargo itself adds `--bench`.
    let words: Vec<String> = std::env::args().skip(1).filter(|word| word != "--bench").collect();
    let form = if words.iter().any(|word| word == "short") { Form::Short } else { Form::Long };
    let names: Vec<&str> = words.iter().map(String::as_str).filter(|word| *word != "short").collect();
    let unknown = names.iter().find(|name| SCENARIOS.iter().all(|scenario| scenario.name != **name));
    if let Some(unknown) = unknown {
        let known = SCENARIOS.iter().map(|scenario| format!("  {:22} {}", scenario.name, scenario.about));
        eprintln!("{unknown} is no scenario; these are:\n{}", known.collect::<Vec<_>>().join("\n"));
        return ExitCode::from(2);
    }
    let _ = rustls::crypto::ring::default_provider().install_default();
    let chosen = SCENARIOS.iter().filter(|scenario| names.is_empty() || names.contains(&scenario.name)).collect();
    tokio::select! {
        passed = play(chosen, form, !names.is_empty()) => if passed { ExitCode::SUCCESS } else { ExitCode::FAILURE },
        () = told_to_end() => ExitCode::from(130),
    }
}

/// Plays the scenarios and prints what they came to; true when all passed, and were played if they were asked for by name.
async fn play(mut chosen: Vec<&'static Scenario>, form: Form, by_name: bool) -> bool {
    if form == Form::Short {
        let place = |name| LONGEST.iter().position(|longest| *longest == name);
        chosen.sort_by_key(|scenario| place(scenario.name).unwrap_or(LONGEST.len()));
    }
    let begin = |scenario: &'static Scenario| {
        tokio::spawn(async move {
            let started = clock::stopwatch();
            let report = (scenario.play)(form).await.unwrap_or_else(Report::failed);
            (scenario.name, report, started.elapsed())
        })
    };
    let at_a_time = if form == Form::Short { AT_A_TIME } else { 1 };
    let mut playing = stream::iter(chosen).map(begin).buffer_unordered(at_a_time);
    let mut reports = Vec::new();
    while let Some(played) = playing.next().await {
        let (name, report, took) = match played {
            Ok(played) => played,
            Err(error) => ("?", Report::failed(error.to_string()), std::time::Duration::ZERO),
        };
        println!("{name}: {} in {:.0} s", report.verdict(), took.as_secs_f64());
        report.notes.iter().for_each(|note| println!("  {note}"));
        report.failures.iter().for_each(|failure| println!("  FAILED: {failure}"));
        reports.push((name, report));
    }
    let order = |name: &str| SCENARIOS.iter().position(|scenario| scenario.name == name);
    reports.sort_by_key(|(name, _)| order(name));
    println!("\n{}", Report::header());
    reports.iter().for_each(|(name, report)| println!("{}", report.row(name)));
    let results: Vec<Value> = reports.iter().map(|(name, report)| report.json(name)).collect();
    println!(
        "{}",
        json!({ "bench": "faults", "form": if form == Form::Short { "short" } else { "long" }, "results": results })
    );
    let missed = |report: &Report| by_name && report.impossible;
    for (name, report) in reports.iter().filter(|(_, report)| missed(report)) {
        eprintln!("{name} was asked for by name, and {}", report.notes.join("; "));
    }
    reports.iter().all(|(_, report)| report.passed() && !missed(report))
}
