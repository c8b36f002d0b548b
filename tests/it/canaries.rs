//! Secrets are unique, so each is its own canary: none may be seen anywhere but in the one answer that hands it out.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Stdio,
};

use base64::{
    Engine,
    engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD},
};
use http::Method;
use serde_json::{Value, json};
use shortkit_webhooks::{
    clock,
    grpc::proto::{ListWebhooksRequest, RotateSecretRequest, webhook_service_client::WebhookServiceClient},
    vault::Vault,
};
use tokio::{
    io::{AsyncBufReadExt, BufReader},
    process::{Child, Command},
};
use tonic::transport::Endpoint;

use crate::{
    command_line::{binary, run},
    support::{Answer, Bearer, Database, Receiver, Reply, on_both_databases, soon},
};

on_both_databases!(secrets_are_seen_only_where_they_are_handed_out);

/// Everything that must not be seen, by what it is.
#[derive(Default)]
struct Canaries(Vec<(String, Vec<u8>)>);

impl Canaries {
    /// A secret, and the forms in which it could slip through: what it encodes as bytes, in hex, as `{:?}` shows them, and
    /// once more in base64.
    fn add(&mut self, what: &str, secret: &str) {
        // A key is its kind, its environment, the secret and a checksum.
        let of_key = secret.split_once("_live_").or_else(|| secret.split_once("_test_")).map(|(_, key)| &key[..43]);
        let encoded = of_key.unwrap_or_else(|| secret.strip_prefix("whsec_").unwrap_or(secret));
        let bytes = STANDARD.decode(encoded).or_else(|_| URL_SAFE_NO_PAD.decode(encoded)).unwrap();
        assert_eq!(bytes.len(), 32, "{what}");
        let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        let debug = |bytes: &[u8]| format!("{:?}", &bytes[..16]).trim_matches(['[', ']']).to_owned();
        let forms = [encoded.into(), hex.into(), debug(&bytes).into(), debug(encoded.as_bytes()).into(), bytes];
        // In base64 too, as what is sealed is stored: its letters depend on how many bytes stand before, modulo three.
        let stored = (0..3).map(|before| {
            let text = STANDARD.encode([&vec![0; before], encoded.as_bytes()].concat());
            // Without the letters that what stands before and behind has a share in.
            text.as_bytes()[4..text.len() - 4].to_vec()
        });
        self.0.extend(forms.into_iter().chain(stored).map(|form| (what.to_owned(), form)));
    }

    /// What is seen in `haystack`.
    fn seen(&self, haystack: &[u8]) -> Vec<&str> {
        // One character for each byte, whatever it is: a search in text is quick, also in a large log.
        let text = |bytes: &[u8]| bytes.iter().map(|byte| char::from(*byte)).collect::<String>();
        let haystack = text(haystack);
        self.0.iter().filter(|(_, form)| haystack.contains(&text(form))).map(|(what, _)| what.as_str()).collect()
    }
}

/// The service with everything logged into a file.
struct Service<'a> {
    database_url: &'a str,
    directory: PathBuf,
    child: Child,
    base: String,
    http: reqwest::Client,
}

impl<'a> Service<'a> {
    async fn start(database_url: &'a str, directory: &Path) -> Self {
        let arguments = ["serve", "--listen", "127.0.0.1:0", "--log", "trace", "--master-key-file", "master-keys"];
        let mut command = binary(&arguments, directory);
        command.args(["--database-url", database_url, "--retry-schedule", "0s,0s", "--allow-http"]);
        command.args(["--egress-allow", "127.0.0.0/8"]).stdout(Stdio::piped());
        command.stderr(fs::File::create(directory.join("serve.log")).unwrap());
        let mut child = command.spawn().unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let line = soon("the first line", lines.next_line()).await.unwrap().expect("the service starts");
        let base = line.strip_prefix("listening on ").unwrap().to_owned();
        // The first of the tests in this process installs it; the others find it there.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let http = reqwest::Client::builder().no_proxy().build().unwrap();
        Self { database_url, directory: directory.to_owned(), child, base, http }
    }

    async fn send(&self, request: reqwest::RequestBuilder) -> Answer {
        let response = soon("an answer", request.send()).await.unwrap();
        let (status, headers) = (response.status().as_u16(), response.headers().clone());
        Answer { status, headers, text: response.text().await.unwrap() }
    }

    fn request(&self, method: Method, path: &str, body: &str) -> reqwest::RequestBuilder {
        let request = self.http.request(method, format!("{}{path}", self.base));
        request.header("content-type", "application/json").body(body.to_owned())
    }

    async fn call(&self, key: &str, method: Method, path: &str, body: &Value) -> Answer {
        let body = if body.is_null() { String::new() } else { body.to_string() };
        self.send(self.request(method, path, &body).bearer_auth(key)).await
    }

