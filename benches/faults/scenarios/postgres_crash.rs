//! PostgreSQL ends at once, as by `pg_ctl stop -m immediate`, and comes back.

use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};

use shortkit_webhooks::clock;

use super::{Form, a_while, postgres};
use crate::{
    ledger::{Ledger, Outcome},
    report::Report,
    world::{LEASE, MAX_IN_FLIGHT, ORGANIZATIONS, World},
};

/// A publish without a database is refused within this time …
const REFUSED: Duration = Duration::from_secs(5);
/// … and accepted this long after the database is back.
const BACK: Duration = Duration::from_secs(5);

pub(super) async fn play(form: Form) -> Result<Report, String> {
    let (mut postgres, url) = postgres().await?;
    let world = World::start(2, Some(&url), |_, launch| launch).await?;
    let load = world.load(8, Duration::from_millis(20));
    let crashes = form.pick(2, 20);
    let (mut back, mut slowest) = (Some(Duration::ZERO), Duration::ZERO);
    for turn in 0..crashes {
        tokio::time::sleep(a_while()).await;
        world.ledger.fault();
        postgres.crash().await;
        // Sometimes long enough for calls to give up, sometimes hardly noticed.
        tokio::time::sleep(if turn % 2 == 0 { Duration::from_secs(8) } else { Duration::ZERO }).await;
        postgres.restart().await?;
        let again = clock::stopwatch();
        let acknowledged = acknowledged_after(&world.ledger, again, 4 * BACK).await;
        back = acknowledged.and_then(|took| back.map(|longest| longest.max(took)));
        slowest = slowest.max(slowest_refusal(&world.ledger));
    }
    load.stop().await;
    // A commit whose answer was lost leaves leases that nobody works on: they run out.
    world.settle(2 * LEASE + Duration::from_secs(30)).await;
    let mut report = Report::of(&world).await;
    refused_with_503(&mut report, &world.ledger);
    // Results that could not be recorded in time, or whose commit went unanswered.
    report.repeats_at_most(MAX_IN_FLIGHT * ORGANIZATIONS.len() * world.nodes.len() * crashes);
    report.within("the slowest refusal took", Some(slowest), REFUSED);
    report.within("acknowledged again after", back, BACK);
    Ok(report)
}

/// How long after `moment` a publish is acknowledged; none when that takes longer than `patience`.
pub(super) async fn acknowledged_after(ledger: &Ledger, moment: Instant, patience: Duration) -> Option<Duration> {
    while moment.elapsed() < patience {
        if let Some(took) = ledger.acknowledged_after(moment) {
            return Some(took);
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    None
}

pub(super) fn slowest_refusal(ledger: &Ledger) -> Duration {
    let books = ledger.books();
    let refused = books.published.values().filter(|publish| !matches!(publish.outcome, Outcome::Acknowledged));
    refused.map(|publish| publish.ended - publish.began).max().unwrap_or_default()
}

/// Some publishes were refused, and all of those with 503.
pub(super) fn refused_with_503(report: &mut Report, ledger: &Ledger) {
    let books = ledger.books();
    let statuses = books.published.values().filter_map(|publish| match publish.outcome {
        Outcome::Refused(status) => Some(status),
        _ => None,
    });
    let statuses: BTreeSet<u16> = statuses.collect();
    report.check(statuses.iter().all(|status| *status == 503), || format!("refused with {statuses:?}, not only 503"));
    report.check(statuses.contains(&503), || "no publish was ever refused".to_owned());
}
