//! `kill -9` under load.

use std::time::Duration;

use sea_orm::{Database, DatabaseConnection};
use tokio::{sync::watch, task::JoinHandle};

use super::{Form, a_while, below, postgres};
use crate::{
    postgres::number,
    report::Report,
    world::{LEASE, MAX_IN_FLIGHT, ORGANIZATIONS, World},
};

/// After its lease has run out, a delivery may wait so long for another node.
const TAKE_OVER: Duration = Duration::from_secs(2);
/// A killed node can leave so many requests that come again.
const REPEATS_PER_KILL: usize = MAX_IN_FLIGHT * ORGANIZATIONS.len();

pub(super) async fn on_sqlite(form: Form) -> Result<Report, String> {
    let mut world = World::start(1, None, |_, launch| launch).await?;
    let load = world.load(4, Duration::from_millis(10));
    let kills = form.pick(5, 100);
    for _ in 0..kills {
        tokio::time::sleep(a_while()).await;
        world.kill(0).await;
        world.restart(0).await?;
    }
    load.stop().await;
    world.settle(Duration::from_secs(60)).await;
    let mut report = Report::of(&world).await;
    report.repeats_at_most(REPEATS_PER_KILL * kills);
    Ok(report)
}

pub(super) async fn on_postgres(form: Form) -> Result<Report, String> {
    const NODES: u64 = 3;
    let (_postgres, url) = postgres().await?;
    let mut world = World::start(NODES as usize, Some(&url), |_, launch| launch).await?;
    let overdue = Overdue::watch(&url).await?;
    let load = world.load(4, Duration::from_millis(20));
    let kills = form.pick(5, 100);
    for _ in 0..kills {
        tokio::time::sleep(a_while()).await;
        let node = below(NODES) as usize;
        world.kill(node).await;
        world.restart(node).await?;
    }
    load.stop().await;
    // What the last one left comes back when its lease has run out, and may meet a wait of the schedule.
    world.settle(2 * LEASE + Duration::from_secs(30)).await;
    let mut report = Report::of(&world).await;
    report.repeats_at_most(REPEATS_PER_KILL * kills);
    let longest = overdue.longest().await;
    report.within("an expired lease was taken over after", longest, TAKE_OVER);
    Ok(report)
}

/// Looks, all the time, for how long the oldest expired lease has been lying around, by the database's clock.
pub(super) struct Overdue {
    stop: watch::Sender<bool>,
    task: JoinHandle<Option<i64>>,
}

impl Overdue {
    pub(super) async fn watch(url: &str) -> Result<Self, String> {
        let connection = Database::connect(url).await.map_err(|error| error.to_string())?;
        let stop = watch::Sender::new(false);
        let task = tokio::spawn(watch(connection, stop.subscribe()));
        Ok(Self { stop, task })
    }

    /// The longest; none when the database did not answer.
    pub(super) async fn longest(self) -> Option<Duration> {
        let _ = self.stop.send(true);
        let longest = self.task.await.ok().flatten()?;
        Some(Duration::from_millis(longest.unsigned_abs()))
    }
}

async fn watch(connection: DatabaseConnection, mut stopped: watch::Receiver<bool>) -> Option<i64> {
    const OLDEST: &str = "SELECT (extract(epoch FROM clock_timestamp()) * 1000)::bigint - min(lease_expires_at_ms) \
                          FROM deliveries WHERE lease_expires_at_ms IS NOT NULL";
    let mut longest = 0;
    while !*stopped.borrow() {
        longest = number(&connection, OLDEST).await.ok()?.max(longest);
        let _ = tokio::time::timeout(Duration::from_millis(250), stopped.changed()).await;
    }
    let _ = connection.close().await;
    Some(longest)
}
