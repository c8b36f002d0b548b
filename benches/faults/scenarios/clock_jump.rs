//! The clock of one node jumps by two hours, one way and then the other.

use std::{
    collections::HashMap,
    path::PathBuf,
    sync::atomic::Ordering,
    time::{Duration, Instant},
};

use super::{Form, postgres};
use crate::{
    report::Report,
    world::{LEASE, World},
};

/// An attempt may come so much earlier than planned.
const TOLERATED: Duration = Duration::from_secs(5);

pub(super) async fn play(form: Form) -> Result<Report, String> {
    let library = faketime().ok_or("no libfaketime; install the package libfaketime")?;
    let (_postgres, url) = postgres().await?;
    let folder = tempfile::tempdir().map_err(|error| error.to_string())?;
    let clock_file = folder.path().join("clock");
    let set = |offset: &str| std::fs::write(&clock_file, offset).map_err(|error| error.to_string());
    set("+0")?;
    let wait = form.pick(Duration::from_secs(8), Duration::from_secs(20));
    let schedule = format!("0s{}", format!(",{}s", wait.as_secs()).repeat(3));
    let world = World::start(3, Some(&url), |index, mut launch| {
        launch.retry_schedule(&schedule);
        if index != 1 {
            return launch;
        }
        launch
            .env("LD_PRELOAD", &library.display().to_string())
            .env("FAKETIME_TIMESTAMP_FILE", &clock_file.display().to_string())
            .env("FAKETIME_NO_CACHE", "1")
            // The time of day jumps; what only ever runs forward does not.
            .env("FAKETIME_DONT_FAKE_MONOTONIC", "1")
            .env("DONT_FAKE_MONOTONIC", "1")
    })
    .await?;
    // Every delivery is refused once, so that each has a second attempt to wait for.
    world.receiver.manners.refused_attempts.store(1, Ordering::Relaxed);
    let load = world.load(3, Duration::from_millis(100));
    for offset in ["+7200", "-7200", "+0"] {
        world.ledger.fault();
        set(offset)?;
        tokio::time::sleep(wait + Duration::from_secs(4)).await;
    }
    load.stop().await;
    world.settle(LEASE + 2 * wait).await;
    let mut report = Report::of(&world).await;
    report.repeats_at_most(0);
    let attempts = Attempts::of(&world);
    report.check(attempts.storms == 0, || format!("{} deliveries came more than twice", attempts.storms));
    let early = wait.saturating_sub(attempts.shortest);
    report.notes.push(format!("waits of {wait:?} lasted from {:?} to {:?}", attempts.shortest, attempts.longest));
    report.check(early <= TOLERATED, || format!("an attempt came {early:?} early"));
    let late = attempts.longest.saturating_sub(wait);
    report.check(late <= TOLERATED, || format!("an attempt came {late:?} late"));
    Ok(report)
}

/// The waits between first and second attempts, as the receiver saw them.
struct Attempts {
    shortest: Duration,
    longest: Duration,
    /// Deliveries with more requests than two.
    storms: usize,
}

impl Attempts {
    fn of(world: &World) -> Self {
        let books = world.ledger.books();
        let mut requests: HashMap<&str, Vec<Instant>> = HashMap::new();
        for arrival in &books.arrivals {
            requests.entry(&arrival.delivery_id).or_default().push(arrival.at);
        }
        let waits = || requests.values().filter(|times| times.len() > 1).map(|times| times[1] - times[0]);
        Self {
            shortest: waits().min().unwrap_or_default(),
            longest: waits().max().unwrap_or_default(),
            storms: requests.values().filter(|times| times.len() > 2).count(),
        }
    }
}

/// The library that lies about the time.
fn faketime() -> Option<PathBuf> {
    let folders = std::fs::read_dir("/usr/lib").ok()?.flatten().map(|entry| entry.path());
    let candidates = folders.map(|folder| folder.join("faketime/libfaketimeMT.so.1"));
    candidates.into_iter().find(|path| path.exists())
}
