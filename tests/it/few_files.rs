//! A process that may open few files, by which any number of receivers is as many as ten thousand elsewhere.

use std::{path::Path, process::Stdio, sync::Arc, time::Duration};

use serde_json::{Value, json};
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::{TcpListener, TcpStream},
    process::{Child, Command},
    sync::watch,
};

use crate::support::soon;

/// The binary in development mode, with so many files.
struct Limited {
    child: Child,
    base: String,
    key: String,
    http: reqwest::Client,
}

impl Limited {
    async fn start(files: usize, directory: &Path) -> Self {
        let mut child = Command::new("sh")
            .args(["-c", &format!("ulimit -n {files}; exec \"$0\" \"$@\"")])
            .arg(env!("CARGO_BIN_EXE_shortkit-webhooks"))
            .args(["serve", "--dev", "--listen", "127.0.0.1:0", "--log", "warn", "--rate-limit", "off"])
            .current_dir(directory)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let mut next = async || soon("a line", lines.next_line()).await.unwrap().expect("the process goes on");
        let base = next().await.strip_prefix("listening on ").expect("the first line").to_owned();
        let key = loop {
            if let Some(rest) = next().await.trim().strip_prefix("secret key") {
                break rest.split_whitespace().next().unwrap().to_owned();
            }
        };
        let _ = rustls::crypto::ring::default_provider().install_default();
        Self { child, base, key, http: reqwest::Client::builder().no_proxy().build().unwrap() }
    }

    async fn post(&self, path: &str, body: Value) {
        let request = self.http.post(format!("{}/v1/{path}", self.base)).bearer_auth(&self.key);
        let request = request.header("content-type", "application/json").body(body.to_string());
        let response = soon("an answer", request.send()).await.unwrap();
        assert!(response.status().is_success(), "{:?}", response.text().await);
    }

    /// A webhook of each of so many hosts, which are all this machine.
    async fn webhooks(&self, hosts: usize, receiver: &Receiver) {
        for host in 0..hosts {
            let url = format!("http://127.1.{}.{}:{}/", host / 250, host % 250 + 1, receiver.port);
            self.post("webhooks", json!({ "url": url, "events": ["content.ready"] })).await;
        }
    }

    async fn publish(&self) {
        self.post("events", json!({ "event": "content.ready", "data": {} })).await;
    }

    /// Ends it, and whether it said that requests got no file.
    async fn was_short_of_files(mut self) -> bool {
        self.child.start_kill().unwrap();
        let mut said = String::new();
        self.child.stderr.take().unwrap().read_to_string(&mut said).await.unwrap();
        self.child.wait().await.unwrap();
        said.contains("requests cannot go out")
    }
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
    let service = Limited::start(512, directory.path()).await;
    let receiver = Receiver::start(Duration::ZERO).await;
    service.webhooks(HOSTS, &receiver).await;
    for round in 1..=2 {
        service.publish().await;
        receiver.first_attempts(round * HOSTS).await;
    }
    // Before idle ones are closed, which would be after half a minute.
    let mut seen = receiver.seen.clone();
    let closed = seen.wait_for(|seen| seen.connections <= 512 / 8);
    drop(tokio::time::timeout(Duration::from_secs(15), closed).await.expect("an eighth of the files is left").unwrap());
    assert!(!service.was_short_of_files().await);
}

#[tokio::test]
async fn a_request_that_gets_no_file_is_no_attempt() {
    const HOSTS: usize = 64;
    let directory = tempfile::tempdir().unwrap();
    let service = Limited::start(80, directory.path()).await;
    // So long that all would be under way together.
    let receiver = Receiver::start(Duration::from_secs(2)).await;
    service.webhooks(HOSTS, &receiver).await;
    service.publish().await;
    receiver.first_attempts(HOSTS).await;
    assert!(service.was_short_of_files().await);
}
