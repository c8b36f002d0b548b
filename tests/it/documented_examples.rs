//! Every example request of the published document, and the shape of its documented response: the same keys, the same
//! types, the same words, nothing missing, nothing null.

use serde_json::{Value, json};

use crate::support::{Answer, Database, Receiver, Reply, TestServer, on_both_databases};

on_both_databases!(the_documented_walk);

/// Asserts that `actual` has exactly the keys of `documented`, with values of the same kind. Strings that look like ids
/// or times must look alike; words must be equal.
fn assert_shape(actual: &Value, documented: &Value, path: &str) {
    match (actual, documented) {
        (Value::Object(actual), Value::Object(documented)) => {
            let keys = |object: &serde_json::Map<String, Value>| object.keys().cloned().collect::<Vec<_>>();
            assert_eq!(keys(actual), keys(documented), "{path}");
            for (key, value) in documented {
                assert_shape(&actual[key], value, &format!("{path}.{key}"));
            }
        }
        (Value::Array(actual), Value::Array(documented)) if path.ends_with("events") => assert_eq!(actual, documented),
        (Value::Array(actual), Value::Array(documented)) => {
            assert_eq!(actual.len(), documented.len(), "{path}");
            for (index, (actual, documented)) in actual.iter().zip(documented).enumerate() {
                assert_shape(actual, documented, &format!("{path}[{index}]"));
            }
        }
        (Value::Number(actual), Value::Number(documented)) => {
            assert_eq!(actual.is_i64(), documented.is_i64(), "{path}")
        }
        (Value::Bool(actual), Value::Bool(documented)) => assert_eq!(actual, documented, "{path}"),
        (Value::String(actual), Value::String(documented)) => match documented.split_once('_') {
            Some((prefix @ ("whk" | "del" | "evt" | "whsec"), _)) => {
                assert!(actual.starts_with(&format!("{prefix}_")), "{path}: {actual}");
            }
            _ if documented.ends_with('Z') => assert!(actual.len() >= 20 && actual.ends_with('Z'), "{path}: {actual}"),
            _ => assert_eq!(actual, documented, "{path}"),
        },
        _ => panic!("{path}: {actual} instead of {documented}"),
    }
}

fn assert_answer(answer: &Answer, status: u16, documented: &Value) {
    assert_eq!(answer.status, status, "{}", answer.text);
    assert_eq!(answer.headers["content-type"], "application/json");
    assert!(answer.headers["x-request-id"].to_str().unwrap().starts_with("req_"));
    assert_shape(&answer.json(), documented, "");
}

