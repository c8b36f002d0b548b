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
    /// With so many others that it is stored in parts; all of them are accepted.
    Together,
    /// With so many others that they are kept in several pieces, before the last; none of them is accepted.
    Unaccepted,
    /// The same, at the last piece; all of them are.
    Accepted,
}

/// The steps, as `failpoint::reached` names them.
const STEPS: [(&str, Way); 13] = [
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
    ("piece before commit", Way::Unaccepted),
    ("piece after commit", Way::Unaccepted),
    ("piece after commit", Way::Accepted),
];
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
    let of = |step: &str| form == Form::Long || step.ends_with("after commit");
    for (step, way) in STEPS.into_iter().filter(|(step, _)| of(step)) {
        let url = postgres.database().await?;
        playing.spawn(async move { (step, play(step, way, Some(&url)).await.unwrap_or_else(Report::failed)) });
    }
    let mut all = Report::all_fine();
    for (step, report) in playing.join_all().await {
        all.add(step, report);
    }
    Ok(all)
}

impl Way {
    /// How many are published together, if any.
    const fn together(self) -> u64 {
        match self {
            Self::Published | Self::Claimed => 0,
            Self::Together => 200,
            Self::Unaccepted | Self::Accepted => 1_000,
        }
    }

    /// Which time the step is the one. The first two events that meet it prove that the crash is not always there; and a
    /// thousand events are four pieces.
    const fn count(self) -> usize {
        if matches!(self, Self::Accepted) { 4 } else { 3 }
    }

    /// Whether all that are published together are accepted once the step has come.
    const fn accepts(self) -> bool {
        matches!(self, Self::Together | Self::Accepted)
    }
}

async fn play(step: &str, way: Way, url: Option<&str>) -> Result<Report, String> {
    let nodes = if url.is_some() { 2 } else { 1 };
    let mut world = World::start(nodes, url, |index, mut launch| {
        if way == Way::Claimed {
            launch.retry_schedule(&format!("50ms{}", ",1s".repeat(9)));
        }
        if index == 0 { launch.crash_at(step, way.count()) } else { launch }
    })
    .await?;
    let (mut crashed, mut together) = (false, 0..0);
    for _ in 0..MAX_EVENTS {
        // Always at the node that is to crash, and one at a time.
        world.caller.publish(&world.ledger, 0, ORGANIZATIONS[0]).await;
        if way.together() > 0 {
            world.caller.publish(&world.ledger, 0, ORGANIZATIONS[1]).await;
            together = world.ledger.begin(ORGANIZATIONS[0], way.together());
            world.caller.publish_again(&world.ledger, 0, ORGANIZATIONS[0], together.clone(), None).await;
        }
        if way.accepts() {
            world.ledger.end(together.clone(), Outcome::Acknowledged);
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
    world.launches[0].crash_no_more();
    world.restart(0).await?;
    for _ in 0..AFTERWARDS {
        world.caller.publish(&world.ledger, 0, ORGANIZATIONS[1]).await;
    }
    world.settle(2 * LEASE).await;
    let kept = world.kept().await?;
    let mut report = Report::of(&world).await;
    report.check(kept == 0, || format!("{kept} parts of what was published together are left"));
    if way == Way::Unaccepted {
        let arrived = world.ledger.arrived_of(together);
        report.check(arrived == 0, || format!("{arrived} of {} events arrived unaccepted", way.together()));
    }
    report.repeats_of_each_at_most(1);
    report.repeats_at_most(if way.accepts() { way.together() as usize } else { 1 });
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
