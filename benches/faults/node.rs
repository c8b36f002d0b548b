//! A process of the service: started, killed, frozen, stopped.

use std::{
    fs::File,
    path::{Path, PathBuf},
    process::{ExitStatus, Stdio},
    time::Duration,
};

use tokio::{
    io::{AsyncBufReadExt, BufReader},
    process::{Child, Command},
};

/// A process that has not said where it listens within this time will not.
const START: Duration = Duration::from_secs(60);

/// Names the step to a process.
#[cfg(feature = "failpoints")]
const CRASH_AT: &str = "SHORTKIT_CRASH_AT";

/// How to start a node; the same for every start, so that a restart is one.
#[derive(Clone)]
pub(crate) struct Launch {
    /// Its working folder, where its keys and its log are.
    pub(crate) directory: PathBuf,
    pub(crate) database_url: String,
    pub(crate) args: Vec<String>,
    pub(crate) envs: Vec<(String, String)>,
}

/// A running process; killed when dropped.
pub(crate) struct Node {
    child: Child,
    pub(crate) base: String,
    /// A service key: it acts for every organisation.
    pub(crate) key: String,
}

impl Launch {
    pub(crate) fn new(directory: &Path, database_url: &str) -> Self {
        std::fs::create_dir_all(directory).expect("a folder");
        let (directory, database_url) = (directory.to_owned(), database_url.to_owned());
        Self { directory, database_url, args: Vec::new(), envs: Vec::new() }
    }

    pub(crate) fn arg(mut self, name: &str, value: &str) -> Self {
        self.args.extend([name.to_owned(), value.to_owned()]);
        self
    }

    pub(crate) fn env(mut self, name: &str, value: &str) -> Self {
        self.envs.push((name.to_owned(), value.to_owned()));
        self
    }

    /// Puts another schedule in the place of the one it was given.
    pub(crate) fn retry_schedule(&mut self, schedule: &str) {
        let flag = self.args.iter().position(|arg| arg == "--retry-schedule").expect("every node has one");
        self.args[flag + 1] = schedule.to_owned();
    }

    /// Ends the process where `step` comes the `count`th time, as `failpoint::reached` names it.
    #[cfg(feature = "failpoints")]
    pub(crate) fn crash_at(self, step: &str, count: usize) -> Self {
        self.env(CRASH_AT, &format!("{step}:{count}"))
    }

    /// From the next start on it goes on there.
    #[cfg(feature = "failpoints")]
    pub(crate) fn crash_no_more(&mut self) {
        self.envs.retain(|(name, _)| name != CRASH_AT);
    }

    pub(crate) fn log(&self) -> PathBuf {
        self.directory.join("node.log")
    }

    /// Starts it; an error is what its log ends with.
    pub(crate) async fn start(&self) -> Result<Node, String> {
        let log = File::options().create(true).append(true).open(self.log()).map_err(|error| error.to_string())?;
        let mut child = Command::new(env!("CARGO_BIN_EXE_shortkit-webhooks"))
            .args(["serve", "--dev", "--listen", "127.0.0.1:0", "--log", "warn", "--database-url", &self.database_url])
            .args(["--rate-limit", "off"])
            .args(&self.args)
            .envs(self.envs.iter().map(|(name, value)| (name, value)))
            .current_dir(&self.directory)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(log)
            .kill_on_drop(true)
            .spawn()
            .map_err(|error| format!("the service does not start: {error}"))?;
        let mut lines = BufReader::new(child.stdout.take().expect("piped")).lines();
        let greeting = async {
            let (mut base, mut key) = (None, None);
            while let Ok(Some(line)) = lines.next_line().await {
                base = base.or(line.strip_prefix("listening on ").map(str::to_owned));
                let rest = line.trim().strip_prefix("service key");
                key = key.or(rest.and_then(|rest| rest.split_whitespace().next()).map(str::to_owned));
                if let (Some(base), Some(key)) = (&base, &key) {
                    return Some((base.clone(), key.clone()));
                }
            }
            None
        };
        match tokio::time::timeout(START, greeting).await {
            Ok(Some((base, key))) => {
                // What else it prints must not fill the pipe.
                tokio::spawn(async move { while let Ok(Some(_)) = lines.next_line().await {} });
                Ok(Node { child, base, key })
            }
            _ => Err(format!("the service did not come up: {}", self.last_words())),
        }
    }

    /// The end of its log.
    pub(crate) fn last_words(&self) -> String {
        let log = std::fs::read_to_string(self.log()).unwrap_or_default();
        let lines: Vec<&str> = log.lines().rev().take(5).collect();
        lines.into_iter().rev().collect::<Vec<_>>().join(" | ")
    }

    /// How many lines of its log hold `words`.
    pub(crate) fn logged(&self, words: &str) -> usize {
        std::fs::read_to_string(self.log()).unwrap_or_default().lines().filter(|line| line.contains(words)).count()
    }
}

impl Node {
    /// `kill -9`, and the end of it.
    pub(crate) async fn kill(mut self) {
        let _ = self.child.start_kill();
        let _ = self.child.wait().await;
    }

    /// Sends a signal by its name.
    pub(crate) async fn signal(&self, name: &str) {
        let Some(pid) = self.child.id() else { return };
        let sent = Command::new("kill").args([format!("-{name}"), pid.to_string()]).status().await;
        assert!(sent.is_ok_and(|status| status.success()), "kill -{name} {pid}");
    }

    /// Waits for the end; none when it does not come within `time`.
    pub(crate) async fn ended(&mut self, time: Duration) -> Option<ExitStatus> {
        tokio::time::timeout(time, self.child.wait()).await.ok().and_then(Result::ok)
    }
}
