//! Whoever disturbs has a process of its own at the lowest priority: elsewhere it would have a machine of its own, and the
//! time that it takes from the processors here is not what is measured.

use std::{
    process::Stdio,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use serde::{Deserialize, Serialize};
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, BufReader, Lines},
    process::{Child, ChildStdout, Command},
    task::JoinSet,
};

use super::{
    caller::Caller,
    receiver::{Manners, Recovery, now, serve},
};

/// The first argument of the process.
pub(crate) const ARGUMENT: &str = "disturb";
/// Calls under way of the loud organisation.
const LOUD: usize = 256;

/// What a process of this kind does until its standard input ends.
#[derive(Serialize, Deserialize)]
pub(crate) enum Role {
    /// Serves with these manners.
    Receive { slow: Duration, recovery: Recovery },
    /// Publishes as fast as it can, and at most so many events.
    Flood { base: String, key: String, most: usize },
}

/// A process that disturbs; it ends when this is dropped.
pub(crate) struct Disturber {
    child: Child,
    lines: Lines<BufReader<ChildStdout>>,
    /// Where it listens.
    pub(crate) base: String,
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
        let base = lines.next_line().await.expect("it prints").expect("where it listens");
        Self { child, lines, base }
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
    let stopped = Arc::new(AtomicBool::new(false));
    tokio::spawn({
        let stopped = Arc::clone(&stopped);
        async move {
            let _ = tokio::io::stdin().read_to_end(&mut Vec::new()).await;
            stopped.store(true, Ordering::Relaxed);
        }
    });
    match serde_json::from_str(role).expect("a role") {
        Role::Receive { slow, recovery } => {
            println!("{}", serve(&Manners::new(now(), slow, recovery)).await);
            while !stopped.load(Ordering::Relaxed) {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            println!("ended");
        }
        Role::Flood { base, key, most } => {
            let loud = Caller::connect(&base, &key, "loud").await;
            println!("nowhere");
            let began = now();
            let count = publish_all(&loud, most, "content.ready", stopped).await;
            println!("{}", count as f64 / began.elapsed().as_secs_f64());
        }
    }
}

/// Publishes `count` events, many at a time.
pub(crate) async fn publish_all(caller: &Caller, count: usize, event: &'static str, until: Arc<AtomicBool>) -> usize {
    let next = Arc::new(AtomicUsize::new(0));
    let mut loops = JoinSet::new();
    for number in 0..LOUD {
        let (caller, next, until) = (caller.clone(), Arc::clone(&next), Arc::clone(&until));
        loops.spawn(async move {
            while !until.load(Ordering::Relaxed) && next.fetch_add(1, Ordering::Relaxed) < count {
                caller.publish_surely(number, event, format!("{{\"filler\":\"{}\"}}", "x".repeat(450))).await;
            }
        });
    }
    while loops.join_next().await.is_some() {}
    next.load(Ordering::Relaxed).min(count)
}
