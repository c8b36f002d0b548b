//! The PostgreSQL that is measured.

use super::{
    postgres::{Postgres, execute, family, new_database, processes},
    service::cpu_secs,
};

/// Names an empty database of another server, perhaps of another machine, in the place of one of our own.
const NAMED: &str = "SHORTKIT_BENCH_POSTGRES";
/// Asks for it on the command line.
pub(crate) const WORD: &str = "postgres";

/// The server that is named, or one of our own; that one ends when this is dropped.
pub(crate) struct Server {
    /// An empty database of it.
    pub(crate) url: String,
    own: Option<Postgres>,
}

impl Server {
    /// An error says what is missing.
    pub(crate) async fn start() -> Result<Self, String> {
        if let Ok(url) = std::env::var(NAMED) {
            return Ok(Self { url, own: None });
        }
        let or =
            |error| format!("PostgreSQL is not measured: {error}, or name an empty database of a server in {NAMED}");
        let own = Postgres::start().await.map_err(or)?;
        Ok(Self { url: own.url("postgres"), own: Some(own) })
    }

    /// For a program that measures on SQLite, unless the command line or the environment asks for this.
    pub(crate) async fn if_asked() -> Result<Option<Self>, String> {
        let asked = std::env::var_os(NAMED).is_some() || std::env::args().any(|word| word == WORD);
        if asked { Self::start().await.map(Some) } else { Ok(None) }
    }

    /// A new database beside the one that is named, where there is a server; its URL.
    pub(crate) async fn database(server: Option<&Self>) -> Option<String> {
        Some(new_database(&server?.url).await.expect("a new database"))
    }

    /// Removes such a database again.
    pub(crate) async fn remove(&self, url: &str) {
        let url = url::Url::parse(url).expect("a URL");
        let name = url.path().trim_start_matches('/');
        execute(&self.url, &format!("DROP DATABASE {name} WITH (FORCE)")).await.expect("it can go");
    }

    /// Seconds of CPU that its processes have used; none of those of another machine.
    pub(crate) fn cpu_secs(&self) -> f64 {
        let leader = self.own.as_ref().map_or_else(|| leader_at(&self.url), Postgres::pid);
        leader.map_or(0.0, |leader| family(leader).into_iter().map(cpu_secs).sum())
    }
}

/// The first process of a PostgreSQL here whose command line names the port of `url`.
fn leader_at(url: &str) -> Option<u32> {
    let port = url::Url::parse(url).ok()?.port()?;
    processes().find(|pid| {
        let line = std::fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        line.contains("postgres") && line.contains(&format!("port={port}"))
    })
}