    /// Runs a command with everything logged; standard output, and standard error added to `log`.
    async fn command(&self, arguments: &[&str], log: &mut Vec<u8>) -> String {
        let mut command = binary(arguments, &self.directory);
        command.args(["--log", "trace", "--database-url", self.database_url]);
        let (code, out, error) = run(command, "").await;
        assert_eq!(code, 0, "{error}");
        log.extend(error.bytes());
        out
    }
}

/// Requests that go wrong with `secret` in every place where a caller can put it.
fn wrong_requests(service: &Service<'_>, key: &str, webhook: &str, secret: &str) -> Vec<reqwest::RequestBuilder> {
    let escaped = secret.replace('/', "%2F").replace('+', "%2B");
    let body = |body: Value| service.request(Method::POST, "/v1/webhooks", &body.to_string()).bearer_auth(key);
    let get = |path: String| service.request(Method::GET, &path, "").bearer_auth(key);
    vec![
        service.request(Method::GET, "/v1/webhooks", "").bearer_auth(format!("{secret}x")),
        service.request(Method::GET, "/v1/webhooks", "").header("authorization", format!("Basic {secret}")),
        body(json!({ "url": "https://example.com/", "events": ["content.ready"], "secret": secret })),
        body(json!({ "url": secret, "events": ["content.ready"] })),
        body(json!({ "url": "https://example.com/", "events": [secret] })),
        body(json!({ "url": "https://example.com/", "events": secret })),
        body(json!(secret)),
        service.request(Method::POST, "/v1/webhooks", &format!("{{\"url\": {secret}")).bearer_auth(key),
        service
            .request(Method::PATCH, &format!("/v1/webhooks/{webhook}"), &json!({ "status": secret }).to_string())
            .bearer_auth(key),
        get(format!("/v1/webhooks/{escaped}")),
        get(format!("/v1/webhooks?cursor={escaped}")),
        get(format!("/v1/webhooks?limit={escaped}")),
        get(format!("/v1/webhooks/{webhook}/deliveries?status={escaped}")),
        get(format!("/v1/webhooks/{webhook}/deliveries?event={escaped}")),
        get(format!("/v1/webhooks/{webhook}/deliveries/watch?resume_token={escaped}")),
    ]
}

