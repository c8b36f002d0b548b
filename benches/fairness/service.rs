//! The service in a process of its own, and callers of it.

use std::{process::Stdio, time::Duration};

use shortkit_webhooks::grpc::proto::{
    CreateWebhookRequest, PublishEventRequest, delivery_service_client::DeliveryServiceClient,
    webhook_service_client::WebhookServiceClient,
};
use tokio::{
    io::{AsyncBufReadExt, BufReader},
    process::{Child, Command},
};
use tonic::{Request, Status, transport::Channel};

/// Connections that callers share; each takes a hundred calls at a time.
const CONNECTIONS: usize = 8;

/// A running service; it is killed when this is dropped.
pub(crate) struct Service {
    child: Child,
    base: String,
    key: String,
    _directory: tempfile::TempDir,
}

/// Somebody who calls in the name of an organisation.
#[derive(Clone)]
pub(crate) struct Caller {
    channels: Vec<Channel>,
    key: String,
    organization: &'static str,
}

impl Service {
    /// Starts on a fresh SQLite database, or on the PostgreSQL database named, with these further arguments.
    pub(crate) async fn start(database_url: Option<&str>, arguments: &[&str]) -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        let mut command = Command::new(env!("CARGO_BIN_EXE_shortkit-webhooks"));
        command
            .args(["serve", "--dev", "--listen", "127.0.0.1:0", "--log", "error", "--rate-limit", "off"])
            .args(arguments);
        if let Some(url) = database_url {
            command.args(["--database-url", url]);
        }
        command.current_dir(directory.path()).stdout(Stdio::piped()).kill_on_drop(true);
        let mut child = command.spawn().expect("the service starts");
        let mut lines = BufReader::new(child.stdout.take().expect("piped")).lines();
        let (mut base, mut key) = (None, None);
        while key.is_none() {
            let line = lines.next_line().await.expect("the service prints").expect("the service goes on");
            base = base.or(line.strip_prefix("listening on ").map(str::to_owned));
            let rest = line.trim().strip_prefix("service key");
            key = rest.and_then(|rest| rest.split_whitespace().next()).map(str::to_owned);
        }
        Self { child, base: base.expect("an address"), key: key.expect("a key"), _directory: directory }
    }

    /// A caller with connections of its own.
    pub(crate) async fn caller(&self, organization: &'static str) -> Caller {
        let mut channels = Vec::new();
        for _ in 0..CONNECTIONS {
            let endpoint = Channel::from_shared(self.base.clone()).expect("a URL");
            channels.push(endpoint.connect().await.expect("a connection"));
        }
        Caller { channels, key: self.key.clone(), organization }
    }

    /// MiB of memory in use.
    pub(crate) fn resident_mib(&self) -> f64 {
        let pid = self.child.id().expect("it runs");
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap_or_default();
        line.trim().trim_end_matches(" kB").parse::<f64>().unwrap_or(0.0) / 1024.0
    }
}

impl Caller {
    /// Registers a webhook.
    pub(crate) async fn webhook(&self, url: String, event: &str) {
        let message = CreateWebhookRequest { url, events: vec![event.to_owned()], description: None };
        let mut client = WebhookServiceClient::new(self.channels[0].clone());
        client.create_webhook(self.signed(message)).await.expect("a webhook");
    }

    /// Publishes, over the connection that is `number`'s turn.
    pub(crate) async fn publish(&self, number: usize, event: &str, data: String) -> Result<(), Status> {
        let message = PublishEventRequest { event: event.to_owned(), data };
        let mut client = DeliveryServiceClient::new(self.channels[number % CONNECTIONS].clone());
        client.publish_event(self.signed(message)).await.map(drop)
    }

    /// Publishes until it is accepted: the service may be busy for a moment.
    pub(crate) async fn publish_surely(&self, number: usize, event: &str, data: String) {
        while self.publish(number, event, data.clone()).await.is_err() {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    fn signed<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        let metadata = request.metadata_mut();
        metadata.insert("authorization", format!("Bearer {}", self.key).parse().expect("a header"));
        metadata.insert("x-shortkit-organization", self.organization.parse().expect("a header"));
        request
    }
}
