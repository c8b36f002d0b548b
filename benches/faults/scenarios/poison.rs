//! An event that ends the process each time that it is attempted.

use std::time::Duration;

use http::Method;
use shortkit_webhooks::clock;

use super::Form;
use crate::{
    report::Report,
    world::{LEASE, ORGANIZATIONS, Stats, World},
};

/// Attempts that its schedule has.
const ATTEMPTS: u64 = 3;
/// The process is not started more often than this.
const MAX_STARTS: usize = 10;
/// Published once the event has ended.
const AFTERWARDS: usize = 3;

/// On SQLite, where a start takes over at once what the process before had leased.
pub(super) async fn play(_: Form) -> Result<Report, String> {
    let mut world = World::start(1, None, |_, mut launch| {
        launch.retry_schedule("0s,1s,1s");
        launch.crash_at("post before", 1)
    })
    .await?;
    world.caller.publish(&world.ledger, 0, ORGANIZATIONS[0]).await;
    let (mut crashes, mut starts) = (0, 1);
    while ended(&mut world).await? {
        crashes += 1;
        world.kill(0).await;
        // Until it stays long enough to say where it listens: the attempt may end it before.
        while starts < MAX_STARTS && world.nodes[0].is_none() {
            starts += 1;
            crashes += u64::from(world.restart(0).await.is_err());
        }
        if starts == MAX_STARTS {
            return Err(format!("it still ends the process: {}", world.launches[0].last_words()));
        }
    }
    let path = format!("{}/deliveries", world.webhook(ORGANIZATIONS[0]));
    let listed = world.caller.call(0, Method::GET, ORGANIZATIONS[0], &path, "").await?;
    let delivery = &listed["data"][0];
    let path = format!("{path}/{}", delivery["id"].as_str().unwrap_or_default());
    let detail = world.caller.call(0, Method::GET, ORGANIZATIONS[0], &path, "").await?;
    world.kill(0).await;
    world.launches[0].crash_no_more();
    world.restart(0).await?;
    for _ in 0..AFTERWARDS {
        world.caller.publish(&world.ledger, 0, ORGANIZATIONS[1]).await;
    }
    let began = clock::stopwatch();
    while world.ledger.sums().received < AFTERWARDS && began.elapsed() < LEASE {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let mut report = Report { sums: world.ledger.sums(), integrity: "ok".to_owned(), ..Report::default() };
    // It was acknowledged and has not arrived, but is not lost: it ended, and everybody can see how.
    report.failures.extend(report.sums.violations.clone());
    report.check(delivery["status"] == "failed", || format!("it has not ended as failed: {delivery}"));
    report.sums.lost = report.sums.lost.saturating_sub(1);
    let (lost, received) = (report.sums.lost, report.sums.received);
    report.check(lost == 0, || format!("{lost} other events were lost"));
    report.check(received == AFTERWARDS, || format!("{received} of {AFTERWARDS} events arrived after it had ended"));
    report.check(crashes == ATTEMPTS, || format!("it ended the process {crashes} times"));
    report.check(delivery["attempts"] == ATTEMPTS, || format!("attempts that were counted: {}", delivery["attempts"]));
    let log = detail["data"]["attemptLog"].as_array().cloned().unwrap_or_default();
    let interrupted = log.iter().filter(|entry| entry["error"] == "The attempt was interrupted").count() as u64;
    report.check(interrupted == ATTEMPTS, || format!("what is told of its attempts: {log:?}"));
    report.check_file(&world).await;
    report.notes.push(format!("it ended as failed after {crashes} crashes"));
    Ok(report)
}

/// Whether the process ends, or the event has: false.
async fn ended(world: &mut World) -> Result<bool, String> {
    let began = clock::stopwatch();
    while began.elapsed() < LEASE {
        if let Some(node) = &mut world.nodes[0]
            && node.ended(Duration::from_millis(10)).await.is_some()
        {
            return Ok(true);
        }
        if matches!(world.stats().await, Ok(Stats { failed: 1.., .. })) {
            return Ok(false);
        }
    }
    Err(format!("neither has ended: {}", world.launches[0].last_words()))
}
