//! `examples/three-nodes` as a person runs it, with the lines that it prints.

use std::{path::Path, process::Stdio};

use tokio::{
    io::{AsyncBufReadExt, BufReader},
    process::{Child, Command},
};

use crate::{
    command_line::run,
    support::{Receiver, soon},
};

/// The example. Told to end it ends what it started, also when the test fails; killed it would not.
struct Example(Child);

impl Drop for Example {
    fn drop(&mut self) {
        if let Some(pid) = self.0.id() {
            kill("-TERM", &pid.to_string());
        }
    }
}

fn kill(signal: &str, pid: &str) {
    let _ = std::process::Command::new("kill").args([signal, pid]).status();
}

fn shell(line: &str) -> Command {
    let mut command = Command::new("sh");
    command.args(["-c", &format!("exec {}", line.replacen("curl ", "curl -sS --fail-with-body ", 1))]);
    command
}

#[tokio::test]
async fn three_nodes_are_tried_out() {
    let mut command = Command::new(concat!(env!("CARGO_MANIFEST_DIR"), "/examples/three-nodes"));
    command.env("SHORTKIT_PROGRAM", env!("CARGO_BIN_EXE_shortkit-webhooks"));
    let mut example = Example(command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().unwrap());
    let mut lines = BufReader::new(example.0.stdout.take().unwrap()).lines();
    let mut printed: Vec<String> = Vec::new();
    while !printed.last().is_some_and(|line| line.starts_with("Ctrl-C")) {
        let line = soon("a line", lines.next_line()).await.unwrap().expect("it goes on");
        printed.push(line.trim().to_owned());
    }
    let nodes: Vec<Vec<&str>> = printed
        .iter()
        .filter(|line| line.starts_with("node "))
        .map(|line| {
            line.split(|c: char| c.is_whitespace() || "(),".contains(c)).filter(|word| !word.is_empty()).collect()
        })
        .collect();
    let [one, two, three] = &nodes[..] else { panic!("{printed:#?}") };
    let line = |start: &str, url: &str| {
        let mut found = printed.iter().filter(|line| line.contains(start) && line.contains(url));
        found.next().unwrap_or_else(|| panic!("{start} at {url}: {printed:#?}")).clone()
    };

    let receiver = Receiver::start().await;
    let register = line("curl ", one[2]).replace("localhost:9000", &receiver.address.to_string());
    let (code, out, error) = run(shell(&register), "").await;
    assert!(code == 0 && out.contains("whsec_"), "{out}{error}");
    let mut watch = shell(&line(" watch ", three[2]));
    let mut watch = watch.stdout(Stdio::piped()).kill_on_drop(true).spawn().unwrap();
    let mut changes = BufReader::new(watch.stdout.take().unwrap()).lines();
    let publish = line("curl ", two[2]);
    // The stream is open, and the second node knows the webhook, at some moment.
    let seen = async {
        loop {
            tokio::select! {
                change = changes.next_line() => break change.unwrap().expect("it watches on"),
                (code, out, error) = run(shell(&publish), "") => assert_eq!(code, 0, "{out}{error}"),
            }
        }
    };
    let seen = soon("a change at the third node", seen).await;
    assert!(seen.contains("content.ready"), "{seen}");
    let first = receiver.wait_for(1).await.remove(0);
    assert!(first.body.contains("cnt_abc123"), "{}", first.body);

    kill("-KILL", one[4]);
    let (code, out, error) = run(shell(&publish.replace("cnt_abc123", "cnt_later")), "").await;
    assert!(code == 0 && out.contains(r#""deliveries":1"#), "{out}{error}");
    let mut count = 1;
    let later = loop {
        let got = receiver.wait_for(count).await.swap_remove(count - 1);
        if got.body.contains("cnt_later") {
            break got;
        }
        count += 1;
    };
    let id = later.header("x-shortform-delivery-id");
    while !soon("its change", changes.next_line()).await.unwrap().expect("it watches on").contains(id) {}

    let folder = Path::new(three[6]).ancestors().nth(2).unwrap();
    let postgres = std::fs::read_to_string(folder.join("postgres/data/postmaster.pid")).unwrap();
    // One that has ended and was not yet asked for has no command line.
    let alive =
        |pid: &str| std::fs::read(Path::new("/proc").join(pid).join("cmdline")).is_ok_and(|line| !line.is_empty());
    let started = [two[4], three[4], postgres.lines().next().unwrap()];
    assert!(started.iter().all(|pid| alive(pid)), "{started:?}");
    kill("-TERM", &example.0.id().unwrap().to_string());
    assert!(soon("the end", example.0.wait()).await.unwrap().success());
    // PostgreSQL's file says that it ended a moment before it does.
    let gone = async {
        while started.iter().any(|pid| alive(pid)) {
            tokio::task::yield_now().await;
        }
    };
    soon("the end of all processes", gone).await;
    assert!(!alive(one[4]) && !folder.exists(), "{folder:?} is left");
}
