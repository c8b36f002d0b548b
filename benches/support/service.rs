//! The service in a process of its own, with durable settings.

use std::{path::Path, process::Stdio, time::Instant};

use shortkit_webhooks::clock;
use tokio::{
    io::{AsyncBufReadExt, BufReader},
    process::{Child, Command},
};

/// A running service; it is killed when this is dropped.
pub(crate) struct Service {
    child: Child,
    /// `http://…`
    pub(crate) base: String,
    /// A key of an organisation.
    pub(crate) secret_key: String,
    /// A key for every organisation.
    pub(crate) service_key: String,
    /// When its start began.
    pub(crate) started: Instant,
}

impl Service {
    /// Starts on the SQLite database in `directory`, or on the PostgreSQL database named, with these further arguments.
    pub(crate) async fn start(directory: &Path, database_url: Option<&str>, arguments: &[&str]) -> Self {
        let started = clock::stopwatch();
        let mut command = Command::new(env!("CARGO_BIN_EXE_shortkit-webhooks"));
        command.args(["serve", "--dev", "--listen", "127.0.0.1:0", "--rate-limit", "off"]).args(arguments);
        if let Some(url) = database_url {
            command.args(["--database-url", url]);
        }
        command.current_dir(directory).stdout(Stdio::piped()).kill_on_drop(true);
        let mut child = command.spawn().expect("the service starts");
        let mut lines = BufReader::new(child.stdout.take().expect("piped")).lines();
        let mut base = None;
        let [mut secret_key, mut service_key] = [None, None];
        while secret_key.is_none() || service_key.is_none() {
            let line = lines.next_line().await.expect("the service prints").expect("the service goes on");
            if let Some(address) = line.strip_prefix("listening on ") {
                base = Some(address.to_owned());
            }
            for (key, name) in [(&mut secret_key, "secret key"), (&mut service_key, "service key")] {
                let rest = line.trim().strip_prefix(name);
                *key = key.take().or(rest.and_then(|rest| rest.split_whitespace().next()).map(str::to_owned));
            }
        }
        let [base, secret_key, service_key] = [base, secret_key, service_key].map(|said| said.expect("it is printed"));
        Self { child, base, secret_key, service_key, started }
    }

    /// Stops as a signal would.
    pub(crate) async fn stop(mut self) {
        let sent = Command::new("kill").args(["-TERM", &self.pid().to_string()]).status().await;
        assert!(sent.is_ok_and(|status| status.success()), "kill");
        self.child.wait().await.expect("it ends");
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id().expect("it runs")
    }

    /// Seconds of CPU that it has used.
    pub(crate) fn cpu_secs(&self) -> f64 {
        cpu_secs(self.pid())
    }

    /// MiB of memory in use.
    pub(crate) fn resident_mib(&self) -> f64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid())).unwrap_or_default();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap_or_default();
        line.trim().trim_end_matches(" kB").parse::<f64>().unwrap_or(0.0) / 1024.0
    }
}

/// Seconds of CPU that a process has used, with those of its children that it has waited for.
pub(crate) fn cpu_secs(pid: u32) -> f64 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let after = stat.rsplit(')').next().unwrap_or_default();
    let fields: Vec<f64> = after.split_whitespace().map(|field| field.parse().unwrap_or(0.0)).collect();
    // utime, stime, cutime and cstime, in hundredths of a second.
    fields.get(11..15).map_or(0.0, |times| times.iter().sum::<f64>() / 100.0)
}