async fn the_documented_walk(database: Database) {
    let server = TestServer::start(&database).await;
    let url = "https://yourserver.com/webhooks/shortkit";
    let events = json!(["content.ready", "content.errored"]);

    let created = server
        .post("/v1/webhooks", &json!({ "url": url, "events": events, "description": "Production webhook" }).to_string())
        .await;
    let mut webhook = json!({
        "id": "whk_abc123", "url": url, "events": events, "description": "Production webhook",
        "secret": "whsec_xyz789abc", "status": "active", "createdAt": "2024-02-04T12:00:00Z",
    });
    assert_answer(&created, 201, &json!({ "data": webhook }));
    let id = created.data()["id"].as_str().unwrap().to_owned();
    assert_eq!(created.data()["secret"].as_str().unwrap().len(), "whsec_".len() + 44);

    webhook.as_object_mut().unwrap().remove("secret");
    let listed = server.get("/v1/webhooks").await;
    assert_answer(&listed, 200, &json!({ "data": [webhook], "meta": { "total": 1 } }));

    let updated = server
        .patch(&format!("/v1/webhooks/{id}"), r#"{"events": ["content.ready", "content.errored", "export.ready"]}"#)
        .await;
    webhook["events"] = json!(["content.ready", "content.errored", "export.ready"]);
    assert_answer(&updated, 200, &json!({ "data": webhook }));
    let disabled = server.patch(&format!("/v1/webhooks/{id}"), r#"{"status": "disabled"}"#).await;
    webhook["status"] = json!("disabled");
    assert_answer(&disabled, 200, &json!({ "data": webhook }));

    let rotated = server.call(http::Method::POST, &format!("/v1/webhooks/{id}/rotate-secret"), "").await;
    let documented = json!({ "data": {
        "id": "whk_abc123", "secret": "whsec_newSecret123", "previousSecretExpiresAt": "2024-02-04T13:00:00Z",
    }});
    assert_answer(&rotated, 200, &documented);
    assert_ne!(rotated.data()["secret"], created.data()["secret"]);

    let deleted = server.delete(&format!("/v1/webhooks/{id}")).await;
    assert_answer(&deleted, 200, &json!({ "data": { "id": "whk_abc123", "deleted": true } }));
    assert_eq!(server.get(&format!("/v1/webhooks/{id}")).await.status, 404);

    deliveries(&server).await;
    server.stop().await;
}

/// The second half of the document: test events, deliveries, stats and retries.
async fn deliveries(server: &TestServer) {
    let receiver = Receiver::scripted(|_, received| {
        Reply::status(if received.body.contains("\"content.errored\"") { 503 } else { 200 })
    })
    .await;
    let (id, _) = server.webhook(&receiver.url(), &["content.ready", "content.errored"]).await;
    let fresh = server.get(&format!("/v1/webhooks/{id}")).await.data();
    assert_eq!(fresh["stats"], json!({ "totalDeliveries": 0, "successfulDeliveries": 0, "failedDeliveries": 0 }));

    let test = server.post(&format!("/v1/webhooks/{id}/test"), r#"{"event": "content.ready"}"#).await;
    let documented = json!({ "data": {
        "deliveryId": "del_test123", "status": "success", "statusCode": 200, "responseTime": 245, "response": "OK",
    }});
    assert_answer(&test, 200, &documented);

    let mut watch = server.watch().await;
    server.publish("content.errored", r#"{"contentId":"cnt_abc123"}"#).await;
    watch.until(1, |change| change.status().as_str_name() == "DELIVERY_STATUS_FAILED").await;
    let published = server
        .post("/v1/events", r#"{"event":"content.ready","data":{"contentId":"cnt_abc123","title":"My Video"}}"#)
        .await;
    assert_answer(&published, 202, &json!({ "data": { "id": "evt_abc", "deliveries": 1 } }));
    watch.until(1, |change| change.status().as_str_name() == "DELIVERY_STATUS_SUCCESS").await;

    let listed = server.get(&format!("/v1/webhooks/{id}/deliveries?limit=2")).await;
    let documented = json!({
        "data": [
            {
                "id": "del_xyz789", "event": "content.ready", "status": "success", "statusCode": 200, "attempts": 1,
                "responseTime": 185,
                "payload": { "event": "content.ready", "data": { "contentId": "cnt_abc123", "title": "My Video" } },
                "createdAt": "2024-02-04T11:55:00Z",
            },
            {
                "id": "del_abc456", "event": "content.errored", "status": "failed", "statusCode": 503, "attempts": 6,
                "responseTime": 12,
                "payload": { "event": "content.errored", "data": { "contentId": "cnt_abc123" } },
                "lastAttemptAt": "2024-02-04T10:30:00Z", "lastError": "HTTP 503", "createdAt": "2024-02-04T10:00:00Z",
            },
        ],
        "meta": { "total": 3, "nextCursor": listed.json()["meta"]["nextCursor"] },
    });
    assert_answer(&listed, 200, &documented);

    let got = server.get(&format!("/v1/webhooks/{id}")).await;
    let documented = json!({ "data": {
        "id": "whk_abc123", "url": receiver.url(), "events": ["content.ready", "content.errored"], "status": "active",
        "stats": {
            "totalDeliveries": 3, "successfulDeliveries": 2, "failedDeliveries": 1,
            "lastDeliveryAt": "2024-02-04T11:55:00Z",
        },
        "createdAt": "2024-01-15T10:00:00Z",
    }});
    assert_answer(&got, 200, &documented);
    assert_eq!(got.data()["stats"]["totalDeliveries"], 3);
    assert_eq!(got.data()["stats"]["successfulDeliveries"], 2);
    assert_eq!(got.data()["stats"]["failedDeliveries"], 1);

    let failed = listed.data()[1]["id"].as_str().unwrap().to_owned();
    let retried = server.call(http::Method::POST, &format!("/v1/webhooks/{id}/deliveries/{failed}/retry"), "").await;
    let documented = json!({ "data": {
        "id": "del_abc456", "status": "pending", "attempts": 7, "nextAttemptAt": "2024-02-04T12:00:00Z",
    }});
    assert_answer(&retried, 200, &documented);
    assert_eq!(retried.data()["attempts"], 7);
}
