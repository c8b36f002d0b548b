//! SQLite on a disk that fills up.

use std::{
    path::Path,
    time::{Duration, Instant},
};

use shortkit_webhooks::clock;
use tempfile::TempDir;
use tokio::process::Command;

use super::Form;
use crate::{
    ledger::{Ledger, Outcome},
    postgres::is_root,
    report::Report,
    world::{World, sqlite_url},
};

/// So long after the disk has room again everything goes on.
const RESUMED: Duration = Duration::from_secs(10);

pub(super) async fn play(form: Form) -> Result<Report, String> {
    let disk = match Disk::mount().await {
        // Not in every container: that must not stand in the way of a change, but it is no proof either.
        Err(why) if form == Form::Short => return Ok(Report::impossible(why)),
        mounted => mounted?,
    };
    let mut world = World::start(1, Some(&sqlite_url(disk.directory.path())), |_, launch| launch).await?;
    let load = world.load(4, Duration::from_millis(5));
    let patience = Duration::from_secs(120);
    let full = until(patience, || refused(&world.ledger) >= 1).await;
    if !full {
        return Err("no publish was refused, so the disk never filled up".to_owned());
    }
    world.ledger.fault();
    // While it stays full, publishers go on asking.
    let asked = refused(&world.ledger);
    tokio::time::sleep(form.pick(Duration::from_secs(3), Duration::from_secs(30))).await;
    let while_full = refused(&world.ledger) - asked;
    disk.resize("256m").await?;
    let enlarged = clock::stopwatch();
    until(3 * RESUMED, || world.ledger.acknowledged_after(enlarged).is_some()).await;
    let resumed = world.ledger.acknowledged_after(enlarged);
    let before = acknowledged_before(&world.ledger, enlarged);
    until(3 * RESUMED, || arrived(&world.ledger, &before)).await;
    let caught_up = arrived(&world.ledger, &before).then(|| enlarged.elapsed());
    tokio::time::sleep(Duration::from_secs(1)).await;
    load.stop().await;
    world.settle(Duration::from_secs(60)).await;
    // What was acknowledged since must be on the disk, and not in a transaction that never ended.
    world.kill(0).await;
    world.restart(0).await?;
    world.settle(Duration::from_secs(60)).await;
    let mut report = Report::of(&world).await;
    report.check(while_full > 0, || "nothing was refused while the disk was full".to_owned());
    report.notes.push(format!("{} events were refused, {while_full} of them while it stayed full", asked + while_full));
    let stored = refused_and_received(&world.ledger);
    report.check(stored == 0, || format!("{stored} events were refused and received nevertheless"));
    report.within("acknowledged again after", resumed, RESUMED);
    report.within("everything acknowledged before arrived after", caught_up, RESUMED);
    drop(world);
    disk.unmount().await;
    Ok(report)
}

fn refused(ledger: &Ledger) -> usize {
    let books = ledger.books();
    books.published.values().filter(|publish| matches!(publish.outcome, Outcome::Refused(_))).count()
}

fn refused_and_received(ledger: &Ledger) -> usize {
    let books = ledger.books();
    let refused =
        |number| matches!(books.published.get(&number).map(|publish| publish.outcome), Some(Outcome::Refused(_)));
    books.arrivals.iter().filter(|arrival| refused(arrival.number)).count()
}

fn acknowledged_before(ledger: &Ledger, moment: Instant) -> Vec<u64> {
    let books = ledger.books();
    let before = books.published.iter().filter(|(_, publish)| publish.outcome == Outcome::Acknowledged);
    before.filter(|(_, publish)| publish.ended <= moment).map(|(number, _)| *number).collect()
}

fn arrived(ledger: &Ledger, numbers: &[u64]) -> bool {
    let books = ledger.books();
    let arrived: std::collections::HashSet<u64> = books.arrivals.iter().map(|arrival| arrival.number).collect();
    numbers.iter().all(|number| arrived.contains(number))
}

async fn until(patience: Duration, mut holds: impl FnMut() -> bool) -> bool {
    let started = clock::stopwatch();
    while !holds() {
        if started.elapsed() >= patience {
            return false;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    true
}

/// A disk of 2 MB in memory.
struct Disk {
    directory: TempDir,
}

impl Disk {
    async fn mount() -> Result<Self, String> {
        let directory = tempfile::tempdir().map_err(|error| error.to_string())?;
        let options = format!("size=2m,uid={}", owner());
        run("mount", &["-t", "tmpfs", "-o", &options, "tmpfs"], directory.path()).await?;
        Ok(Self { directory })
    }

    async fn resize(&self, size: &str) -> Result<(), String> {
        run("mount", &["-o", &format!("remount,size={size}")], self.directory.path()).await
    }

    async fn unmount(self) {
        let _ = run("umount", &["--lazy"], self.directory.path()).await;
    }
}

/// The user of this process.
fn owner() -> u32 {
    use std::os::unix::fs::MetadataExt;
    std::fs::metadata("/proc/self").map_or(0, |entry| entry.uid())
}

/// Only root may mount.
async fn run(program: &str, args: &[&str], path: &Path) -> Result<(), String> {
    let mut command = if is_root() { Command::new(program) } else { Command::new("sudo") };
    if !is_root() {
        command.args(["-n", program]);
    }
    let done = command.args(args).arg(path).output().await.map_err(|error| format!("{program}: {error}"))?;
    let said = String::from_utf8_lossy(&done.stderr);
    if done.status.success() { Ok(()) } else { Err(format!("{program}, which needs root: {}", said.trim())) }
}
