//! The command line: one file per subcommand.

mod audit;
mod client;
mod keys;
mod listen;
mod publish;
mod serve;
mod watch;

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use tokio_util::sync::CancellationToken;

use crate::{
    config::{DatabaseArgs, Invalid, ServeArgs},
    server,
    store::{self, DEFAULT_CONNECTIONS, Store, sqlite_path},
    telemetry,
};

/// Exit code of wrong usage, also clap's.
const WRONG_USAGE: u8 = 2;
/// Exit code of an invalid configuration.
const INVALID_CONFIGURATION: u8 = 64;

/// Webhooks as a service: publish an event once, and every endpoint that wants it gets it, signed, retried and visible.
#[derive(Parser)]
#[command(version, propagate_version = true, max_term_width = 110)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Serve gRPC, gRPC-Web and the JSON API on one port, and deliver
    Serve(Box<ServeArgs>),
    /// Create, list and revoke API keys
    Keys(keys::KeysArgs),
    /// Show who did what to keys, webhooks, secrets and deliveries
    Audit(audit::AuditArgs),
    /// Bring the database's schema up to date, for deployments that do so before `serve`
    Migrate(DatabaseArgs),
    /// Receive webhooks here: verify, print and answer them
    Listen(listen::ListenArgs),
    /// Publish one event, or one for each line of standard input
    Publish(publish::PublishArgs),
    /// Show deliveries as they happen
    Watch(watch::WatchArgs),
}

/// Why a command failed: a sentence that says what to do next where there is something to do.
#[derive(Debug, thiserror::Error)]
enum Error {
    #[error(transparent)]
    Configuration(#[from] Invalid),
    #[error("{0}\n  Is the database running, and is --database-url right?")]
    Unavailable(store::Error),
    #[error("{0}\n  Does the folder that --database-url names exist, and may files be written there?")]
    NotOpened(store::Error),
    #[error(transparent)]
    Store(store::Error),
    #[error(transparent)]
    Server(#[from] server::Error),
    #[error(transparent)]
    Io(#[from] std::io::Error),
    #[error("{0}")]
    Usage(String),
    #[error("{0}")]
    Failed(String),
}

impl From<store::Error> for Error {
    fn from(error: store::Error) -> Self {
        if let Some(remedy) = error.remedy() {
            return Self::Failed(format!("{error}\n  {remedy}"));
        }
        match error {
            store::Error::Unavailable(_) => Self::Unavailable(error),
            error => Self::Store(error),
        }
    }
}

impl Cli {
    /// Runs the subcommand; the code is 0 when it did what it was asked, 2 for wrong usage, 64 when the configuration is not valid, else 1.
    pub fn run(self) -> ExitCode {
        let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
            Ok(runtime) => runtime,
            Err(error) => return failed(&error.into()),
        };
        match runtime.block_on(self.command.run()) {
            Ok(()) => ExitCode::SUCCESS,
            // Whoever reads has seen enough, as `head` does.
            Err(Error::Io(error)) if error.kind() == std::io::ErrorKind::BrokenPipe => ExitCode::SUCCESS,
            Err(error) => failed(&error),
        }
    }
}

impl Command {
    async fn run(self) -> Result<(), Error> {
        let stop = CancellationToken::new();
        let signalled = stop.clone();
        tokio::spawn(async move {
            shutdown_on_signal().await;
            signalled.cancel();
            // Who asks twice does not want to wait.
            shutdown_on_signal().await;
            std::process::exit(1);
        });
        match self {
            Self::Serve(args) => serve::serve(*args, stop).await,
            Self::Keys(args) => unless(stop, args.run()).await,
            Self::Audit(args) => unless(stop, args.run()).await,
            Self::Migrate(args) => unless(stop, migrate(args)).await,
            Self::Listen(args) => args.run(stop).await,
            Self::Publish(args) => args.run(stop).await,
            Self::Watch(args) => args.run(stop).await,
        }
    }
}

/// Does some work on the database unless it is to stop; what is under way then is undone.
async fn unless(stop: CancellationToken, work: impl Future<Output = Result<(), Error>>) -> Result<(), Error> {
    tokio::select! {
        done = work => done,
        () = stop.cancelled() => Err(Error::Failed("stopped by a signal".to_owned())),
    }
}

fn failed(error: &Error) -> ExitCode {
    eprintln!("error: {error}");
    match error {
        Error::Configuration(_) => ExitCode::from(INVALID_CONFIGURATION),
        Error::Usage(_) => ExitCode::from(WRONG_USAGE),
        _ => ExitCode::FAILURE,
    }
}

/// Prints a line on standard output, at once.
fn print(line: impl std::fmt::Display) -> std::io::Result<()> {
    use std::io::Write;
    let mut out = std::io::stdout().lock();
    writeln!(out, "{line}")?;
    out.flush()
}

/// Prints rows in columns as wide as they need to be.
fn print_table<const N: usize>(header: [&str; N], rows: impl Iterator<Item = [String; N]>) -> std::io::Result<()> {
    let rows: Vec<[String; N]> = std::iter::once(header.map(str::to_owned)).chain(rows).collect();
    let widths: [usize; N] =
        std::array::from_fn(|column| rows.iter().map(|row| row[column].len()).max().unwrap_or_default());
    for row in &rows {
        let cells: Vec<String> = row.iter().zip(widths).map(|(cell, width)| format!("{cell:width$}")).collect();
        print(cells.join("  ").trim_end())?;
    }
    Ok(())
}

/// Ends when the operator or the system asks this process to stop.
async fn shutdown_on_signal() {
    use tokio::signal::unix::{SignalKind, signal};
    let Ok(mut terminate) = signal(SignalKind::terminate()) else { return std::future::pending().await };
    tokio::select! {
        _ = terminate.recv() => {}
        _ = tokio::signal::ctrl_c() => {}
    }
}

async fn migrate(args: DatabaseArgs) -> Result<(), Error> {
    let store = open(args).await?;
    store.migrate().await?;
    eprintln!("the schema is up to date");
    Ok(())
}

/// Opens the database that these settings name.
async fn open(args: DatabaseArgs) -> Result<Store, Error> {
    let config = args.load()?;
    telemetry::start(&config.log);
    connect(&config.database_url, DEFAULT_CONNECTIONS).await
}

async fn connect(database_url: &str, connections: u32) -> Result<Store, Error> {
    let opened = Store::connect_with(database_url, connections).await;
    opened.map_err(|error| match error {
        store::Error::Failed(_) if sqlite_path(database_url).is_some() => Error::NotOpened(error),
        error => error.into(),
    })
}
