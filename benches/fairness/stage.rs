//! The service and those who are not to be disturbed.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use tokio::task::JoinSet;

use super::{
    GROUPS, PACE,
    caller::Caller,
    receiver::{Manners, Recovery, nanoseconds, now, serve},
    report::{Latency, Report},
    support::{load::percentile_ms, server::Server, service::Service},
};

/// Not measured: connections are made, caches filled.
pub(crate) const WARM_UP: Duration = Duration::from_secs(2);
/// What has not arrived this long after its run counts as lost.
const PATIENCE: Duration = Duration::from_secs(60);
/// Who disturbs takes this many times as long as its pace says. In step with those who are measured, it would meet all of
/// them at the same moment of theirs, which is another one in each run.
const OUT_OF_STEP: f64 = 37.0 / 36.0;
/// Times that each is measured.
const ROUNDS: usize = 3;

/// Everything a scenario needs.
pub(crate) struct Stage<'a> {
    pub(crate) service: Arc<Service>,
    server: Option<&'a Server>,
    /// None on SQLite.
    database_url: Option<String>,
    /// Goes last: the service works in it.
    _directory: tempfile::TempDir,
    pub(crate) manners: Arc<Manners>,
    pub(crate) base: String,
    others: Caller,
    runs: u64,
    pub(crate) report: Report,
}

impl<'a> Stage<'a> {
    pub(crate) async fn new(server: Option<&'a Server>, arguments: &[&str]) -> Self {
        let manners = Manners::new(now(), Duration::ZERO, Recovery::default());
        let base = serve(&manners).await;
        // Of its own, as each has its own keys.
        let database_url = Server::database(server).await;
        let groups: Vec<String> = (0..GROUPS).map(group).collect();
        let types = format!("content.ready,content.errored,export.ready,{}", groups.join(","));
        let arguments = [&["--log", "error", "--event-types", &types], arguments].concat();
        let directory = tempfile::tempdir().expect("a directory");
        let service = Arc::new(Service::start(directory.path(), database_url.as_deref(), &arguments).await);
        let others = Caller::connect(&service.base, &service.service_key, "others").await;
        for _ in 0..4 {
            others.webhook(format!("{base}/counted"), "content.ready").await;
        }
        let report = Report::default();
        let mut stage =
            Self { service, server, database_url, _directory: directory, manners, base, others, runs: 0, report };
        stage.measure(WARM_UP, PACE).await;
        stage
    }

    /// What was found; nothing else is left.
    pub(crate) async fn end(self) -> Report {
        drop(self.service);
        if let (Some(server), Some(url)) = (self.server, self.database_url) {
            server.remove(&url).await;
        }
        self.report
    }

    pub(crate) async fn caller(&self, organization: &str) -> Caller {
        Caller::connect(&self.service.base, &self.service.service_key, organization).await
    }

    /// Several measurements; the medians of what they found.
    pub(crate) async fn median(&mut self, time: Duration, pace: u32) -> Latency {
        Latency::median(&self.rounds(time, pace).await)
    }

    pub(crate) async fn rounds(&mut self, time: Duration, pace: u32) -> Vec<Latency> {
        let mut found = Vec::new();
        for _ in 0..ROUNDS {
            found.push(self.measure(time, pace).await);
        }
        found
    }

    /// Publishes for `time` and measures what arrives.
    pub(crate) async fn measure(&mut self, time: Duration, pace: u32) -> Latency {
        self.runs += 1;
        let (run, start) = (self.runs, self.manners.start);
        self.manners.arrived.expect(run);
        let published = Arc::new(AtomicUsize::new(0));
        let mut calls = JoinSet::new();
        let mut ticks = tokio::time::interval(Duration::from_secs(1) / pace);
        let began = now();
        let mut number = 0;
        while began.elapsed() < time {
            ticks.tick().await;
            number += 1;
            // Each in a task of its own: one that takes long does not hold up the next, and is measured with its wait.
            let (others, published) = (self.others.clone(), Arc::clone(&published));
            calls.spawn(async move {
                let data =
                    format!("{{\"run\":{run},\"at\":{},\"filler\":\"{}\"}}", nanoseconds(start), "x".repeat(450));
                if others.publish(number, "content.ready", data).await.is_ok() {
                    published.fetch_add(4, Ordering::Relaxed);
                }
            });
        }
        while calls.join_next().await.is_some() {}
        let published = published.load(Ordering::Relaxed);
        let waiting = now();
        let mut latencies = self.manners.arrived.latencies();
        while latencies.len() < published && waiting.elapsed() < PATIENCE {
            tokio::time::sleep(Duration::from_millis(50)).await;
            latencies = self.manners.arrived.latencies();
        }
        latencies.sort_unstable();
        let lost = published.saturating_sub(latencies.len());
        let [p50_ms, p99_ms] = [50, 99].map(|percent| percentile_ms(&latencies, percent));
        Latency { p50_ms, p99_ms, count: latencies.len(), lost }
    }
}

pub(crate) fn group(number: usize) -> String {
    format!("slow.g{number}")
}

/// Publishes at a pace until told to stop, or nearly: see [`OUT_OF_STEP`].
pub(crate) fn keep_publishing(
    caller: Caller,
    pace: u32,
    event: impl Fn(usize) -> String + Send + 'static,
) -> Arc<AtomicBool> {
    let stop = Arc::new(AtomicBool::new(false));
    let stopped = Arc::clone(&stop);
    tokio::spawn(async move {
        let mut ticks = tokio::time::interval(Duration::from_secs(1).mul_f64(OUT_OF_STEP) / pace);
        let mut number = 0;
        while !stopped.load(Ordering::Relaxed) {
            ticks.tick().await;
            number += 1;
            let (caller, event) = (caller.clone(), event(number));
            tokio::spawn(async move { caller.publish(number, &event, "{}".to_owned()).await });
        }
    });
    stop
}
