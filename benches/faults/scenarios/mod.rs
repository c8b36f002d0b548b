//! The scenarios, one file for each kind of fault.

mod clock_jump;
mod crash_loop;
#[cfg(feature = "failpoints")]
mod crash_steps;
mod disk_full;
mod frozen_node;
mod graceful_stop;
mod lost_reply;
#[cfg(feature = "failpoints")]
mod poison;
mod postgres_crash;
mod postgres_silence;

use std::{pin::Pin, time::Duration};

use crate::{load::below, postgres::Postgres, report::Report};

/// A process ends at a step only where it was built for that.
#[cfg(not(feature = "failpoints"))]
async fn needs_failpoints(_: Form) -> Result<Report, String> {
    let why = "it needs the feature failpoints: `cargo bench --features failpoints --bench faults -- SCENARIO`";
    Ok(Report::impossible(why.to_owned()))
}

#[cfg(not(feature = "failpoints"))]
mod crash_steps {
    pub(super) use super::{needs_failpoints as on_postgres, needs_failpoints as on_sqlite};
}

#[cfg(not(feature = "failpoints"))]
mod poison {
    pub(super) use super::needs_failpoints as play;
}

/// How much of it.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Form {
    /// For every change: a few faults of each kind.
    Short,
    /// On demand: as many as it takes to believe it.
    Long,
}

/// A scenario under way.
pub(crate) type Playing = Pin<Box<dyn Future<Output = Result<Report, String>> + Send>>;

/// A scenario by its name.
pub(crate) struct Scenario {
    pub(crate) name: &'static str,
    pub(crate) about: &'static str,
    pub(crate) play: fn(Form) -> Playing,
}

/// Boxes a scenario's function.
macro_rules! scenario {
    ($name:literal, $about:literal, $play:path) => {
        Scenario { name: $name, about: $about, play: |form| Box::pin($play(form)) }
    };
}

/// All of them.
pub(crate) const SCENARIOS: &[Scenario] = &[
    scenario!("crash-loop-sqlite", "kill -9 again and again under load", crash_loop::on_sqlite),
    scenario!("crash-loop-postgres", "kill -9 of one of three nodes, again and again", crash_loop::on_postgres),
    scenario!("crash-steps-sqlite", "the process ends at each step of an event's way", crash_steps::on_sqlite),
    scenario!("crash-steps-postgres", "the same, with another node that takes over", crash_steps::on_postgres),
    scenario!("poison", "an event ends the process at each attempt", poison::play),
    scenario!("disk-full", "SQLite on a disk of 2 MB that is later made larger", disk_full::play),
    scenario!("postgres-crash", "PostgreSQL ends at once and comes back, again and again", postgres_crash::play),
    scenario!("postgres-silence", "PostgreSQL stands still, with all its connections", postgres_silence::play),
    scenario!("lost-reply", "PostgreSQL commits, and its reply is lost, again and again", lost_reply::play),
    scenario!("frozen-node", "a node stands still for two leases and goes on", frozen_node::play),
    scenario!("clock-jump", "the clock of one node is wrong by two hours, one way and the other", clock_jump::play),
    scenario!("graceful-stop-sqlite", "SIGTERM under load, again and again", graceful_stop::on_sqlite),
    scenario!("graceful-stop-postgres", "the same with two nodes, one after the other", graceful_stop::on_postgres),
];

impl Form {
    /// So many in this form.
    fn pick<T>(self, short: T, long: T) -> T {
        match self {
            Self::Short => short,
            Self::Long => long,
        }
    }
}

/// A PostgreSQL and an empty database in it.
async fn postgres() -> Result<(Postgres, String), String> {
    let postgres = Postgres::start().await?;
    let url = postgres.database().await?;
    Ok((postgres, url))
}

/// A random time from 0.2 to 3 seconds.
fn a_while() -> Duration {
    Duration::from_millis(200 + below(2_800))
}
