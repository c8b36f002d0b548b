//! Receivers that do not behave, from raw sockets: each ends in time, with a reason of its own.

use std::{sync::Arc, time::Duration};

use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair};
use serde_json::json;
use shortkit_webhooks::{clock, config::Config};
use tokio::{
    io::{AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};
use tokio_rustls::{
    TlsAcceptor,
    rustls::{
        ServerConfig,
        pki_types::{CertificateDer, PrivateKeyDer},
    },
};

use crate::support::{Database, Kind, TestServer, config};

/// One attempt may take this long in these tests.
const TIMEOUT: Duration = Duration::from_secs(1);

/// A receiver that hands each connection to `act`, after the head of a request has come.
async fn raw<F>(act: impl Fn(TcpStream) -> F + Send + 'static) -> String
where
    F: Future<Output = std::io::Result<()>> + Send + 'static,
{
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            let _ = stream.read(&mut [0; 4096]).await;
            tokio::spawn(act(stream));
        }
    });
    format!("http://{address}/")
}

async fn server(database: &Database) -> TestServer {
    TestServer::with(Config { request_timeout: TIMEOUT, ..config(database) }).await
}

/// Sends a test event and asserts how it ended.
async fn assert_ends(server: &TestServer, url: &str, expected: serde_json::Value) -> serde_json::Value {
    let (id, _) = server.webhook(url, &["content.ready"]).await;
    let started = clock::stopwatch();
    let test = server.post(&format!("/v1/webhooks/{id}/test"), "{}").await.data();
    assert!(started.elapsed() < TIMEOUT + Duration::from_secs(2), "{:?} {test}", started.elapsed());
    for (key, value) in expected.as_object().unwrap() {
        assert_eq!(&test[key], value, "{url} {test}");
    }
    test
}

fn failed(reason: &str) -> serde_json::Value {
    json!({ "status": "failed", "lastError": reason })
}

const HEAD: &[u8] = b"HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\n";

