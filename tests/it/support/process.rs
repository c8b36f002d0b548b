//! The real binary.

use std::{path::Path, process::Stdio};

use http::Method;
use tokio::{
    io::{AsyncBufReadExt, BufReader},
    process::{Child, Command},
};

use super::{Answer, soon};

/// The binary in development mode, which has said where it listens and the secret key that it made.
pub(crate) struct Process {
    pub(crate) child: Child,
    base: String,
    key: String,
    http: reqwest::Client,
}

/// Lets a command see a time of day that is not, with the library for that: which, its other variables say. What only ever
/// runs forward stays as it is.
pub(crate) fn lie_about_time(command: &mut Command) -> &mut Command {
    let folders = std::fs::read_dir("/usr/lib").unwrap().map(|entry| entry.unwrap().path());
    let mut libraries = folders.map(|folder| folder.join("faketime/libfaketimeMT.so.1"));
    let library = libraries.find(|path| path.exists()).expect("libfaketime is installed; tests/run does it");
    command.env("LD_PRELOAD", library).env("FAKETIME_DONT_FAKE_MONOTONIC", "1").env("DONT_FAKE_MONOTONIC", "1")
}

impl Process {
    /// Runs `command`, which is to become the binary, in `directory`.
    pub(crate) async fn start(mut command: Command, arguments: &[&str], directory: &Path) -> Self {
        command.args(["serve", "--dev", "--listen", "127.0.0.1:0", "--log", "warn"]).args(arguments);
        command.current_dir(directory).stdout(Stdio::piped()).kill_on_drop(true);
        let mut child = command.spawn().unwrap();
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

    /// Calls the REST API with the key.
    pub(crate) async fn call(&self, method: Method, path: &str, body: String) -> Answer {
        let request = self.http.request(method, format!("{}{path}", self.base)).bearer_auth(&self.key);
        let request = request.header("content-type", "application/json").body(body);
        let response = soon("an answer", request.send()).await.unwrap();
        let (status, headers) = (response.status().as_u16(), response.headers().clone());
        Answer { status, headers, text: response.text().await.unwrap() }
    }

    /// Registers a webhook for `content.ready`.
    pub(crate) async fn webhook(&self, url: &str) {
        let body = serde_json::json!({ "url": url, "events": ["content.ready"] }).to_string();
        self.call(Method::POST, "/v1/webhooks", body).await.data();
    }

    /// Publishes `content.ready`; how many deliveries that makes.
    pub(crate) async fn publish(&self, data: &str) -> i64 {
        let body = format!(r#"{{"event":"content.ready","data":{data}}}"#);
        self.call(Method::POST, "/v1/events", body).await.data()["deliveries"].as_i64().unwrap()
    }
}
