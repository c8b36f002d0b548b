//! The real binary, with proxy variables that point inside.

use std::{path::Path, process::Stdio};

use http::Method;
use serde_json::{Value, json};
use shortkit_webhooks::grpc::proto::{
    DeliveryStatus, WatchDeliveriesRequest, WatchDeliveriesResponse, delivery_service_client::DeliveryServiceClient,
};
use tokio::{
    io::{AsyncBufReadExt, BufReader},
    process::{Child, Command},
};
use tonic::{Request, Status, Streaming, metadata::AsciiMetadataValue, transport::Endpoint};

use crate::support::soon;

const BINARY: &str = env!("CARGO_BIN_EXE_shortkit-webhooks");
const ORGANIZATION: &str = "acme";
/// Of 32 bytes.
const MASTER_KEY: &str = "c2l4dGVlbiBieXRlcyBhbmQgc2l4dGVlbiBtb3JlLi4=";
/// In either case, as programs read them.
const PROXY_VARIABLES: [&str; 6] = ["http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"];

/// A service that may go to public addresses and to what it is told.
pub(super) struct Service {
    child: Child,
    base: String,
    key: String,
    http: reqwest::Client,
}

/// The live stream.
pub(super) struct Watch(Streaming<WatchDeliveriesResponse>);

impl Service {
    pub(super) async fn start(directory: &Path, allow: &str) -> Self {
        let created = Command::new(BINARY)
            .args(["keys", "create", "--environment", "test", "--kind", "service", "--json"])
            .current_dir(directory)
            .output()
            .await
            .unwrap();
        let key: Value = serde_json::from_slice(&created.stdout).unwrap();
        let mut child = Command::new(BINARY)
            .args(["serve", "--listen", "127.0.0.1:0", "--log", "warn", "--allow-http", "--egress-allow", allow])
            .args(["--retry-schedule", "0s"])
            .env("SHORTKIT_MASTER_KEY", MASTER_KEY)
            .envs(PROXY_VARIABLES.map(|name| (name, "http://10.1.2.3:9000")))
            .env_remove("no_proxy")
            .env_remove("NO_PROXY")
            .current_dir(directory)
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let line = soon("the first line", lines.next_line()).await.unwrap().expect("the service starts");
        let base = line.strip_prefix("listening on ").expect("the address").to_owned();
        let _ = rustls::crypto::ring::default_provider().install_default();
        let http = reqwest::Client::builder().no_proxy().build().unwrap();
        Self { child, base, key: key["key"].as_str().unwrap().to_owned(), http }
    }

    async fn call(&self, method: Method, path: &str, body: &Value) -> (u16, Value) {
        let request = self.http.request(method, format!("{}{path}", self.base)).bearer_auth(&self.key);
        let request = request.header("x-shortkit-organization", ORGANIZATION);
        let body = if body.is_null() { String::new() } else { body.to_string() };
        let request = request.header("content-type", "application/json").body(body);
        let response = soon("an answer", request.send()).await.unwrap();
        (response.status().as_u16(), serde_json::from_str(&response.text().await.unwrap()).unwrap())
    }

    async fn data(&self, method: Method, path: &str, body: &Value) -> Value {
        let (status, mut answer) = self.call(method, path, body).await;
        assert!(status < 300, "{path}: {answer}");
        answer["data"].take()
    }

    pub(super) async fn create(&self, url: &str, event: &str) -> (u16, Value) {
        self.call(Method::POST, "/v1/webhooks", &json!({ "url": url, "events": [event] })).await
    }

    pub(super) async fn register(&self, url: &str, event: &str) -> String {
        let (status, answer) = self.create(url, event).await;
        assert_eq!(status, 201, "{url}: {answer}");
        answer["data"]["id"].as_str().unwrap().to_owned()
    }

    pub(super) async fn patch(&self, id: &str, change: &Value) -> (u16, Value) {
        self.call(Method::PATCH, &format!("/v1/webhooks/{id}"), change).await
    }

    pub(super) async fn delete(&self, id: &str) {
        self.data(Method::DELETE, &format!("/v1/webhooks/{id}"), &Value::Null).await;
    }

    /// Sends a test event: how it ended.
    pub(super) async fn test(&self, id: &str) -> Value {
        self.data(Method::POST, &format!("/v1/webhooks/{id}/test"), &Value::Null).await
    }

    /// Publishes an event: how many deliveries it has.
    pub(super) async fn publish(&self, event: &str) -> usize {
        let published = self.data(Method::POST, "/v1/events", &json!({ "event": event, "data": {} })).await;
        usize::try_from(published["deliveries"].as_u64().unwrap()).unwrap()
    }

    /// The newest delivery of a webhook.
    pub(super) async fn newest(&self, id: &str) -> Value {
        self.data(Method::GET, &format!("/v1/webhooks/{id}/deliveries?limit=1"), &Value::Null).await[0].take()
    }

    /// The newest delivery of the newest webhook for an event, with its attempts.
    pub(super) async fn newest_of(&self, event: &str) -> Value {
        let webhooks = self.data(Method::GET, "/v1/webhooks", &Value::Null).await;
        let webhook = webhooks.as_array().unwrap().iter().find(|webhook| webhook["events"][0] == event).unwrap();
        let id = webhook["id"].as_str().unwrap();
        let delivery = self.newest(id).await;
        let path = format!("/v1/webhooks/{id}/deliveries/{}", delivery["id"].as_str().unwrap());
        self.data(Method::GET, &path, &Value::Null).await
    }

    /// The live stream of an event's deliveries, from now on.
    pub(super) async fn watch(&self, event: &str) -> Watch {
        let channel = Endpoint::from_shared(self.base.clone()).unwrap().connect_lazy();
        let bearer: AsciiMetadataValue = format!("Bearer {}", self.key).parse().unwrap();
        let mut client = DeliveryServiceClient::with_interceptor(channel, move |mut request: Request<()>| {
            request.metadata_mut().insert("authorization", bearer.clone());
            request.metadata_mut().insert("x-shortkit-organization", AsciiMetadataValue::from_static(ORGANIZATION));
            Ok::<_, Status>(request)
        });
        let request = WatchDeliveriesRequest { event: Some(event.to_owned()), ..WatchDeliveriesRequest::default() };
        Watch(client.watch_deliveries(request).await.unwrap().into_inner())
    }

    /// A number of `/proc/…/status`.
    pub(super) fn status(&self, name: &str) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id().unwrap())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')).unwrap();
        line.split_whitespace().next().unwrap().parse().unwrap()
    }

    pub(super) async fn stop(mut self) {
        self.child.start_kill().unwrap();
        self.child.wait().await.unwrap();
    }
}

impl Watch {
    /// Waits until so many deliveries have ended: the change that ended each.
    pub(super) async fn ended(&mut self, count: usize) -> Vec<WatchDeliveriesResponse> {
        let mut ended = Vec::new();
        while ended.len() < count {
            let change = soon("a change", self.0.message()).await.unwrap().expect("the stream goes on");
            if matches!(change.status(), DeliveryStatus::Success | DeliveryStatus::Failed) {
                ended.push(change);
            }
        }
        ended
    }
}
