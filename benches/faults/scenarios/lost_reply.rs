//! The reply of a commit is lost, again and again: the database has done it, and the node never hears of it.

use std::time::Duration;

use shortkit_webhooks::clock;

use super::{Form, a_while, below, postgres, postgres_crash::refused_with_503};
use crate::{
    lossy_proxy::{Carried, LossyProxy, Then, Which},
    node::Launch,
    report::Report,
    world::{LEASE, World},
};

const NODES: usize = 2;
/// Whose reply is lost, and what follows, going round: each with each.
const WHICH: [Which; 4] = [Which::Keyed, Which::Together, Which::Result, Which::Together];
const THEN: [Then; 3] = [Then::Cut, Then::Silence, Then::Down];
/// The time without a way to the database.
const DOWN: Duration = Duration::from_secs(1);
/// What was leased by a commit that nobody heard of is delivered so long after its lease has run out.
const A_BIT: Duration = Duration::from_secs(10);

pub(super) async fn play(form: Form) -> Result<Report, String> {
    let (_postgres, url) = postgres().await?;
    let mut ways = Vec::new();
    for _ in 0..NODES {
        ways.push(LossyProxy::start(&url).await?);
    }
    let way = |index: usize, launch| Launch { database_url: ways[index].url.clone(), ..launch };
    let world = World::start(NODES, Some(&url), way).await?;
    let load = world.load_with_keys(8, Duration::from_millis(20));
    let losses = form.pick(4, 40);
    let mut lost = Carried::default();
    for turn in 0..losses {
        tokio::time::sleep(a_while()).await;
        let way = &ways[below(NODES as u64) as usize];
        let (which, then) = (WHICH[turn % WHICH.len()], THEN[turn % THEN.len()]);
        lost.add(way.lose(which, then).await?);
        world.ledger.fault();
        if matches!(then, Then::Down) {
            tokio::time::sleep(DOWN).await;
            way.mend();
        }
    }
    load.stop().await;
    let settling = clock::stopwatch();
    world.settle(2 * LEASE).await;
    let settled = settling.elapsed();
    let mut report = Report::of(&world).await;
    refused_with_503(&mut report, &world.ledger);
    // A result that is recorded is not sent once more, and one that is not is recorded while its lease lasts.
    report.repeats_at_most(0);
    report.within("everything had arrived after", Some(settled), LEASE + A_BIT);
    let Carried { events, keyed, results } = lost;
    report.check(keyed > 0 && results > 0, || "no reply was lost that told of a key, or of a result".to_owned());
    let carried = format!("{events} events ({keyed} published with a key) and {results} results");
    report.notes.push(format!("{losses} replies were lost, of commits with {carried}"));
    let again = world.ledger.books().asked_again;
    report.notes.push(format!("{again} publishes were asked for again with their keys"));
    report.check(again > 0, || "no publish was asked for again".to_owned());
    Ok(report)
}