#[tokio::test]
async fn each_ends_in_time_with_its_reason() {
    let database = Database::fresh(Kind::Sqlite).await;
    let server = server(&database).await;

    let silent = raw(async |stream| {
        let _open = stream;
        std::future::pending().await
    })
    .await;
    assert_ends(&server, &silent, failed("Request timeout")).await;
    let drip = raw(async |mut stream| {
        stream.write_all(HEAD).await?;
        stream.write_all(b"content-length: 100000\r\n\r\n").await?;
        loop {
            stream.write_all(b"x").await?;
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    })
    .await;
    assert_ends(&server, &drip, failed("Request timeout")).await;
    let endless_head = raw(async |mut stream| {
        stream.write_all(HEAD).await?;
        loop {
            stream.write_all(b"x-filler: yyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyy\r\n").await?;
        }
    })
    .await;
    assert_ends(&server, &endless_head, json!({ "status": "failed" })).await;
    let informational = raw(async |mut stream| {
        loop {
            stream.write_all(b"HTTP/1.1 100 Continue\r\n\r\n").await?;
        }
    })
    .await;
    assert_ends(&server, &informational, json!({ "status": "failed" })).await;
    let endless = raw(async |mut stream| {
        stream.write_all(HEAD).await?;
        stream.write_all(b"transfer-encoding: chunked\r\n\r\n").await?;
        loop {
            stream.write_all(b"8\r\nabcdefgh\r\n").await?;
        }
    })
    .await;
    let test = assert_ends(&server, &endless, json!({ "status": "success", "statusCode": 200 })).await;
    assert_eq!(test["response"].as_str().unwrap().len(), 16 * 1024);
    let nonsense = raw(async |mut stream| stream.write_all(b"SSH-2.0-OpenSSH_9.2\r\n").await).await;
    assert_ends(&server, &nonsense, failed("Invalid HTTP response")).await;
    let bomb = raw(async |mut stream| {
        stream.write_all(HEAD).await?;
        stream.write_all(b"content-encoding: gzip\r\ncontent-length: 3\r\n\r\n\x1f\x8b\x08").await
    })
    .await;
    // Not unpacked at all: what cannot grow needs no bound.
    assert_ends(&server, &bomb, json!({ "status": "success" })).await;
    let cut = raw(async |mut stream| {
        stream.write_all(HEAD).await?;
        stream.write_all(b"content-length: 100\r\n\r\nabc").await
    })
    .await;
    assert_ends(&server, &cut, json!({ "status": "failed" })).await;

    let nobody = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    assert_ends(&server, &format!("http://{nobody}/"), failed("Connection refused")).await;
    assert_ends(&server, "https://nobody.invalid/", failed("DNS lookup failed")).await;
    assert_ends(&server, &silent.replace("http:", "https:"), json!({ "status": "failed" })).await;
    server.stop().await;
}

#[tokio::test]
async fn an_address_is_judged_at_every_attempt() {
    let database = Database::fresh(Kind::Sqlite).await;
    let open = server(&database).await;
    let receiver = crate::support::Receiver::start().await;
    let urls = [receiver.url(), format!("http://localhost:{}/", receiver.address.port())];
    let mut ids = Vec::new();
    for url in &urls {
        ids.push(open.webhook(url, &["content.ready"]).await.0);
    }
    let key = open.key.clone();
    open.stop().await;

    // The operator has changed the policy since.
    let mut server = TestServer::with(Config { allow_loopback: false, ..config(&database) }).await;
    server.key = key;
    for id in ids {
        let test = server.post(&format!("/v1/webhooks/{id}/test"), "{}").await.data();
        assert_eq!(test["lastError"], "Blocked address", "{test}");
    }
    for url in urls {
        let body = json!({ "url": url, "events": ["content.ready"] }).to_string();
        let refused = server.post("/v1/webhooks", &body).await;
        assert_eq!((refused.status, &refused.json()["error"]["details"]["field"]), (400, &json!("url")));
    }
    assert_eq!(receiver.received().len(), 0);
    server.stop().await;
}

/// A TLS receiver that answers 200, with a certificate of `authority` for `names`.
async fn tls(authority: &Issuer<'_, KeyPair>, names: &[&str], expired: bool) -> u16 {
    let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
    let mut params = CertificateParams::new(names).unwrap();
    if expired {
        params.not_after = rcgen::date_time_ymd(2020, 1, 1);
    }
    let key = KeyPair::generate().unwrap();
    let certificate = params.signed_by(&key, authority).unwrap();
    let chain = vec![CertificateDer::from(certificate.der().to_vec())];
    let key = PrivateKeyDer::try_from(key.serialize_der()).unwrap();
    let provider = Arc::new(tokio_rustls::rustls::crypto::ring::default_provider());
    let config = ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
    let acceptor = TlsAcceptor::from(Arc::new(config.with_no_client_auth().with_single_cert(chain, key).unwrap()));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            let acceptor = acceptor.clone();
            tokio::spawn(async move {
                if let Ok(mut stream) = acceptor.accept(stream).await {
                    let _ = stream.read(&mut [0; 4096]).await;
                    let _ = accept(&mut stream).await;
                }
            });
        }
    });
    port
}

async fn accept(stream: &mut (impl AsyncWrite + Unpin)) -> std::io::Result<()> {
    stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: close\r\n\r\nOK").await?;
    stream.shutdown().await
}

#[tokio::test]
async fn failures_of_tls_have_their_own_reasons() {
    let database = Database::fresh(Kind::Sqlite).await;
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let key = KeyPair::generate().unwrap();
    let root = params.self_signed(&key).unwrap();
    let authority = Issuer::new(params, key);
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, "Nobody You Know");
    let stranger = Issuer::new(params, KeyPair::generate().unwrap());
    let trusting = Config { egress_ca: vec![root.pem().into_bytes()], ..config(&database) };
    let server = TestServer::with(trusting).await;

    let url = |port| format!("https://localhost:{port}/");
    let good = tls(&authority, &["localhost"], false).await;
    assert_ends(&server, &url(good), json!({ "status": "success", "response": "OK" })).await;
    let expired = tls(&authority, &["localhost"], true).await;
    assert_ends(&server, &url(expired), failed("TLS handshake failed: certificate expired")).await;
    let other = tls(&authority, &["other.example"], false).await;
    let wrong = "TLS handshake failed: certificate not valid for this host";
    assert_ends(&server, &url(other), failed(wrong)).await;
    let unknown = tls(&stranger, &["localhost"], false).await;
    assert_ends(&server, &url(unknown), failed("TLS handshake failed: unknown certificate authority")).await;
    let plain = crate::support::Receiver::start().await.address.port();
    assert_ends(&server, &url(plain), json!({ "status": "failed" })).await;
    server.stop().await;
}
