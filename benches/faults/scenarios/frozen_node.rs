//! A node stands still for two leases, while another takes over, and then goes on as if nothing had happened.

use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use http::Method;
use shortkit_webhooks::clock;
use tokio::task::JoinSet;

use super::{Form, crash_loop::Overdue, postgres};
use crate::{
    report::Report,
    world::{LEASE, ORGANIZATIONS, World},
};

/// Events whose first attempt is on the wire when the node freezes.
const CAUGHT: usize = 8;
/// What the node logs, once a second, of results that come too late.
const FENCED: &str = "leases were lost before results were recorded";

pub(super) async fn play(_: Form) -> Result<Report, String> {
    let (_postgres, url) = postgres().await?;
    let mut world = World::start(2, Some(&url), |_, launch| launch).await?;
    let overdue = Overdue::watch(&url).await?;
    // The receiver answers after the node is frozen, and within the request timeout.
    world.receiver.manners.delay_ms.store(800, Ordering::Relaxed);
    let mut publishing = JoinSet::new();
    for index in 0..CAUGHT {
        let (ledger, caller) = (Arc::clone(&world.ledger), world.caller.clone());
        // The doors go round two nodes: even ones are the first's.
        publishing.spawn(async move { caller.publish(&ledger, 0, ORGANIZATIONS[index % 2]).await });
    }
    publishing.join_all().await;
    let began = clock::stopwatch();
    while world.ledger.arrivals() < CAUGHT && began.elapsed() < LEASE {
        world.ledger.arrived.notified().await;
    }
    world.ledger.fault();
    world.node(0).signal("STOP").await;
    world.caller.close(0);
    let frozen = clock::stopwatch();
    world.receiver.manners.delay_ms.store(0, Ordering::Relaxed);
    let load = world.load(2, Duration::from_millis(100));
    tokio::time::sleep(2 * LEASE).await;
    let taken_over = world.ledger.arrivals();
    world.node(0).signal("CONT").await;
    let (base, thawed) = (world.node(0).base.clone(), clock::stopwatch());
    tokio::time::sleep(Duration::from_secs(3)).await;
    load.stop().await;
    world.settle(LEASE).await;

    let mut report = Report::of(&world).await;
    let late = world.launches[0].logged(FENCED);
    report.notes.push(format!("frozen for {:.0} s; late results were fenced out", (thawed - frozen).as_secs_f64()));
    report.check(late > 0, || "no late result was fenced out".to_owned());
    report.check(taken_over >= 2 * CAUGHT, || "not everything was taken over while the node stood still".to_owned());
    report.repeats_at_most(CAUGHT);
    report.within("an expired lease was taken over after", overdue.longest().await, Duration::from_secs(2));
    report.failures.extend(twice_recorded(&world).await?);
    // The node is of use again.
    world.caller.open(0, &base);
    let answer = world.caller.publish(&world.ledger, 0, ORGANIZATIONS[0]).await;
    report.check(matches!(answer, Some((202, _))), || format!("the node that was frozen answers {answer:?}"));
    world.nodes.clear();
    Ok(report)
}

/// The deliveries that were caught have exactly two attempts, of which the first was interrupted.
async fn twice_recorded(world: &World) -> Result<Vec<String>, String> {
    let mut faults = Vec::new();
    let again: Vec<(u64, String)> = {
        let books = world.ledger.books();
        let second = books.arrivals.iter().filter(|arrival| arrival.attempt == 2);
        second.map(|arrival| (arrival.number, arrival.delivery_id.clone())).collect()
    };
    for (number, delivery_id) in again {
        let organization = world.ledger.books().published[&number].organization;
        let path = format!("{}/deliveries/{delivery_id}", world.webhook(organization));
        let answer = world.caller.call(1, Method::GET, organization, &path, "").await?;
        let log = &answer["data"]["attemptLog"];
        let lines = log.as_array().map_or(0, Vec::len);
        if lines != 2 || log[0]["statusCode"].is_number() || log[1]["statusCode"] != 200 {
            faults.push(format!("{delivery_id} has the log {log}"));
        }
    }
    Ok(faults)
}
