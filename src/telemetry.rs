//! What can be seen of a node from outside: its log and its metrics.

mod calls;
mod metrics;

use std::io::{IsTerminal, stderr};

use tracing_subscriber::{EnvFilter, fmt};

pub(crate) use self::{
    calls::Counted,
    metrics::{Kind, Levels, Metrics},
};

/// Starts logging what `filter` lets through, once for the process: text on a terminal, one JSON object a line otherwise,
/// always on standard error.
pub(crate) fn start(filter: &str) {
    // What the migrations and PostgreSQL say by the way is for those who look for it. A span of sea-orm shows the
    // database's URL, with its password in it, whoever asks for it.
    let filter = format!("sea_orm_migration=warn,sqlx::postgres::notice=warn,{filter},sea_orm=warn");
    let builder = fmt().with_env_filter(EnvFilter::new(filter)).with_writer(stderr);
    // Fails when a log is running already; that one goes on.
    let _ = if stderr().is_terminal() {
        builder.with_target(false).compact().try_init()
    } else {
        builder.json().flatten_event(true).try_init()
    };
}
