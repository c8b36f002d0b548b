//! One port for everything: HTTP/1.1, cleartext HTTP/2, gRPC, and what browsers need.

use std::time::Duration;

use http::Method;
use shortkit_webhooks::grpc::proto::SendTestEventRequest;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};
use tonic::{Code, Request};

use crate::support::{Receiver, Reply, TestServer, soon};

#[tokio::test]
async fn rest_over_cleartext_http2() {
    let server = TestServer::on_sqlite().await;
    let client = reqwest::Client::builder().no_proxy().http2_prior_knowledge().build().unwrap();
    let request = client.get(format!("http://{}/v1/webhooks", server.address)).bearer_auth(&server.key);
    let response = request.send().await.unwrap();
    assert_eq!((response.status().as_u16(), response.version()), (200, http::Version::HTTP_2));
    assert_eq!(response.text().await.unwrap(), r#"{"data":[],"meta":{"total":0}}"#);
    server.stop().await;
}

/// Reads one HTTP/1.1 response with a content length.
pub(crate) async fn response(stream: &mut TcpStream) -> (u16, String) {
    let mut text = Vec::new();
    loop {
        let mut byte = [0];
        soon("a byte", stream.read_exact(&mut byte)).await.unwrap();
        text.push(byte[0]);
        if text.ends_with(b"\r\n\r\n") {
            break;
        }
    }
    let head = String::from_utf8(text).unwrap().to_lowercase();
    let length = head.lines().find_map(|line| line.strip_prefix("content-length: ")).unwrap_or("0");
    let mut body = vec![0; length.parse().unwrap()];
    soon("a body", stream.read_exact(&mut body)).await.unwrap();
    (head.split(' ').nth(1).unwrap().parse().unwrap(), head)
}

#[tokio::test]
async fn a_connection_survives_every_error() {
    let server = TestServer::on_sqlite().await;
    let mut stream = TcpStream::connect(server.address).await.unwrap();
    let key = &server.key;
    for (method, path, headers, body, status) in [
        ("GET", "/nope", "", "", 404),
        ("PUT", "/v1/webhooks", "", "", 405),
        ("POST", "/v1/webhooks", "content-type: text/plain\r\n", "x", 415),
        ("POST", "/v1/webhooks", "content-type: application/json\r\n", "{", 400),
        ("GET", "/v1/webhooks/%zz", "", "", 400),
        ("GET", "/v1/webhooks", "", "{}", 400),
        ("POST", "/v1/events", "content-type: application/json\r\ncontent-encoding: br\r\n", "x", 415),
        ("POST", "/v1/events", "content-type: application/grpc\r\n", "x", 415),
        ("POST", "/v1.Nothing/Do", "content-type: application/grpc\r\n", "x", 415),
        ("GET", "/v1/webhooks/whk_none", "", "", 404),
        ("GET", "/v1/webhooks", "", "", 200),
    ] {
        let request = format!(
            "{method} {path} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {key}\r\n{headers}content-length: {}\r\n\r\n{body}",
            body.len()
        );
        stream.write_all(request.as_bytes()).await.unwrap();
        let (got, head) = response(&mut stream).await;
        assert_eq!(got, status, "{method} {path}");
        assert_eq!(head.matches("x-request-id: req_").count(), 1, "{head}");
    }
    drop(stream);
    server.stop().await;
}

#[tokio::test]
async fn request_ids_are_ours() {
    let server = TestServer::on_sqlite().await;
    let request = server.request(Method::GET, "/v1/webhooks/whk_none").header("x-request-id", "mine");
    let answer = server.send(request).await;
    let id = answer.headers["x-request-id"].to_str().unwrap();
    assert!(id.starts_with("req_"));
    assert_eq!(answer.json()["meta"]["requestId"], id);
    server.stop().await;
}

#[tokio::test]
async fn browsers_may_call() {
    let server = TestServer::on_sqlite().await;
    let preflight = server
        .anonymous(Method::OPTIONS, "/v1/webhooks")
        .header("origin", "https://dashboard.example")
        .header("access-control-request-method", "POST")
        .header("access-control-request-headers", "authorization,content-type");
    let answer = server.send(preflight).await;
    assert_eq!((answer.status, answer.headers["access-control-allow-origin"].to_str().unwrap()), (204, "*"));
    assert_eq!(answer.headers["access-control-allow-headers"], "authorization,content-type");
    assert!(answer.headers["access-control-allow-methods"].to_str().unwrap().contains("PATCH"));
    let refused = server.anonymous(Method::GET, "/v1/webhooks").header("origin", "https://dashboard.example");
    let answer = server.send(refused).await;
    assert_eq!((answer.status, answer.headers["access-control-allow-origin"].to_str().unwrap()), (401, "*"));
    assert!(answer.headers["access-control-expose-headers"].to_str().unwrap().contains("x-request-id"));
    let answer = server.get("/v1/webhooks").await;
    assert_eq!(answer.headers.get("access-control-allow-origin"), None, "no page asked");
    server.stop().await;
}

#[tokio::test]
async fn answers_are_packed_when_asked() {
    let server = TestServer::on_sqlite().await;
    for _ in 0..5 {
        server.webhook("https://example.com/", &["content.ready"]).await;
    }
    let request = server.request(Method::GET, "/v1/webhooks").header("accept-encoding", "gzip");
    let response = request.send().await.unwrap();
    assert_eq!(response.headers()["content-encoding"], "gzip");
    let packed = response.bytes().await.unwrap();
    let mut text = String::new();
    std::io::Read::read_to_string(&mut flate2::read::GzDecoder::new(&packed[..]), &mut text).unwrap();
    assert_eq!(text, server.get("/v1/webhooks").await.text);

    let (id, _) = server.webhook("https://example.com/", &["content.ready"]).await;
    let watch = server.request(Method::GET, &format!("/v1/webhooks/{id}/deliveries/watch"));
    let response = watch.header("accept-encoding", "gzip").send().await.unwrap();
    assert_eq!(response.headers().get("content-encoding"), None, "a stream is never held back to be packed");
    drop(response);
    server.stop().await;
}

#[tokio::test]
async fn deadlines_of_callers_hold() {
    let server = TestServer::on_sqlite().await;
    let receiver = Receiver::scripted(|_, _| Reply { delay: Duration::from_secs(5), ..Reply::status(200) }).await;
    let (id, _) = server.webhook(&receiver.url(), &["content.ready"]).await;
    let mut request = Request::new(SendTestEventRequest { id, event: None });
    request.metadata_mut().insert("grpc-timeout", "200m".parse().unwrap());
    let status = server.webhooks().send_test_event(request).await.unwrap_err();
    assert!(matches!(status.code(), Code::DeadlineExceeded | Code::Cancelled), "{status:?}");
    server.stop().await;
}
