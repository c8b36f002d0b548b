//! A running server, and one caller of it.

use std::net::SocketAddr;

use http::{HeaderMap, Method};
use serde_json::Value;
use shortkit_webhooks::{
    config::{Config, ServeArgs},
    grpc::proto::{
        WatchDeliveriesRequest, WatchDeliveriesResponse, delivery_service_client::DeliveryServiceClient,
        webhook_service_client::WebhookServiceClient,
    },
    server::{self, Listeners},
    store::{KeyKind, NewKey, Store},
    vault::Vault,
    webhook::{Environment, RetrySchedule},
};
use tokio::{net::TcpListener, task::JoinHandle};
use tokio_util::sync::CancellationToken;
use tonic::{
    Request, Status, Streaming,
    service::{Interceptor, interceptor::InterceptedService},
    transport::{Channel, Endpoint},
};

use super::{Database, Kind, soon};

/// What encrypts the secrets of most tests; a second server on the same database needs the same.
pub(crate) const MASTER_KEY: &str = "dGVzdHMgaGF2ZSBhIG1hc3RlciBrZXkgb2YgMzIgYnk=";

/// A server on a port of its own, with a secret key for the organisation `acme`.
pub(crate) struct TestServer {
    pub(crate) address: SocketAddr,
    /// The one for those who run it.
    pub(crate) internal: Option<SocketAddr>,
    pub(crate) store: Store,
    pub(crate) key: String,
    http: reqwest::Client,
    shutdown: CancellationToken,
    task: JoinHandle<Result<(), server::Error>>,
    /// Goes last: the server works on it.
    _database: Option<Database>,
}

/// An answer over REST.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) headers: HeaderMap,
    pub(crate) text: String,
}

/// Adds a key to every gRPC call.
#[derive(Clone)]
pub(crate) struct Bearer(pub(crate) String);

impl Interceptor for Bearer {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        request.metadata_mut().insert("authorization", format!("Bearer {}", self.0).parse().unwrap());
        Ok(request)
    }
}

type Authorized = InterceptedService<Channel, Bearer>;

impl Answer {
    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.text).unwrap_or_else(|error| panic!("{error}: {}", self.text))
    }

    pub(crate) fn data(&self) -> Value {
        assert!((200..300).contains(&self.status), "{} {}", self.status, self.text);
        self.json()["data"].clone()
    }
}

/// The configuration of most tests: loopback receivers, retries at once, any number of calls.
pub(crate) fn config(database: &Database) -> Config {
    Config {
        database_url: database.url.clone(),
        vault: Some(Vault::parse(MASTER_KEY).unwrap()),
        retry_schedule: RetrySchedule::parse("0s,0s,0s,0s,0s,0s").unwrap(),
        rate_limit: None,
        ..ServeArgs::development().load().unwrap()
    }
}

impl TestServer {
    pub(crate) async fn start(database: &Database) -> Self {
        Self::with(config(database)).await
    }

    /// For what does not depend on the database.
    pub(crate) async fn on_sqlite() -> Self {
        let database = Database::fresh(Kind::Sqlite).await;
        let server = Self::start(&database).await;
        Self { _database: Some(database), ..server }
    }

    pub(crate) async fn with(config: Config) -> Self {
        let store = Store::connect(&config.database_url).await.unwrap();
        store.migrate().await.unwrap();
        let public = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = public.local_addr().unwrap();
        let internal = match config.internal_listen {
            Some(address) => Some(TcpListener::bind(address).await.unwrap()),
            None => None,
        };
        let internal_address = internal.as_ref().map(|listener| listener.local_addr().unwrap());
        let listeners = Listeners { public, internal };
        let shutdown = CancellationToken::new();
        let task = tokio::spawn(server::run(listeners, config, store.clone(), shutdown.clone()));
        // The first of the tests in this process installs it; the others find it there.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let http = reqwest::Client::builder().no_proxy().build().unwrap();
        let (key, internal) = (String::new(), internal_address);
        let mut server = Self { address, internal, store, key, http, shutdown, task, _database: None };
        server.key = server.new_key(Some("acme"), KeyKind::Secret, Environment::Test).await;
        server
    }

    /// Makes a key in the database.
    pub(crate) async fn new_key(&self, organization: Option<&str>, kind: KeyKind, environment: Environment) -> String {
        let organization = organization.map(str::to_owned);
        let new = NewKey { organization, environment, kind, expires_at: None };
        self.store.create_key(new).await.unwrap().key.to_owned()
    }

