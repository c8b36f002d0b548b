//! Those who neither publish nor receive, and still cost something.

use std::time::Duration;

use super::{
    GROUPS, PACE, Report, Size,
    disturber::{Disturber, Role},
    stage::{Stage, group, keep_publishing},
    support::server::Server,
};

/// Live streams, and the organisations that they watch.
const WATCHERS: usize = 1_000;
const WATCHING: usize = 10;
/// Changes a second of one who changes a webhook all the time.
const CHANGES: u32 = 50;
/// Webhooks that are in use, in as many groups as there are, and events a second for them.
const CROWD: usize = 1_000;
const CROWD_PACE: u32 = 25;

/// Many watch what happens in other organisations.
pub(super) async fn watched(size: &Size, server: Option<&Server>) -> Report {
    let mut stage = Stage::new(server, &[]).await;
    let cpu = stage.service.cpu_secs();
    let without = stage.median(size.measure, PACE).await;
    let cpu = stage.service.cpu_secs() - cpu;
    let (base, key) = (stage.service.base.clone(), stage.service.service_key.clone());
    let role = Role::Watch { base, key, streams: WATCHERS, organizations: WATCHING };
    let _watchers = Disturber::start(&role).await;
    let before = stage.service.cpu_secs();
    let with = stage.median(size.measure, PACE).await;
    stage.report.note("watched", "CPU s", cpu, stage.service.cpu_secs() - before);
    stage.report.latencies("watched", without, with, 2.0);
    stage.end().await
}

/// One organisation changes its webhooks all the time, while a thousand of others are in use.
pub(super) async fn changed(size: &Size, server: Option<&Server>) -> Report {
    let mut stage = Stage::new(server, &[]).await;
    let crowd = stage.caller("crowd").await;
    for number in 0..CROWD {
        crowd.webhook(format!("{}/loud", stage.base), &group(number % GROUPS)).await;
    }
    let _publishing = keep_publishing(crowd, CROWD_PACE, |number| group(number % GROUPS));
    let cpu = stage.service.cpu_secs();
    let without = stage.median(size.measure, PACE).await;
    let cpu = stage.service.cpu_secs() - cpu;
    let restless = stage.caller("restless").await;
    let id = restless.webhook(format!("{}/loud", stage.base), "export.ready").await;
    let changing = tokio::spawn(async move {
        let mut ticks = tokio::time::interval(Duration::from_secs(1) / CHANGES);
        for number in 0_u64.. {
            ticks.tick().await;
            restless.describe(id.clone(), number.to_string()).await;
        }
    });
    let before = stage.service.cpu_secs();
    let with = stage.median(size.measure, PACE).await;
    changing.abort();
    stage.report.note("changed", "CPU s", cpu, stage.service.cpu_secs() - before);
    stage.report.latencies("changed", without, with, 2.0);
    stage.end().await
}
