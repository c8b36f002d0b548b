//! The live stream, over gRPC and as Server-Sent Events.

use std::time::Duration;

use shortkit_webhooks::{
    grpc::proto::{
        DeliveryChange, DeliveryStatus, WatchDeliveriesRequest, delivery_service_client::DeliveryServiceClient,
    },
    store::{ChangeFilter, KeyKind, NewKey},
    webhook::{Environment, Tenant},
};
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio_stream::StreamExt;
use tokio_util::io::StreamReader;
use tonic::{Code, transport::Endpoint};
use tonic_types::StatusExt;

use crate::support::{Bearer, Database, Receiver, TestServer, Watch, on_both_databases, soon};

on_both_databases!(
    every_change_in_order,
    resumes_after_a_restart,
    catches_up_with_what_comes_meanwhile,
    filters,
    server_sent_events,
    ends_on_shutdown,
    a_database_of_before_the_filed_log_is_brought_up_to_date,
);

async fn every_change_in_order(database: Database) {
    let server = TestServer::start(&database).await;
    let receiver = Receiver::start().await;
    let (id, _) = server.webhook(&receiver.url(), &["content.ready"]).await;
    let mut watch = server.watch().await;
    server.publish("content.ready", "{}").await;
    let created = watch.next().await;
    assert_eq!((created.change(), created.status()), (DeliveryChange::Created, DeliveryStatus::Pending));
    assert_eq!((created.webhook_id, created.event.as_str()), (id, "content.ready"));
    let attempted = watch.next().await;
    assert_eq!((attempted.change(), attempted.status()), (DeliveryChange::Attempted, DeliveryStatus::Success));
    assert_eq!((attempted.attempts, attempted.status_code, attempted.last_error), (1, Some(200), None));
    server.stop().await;
}

async fn resumes_after_a_restart(database: Database) {
    let server = TestServer::start(&database).await;
    let key = server.key.clone();
    let receiver = Receiver::start().await;
    server.webhook(&receiver.url(), &["content.ready"]).await;
    let mut watch = server.watch().await;
    server.publish("content.ready", "{}").await;
    let first = watch.next().await;
    // Its own later changes are missed, and so are those of the others.
    drop(watch);
    for _ in 0..3 {
        server.publish("content.ready", "{}").await;
    }
    receiver.wait_for(4).await;
    server.stop().await;

    let mut server = TestServer::start(&database).await;
    server.key = key;
    let request = WatchDeliveriesRequest { resume_token: Some(first.resume_token), ..Default::default() };
    let stream = server.deliveries().watch_deliveries(request).await.unwrap().into_inner();
    let missed: Vec<_> = soon("7 changes", stream.take(7).collect::<Result<Vec<_>, _>>()).await.unwrap();
    let attempted = missed.iter().filter(|change| change.change() == DeliveryChange::Attempted).count();
    assert_eq!((missed.len(), attempted), (7, 4));
    server.stop().await;
}

async fn catches_up_with_what_comes_meanwhile(database: Database) {
    let server = TestServer::start(&database).await;
    let receiver = Receiver::start().await;
    server.webhook(&receiver.url(), &["content.ready"]).await;
    let mut watch = server.watch().await;
    server.publish("content.ready", "{}").await;
    let resume_token = Some(watch.next().await.resume_token);
    watch.until(1, |change| change.response_time.is_some()).await;
    database.log_failures("acme", 1_000, Duration::ZERO).await;
    let request = WatchDeliveriesRequest { resume_token, ..Default::default() };
    // A window that some hundred changes fill.
    let small = Endpoint::from_shared(format!("http://{}", server.address)).unwrap().initial_stream_window_size(65_535);
    let mut small = DeliveryServiceClient::with_interceptor(small.connect_lazy(), Bearer(server.key.clone()));
    let mut resumed = Watch(small.watch_deliveries(request).await.unwrap().into_inner());
    let attempted = resumed.next().await;
    assert_eq!(attempted.change(), DeliveryChange::Attempted);
    // It reads no further while as many come once more, which another sees as they come.
    database.log_failures("acme", 1_000, Duration::ZERO).await;
    server.publish("content.ready", "{}").await;
    watch.until(1, |change| change.response_time.is_some()).await;
    for number in (1..=1_000).chain(1..=1_000) {
        assert_eq!(resumed.next().await.delivery_id, format!("del_{number}"));
    }
    resumed.until(1, |change| change.response_time.is_some()).await;
    // From here on it sees what comes as it comes.
    server.publish("content.ready", "{}").await;
    assert_eq!(resumed.next().await.change(), DeliveryChange::Created);
    server.stop().await;
}

