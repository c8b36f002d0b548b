//! The process ends at each step of an event's way, with that one event under way.

use std::time::Duration;

use shortkit_webhooks::clock;
use tokio::task::JoinSet;

use super::Form;
use crate::{
    ledger::Outcome,
    postgres::Postgres,
    report::Report,
    world::{LEASE, ORGANIZATIONS, World},
};

/// How the event that is under way comes to the step.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    Published,
    Claimed,
    /// With so many others that it is stored in parts.
    Together,
}

/// The steps, as `failpoint::reached` names them.
const STEPS: [(&str, Way); 10] = [
    ("publish before commit", Way::Published),
    ("publish after commit", Way::Published),
    ("claim before commit", Way::Claimed),
    ("claim after commit", Way::Claimed),
    ("post before", Way::Published),
    ("post after", Way::Published),
    ("record before commit", Way::Published),
    ("record after commit", Way::Published),
    ("part before commit", Way::Together),
    ("part after commit", Way::Together),
];
/// Published together.
const TOGETHER: usize = 200;
/// Names the step to a process.
const CRASH_AT: &str = "SHORTKIT_CRASH_AT";
/// The third event meets the crash: the first two prove that it is not always there.
const COUNT: usize = 3;
/// More are not published in waiting for it.
const MAX_EVENTS: usize = 100;
/// Published after the crash.
const AFTERWARDS: usize = 3;

pub(super) async fn on_sqlite(_: Form) -> Result<Report, String> {
    let mut all = Report::all_fine();
    for (step, way) in STEPS {
        all.add(step, play(step, way, None).await.unwrap_or_else(Report::failed));
    }
    Ok(all)
}

pub(super) async fn on_postgres(form: Form) -> Result<Report, String> {
    let postgres = Postgres::start().await?;
    let mut playing = JoinSet::new();
    // At the same time: each waits for a lease to run out.
    for (step, way) in STEPS.into_iter().step_by(form.pick(3, 1)) {
        let url = postgres.database().await?;
        playing.spawn(async move { (step, play(step, way, Some(&url)).await.unwrap_or_else(Report::failed)) });
    }
    let mut all = Report::all_fine();
    for (step, report) in playing.join_all().await {
        all.add(step, report);
    }
    Ok(all)
}

async fn play(step: &str, way: Way, url: Option<&str>) -> Result<Report, String> {
    let nodes = if url.is_some() { 2 } else { 1 };
    let mut world = World::start(nodes, url, |index, mut launch| {
        if way == Way::Claimed {
            launch.retry_schedule(&format!("50ms{}", ",1s".repeat(9)));
        }
        if index == 0 { launch.env(CRASH_AT, &format!("{step}:{COUNT}")) } else { launch }
    })
    .await?;
    let mut crashed = false;
    for _ in 0..MAX_EVENTS {
        // Always at the node that is to crash, and one at a time.
        world.caller.publish(&world.ledger, 0, ORGANIZATIONS[0]).await;
        if way == Way::Together {
            world.caller.publish(&world.ledger, 0, ORGANIZATIONS[1]).await;
            let together = world.caller.publish_together(&world.ledger, 0, ORGANIZATIONS[0], TOGETHER).await;
            // Once the first part is stored, so will be all.
            together.into_iter().for_each(|number| world.ledger.end(number, Outcome::Acknowledged));
        }
        crashed = alone(&mut world).await;
        if crashed {
            break;
        }
    }
    if !crashed {
        return Err(format!("the process never came to `{step}`"));
    }
    world.kill(0).await;
    world.launches[0].envs.retain(|(name, _)| name != CRASH_AT);
    world.restart(0).await?;
    for _ in 0..AFTERWARDS {
        world.caller.publish(&world.ledger, 0, ORGANIZATIONS[1]).await;
    }
    world.settle(2 * LEASE).await;
    let mut report = Report::of(&world).await;
    report.repeats_at_most(if way == Way::Together { TOGETHER } else { 1 });
    Ok(report)
}

/// Waits until the event is through, or the first node has ended: true.
async fn alone(world: &mut World) -> bool {
    let began = clock::stopwatch();
    while began.elapsed() < LEASE {
        if let Some(node) = &mut world.nodes[0]
            && node.ended(Duration::from_millis(10)).await.is_some()
        {
            return true;
        }
        if world.ledger.missing() == 0 && world.stats().await.is_ok_and(|stats| stats.is_settled()) {
            return false;
        }
    }
    false
}