async fn secrets_are_seen_only_where_they_are_handed_out(database: Database) {
    let directory = tempfile::tempdir().unwrap();
    let (mut canaries, mut log) = (Canaries::default(), Vec::new());
    let masters = [Vault::new_master_key(), Vault::new_master_key()];
    masters.iter().for_each(|master| canaries.add("master key", master));
    fs::write(directory.path().join("master-keys"), &*masters[0]).unwrap();
    // The PostgreSQL of the tests takes any password; SQLite has none.
    let password = URL_SAFE_NO_PAD.encode(clock::random::<32>());
    canaries.add("password of the database", &password);
    let url = database.url.replacen("postgres@", &format!("postgres:{password}@"), 1);
    let service = Service::start(&url, directory.path()).await;

    // Keys, made and revoked by the command line.
    let make = ["keys", "create", "--environment", "test", "--json", "--kind"];
    let mut keys = Vec::new();
    for kind in ["secret", "secret", "publishable", "service"] {
        let whose: &[&str] = if kind == "service" { &[] } else { &["--organization", "acme"] };
        let made: Value =
            serde_json::from_str(&service.command(&[&make[..], &[kind], whose].concat(), &mut log).await).unwrap();
        let text = |name: &str| made[name].as_str().unwrap().to_owned();
        canaries.add(&format!("{kind} key"), &text("key"));
        keys.push((text("id"), text("key")));
    }
    service.command(&["keys", "revoke", &keys[1].0], &mut log).await;
    let key = keys[0].1.as_str();

    // Secrets, made and rotated; one receiver is well, one is not.
    let (well, broken) = (Receiver::start().await, Receiver::scripted(|_, _| Reply::status(500)).await);
    let mut handed_out = String::new();
    let mut webhooks = Vec::new();
    for receiver in [&well, &broken] {
        let new = json!({ "url": receiver.url(), "events": ["content.ready"] });
        let made = service.call(key, Method::POST, "/v1/webhooks", &new).await;
        let data = made.data();
        webhooks.push((data["id"].as_str().unwrap().to_owned(), data["secret"].as_str().unwrap().to_owned()));
        canaries.add("signing secret", &webhooks.last().unwrap().1);
        handed_out += &made.text;
    }
    for _ in 0..2 {
        let path = format!("/v1/webhooks/{}/rotate-secret", webhooks[0].0);
        let rotated = service.call(key, Method::POST, &path, &json!({})).await;
        canaries.add("rotated secret", rotated.data()["secret"].as_str().unwrap());
        handed_out += &rotated.text;
    }
    // The look itself finds what is there to be seen.
    assert_eq!(canaries.seen(handed_out.as_bytes()).len(), 4);

    // Deliveries that succeed and that fail, a retry by hand, a test event, changes.
    let event = json!({ "event": "content.ready", "data": {} });
    service.call(key, Method::POST, "/v1/events", &event).await.data();
    let got = well.wait_for(1).await.remove(0);
    assert_eq!(got.header("webhook-signature").split(' ').count(), 2, "signed with both secrets");
    broken.wait_for(2).await;
    let (mut answers, broken_path) = (Vec::new(), format!("/v1/webhooks/{}", webhooks[1].0));
    let failed = soon("a failure", async {
        loop {
            let listed =
                service.call(key, Method::GET, &format!("{broken_path}/deliveries?status=failed"), &Value::Null).await;
            if let Some(id) = listed.data()[0]["id"].as_str() {
                break id.to_owned();
            }
        }
    })
    .await;
    for (method, path, body) in [
        (Method::POST, format!("{broken_path}/deliveries/{failed}/retry"), json!({})),
        (Method::POST, format!("{broken_path}/test"), json!({})),
        (Method::PATCH, broken_path.clone(), json!({ "status": "disabled" })),
        (Method::GET, "/v1/webhooks".to_owned(), Value::Null),
        (Method::GET, broken_path.clone(), Value::Null),
        (Method::GET, format!("{broken_path}/deliveries/{failed}"), Value::Null),
        (Method::GET, "/v1/audit".to_owned(), Value::Null),
        (Method::DELETE, broken_path, Value::Null),
    ] {
        let answer = service.call(key, method, &path, &body).await;
        answer.data();
        answers.push(answer.text);
    }

    // Wrong requests, with each secret in each place.
    let secrets = keys.iter().map(|(_, key)| key).chain(webhooks.iter().map(|(_, secret)| secret));
    for secret in secrets {
        for request in wrong_requests(&service, key, &webhooks[0].0, secret) {
            let answer = service.send(request).await;
            assert!((400..500).contains(&answer.status), "{} {}", answer.status, answer.text);
            answers.push(format!("{:?} {}", answer.headers, answer.text));
        }
    }
    for (_, key) in &keys[1..] {
        let answer = service.call(key, Method::GET, "/v1/webhooks", &Value::Null).await;
        assert!((400..500).contains(&answer.status), "{}", answer.status);
        answers.push(answer.text);
    }

    // The same over HTTP/2, whose library logs a lot.
    for (_, key) in &keys {
        let channel = Endpoint::from_shared(service.base.clone()).unwrap().connect_lazy();
        let mut client = WebhookServiceClient::with_interceptor(channel, Bearer(key.clone()));
        let listed = client.list_webhooks(ListWebhooksRequest::default()).await;
        assert_eq!(listed.is_ok(), *key == keys[0].1);
        let rotated = client.rotate_secret(RotateSecretRequest { id: key.clone() }).await.unwrap_err();
        answers.extend([format!("{listed:?}"), format!("{rotated:?}")]);
    }

    // The master key is replaced, and the service ends in order.
    fs::write(directory.path().join("master-keys"), format!("{}\n{}", *masters[1], *masters[0])).unwrap();
    let rotate = ["keys", "rotate-master", "--master-key-file", "master-keys"];
    assert_eq!(service.command(&rotate, &mut log).await, "");
    answers.push(service.command(&["keys", "list", "--json"], &mut log).await);
    answers.push(service.command(&["audit", "list", "--json"], &mut log).await);
    assert!(answers.last().unwrap().lines().count() == 13, "{answers:?}");
    let Service { mut child, .. } = service;
    let pid = child.id().unwrap().to_string();
    assert!(Command::new("kill").args(["-TERM", &pid]).status().await.unwrap().success());
    assert!(soon("the end", child.wait()).await.unwrap().success());

    log.extend(fs::read(directory.path().join("serve.log")).unwrap());
    let text = String::from_utf8_lossy(&log);
    for source in ["h2::", "shortkit_webhooks::"] {
        assert!(text.contains(source), "everything is logged, also what {source} says");
    }
    assert!(text.contains("TRACE") && text.contains(&webhooks[0].0));
    let contents = database.contents().await;
    for (place, content) in
        [("the logs", log.as_slice()), ("answers", answers.join("\n").as_bytes()), ("the database", &contents)]
    {
        assert!(canaries.seen(content).is_empty(), "{place}: {:?}", canaries.seen(content));
    }
}