    /// Tells it to stop as a signal would.
    pub(crate) fn tell_to_stop(&self) {
        self.shutdown.cancel();
    }

    /// Stops as a signal would, and waits until everything has ended.
    pub(crate) async fn stop(self) {
        self.shutdown.cancel();
        soon("the end of the server", self.task).await.unwrap().unwrap();
    }

    /// A request without a key.
    pub(crate) fn anonymous(&self, method: Method, path: &str) -> reqwest::RequestBuilder {
        self.http.request(method, format!("http://{}{path}", self.address))
    }

    pub(crate) fn request(&self, method: Method, path: &str) -> reqwest::RequestBuilder {
        self.anonymous(method, path).bearer_auth(&self.key)
    }

    pub(crate) async fn send(&self, request: reqwest::RequestBuilder) -> Answer {
        let response = soon("an answer", request.send()).await.unwrap();
        let (status, headers) = (response.status().as_u16(), response.headers().clone());
        Answer { status, headers, text: response.text().await.unwrap() }
    }

    pub(crate) async fn get(&self, path: &str) -> Answer {
        self.send(self.request(Method::GET, path)).await
    }

    pub(crate) async fn call(&self, method: Method, path: &str, body: &str) -> Answer {
        let request = self.request(method, path).header("content-type", "application/json");
        self.send(request.body(body.to_owned())).await
    }

    pub(crate) async fn post(&self, path: &str, body: &str) -> Answer {
        self.call(Method::POST, path, body).await
    }

    pub(crate) async fn patch(&self, path: &str, body: &str) -> Answer {
        self.call(Method::PATCH, path, body).await
    }

    pub(crate) async fn delete(&self, path: &str) -> Answer {
        self.send(self.request(Method::DELETE, path)).await
    }

    /// Registers a webhook for `events`; its id and secret.
    pub(crate) async fn webhook(&self, url: &str, events: &[&str]) -> (String, String) {
        let body = serde_json::json!({ "url": url, "events": events }).to_string();
        let data = self.post("/v1/webhooks", &body).await.data();
        let text = |key: &str| data[key].as_str().unwrap().to_owned();
        (text("id"), text("secret"))
    }

    /// Publishes an event; how many deliveries it made.
    pub(crate) async fn publish(&self, event: &str, data: &str) -> i64 {
        let answer = self.post("/v1/events", &format!(r#"{{"event":"{event}","data":{data}}}"#)).await;
        answer.data()["deliveries"].as_i64().unwrap()
    }

    pub(crate) fn channel(&self) -> Channel {
        Endpoint::from_shared(format!("http://{}", self.address)).unwrap().connect_lazy()
    }

    pub(crate) fn webhooks(&self) -> WebhookServiceClient<Authorized> {
        WebhookServiceClient::with_interceptor(self.channel(), Bearer(self.key.clone()))
    }

    pub(crate) fn deliveries(&self) -> DeliveryServiceClient<Authorized> {
        DeliveryServiceClient::with_interceptor(self.channel(), Bearer(self.key.clone()))
    }

    /// The live stream of all the tenant's deliveries.
    pub(crate) async fn watch(&self) -> Watch {
        self.watch_as(&self.key).await
    }

    /// The same with another key.
    pub(crate) async fn watch_as(&self, key: &str) -> Watch {
        let mut deliveries = DeliveryServiceClient::with_interceptor(self.channel(), Bearer(key.to_owned()));
        let stream = deliveries.watch_deliveries(WatchDeliveriesRequest::default()).await;
        Watch(stream.unwrap().into_inner())
    }
}

/// The live stream, to wait for what must happen.
pub(crate) struct Watch(pub(crate) Streaming<WatchDeliveriesResponse>);

impl Watch {
    pub(crate) async fn next(&mut self) -> WatchDeliveriesResponse {
        soon("a change", self.0.message()).await.unwrap().expect("the stream goes on")
    }

    /// Waits for `count` changes that `wanted` picks.
    pub(crate) async fn until(
        &mut self,
        count: usize,
        wanted: impl Fn(&WatchDeliveriesResponse) -> bool,
    ) -> Vec<WatchDeliveriesResponse> {
        let mut found = Vec::new();
        while found.len() < count {
            let change = self.next().await;
            if wanted(&change) {
                found.push(change);
            }
        }
        found
    }
}
