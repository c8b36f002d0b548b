//! A process that may open few files, by which any number of receivers is as many as ten thousand elsewhere.

use std::{collections::BTreeSet, path::Path, process::Stdio, time::Duration};

use serde_json::{Value, json};
use tokio::{
    io::{AsyncBufReadExt, BufReader},
    process::{Child, Command},
};

use crate::support::{Receiver, Reply, soon};

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
            .args(["serve", "--dev", "--listen", "127.0.0.1:0", "--log", "error", "--rate-limit", "off"])
            .current_dir(directory)
            .stdout(Stdio::piped())
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
            let url = format!("http://127.1.{}.{}:{}/", host / 250, host % 250 + 1, receiver.address.port());
            self.post("webhooks", json!({ "url": url, "events": ["content.ready"] })).await;
        }
    }

    async fn publish(&self) {
        self.post("events", json!({ "event": "content.ready", "data": {} })).await;
    }

    fn open_files(&self) -> usize {
        std::fs::read_dir(format!("/proc/{}/fd", self.child.id().unwrap())).unwrap().count()
    }

    async fn stop(mut self) {
        self.child.start_kill().unwrap();
        self.child.wait().await.unwrap();
    }
}

/// Each delivery arrived once, at its first attempt.
async fn all_at_the_first_attempt(receiver: &Receiver, count: usize) {
    let received = receiver.wait_for(count).await;
    let deliveries: BTreeSet<&str> = received.iter().map(|one| one.header("x-shortform-delivery-id")).collect();
    assert_eq!(deliveries.len(), received.len());
    assert!(received.iter().all(|one| one.header("x-shortform-delivery-attempt") == "1"));
}

#[tokio::test]
async fn connections_to_many_hosts_are_not_all_kept() {
    const HOSTS: usize = 600;
    let directory = tempfile::tempdir().unwrap();
    let service = Limited::start(512, directory.path()).await;
    let receiver = Receiver::on("0.0.0.0:0", |_, _| Reply::status(200)).await;
    service.webhooks(HOSTS, &receiver).await;
    for round in 1..=2 {
        service.publish().await;
        all_at_the_first_attempt(&receiver, round * HOSTS).await;
    }
    // An eighth of the files are such, and the database has its own.
    let closed = async {
        while service.open_files() > 512 / 8 + 100 {
            tokio::task::yield_now().await;
        }
    };
    soon("the others are closed", closed).await;
    service.stop().await;
}

#[tokio::test]
async fn a_request_that_gets_no_file_is_no_attempt() {
    const HOSTS: usize = 64;
    const FILES: usize = 80;
    let directory = tempfile::tempdir().unwrap();
    let service = Limited::start(FILES, directory.path()).await;
    // So long that all would be under way together.
    let slow = |_: usize, _: &_| Reply { delay: Duration::from_secs(2), ..Reply::status(200) };
    let receiver = Receiver::on("0.0.0.0:0", slow).await;
    service.webhooks(HOSTS, &receiver).await;
    assert!(service.open_files() + HOSTS > FILES, "{} files are enough", service.open_files());
    service.publish().await;
    all_at_the_first_attempt(&receiver, HOSTS).await;
    service.stop().await;
}
