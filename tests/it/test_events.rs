//! How many test events may be under way, at receivers that hang.

use std::{
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::Duration,
};

use http::Method;
use serde_json::json;
use shortkit_webhooks::{
    grpc::proto::{DeliveryStatus, SendTestEventRequest, webhook_service_client::WebhookServiceClient},
    store::{KeyKind, Lease, NewEvent},
    webhook::{Environment, EventData, Tenant},
};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::watch,
    task::{JoinHandle, JoinSet},
};
use tonic::{Code, Request};

use crate::support::{Answer, Bearer, Database, Receiver, TestServer, on_both_databases, soon};

on_both_databases!(
    an_organisation_may_have_as_many_as_are_free,
    a_test_counts_until_its_attempt_has_ended_also_when_its_caller_has_left,
    a_test_that_was_not_sent_is_not_sent_later,
);

const MAX_TESTS: usize = 128;
const MAX_TESTS_PER_ORGANIZATION: usize = 32;

/// Takes connections and says nothing, until they are let go.
struct Hanging {
    address: SocketAddr,
    held: Arc<Mutex<Vec<TcpStream>>>,
    /// How many have come, also those that were let go.
    count: watch::Receiver<usize>,
    task: JoinHandle<()>,
}

impl Hanging {
    async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (held, (counted, count)) = (Arc::<Mutex<Vec<_>>>::default(), watch::channel(0));
        let into = Arc::clone(&held);
        let task = tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                into.lock().unwrap().push(stream);
                counted.send_modify(|count| *count += 1);
            }
        });
        Self { address, held, count, task }
    }

    fn url(&self) -> String {
        format!("http://{}/hook", self.address)
    }

    fn count(&self) -> usize {
        *self.count.borrow()
    }

    async fn wait_for(&self, count: usize) {
        let mut seen = self.count.clone();
        soon(&format!("attempt number {count}"), seen.wait_for(|seen| *seen >= count)).await.unwrap();
    }

    /// Ends the attempts that hang.
    fn let_go(&self) {
        self.held.lock().unwrap().clear();
    }
}

impl Drop for Hanging {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// An organisation with a webhook.
struct Organization {
    key: String,
    webhook_id: String,
}

impl Organization {
    async fn new(server: &TestServer, name: &str, url: &str) -> Self {
        let key = server.new_key(Some(name), KeyKind::Secret, Environment::Test).await;
        let body = json!({ "url": url, "events": ["content.ready"] }).to_string();
        let request = server.anonymous(Method::POST, "/v1/webhooks").bearer_auth(&key);
        let made = server.send(request.header("content-type", "application/json").body(body)).await.data();
        Self { key, webhook_id: made["id"].as_str().unwrap().to_owned() }
    }

    fn test(&self, server: &TestServer) -> reqwest::RequestBuilder {
        server.anonymous(Method::POST, &format!("/v1/webhooks/{}/test", self.webhook_id)).bearer_auth(&self.key)
    }
}

fn assert_refused(answer: &Answer, status: u16, code: &str) {
    assert_eq!((answer.status, &answer.json()["error"]["code"]), (status, &json!(code)), "{}", answer.text);
    assert_eq!(answer.headers["retry-after"], "1");
}

async fn an_organisation_may_have_as_many_as_are_free(database: Database) {
    let server = TestServer::start(&database).await;
    let (receiver, hanging) = (Receiver::start().await, Hanging::start().await);
    let quick = Organization::new(&server, "quick", &receiver.url()).await;
    let mut under_way = JoinSet::new();
    // Half of what the others leave of 96, and never fewer than 4: four who take all they can leave room for ten more.
    for (number, room) in [MAX_TESTS_PER_ORGANIZATION, 32, 16, 8].into_iter().chain([4; 10]).enumerate() {
        assert_eq!(server.send(quick.test(&server)).await.data()["status"], "success", "beside {number} that have all");
        let loud = Organization::new(&server, &format!("loud-{number}"), &hanging.url()).await;
        for _ in 0..room {
            under_way.spawn(loud.test(&server).send());
        }
        hanging.wait_for(under_way.len()).await;
        assert_refused(&server.send(loud.test(&server)).await, 429, "RATE_LIMITED");
    }
    assert_refused(&server.send(quick.test(&server)).await, 503, "SERVICE_UNAVAILABLE");
    assert_eq!(hanging.count(), MAX_TESTS);

    hanging.let_go();
    for answer in soon("the end of all tests", under_way.join_all()).await {
        assert_eq!(answer.unwrap().status(), 200);
    }
    assert_eq!(server.send(quick.test(&server)).await.data()["status"], "success");
    server.stop().await;
}

async fn a_test_counts_until_its_attempt_has_ended_also_when_its_caller_has_left(database: Database) {
    let server = TestServer::start(&database).await;
    let hanging = Hanging::start().await;
    let Organization { key, webhook_id } = Organization::new(&server, "loud", &hanging.url()).await;
    let mut webhooks = WebhookServiceClient::with_interceptor(server.channel(), Bearer(key));
    let mut call_and_leave = async || {
        let mut request = Request::new(SendTestEventRequest { id: webhook_id.clone(), event: None });
        request.set_timeout(Duration::from_millis(20));
        webhooks.send_test_event(request).await.unwrap_err().code()
    };
    while soon("an answer", call_and_leave()).await != Code::ResourceExhausted {
        assert!(hanging.count() <= MAX_TESTS_PER_ORGANIZATION, "nobody waits for {} attempts", hanging.count());
    }
    hanging.wait_for(MAX_TESTS_PER_ORGANIZATION).await;
    assert_eq!(soon("an answer", call_and_leave()).await, Code::ResourceExhausted);
    assert_eq!(hanging.count(), MAX_TESTS_PER_ORGANIZATION);

    hanging.let_go();
    let again = async {
        while hanging.count() == MAX_TESTS_PER_ORGANIZATION {
            call_and_leave().await;
        }
    };
    soon("another test", again).await;
    // With what still comes.
    drop(hanging);
    server.stop().await;
}

async fn a_test_that_was_not_sent_is_not_sent_later(database: Database) {
    let server = TestServer::start(&database).await;
    let receiver = Receiver::start().await;
    let (id, _) = server.webhook(&receiver.url(), &["content.ready"]).await;
    let mut watch = server.watch().await;
    // As one that lay around for so long that its lease would run out under way.
    let lease = Lease { length: Duration::from_secs(20), first_wait: Duration::ZERO };
    let event = NewEvent { event_type: "content.ready".to_owned(), data: EventData::parse("{}").unwrap() };
    let tenant = Tenant::new("acme", Environment::Test).unwrap();
    let (delivery_id, attempted) = server.store.publish_test(tenant, &id, event, lease).await.unwrap();
    assert!(soon("the end of the test", attempted).await.is_err(), "nobody hears of an attempt");
    let ended = watch.until(1, |change| change.status() != DeliveryStatus::Pending).await.remove(0);
    assert_eq!(ended.delivery_id, delivery_id);
    assert_eq!((ended.status(), ended.last_error.as_deref()), (DeliveryStatus::Failed, Some("The test was not sent")));
    assert!(receiver.received().is_empty());
    server.stop().await;
}
