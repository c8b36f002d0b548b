//! Whoever disturbs has a process of its own at the lowest priority: elsewhere it would have a machine of its own, and the
//! time that it takes from the processors here is not what is measured.

use std::{
    process::Stdio,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use serde::{Deserialize, Serialize};
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, BufReader, Lines},
    process::{Child, ChildStdout, Command},
};

use super::{
    caller::Caller,
    receiver::{Manners, Recovery, now, serve},
};

/// The first argument of the process.
pub(crate) const ARGUMENT: &str = "disturb";

/// What a process of this kind does until its standard input ends.
#[derive(Serialize, Deserialize)]
pub(crate) enum Role {
    /// Serves with these manners.
    Receive { slow: Duration, recovery: Recovery },
    /// Publishes as fast as it can, so many events a call, and at most so many calls.
    Flood { base: String, key: String, together: usize, most: usize },
    /// Watches with so many streams, divided among so many organisations.
    Watch { base: String, key: String, streams: usize, organizations: usize },
}

/// A process that disturbs; it ends when this is dropped.
pub(crate) struct Disturber {
    child: Child,
    lines: Lines<BufReader<ChildStdout>>,
    /// Its first line: where a receiver listens.
    pub(crate) said: String,
}

impl Disturber {
    pub(crate) async fn start(role: &Role) -> Self {
        let program = std::env::current_exe().expect("a path");
        let role = serde_json::to_string(role).expect("JSON");
        let mut command = Command::new("nice");
        command.args(["-n", "19"]).arg(program).args([ARGUMENT, &role]);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).kill_on_drop(true);
        let mut child = command.spawn().expect("nice, which every system has");
        let mut lines = BufReader::new(child.stdout.take().expect("piped")).lines();
        let said = lines.next_line().await.expect("it prints").expect("a first line");
        Self { child, lines, said }
    }

    /// Ends it; what it says last.
    pub(crate) async fn stop(mut self) -> String {
        drop(self.child.stdin.take());
        let said = self.lines.next_line().await.expect("it prints").expect("a last line");
        self.child.wait().await.expect("it ends");
        said
    }
}

/// What the process does.
pub(crate) async fn run(role: &str) {
    match serde_json::from_str(role).expect("a role") {
        Role::Receive { slow, recovery } => {
            println!("{}", serve(&Manners::new(now(), slow, recovery)).await);
            end_of_input().await;
        }
        Role::Watch { base, key, streams, organizations } => {
            for number in 0..organizations {
                let watcher = Caller::connect(&base, &key, &format!("watcher{number}")).await;
                watcher.watch(streams / organizations).await;
            }
            println!("watching");
            end_of_input().await;
        }
        Role::Flood { base, key, together, most } => {
            let loud = Caller::connect(&base, &key, "loud").await;
            println!("publishing");
            let (began, until) = (now(), Arc::new(AtomicBool::new(false)));
            let stopped = Arc::clone(&until);
            tokio::spawn(async move {
                end_of_input().await;
                stopped.store(true, Ordering::Relaxed);
            });
            let count = loud.publish_all(most, "content.ready", together, until).await;
            println!("{}", (count * together) as f64 / began.elapsed().as_secs_f64());
        }
    }
}

async fn end_of_input() {
    let _ = tokio::io::stdin().read_to_end(&mut Vec::new()).await;
}