async fn filters(database: Database) {
    let server = TestServer::start(&database).await;
    let receiver = Receiver::start().await;
    let (id, _) = server.webhook(&receiver.url(), &["content.ready", "export.ready"]).await;
    server.webhook(&receiver.url(), &["content.ready", "export.ready"]).await;
    let request = WatchDeliveriesRequest {
        webhook_id: id.clone(),
        status: Some(DeliveryStatus::Success.into()),
        event: Some("export.ready".to_owned()),
        resume_token: None,
    };
    let mut stream = server.deliveries().watch_deliveries(request).await.unwrap().into_inner();
    server.publish("content.ready", "{}").await;
    receiver.wait_for(2).await;
    server.publish("export.ready", "{}").await;
    let change = soon("a change", stream.message()).await.unwrap().unwrap();
    assert_eq!(change.status(), DeliveryStatus::Success);
    assert_eq!((change.webhook_id, change.event.as_str()), (id, "export.ready"));
    server.stop().await;
}

async fn server_sent_events(database: Database) {
    let server = TestServer::start(&database).await;
    let receiver = Receiver::start().await;
    let (id, _) = server.webhook(&receiver.url(), &["content.ready"]).await;
    let path = format!("/v1/webhooks/{id}/deliveries/watch");

    let response = server.request(http::Method::GET, &path).send().await.unwrap();
    assert_eq!(response.status(), 200);
    assert_eq!(response.headers()["content-type"], "text/event-stream");
    server.publish("content.ready", "{}").await;
    let events = events(response, 2).await;
    assert!(events[0].1.starts_with("{"), "{events:?}");
    assert!(
        events[0].1.contains(r#""change":"created""#) && events[1].1.contains(r#""status":"success""#),
        "{events:?}"
    );

    let request = server.request(http::Method::GET, &path).header("last-event-id", &events[0].0);
    let resumed = self::events(request.send().await.unwrap(), 1).await;
    assert_eq!(resumed[0], events[1]);

    let forged = server.request(http::Method::GET, &path).header("last-event-id", "x");
    let refused = server.send(forged).await;
    assert_eq!((refused.status, refused.json()["error"]["code"].as_str()), (400, Some("INVALID_PARAMETER")));
    server.stop().await;
}

/// An organisation has so many streams on a node, and one that ends in any way makes room.
#[tokio::test]
async fn an_organisation_has_so_many_streams() {
    let server = TestServer::on_sqlite().await;
    let tenant = Tenant::new("acme", Environment::Live).unwrap();
    let filter = ChangeFilter { tenant, webhook_id: None, status: None, event_type: None };
    let mut others = Vec::new();
    for _ in 0..255 {
        others.push(server.store.watch(filter.clone(), None).await.unwrap());
    }
    let (id, _) = server.webhook("https://example.com/", &["content.ready"]).await;
    let rest = || server.request(http::Method::GET, &format!("/v1/webhooks/{id}/deliveries/watch"));
    // Takes the last place as soon as it is free.
    let open = async |key: &str| loop {
        let mut deliveries = DeliveryServiceClient::with_interceptor(server.channel(), Bearer(key.to_owned()));
        match deliveries.watch_deliveries(WatchDeliveriesRequest::default()).await {
            Ok(stream) => return stream.into_inner(),
            Err(refused) => assert_eq!(refused.code(), Code::ResourceExhausted),
        }
    };
    let new = NewKey {
        organization: Some("acme".to_owned()),
        environment: Environment::Test,
        kind: KeyKind::Secret,
        expires_at: None,
    };
    let revoked = server.store.create_key(new).await.unwrap();

    let stream = open(&revoked.key).await;
    let refused = server.deliveries().watch_deliveries(WatchDeliveriesRequest::default()).await.unwrap_err();
    assert_eq!(refused.get_error_details().error_info().unwrap().reason, "RATE_LIMITED");
    let refused = server.send(rest()).await;
    assert_eq!((refused.status, refused.headers["retry-after"].to_str().unwrap()), (429, "5"));
    let other = server.new_key(Some("other"), KeyKind::Secret, Environment::Test).await;
    server.watch_as(&other).await;

    drop(stream);
    let mut stream = soon("room after a caller has left", open(&revoked.key)).await;
    server.store.revoke_key(&revoked.info.id).await.unwrap();
    assert_eq!(soon("the end", stream.message()).await.unwrap_err().code(), Code::Unauthenticated);
    let stream = soon("room after a stream has ended", open(&server.key)).await;
    drop(stream);
    let events = async {
        loop {
            let response = rest().send().await.unwrap();
            if response.status() == 200 {
                return response;
            }
        }
    };
    let events = soon("room for events", events).await;
    assert_eq!(server.send(rest()).await.status, 429);
    drop(events);
    soon("room after a reader of events has left", open(&server.key)).await;
    drop(others);
    server.stop().await;
}

/// The first `count` events of a stream: id and data.
async fn events(response: reqwest::Response, count: usize) -> Vec<(String, String)> {
    let bytes = response.bytes_stream().map(|chunk| chunk.map_err(std::io::Error::other));
    let mut lines = BufReader::new(StreamReader::new(bytes)).lines();
    let (mut events, mut id) = (Vec::new(), String::new());
    while events.len() < count {
        let line = soon("a line", lines.next_line()).await.unwrap().expect("the stream goes on");
        if let Some(value) = line.strip_prefix("id: ") {
            id = value.to_owned();
        } else if let Some(data) = line.strip_prefix("data: ") {
            events.push((id.clone(), data.to_owned()));
        }
    }
    events
}

async fn ends_on_shutdown(database: Database) {
    let server = TestServer::start(&database).await;
    let mut watch = server.watch().await;
    let (id, _) = server.webhook("https://example.com/", &["content.ready"]).await;
    let path = format!("/v1/webhooks/{id}/deliveries/watch");
    let response = server.request(http::Method::GET, &path).send().await.unwrap();
    server.stop().await;
    let ended = soon("the end of the stream", watch.0.message()).await.unwrap_err();
    assert_eq!(ended.code(), tonic::Code::Unavailable);
    let text = soon("the end of the stream", response.text()).await.unwrap();
    assert!(text.contains("event: error") && text.contains("SERVICE_UNAVAILABLE"), "{text}");
}

async fn a_database_of_before_the_filed_log_is_brought_up_to_date(database: Database) {
    let server = TestServer::start(&database).await;
    let key = server.key.clone();
    let receiver = Receiver::start().await;
    server.webhook(&receiver.url(), &["content.ready"]).await;
    let mut watch = server.watch().await;
    server.publish("content.ready", "{}").await;
    let last = watch.until(1, |change| change.response_time.is_some()).await.remove(0);
    drop(watch);
    server.stop().await;
    for organization in ["acme", "other", "acme"] {
        database.log_failures(organization, 100, Duration::ZERO).await;
    }
    database.undo_filed_changes().await;
    let sqlite = database.url.starts_with("sqlite:");

    let mut server = TestServer::start(&database).await;
    server.key = key;
    if sqlite {
        let indexes = database.rows("SELECT name FROM pragma_index_list('changes')").await;
        assert!(indexes.is_empty(), "the log's only index is its key");
        // Also the mark is there: what is filed already would stop what comes next.
        let unfiled = "SELECT count(*), (SELECT max(seq) FROM changes) - (SELECT seq FROM changes_filed) FROM changes \
                       WHERE (organization, environment, seq) NOT IN (SELECT * FROM changes_of_tenants)";
        assert_eq!(database.rows(unfiled).await[0].try_get_many_by_index::<(i64, i64)>().unwrap(), (0, 0));
    }
    database.log_failures("other", 100, Duration::ZERO).await;
    database.log_failures("acme", 100, Duration::ZERO).await;
    let request = WatchDeliveriesRequest { resume_token: Some(last.resume_token), ..Default::default() };
    let mut resumed = Watch(server.deliveries().watch_deliveries(request).await.unwrap().into_inner());
    for number in (0..3).flat_map(|_| 1..=100) {
        assert_eq!(resumed.next().await.delivery_id, format!("del_{number}"));
    }
    server.stop().await;
}
