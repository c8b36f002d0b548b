//! Every error of the contract's table and every validation rule, with the field named; REST and gRPC agree.

use http::Method;
use serde_json::json;
use shortkit_webhooks::grpc::proto;
use tonic::Code;
use tonic_types::StatusExt;

use crate::support::{Database, TestServer, on_both_databases};

on_both_databases!(bodies, parameters, protocol, same_over_grpc);

/// `ListWebhooks` in words of the wire.
const LIST: &str = "/shortkit.webhooks.v1.WebhookService/ListWebhooks";

/// What an error looks like: HTTP status, code, field and reason (empty when there is none).
type Expected = (u16, &'static str, &'static str, &'static str);

async fn assert_error(server: &TestServer, method: Method, path: &str, body: &str, expected: Expected) {
    let answer = server.call(method.clone(), path, body).await;
    let json = answer.json();
    let text = |pointer: &str| json.pointer(pointer).and_then(|value| value.as_str()).unwrap_or_default();
    let actual = (answer.status, text("/error/code"), text("/error/details/field"), text("/error/details/reason"));
    assert_eq!(actual, expected, "{method} {path} {body}\n{}", answer.text);
    assert!(!text("/error/message").is_empty());
    assert_eq!(text("/meta/requestId"), answer.headers["x-request-id"].to_str().unwrap());
}

async fn bodies(database: Database) {
    let server = TestServer::start(&database).await;
    let (id, _) = server.webhook("https://example.com/", &["content.ready"]).await;
    let too_long = format!(r#"{{"url":"https://example.com/{}","events":["content.ready"]}}"#, "a".repeat(2_048));
    let description =
        format!(r#"{{"url":"https://example.com/","events":["content.ready"],"description":"{}"}}"#, "é".repeat(501));
    let url = |url: &str| json!({ "url": url, "events": ["content.ready"] }).to_string();
    let events = |events: serde_json::Value| json!({ "url": "https://example.com/", "events": events }).to_string();
    const INVALID: &str = "VALIDATION_ERROR";
    for (body, expected) in [
        ("", (400, INVALID, "url", "required")),
        ("{}", (400, INVALID, "url", "required")),
        (r#"{"url":null,"events":["content.ready"]}"#, (400, INVALID, "url", "required")),
        (r#"{"url":"https://example.com/"}"#, (400, INVALID, "events", "required")),
        (&events(json!([])), (400, INVALID, "events", "required")),
        (&events(json!(["content.ready", "content.ready"])), (400, INVALID, "events[1]", "duplicate")),
        (&events(json!(["content.ready", "nope"])), (400, INVALID, "events[1]", "unknown")),
        (&events(json!(["content.ready", 7])), (400, INVALID, "events[1]", "wrong_type")),
        (&events(json!("content.ready")), (400, INVALID, "events", "wrong_type")),
        (&description, (400, INVALID, "description", "too_long")),
        (&too_long, (400, INVALID, "url", "too_long")),
        (&url("example.com"), (400, INVALID, "url", "invalid")),
        (&url("ftp://example.com/"), (400, INVALID, "url", "scheme")),
        (&url("https://user:pw@example.com/"), (400, INVALID, "url", "user_info")),
        (&url("https://example.com/#top"), (400, INVALID, "url", "fragment")),
        (&url("https://example.com:22/"), (400, INVALID, "url", "port")),
        (&url("https://10.0.0.1/"), (400, INVALID, "url", "blocked_address")),
        (&url("https://0xa9fea9fe/"), (400, INVALID, "url", "blocked_address")),
        (&url("https://[::ffff:10.0.0.1]/"), (400, INVALID, "url", "blocked_address")),
        (r#"{"url":7}"#, (400, INVALID, "url", "wrong_type")),
        (r#"{"url":"https://example.com/","color":1}"#, (400, INVALID, "color", "unknown")),
        (r#"{"url":"a","url":"b"}"#, (400, "INVALID_REQUEST", "url", "duplicate")),
        (r#"{"url":"#, (400, "INVALID_REQUEST", "", "")),
        ("null", (400, "INVALID_REQUEST", "", "")),
        ("[]", (400, "INVALID_REQUEST", "", "")),
        ("{} {}", (400, "INVALID_REQUEST", "", "")),
    ] {
        assert_error(&server, Method::POST, "/v1/webhooks", body, expected).await;
    }
    let deep = format!(r#"{{"event":"content.ready","data":{}1{}}}"#, r#"{"a":"#.repeat(65), "}".repeat(65));
    for (body, expected) in [
        (r#"{"data":{}}"#, (400, INVALID, "event", "required")),
        (r#"{"event":"nope","data":{}}"#, (400, INVALID, "event", "unknown")),
        (r#"{"event":"content.ready"}"#, (400, INVALID, "data", "required")),
        (r#"{"event":"content.ready","data":[]}"#, (400, INVALID, "data", "wrong_type")),
        (r#"{"event":"content.ready","data":"x"}"#, (400, INVALID, "data", "wrong_type")),
        (&deep, (400, INVALID, "data", "too_deep")),
    ] {
        assert_error(&server, Method::POST, "/v1/events", body, expected).await;
    }
    for (body, expected) in [
        ("{}", (400, INVALID, "", "")),
        (r#"{"url":null}"#, (400, INVALID, "url", "required")),
        (r#"{"events":null}"#, (400, INVALID, "events", "required")),
        (r#"{"events":[]}"#, (400, INVALID, "events", "required")),
        (r#"{"status":null}"#, (400, INVALID, "status", "required")),
        (r#"{"status":"paused"}"#, (400, INVALID, "status", "unknown")),
        (r#"{"status":"ACTIVE"}"#, (400, INVALID, "status", "unknown")),
        (r#"{"secret":"x"}"#, (400, INVALID, "secret", "unknown")),
    ] {
        let path = format!("/v1/webhooks/{id}");
        let answer = server.patch(&path, body).await;
        let code = answer.json()["error"]["code"].as_str().unwrap().to_owned();
        if expected.2.is_empty() {
            assert_eq!((answer.status, code.as_str()), (400, expected.1), "{}", answer.text);
        } else {
            assert_error(&server, Method::PATCH, &path, body, expected).await;
        }
    }
    let cleared = server.patch(&format!("/v1/webhooks/{id}"), r#"{"description":""}"#).await.data();
    assert_eq!(cleared["description"], "");
    let cleared = server.patch(&format!("/v1/webhooks/{id}"), r#"{"description":null}"#).await.data();
    assert_eq!(cleared.get("description"), None);
    server.stop().await;
}

async fn parameters(database: Database) {
    let server = TestServer::start(&database).await;
    let (id, _) = server.webhook("https://example.com/", &["content.ready"]).await;
    const INVALID: &str = "INVALID_PARAMETER";
    for (query, expected) in [
        ("limit=0", (400, INVALID, "limit", "out_of_range")),
        ("limit=101", (400, INVALID, "limit", "out_of_range")),
        ("limit=-1", (400, INVALID, "limit", "out_of_range")),
        ("limit=ten", (400, INVALID, "limit", "wrong_type")),
        ("limit=1.5", (400, INVALID, "limit", "wrong_type")),
        ("limit=99999999999", (400, INVALID, "limit", "out_of_range")),
        ("limit=1&limit=2", (400, INVALID, "limit", "duplicate")),
        ("status=done", (400, INVALID, "status", "unknown")),
        ("status=DELIVERY_STATUS_FAILED", (400, INVALID, "status", "unknown")),
        ("event=nope", (400, INVALID, "event", "unknown")),
        ("event=", (400, INVALID, "event", "unknown")),
        ("color=red", (400, INVALID, "color", "unknown")),
        ("webhookId=x", (400, INVALID, "webhookId", "unknown")),
    ] {
        assert_error(&server, Method::GET, &format!("/v1/webhooks/{id}/deliveries?{query}"), "", expected).await;
    }
    let failed = server.get(&format!("/v1/webhooks/{id}/deliveries?status=done")).await;
    assert!(failed.text.contains("pending, success, failed"), "lists what is allowed: {}", failed.text);
    for path in ["/v1/webhooks/%zz", "/v1/webhooks/%ff", "/v1/webhooks/%"] {
        let answer = server.get(path).await;
        assert_eq!((answer.status, answer.json()["error"]["code"].as_str()), (400, Some(INVALID)), "{path}");
    }
    server.stop().await;
}

async fn protocol(database: Database) {
    let server = TestServer::start(&database).await;
    let (id, _) = server.webhook("https://example.com/", &["content.ready"]).await;
    let none = (404, "NOT_FOUND", "", "");
    for path in [
        "/",
        "/v1",
        "/v1/webhooks/",
        "/v1//webhooks",
        "/v1/nope",
        "/v1/webhooks/a/b",
        "/v1/webhooks/whk_none",
        "/v1/webhooks/%00",
    ] {
        assert_error(&server, Method::GET, path, "", none).await;
    }
    let path = format!("/v1/webhooks/{id}/deliveries/del_none");
    assert_error(&server, Method::GET, &path, "", none).await;
    assert_error(&server, Method::POST, &format!("{path}/retry"), "", none).await;

    let webhook = format!("/v1/webhooks/{id}");
    assert_error(&server, Method::PUT, &webhook, "{}", (405, "METHOD_NOT_ALLOWED", "", "")).await;
    let refused = server.call(Method::PUT, &webhook, "{}").await;
    assert_eq!(refused.headers["allow"], "DELETE, GET, HEAD, OPTIONS, PATCH");
    let options = server.send(server.request(Method::OPTIONS, "/v1/webhooks")).await;
    assert_eq!((options.status, options.headers["allow"].to_str().unwrap()), (204, "GET, HEAD, OPTIONS, POST"));
    let head = server.send(server.request(Method::HEAD, "/v1/webhooks")).await;
    let get = server.get("/v1/webhooks").await;
    assert_eq!((head.status, head.text.as_str()), (200, ""));
    assert_eq!(head.headers["content-length"].to_str().unwrap(), get.text.len().to_string());

    for (content_type, status) in [
        ("application/json", 400),
        ("application/json; charset=utf-8", 400),
        ("Application/JSON;charset=\"UTF-8\"", 400),
        ("application/json; charset=latin1", 415),
        ("text/plain", 415),
        ("application/x-www-form-urlencoded", 415),
    ] {
        let request = server.request(Method::POST, "/v1/webhooks").header("content-type", content_type).body("{}");
        assert_eq!(server.send(request).await.status, status, "{content_type}");
    }
    let untyped = server.send(server.request(Method::POST, "/v1/webhooks").body("{}")).await;
    assert_eq!((untyped.status, untyped.json()["error"]["code"].as_str()), (415, Some("UNSUPPORTED_MEDIA_TYPE")));
    assert_eq!(untyped.json()["meta"]["requestId"], untyped.headers["x-request-id"].to_str().unwrap());

    let large = format!(r#"{{"event":"content.ready","data":{{"a":"{}"}}}}"#, "x".repeat(1024 * 1024));
    assert_error(&server, Method::POST, "/v1/events", &large, (413, "PAYLOAD_TOO_LARGE", "", "")).await;
    let request = server.request(Method::POST, "/v1/events").header("content-type", "application/json");
    let request = request.header("content-encoding", "gzip").body(gzip(large.as_bytes()));
    assert_eq!(server.send(request).await.status, 413, "also after gunzip");
    let request = server.request(Method::POST, "/v1/events").header("content-type", "application/json");
    let small = gzip(br#"{"event":"content.ready","data":{}}"#);
    assert_eq!(server.send(request.header("content-encoding", "gzip").body(small)).await.status, 202);
    let request = server.request(Method::POST, "/v1/events").header("content-type", "application/json");
    let refused = server.send(request.header("content-encoding", "br").body("x")).await;
    assert_eq!((refused.status, refused.json()["error"]["code"].as_str()), (415, Some("UNSUPPORTED_MEDIA_TYPE")));
    server.stop().await;
}

pub(crate) fn gzip(bytes: &[u8]) -> Vec<u8> {
    use std::io::Write;
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

/// The facts of an error over gRPC: its code, the reason in `ErrorInfo`, the field in `BadRequest`.
fn facts(status: &tonic::Status) -> (Code, String, String) {
    let details = status.get_error_details();
    let field = details.bad_request().map(|bad| bad.field_violations[0].field.clone()).unwrap_or_default();
    (status.code(), details.error_info().expect("ErrorInfo").reason.clone(), field)
}

async fn same_over_grpc(database: Database) {
    let server = TestServer::start(&database).await;
    let (id, _) = server.webhook("https://example.com/", &["content.ready"]).await;
    let fact = |code, reason: &str, field: &str| (code, reason.to_owned(), field.to_owned());
    let invalid = |field: &str| fact(Code::InvalidArgument, "VALIDATION_ERROR", field);

    let create = |url: &str, events: &[&str]| proto::CreateWebhookRequest {
        url: url.to_owned(),
        events: events.iter().map(|event| (*event).to_owned()).collect(),
        description: None,
    };
    for (request, expected) in [
        (create("", &["content.ready"]), invalid("url")),
        (create("https://10.0.0.1/", &["content.ready"]), invalid("url")),
        (create("https://example.com/", &[]), invalid("events")),
        (create("https://example.com/", &["content.ready", "nope"]), invalid("events[1]")),
    ] {
        let status = server.webhooks().create_webhook(request).await.unwrap_err();
        assert_eq!(facts(&status), expected);
    }
    // A mask comes before what it names, and is a set: a field that is named again and again is not judged again and again.
    let update = async |paths: &[&str], url: &str, description: &str| {
        let update_mask = Some(prost_types::FieldMask { paths: paths.iter().map(|path| (*path).to_owned()).collect() });
        let (url, description) = (Some(url.to_owned()), Some(description.to_owned()));
        let webhook = Some(proto::WebhookUpdate { url, description, ..Default::default() });
        let update = proto::UpdateWebhookRequest { id: id.clone(), webhook, update_mask };
        server.webhooks().update_webhook(update).await.map(|answer| answer.into_inner().webhook.unwrap_or_default())
    };
    for paths in [&[][..], &["url", "name"]] {
        let status = update(paths, "https://10.0.0.1/", "").await.unwrap_err();
        assert_eq!(facts(&status), invalid("update_mask"), "{paths:?}");
    }
    let status = update(&["url"; 100_000], "https://10.0.0.1/", "").await.unwrap_err();
    assert_eq!(facts(&status), invalid("url"));
    let often = [["description"; 50_000], ["url"; 50_000]].concat();
    let updated = update(&often, "https://example.com/2", "new").await.unwrap();
    assert_eq!((updated.description.as_deref(), &*updated.url), (Some("new"), "https://example.com/2"));
    let missing = proto::GetWebhookRequest { id: "whk_none".to_owned() };
    let status = server.webhooks().get_webhook(missing).await.unwrap_err();
    assert_eq!(facts(&status), fact(Code::NotFound, "NOT_FOUND", ""));
    let list = proto::ListDeliveriesRequest { webhook_id: id.clone(), limit: Some(101), ..Default::default() };
    let status = server.deliveries().list_deliveries(list).await.unwrap_err();
    assert_eq!(facts(&status), fact(Code::InvalidArgument, "INVALID_PARAMETER", "limit"));
    let test = server.webhooks().send_test_event(proto::SendTestEventRequest { id: id.clone(), event: None }).await;
    let delivery_id = test.unwrap().into_inner().delivery_id;
    let publish = proto::PublishEventRequest { event: "content.ready".to_owned(), data: "{\"a\":}".to_owned() };
    let status = server.deliveries().publish_event(publish).await.unwrap_err();
    assert_eq!(facts(&status), invalid("data"));

    let mut nobody = server.deliveries();
    let unauthenticated = proto::delivery_service_client::DeliveryServiceClient::new(server.channel());
    let request = proto::GetDeliveryRequest { webhook_id: id, delivery_id };
    assert!(nobody.get_delivery(request.clone()).await.is_ok());
    let status = { unauthenticated }.get_delivery(request).await.unwrap_err();
    assert_eq!(facts(&status), fact(Code::Unauthenticated, "UNAUTHORIZED", ""));
    server.stop().await;
}

fn call_grpc(server: &TestServer, path: &str, content_type: &str) -> reqwest::RequestBuilder {
    let client = reqwest::Client::builder().no_proxy().http2_prior_knowledge().build().unwrap();
    let request = client.post(format!("http://{}{path}", server.address)).bearer_auth(&server.key);
    request.header("content-type", content_type)
}

/// What a call of these bytes is refused with.
async fn refusal(server: &TestServer, path: &str, content_type: &str, body: Vec<u8>) -> tonic::Status {
    let response = call_grpc(server, path, content_type).body(body).send().await.unwrap();
    assert_eq!(response.status(), 200, "{path}");
    assert!(response.headers()["x-request-id"].to_str().unwrap().starts_with("req_"));
    tonic::Status::from_header_map(response.headers()).unwrap_or_else(|| panic!("{path} was answered"))
}

/// A message in a frame whose flag says whether it is compressed.
fn frame(flag: u8, message: &[u8]) -> Vec<u8> {
    [&[flag], u32::try_from(message.len()).unwrap().to_be_bytes().as_slice(), message].concat()
}

/// Errors that come before any code of ours is called.
#[tokio::test]
async fn who_calls_comes_before_what_is_asked() {
    let server = TestServer::on_sqlite().await;
    for (method, path, content_type, body) in [
        (Method::POST, "/v1/webhooks", "application/json", "{"),
        (Method::POST, "/v1/events", "text/plain", "x"),
        (Method::PATCH, "/v1/webhooks/whk_none", "application/json", ""),
        (Method::GET, "/v1/webhooks?nonsense=1", "application/json", ""),
        (Method::GET, "/v1/webhooks", "application/json", "{}"),
    ] {
        let stranger = server.anonymous(method.clone(), path).header("content-type", content_type).body(body);
        let refused = server.send(stranger).await;
        assert_eq!((refused.status, &refused.json()["error"]["code"]), (401, &json!("UNAUTHORIZED")), "{path} {body}");
        let known = server.request(method, path).header("content-type", content_type).body(body);
        let status = server.send(known).await.status;
        assert!(matches!(status, 400 | 415), "{path} {body}: {status}");
    }
    server.stop().await;
}

#[tokio::test]
async fn what_the_grpc_library_refuses_is_explained_too() {
    let server = TestServer::on_sqlite().await;
    let create = "/shortkit.webhooks.v1.WebhookService/CreateWebhook";
    let update = "/shortkit.webhooks.v1.WebhookService/UpdateWebhook";
    let health = "/grpc.health.v1.Health/Check";
    let unreadable = |field| (Code::InvalidArgument, "INVALID_REQUEST".to_owned(), str::to_owned(field));
    let other = |code, reason: &str| (code, reason.to_owned(), String::new());
    const GRPC: &str = "application/grpc";
    for (path, content_type, body, expected) in [
        ("/nope.v1.Service/Do", GRPC, frame(0, b""), other(Code::Unimplemented, "NOT_FOUND")),
        ("/shortkit.webhooks.v1.WebhookService/Nope", GRPC, frame(0, b""), other(Code::Unimplemented, "NOT_FOUND")),
        (create, GRPC, frame(0, b"\xff\xff"), unreadable("")),
        (create, GRPC, frame(0, b"\x0a\x02\xff\xfe"), unreadable("url")),
        (update, GRPC, frame(0, b"\x12\x03\x0a\x01\xff"), unreadable("webhook.url")),
        (create, GRPC, frame(0, b"\x08\x01"), unreadable("url")),
        (create, GRPC, Vec::new(), unreadable("")),
        (create, GRPC, frame(0, b"\x0a\x09http")[..8].to_vec(), unreadable("")),
        (create, GRPC, frame(1, b"x"), unreadable("")),
        (create, GRPC, frame(7, b"x"), unreadable("")),
        (create, GRPC, frame(0, &vec![0; 1024 * 1024 + 1]), other(Code::ResourceExhausted, "PAYLOAD_TOO_LARGE")),
        (LIST, "application/grpc+json", frame(0, b"{}"), other(Code::Unimplemented, "UNSUPPORTED_MEDIA_TYPE")),
        (LIST, "application/grpcx", frame(0, b""), other(Code::Unimplemented, "UNSUPPORTED_MEDIA_TYPE")),
        (health, GRPC, frame(0, b"\x0a\x01x"), other(Code::NotFound, "NOT_FOUND")),
    ] {
        let status = refusal(&server, path, content_type, body.clone()).await;
        assert_eq!(facts(&status), expected, "{path} {body:?} {}", status.message());
        assert!(!status.message().is_empty());
    }
    for content_type in ["application/grpc+proto", "application/grpc;charset=utf-8"] {
        let answer = call_grpc(&server, LIST, content_type).body(frame(0, b"")).send().await.unwrap();
        assert_eq!(answer.headers().get("grpc-status"), None, "{content_type} is protobuf");
    }
    let packed = call_grpc(&server, LIST, GRPC).header("grpc-encoding", "gzip").body(frame(1, b"x"));
    let packed = tonic::Status::from_header_map(packed.send().await.unwrap().headers()).unwrap();
    assert_eq!(facts(&packed), other(Code::Unimplemented, "UNSUPPORTED_MEDIA_TYPE"));
    let refused = server.send(server.request(Method::POST, LIST).header("content-type", GRPC).body("x")).await;
    assert_eq!((refused.status, refused.json()["error"]["code"].as_str()), (415, Some("UNSUPPORTED_MEDIA_TYPE")));
    server.stop().await;
}
