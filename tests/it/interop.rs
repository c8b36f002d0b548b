//! Other people's clients: Standard Webhooks' library, grpcio, `buf curl`.

use std::process::Stdio;

use serde_json::json;
use tokio::{io::AsyncWriteExt, process::Command};

use crate::support::{Receiver, TestServer, soon};

fn python(script: &str) -> Command {
    let python = std::env::var("SHORTKIT_TEST_PYTHON").expect("SHORTKIT_TEST_PYTHON; tests/run installs it");
    let mut command = Command::new(python);
    command.arg(format!("{}/tests/interop/{script}", env!("CARGO_MANIFEST_DIR")));
    command
}

/// Runs to the end and returns what it printed.
async fn output(mut command: Command, input: &str) -> String {
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
    let mut child = command.spawn().unwrap();
    child.stdin.take().unwrap().write_all(input.as_bytes()).await.unwrap();
    let output = soon("the end of the client", child.wait_with_output()).await.unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(output.status.success(), "{}\n{}", text(&output.stdout), text(&output.stderr));
    text(&output.stdout)
}

#[tokio::test]
async fn standard_webhooks_verifies_with_both_secrets_of_a_rotation() {
    let server = TestServer::on_sqlite().await;
    let receiver = Receiver::start().await;
    let (id, first) = server.webhook(&receiver.url(), &["content.ready"]).await;
    server.publish("content.ready", r#"{"title":"Grüße","n":45.20}"#).await;
    receiver.wait_for(1).await;
    let rotated = server.post(&format!("/v1/webhooks/{id}/rotate-secret"), "{}").await.data();
    let second = rotated["secret"].as_str().unwrap().to_owned();
    server.publish("content.ready", "{}").await;
    let received = receiver.wait_for(2).await;

    let line = |secret: &str, index: usize| {
        let got = &received[index];
        let headers: serde_json::Map<_, _> =
            got.headers.iter().map(|(name, value)| (name.to_string(), json!(value.to_str().unwrap()))).collect();
        format!("{}\n", json!({ "secret": secret, "headers": headers, "body": got.body }))
    };
    let deliveries = [line(&first, 0), line(&first, 1), line(&second, 1)].concat();
    assert_eq!(output(python("verify.py"), &deliveries).await, "3 verified\n");
    server.stop().await;
}

#[tokio::test]
async fn grpcio_finds_everything_by_reflection() {
    let server = TestServer::on_sqlite().await;
    let mut client = python("reflect.py");
    client.args([server.address.to_string(), server.key.clone()]);
    assert_eq!(output(client, "").await, "all calls answered\n");
    server.stop().await;
}

#[tokio::test]
async fn buf_curl_calls_by_reflection() {
    let server = TestServer::on_sqlite().await;
    server.webhook("https://example.com/", &["content.ready"]).await;
    for protocol in ["grpc", "grpcweb"] {
        let mut buf = Command::new("npx");
        buf.args(["--yes", "@bufbuild/buf@1.75.0", "curl", "--http2-prior-knowledge", "--protocol", protocol]);
        buf.args(["--header", &format!("authorization: Bearer {}", server.key)]);
        buf.arg(format!("http://{}/shortkit.webhooks.v1.WebhookService/ListWebhooks", server.address));
        let answer: serde_json::Value = serde_json::from_str(&output(buf, "").await).unwrap();
        assert_eq!(answer["webhooks"][0]["status"], "WEBHOOK_STATUS_ACTIVE", "{protocol}");
    }
    server.stop().await;
}
