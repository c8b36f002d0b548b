//! A PostgreSQL of our own: a fresh data folder, a free port, gone at the end.

use std::{
    net::TcpListener,
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use sea_orm::{ConnectionTrait, Database, DatabaseConnection, DbBackend, Statement};
use shortkit_webhooks::clock;
use tempfile::TempDir;
use tokio::process::{Child, Command};

/// A server that does not answer within this time will not.
const START: Duration = Duration::from_secs(60);
/// One that has not ended within this time is killed.
const STOP: Duration = Duration::from_secs(10);

/// A running server, with durable settings; it ends at once when dropped.
pub(crate) struct Postgres {
    directory: TempDir,
    binaries: PathBuf,
    port: u16,
    child: Child,
}

impl Postgres {
    pub(crate) async fn start() -> Result<Self, String> {
        let binaries = newest().ok_or("no PostgreSQL in /usr/lib/postgresql; install the package postgresql")?;
        let directory = tempfile::tempdir().map_err(|error| error.to_string())?;
        owned(directory.path()).await?;
        let made = owner(&binaries.join("initdb"))
            .args(["--username", "postgres", "--auth", "trust", "--encoding", "UTF8", "--locale", "C", "--no-sync"])
            .arg("--pgdata")
            .arg(directory.path().join("data"))
            .stdout(Stdio::null())
            .status()
            .await;
        if !made.is_ok_and(|status| status.success()) {
            return Err("initdb failed".to_owned());
        }
        let free = TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr());
        let port = free.map_err(|error| error.to_string())?.port();
        let child = run(&binaries, directory.path(), port)?;
        let postgres = Self { directory, binaries, port, child };
        postgres.ready().await?;
        Ok(postgres)
    }

    /// An empty database; its URL.
    pub(crate) async fn database(&self) -> Result<String, String> {
        new_database(&self.url("postgres")).await
    }

    /// Whether there is one to start.
    pub(crate) fn is_installed() -> bool {
        newest().is_some()
    }

    /// The process that started all others of it.
    pub(crate) fn pid(&self) -> Option<u32> {
        self.child.id()
    }

    /// What `pg_ctl stop -m immediate` does: every process of it is gone at once, nothing is written any more.
    pub(crate) async fn crash(&mut self) {
        if let Some(pid) = self.child.id() {
            let _ = Command::new("kill").args(["-QUIT", &pid.to_string()]).status().await;
        }
        let _ = self.child.wait().await;
    }

    /// Has every process of it stand still, so that nothing it was asked is answered, nor any end of a connection told.
    pub(crate) async fn freeze(&self) {
        self.signal_all("STOP").await;
    }

    /// Has it go on.
    pub(crate) async fn thaw(&self) {
        self.signal_all("CONT").await;
    }

    async fn signal_all(&self, signal: &str) {
        let Some(pid) = self.child.id() else { return };
        // The first first: it starts no others then.
        let all = family(pid).into_iter().map(|pid| pid.to_string());
        let _ = Command::new("kill").arg(format!("-{signal}")).args(all).status().await;
    }

    /// Starts it again after a crash; it answers when this returns.
    pub(crate) async fn restart(&mut self) -> Result<(), String> {
        self.child = run(&self.binaries, self.directory.path(), self.port)?;
        self.ready().await
    }

    pub(crate) fn url(&self, database: &str) -> String {
        format!("postgres://postgres@127.0.0.1:{}/{database}", self.port)
    }

    async fn ready(&self) -> Result<(), String> {
        let started = clock::stopwatch();
        while started.elapsed() < START {
            let port = self.port.to_string();
            let asked = Command::new(self.binaries.join("pg_isready"))
                .args(["--host", "127.0.0.1", "--port", &port, "--quiet"])
                .status();
            if asked.await.is_ok_and(|status| status.success()) {
                return Ok(());
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        let log = std::fs::read_to_string(self.directory.path().join("log")).unwrap_or_default();
        Err(format!("PostgreSQL does not answer: {log}"))
    }
}

impl Drop for Postgres {
    /// Killed, it would leave its shared memory behind; and one that stands still would not even end.
    fn drop(&mut self) {
        let Some(pid) = self.child.id() else { return };
        let all = family(pid).into_iter().map(|pid| pid.to_string());
        // Some may have ended meanwhile, which is nobody's concern.
        let _ = std::process::Command::new("kill").arg("-CONT").args(all).stderr(Stdio::null()).status();
        let _ = std::process::Command::new("kill").args(["-QUIT", &pid.to_string()]).status();
        let told = clock::stopwatch();
        while told.elapsed() < STOP && matches!(self.child.try_wait(), Ok(None)) {
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

/// A process, and those that it started.
pub(crate) fn family(leader: u32) -> Vec<u32> {
    let parent = |pid: u32| {
        let status = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        status.rsplit(')').next().and_then(|rest| rest.split_whitespace().nth(1)?.parse::<u32>().ok())
    };
    let children = processes().filter(|pid| parent(*pid) == Some(leader));
    std::iter::once(leader).chain(children).collect()
}

/// All processes of this machine.
pub(crate) fn processes() -> impl Iterator<Item = u32> {
    let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_string_lossy().parse().ok())
}

/// Makes an empty database beside the one at `url`; its URL.
pub(crate) async fn new_database(url: &str) -> Result<String, String> {
    let name = clock::new_id("bench");
    execute(url, &format!("CREATE DATABASE {name}")).await?;
    let mut url = url::Url::parse(url).map_err(|error| error.to_string())?;
    url.set_path(&name);
    Ok(url.into())
}

/// Has the server of the database at `url` do this.
pub(crate) async fn execute(url: &str, sql: &str) -> Result<(), String> {
    let admin = Database::connect(url).await.map_err(|error| error.to_string())?;
    let done = admin.execute_unprepared(sql).await;
    let _ = admin.close().await;
    done.map(drop).map_err(|error| error.to_string())
}

/// One number that `sql` selects from the database at `url`.
pub(crate) async fn number(connection: &DatabaseConnection, sql: &str) -> Result<i64, String> {
    let row = connection.query_one_raw(Statement::from_string(DbBackend::Postgres, sql)).await;
    let value = row.and_then(|row| row.map(|row| row.try_get_by_index::<Option<i64>>(0)).transpose());
    value.map(|value| value.flatten().unwrap_or(0)).map_err(|error| error.to_string())
}

fn run(binaries: &Path, directory: &Path, port: u16) -> Result<Child, String> {
    let log = std::fs::File::options().create(true).append(true).open(directory.join("log"));
    let log = log.map_err(|error| error.to_string())?;
    owner(&binaries.join("postgres"))
        .arg("-D")
        .arg(directory.join("data"))
        .args(["-c", "listen_addresses=127.0.0.1", "-c", &format!("port={port}"), "-c", "max_connections=300"])
        .args(["-c", &format!("unix_socket_directories={}", directory.display())])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log)
        .kill_on_drop(true)
        .spawn()
        .map_err(|error| format!("PostgreSQL does not start: {error}"))
}

/// A command run by a user that PostgreSQL accepts: it refuses to run as root.
fn owner(program: &Path) -> Command {
    if !is_root() {
        return Command::new(program);
    }
    let mut command = Command::new("setpriv");
    command.args(["--reuid=postgres", "--regid=postgres", "--clear-groups"]).arg(program);
    command
}

async fn owned(directory: &Path) -> Result<(), String> {
    if !is_root() {
        return Ok(());
    }
    let given = Command::new("chown").arg("postgres:").arg(directory).status().await;
    if given.is_ok_and(|status| status.success()) { Ok(()) } else { Err("chown postgres: failed".to_owned()) }
}

/// Whether this process may do everything.
pub(crate) fn is_root() -> bool {
    use std::os::unix::fs::MetadataExt;
    std::fs::metadata("/proc/self").is_ok_and(|entry| entry.uid() == 0)
}

/// The folder with the programs of the newest PostgreSQL.
fn newest() -> Option<PathBuf> {
    let versions = std::fs::read_dir("/usr/lib/postgresql").ok()?.flatten();
    let version = |path: &Path| path.file_name().and_then(|name| name.to_string_lossy().parse::<u32>().ok());
    let newest = versions.map(|entry| entry.path()).max_by_key(|path| version(path))?;
    Some(newest.join("bin")).filter(|binaries| binaries.join("postgres").exists())
}
