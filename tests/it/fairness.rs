//! Nobody's receivers slow the others down. How much is measured by `cargo bench --bench fairness`.

use std::time::Duration;

use shortkit_webhooks::config::Config;
use tokio::net::TcpListener;

use crate::support::{Database, Receiver, TestServer, config, on_both_databases};

on_both_databases!(receivers_that_never_answer_leave_room_for_the_others);

/// 80 receivers that never answer, each with more waiting than it may have under way: no more than one that has not been
/// heard of, for two minutes.
async fn receivers_that_never_answer_leave_room_for_the_others(database: Database) {
    let server = TestServer::with(Config { request_timeout: Duration::from_secs(120), ..config(&database) }).await;
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/", silent.local_addr().unwrap());
    // Connections are taken, kept and never answered.
    let (count, mut taken) = tokio::sync::watch::channel(0);
    let accepting = tokio::spawn(async move {
        let mut kept = Vec::new();
        loop {
            kept.push(silent.accept().await.unwrap());
            count.send_replace(kept.len());
        }
    });
    let mut ids = Vec::new();
    for _ in 0..80 {
        ids.push(server.webhook(&url, &["export.ready"]).await.0);
    }
    for _ in 0..32 {
        assert_eq!(server.publish("export.ready", "{}").await, 80);
    }
    crate::support::soon("the silent receivers have what they may have", taken.wait_for(|taken| *taken >= 80 * 8))
        .await
        .unwrap();

    let receiver = Receiver::start().await;
    server.webhook(&receiver.url(), &["content.ready"]).await;
    for _ in 0..100 {
        server.publish("content.ready", "{}").await;
    }
    receiver.wait_for(100).await;
    let dead = server.get(&format!("/v1/webhooks/{}", ids[0])).await.data();
    assert_eq!(dead["stats"].get("lastDeliveryAt"), None, "none of the silent ones has given up its place: {dead}");
    assert_eq!(*taken.borrow(), 80 * 8, "attempts under way to those that never answer");
    accepting.abort();
    server.stop().await;
}
