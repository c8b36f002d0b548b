//! SIGTERM under load: nothing lost, nothing twice.

use std::time::Duration;

use shortkit_webhooks::clock;

use super::{Form, a_while, postgres};
use crate::{report::Report, world::World};

/// A stop takes at most this long.
const STOP: Duration = Duration::from_secs(30);
/// Together they publish more than a node delivers, so that a stop finds publishes in the middle, every place on the wire
/// taken, and more waiting for one …
const PUBLISHERS: usize = 16;
const PAUSE: Duration = Duration::from_millis(10);
/// … which is all delivered within this time, before the next stop.
const CAUGHT_UP: Duration = Duration::from_secs(60);

pub(super) async fn on_sqlite(form: Form) -> Result<Report, String> {
    play(form, World::start(1, None, |_, launch| launch).await?).await
}

pub(super) async fn on_postgres(form: Form) -> Result<Report, String> {
    let (_postgres, url) = postgres().await?;
    play(form, World::start(2, Some(&url), |_, launch| launch).await?).await
}

async fn play(form: Form, mut world: World) -> Result<Report, String> {
    // Slow enough that some attempts are always on the wire.
    world.receiver.manners.delay_ms.store(100, std::sync::atomic::Ordering::Relaxed);
    let (mut longest, mut wrong) = (Duration::ZERO, Vec::new());
    for turn in 0..form.pick(3, 20) {
        let load = world.load(PUBLISHERS, PAUSE);
        tokio::time::sleep(a_while()).await;
        let index = turn % world.nodes.len();
        world.ledger.fault();
        let stopping = clock::stopwatch();
        // Publishers still call it: what it answers with a 2xx until the end is acknowledged like any other.
        world.node(index).signal("TERM").await;
        let ended = match world.nodes[index].as_mut() {
            Some(node) => node.ended(2 * STOP).await,
            None => None,
        };
        world.caller.close(index);
        longest = longest.max(stopping.elapsed());
        if !ended.is_some_and(|status| status.success()) {
            wrong.push(format!("a stop ended with {ended:?}"));
        }
        world.restart(index).await?;
        load.stop().await;
        world.settle(CAUGHT_UP).await;
    }
    let mut report = Report::of(&world).await;
    report.repeats_at_most(0);
    report.failures.extend(wrong);
    report.within("the longest stop took", Some(longest), STOP);
    Ok(report)
}
