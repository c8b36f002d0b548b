//! A node that starts on a backup.

use shortkit_webhooks::{config::Config, grpc::proto::WatchDeliveriesRequest, webhook::RetrySchedule};
use tonic::Code;

use crate::support::{Database, Receiver, Reply, TestServer, Watch, config, on_both_databases};

on_both_databases!(a_backup_goes_on_from_where_it_was_made);

async fn a_backup_goes_on_from_where_it_was_made(database: Database) {
    let retry_schedule = RetrySchedule::parse("0s,24h").unwrap();
    let start = async |database: &Database| {
        TestServer::with(Config { retry_schedule: retry_schedule.clone(), ..config(database) }).await
    };
    let receiver = Receiver::scripted(|index, _| Reply::status(if index == 0 { 503 } else { 200 })).await;
    let server = start(&database).await;
    let key = server.key.clone();
    server.webhook(&receiver.url(), &["content.ready"]).await;
    let mut watch = server.watch().await;
    server.publish("content.ready", r#"{"number":0}"#).await;
    let kept = watch.until(1, |change| change.response_time.is_some()).await.remove(0);
    let backup = database.backup().await;
    for number in 1..=20 {
        server.publish("content.ready", &format!(r#"{{"number":{number}}}"#)).await;
    }
    let lost = watch.until(20, |change| change.response_time.is_some()).await.remove(19);
    drop(watch);
    server.stop().await;

    assert_eq!(backup.execute("UPDATE deliveries SET next_attempt_at_ms = 1 WHERE status = 'pending'").await, 1);
    let mut server = start(&backup).await;
    server.key.clone_from(&key);
    let arrived = receiver.wait_for(22).await;
    let id = |index: usize| arrived[index].header("x-shortform-delivery-id");
    assert_eq!((id(21), arrived[21].body.contains(r#""number":0"#)), (id(0), true));
    let resume = async |server: &TestServer, token: &str| {
        let request = WatchDeliveriesRequest { resume_token: Some(token.to_owned()), ..Default::default() };
        server.deliveries().watch_deliveries(request).await
    };
    let refused = resume(&server, &lost.resume_token).await.unwrap_err();
    assert!(refused.code() == Code::InvalidArgument && refused.message().contains("are lost"), "{refused:?}");
    let mut resumed = Watch(resume(&server, &kept.resume_token).await.unwrap().into_inner());
    let attempted = resumed.until(1, |change| change.response_time.is_some()).await.remove(0);
    assert_eq!((attempted.delivery_id, attempted.attempts), (kept.delivery_id, 2));
    drop(resumed);
    server.stop().await;

    backup.execute("DELETE FROM settings WHERE name = 'token_key'").await;
    let mut server = start(&backup).await;
    server.key = key;
    let refused = resume(&server, &kept.resume_token).await.unwrap_err();
    assert_eq!(refused.code(), Code::InvalidArgument, "{refused:?}");
    server.stop().await;
}
