//! A process that may open few files, by which any number of receivers is as many as ten thousand elsewhere.

use std::{path::Path, process::Stdio, sync::Arc, time::Duration};

use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::{TcpListener, TcpStream},
    process::Command,
    sync::watch,
};

use crate::support::{Process, soon};

/// The binary, with so many files.
async fn start(files: usize, directory: &Path) -> Process {
    let mut command = Command::new("sh");
    command.args(["-c", &format!("ulimit -n {files}; exec \"$0\" \"$@\"")]);
    command.arg(env!("CARGO_BIN_EXE_shortkit-webhooks")).stderr(Stdio::piped());
    Process::start(command, &["--rate-limit", "off"], directory).await
}

/// A webhook of each of so many hosts, which are all this machine.
async fn webhooks(process: &Process, hosts: usize, receiver: &Receiver) {
    for host in 0..hosts {
        process.webhook(&format!("http://127.1.{}.{}:{}/", host / 250, host % 250 + 1, receiver.port)).await;
    }
}

/// Ends it, and whether it said that requests got no file.
async fn was_short_of_files(Process { mut child, .. }: Process) -> bool {
    child.start_kill().unwrap();
    let mut said = String::new();
    child.stderr.take().unwrap().read_to_string(&mut said).await.unwrap();
    child.wait().await.unwrap();
    said.contains("requests cannot go out")
}

/// Takes everything at all addresses of this machine.
struct Receiver {
    port: u16,
    seen: watch::Receiver<Seen>,
}

#[derive(Clone, Copy, Default)]
struct Seen {
    /// First attempts, and others.
    first: usize,
    again: usize,
    connections: usize,
}

impl Receiver {
    /// One that takes its time.
    async fn start(delay: Duration) -> Self {
        let listener = TcpListener::bind("0.0.0.0:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let (sender, seen) = watch::channel(Seen::default());
        let sender = Arc::new(sender);
        tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                sender.send_modify(|seen| seen.connections += 1);
                let sender = Arc::clone(&sender);
                tokio::spawn(async move {
                    // Whoever ends the connection, it has ended.
                    let _ = answer(stream, delay, &sender).await;
                    sender.send_modify(|seen| seen.connections -= 1);
                });
            }
        });
        Self { port, seen }
    }

    /// So many arrived, each at its first attempt.
    async fn first_attempts(&self, count: usize) {
        let mut seen = self.seen.clone();
        let seen =
            *soon("the last first attempt", seen.wait_for(|seen| seen.first + seen.again >= count)).await.unwrap();
        assert_eq!((seen.first, seen.again), (count, 0));
    }
}

async fn answer(stream: TcpStream, delay: Duration, seen: &watch::Sender<Seen>) -> std::io::Result<()> {
    let mut stream = BufReader::new(stream);
    loop {
        let (mut length, mut first) = (0, false);
        loop {
            let mut line = String::new();
            if stream.read_line(&mut line).await? == 0 {
                return Ok(());
            }
            match line.trim_end().split_once(": ") {
                Some(("content-length", text)) => length = text.parse().unwrap(),
                Some(("x-shortform-delivery-attempt", text)) => first = text == "1",
                Some(_) => {}
                None if line.trim_end().is_empty() => break,
                None => {}
            }
        }
        stream.read_exact(&mut vec![0; length]).await?;
        seen.send_modify(|seen| *if first { &mut seen.first } else { &mut seen.again } += 1);
        tokio::time::sleep(delay).await;
        stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").await?;
    }
}

#[tokio::test]
async fn connections_to_many_hosts_are_not_all_kept() {
    const HOSTS: usize = 600;
    let directory = tempfile::tempdir().unwrap();
    let service = start(512, directory.path()).await;
    let receiver = Receiver::start(Duration::ZERO).await;
    webhooks(&service, HOSTS, &receiver).await;
    for round in 1..=2 {
        assert_eq!(service.publish("{}").await, HOSTS as i64);
        receiver.first_attempts(round * HOSTS).await;
    }
    // Before idle ones are closed, which would be after half a minute.
    let mut seen = receiver.seen.clone();
    let closed = seen.wait_for(|seen| seen.connections <= 512 / 8);
    drop(tokio::time::timeout(Duration::from_secs(15), closed).await.expect("an eighth of the files is left").unwrap());
    assert!(!was_short_of_files(service).await);
}

#[tokio::test]
async fn a_request_that_gets_no_file_is_no_attempt() {
    const HOSTS: usize = 64;
    let directory = tempfile::tempdir().unwrap();
    let service = start(44, directory.path()).await;
    // So long that as many are under way together as one organisation may have, which is 32 of 64; with what the service
    // has open for itself that is more than it may.
    let receiver = Receiver::start(Duration::from_secs(2)).await;
    webhooks(&service, HOSTS, &receiver).await;
    assert_eq!(service.publish("{}").await, HOSTS as i64);
    receiver.first_attempts(HOSTS).await;
    assert!(was_short_of_files(service).await);
}
