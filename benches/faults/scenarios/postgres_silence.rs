//! PostgreSQL stands still for longer than anybody waits for it, as when its machine is gone: nothing is answered, and no
//! connection ends. Then it goes on, and with it what it was asked before.

use std::time::Duration;

use shortkit_webhooks::clock;

use super::{
    Form, a_while, postgres,
    postgres_crash::{acknowledged_after, refused_with_503, slowest_refusal},
};
use crate::{
    report::Report,
    world::{LEASE, MAX_IN_FLIGHT, ORGANIZATIONS, World},
};

/// How long it stands still.
const SILENCE: Duration = Duration::from_secs(12);
/// A publish meanwhile is refused within this time: a commit is waited for, and perhaps a connection before it …
const REFUSED: Duration = Duration::from_secs(10);
/// … and accepted this long after the database goes on.
const BACK: Duration = Duration::from_secs(5);

pub(super) async fn play(form: Form) -> Result<Report, String> {
    let (postgres, url) = postgres().await?;
    let world = World::start(2, Some(&url), |_, launch| launch).await?;
    let load = world.load(8, Duration::from_millis(20));
    let silences = form.pick(1, 10);
    let mut back = Some(Duration::ZERO);
    for _ in 0..silences {
        tokio::time::sleep(a_while()).await;
        world.ledger.fault();
        postgres.freeze().await;
        tokio::time::sleep(SILENCE).await;
        postgres.thaw().await;
        let acknowledged = acknowledged_after(&world.ledger, clock::stopwatch(), 4 * BACK).await;
        back = acknowledged.and_then(|took| back.map(|longest| longest.max(took)));
    }
    load.stop().await;
    // Commits that were given up were done all the same: their leases run out.
    world.settle(2 * LEASE + Duration::from_secs(30)).await;
    let mut report = Report::of(&world).await;
    refused_with_503(&mut report, &world.ledger);
    report.repeats_at_most(MAX_IN_FLIGHT * ORGANIZATIONS.len() * world.nodes.len() * silences);
    report.within("the slowest refusal took", Some(slowest_refusal(&world.ledger)), REFUSED);
    report.within("acknowledged again after", back, BACK);
    Ok(report)
}
