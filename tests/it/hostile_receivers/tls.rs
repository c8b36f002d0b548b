//! Certificates that are not good, and handshakes that do not end.

use std::{convert::Infallible, sync::Arc};

use bytes::Bytes;
use http::{Request, Response};
use http_body::Frame;
use http_body_util::{BodyExt, Full, StreamBody, combinators::BoxBody};
use hyper::{body::Incoming, service::service_fn};
use hyper_util::{
    rt::{TokioExecutor, TokioIo},
    server::conn::auto,
};
use rcgen::{BasicConstraints, Certificate, CertificateParams, DnType, IsCa, Issuer, KeyPair};
use serde_json::json;
use shortkit_webhooks::config::Config;
use tokio::{io::AsyncWriteExt, net::TcpListener, sync::watch};
use tokio_rustls::{
    TlsAcceptor,
    rustls::{
        ALL_VERSIONS, ServerConfig, SupportedProtocolVersion,
        pki_types::{CertificateDer, PrivateKeyDer},
        version::TLS12,
    },
};

use super::{TIMEOUT, accept, assert_ends, drip, failed, raw, server};
use crate::support::{Database, Kind, TestServer, config, soon};

/// A certificate, and what it is for.
struct Certified {
    names: Vec<String>,
    from: i32,
    until: i32,
    is_authority: bool,
}

impl Certified {
    fn good() -> Self {
        Self { names: vec!["localhost".to_owned()], from: 1990, until: 2090, is_authority: false }
    }

    fn params(&self) -> CertificateParams {
        let mut params = CertificateParams::new(self.names.clone()).unwrap();
        params.not_before = rcgen::date_time_ymd(self.from, 1, 1);
        params.not_after = rcgen::date_time_ymd(self.until, 1, 1);
        if self.is_authority {
            params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        }
        params
    }

    /// A TLS receiver that answers 200, with a certificate of `authority`, or of its own; and how many requests it leaves
    /// without an answer.
    async fn serve(
        &self,
        authority: Option<&Issuer<'_, KeyPair>>,
        versions: &[&'static SupportedProtocolVersion],
    ) -> (u16, watch::Receiver<usize>) {
        let key = KeyPair::generate().unwrap();
        let certificate = match authority {
            Some(authority) => self.params().signed_by(&key, authority).unwrap(),
            None => self.params().self_signed(&key).unwrap(),
        };
        let chain = vec![CertificateDer::from(certificate.der().to_vec())];
        let key = PrivateKeyDer::try_from(key.serialize_der()).unwrap();
        let provider = Arc::new(tokio_rustls::rustls::crypto::ring::default_provider());
        let config = ServerConfig::builder_with_provider(provider).with_protocol_versions(versions).unwrap();
        let mut config = config.with_no_client_auth().with_single_cert(chain, key).unwrap();
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        let acceptor = TlsAcceptor::from(Arc::new(config));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let (hanging, hang) = watch::channel(0);
        tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let (acceptor, hanging) = (acceptor.clone(), hanging.clone());
                tokio::spawn(async move {
                    let Ok(stream) = acceptor.accept(stream).await else { return };
                    let service = service_fn(move |request| answer(request, hanging.clone()));
                    let mut connection = auto::Builder::new(TokioExecutor::new());
                    connection.http2().max_concurrent_streams(STREAMS);
                    let _ = connection.serve_connection(TokioIo::new(stream), service).await;
                });
            }
        });
        (port, hang)
    }
}

/// So many requests at a time are allowed over one HTTP/2 connection.
const STREAMS: u32 = 4;

/// `OK`, on `/endless` no end of it, on `/hang` nothing.
async fn answer(
    request: Request<Incoming>,
    hanging: watch::Sender<usize>,
) -> Result<Response<BoxBody<Bytes, Infallible>>, Infallible> {
    let chunk = || Ok(Frame::data(Bytes::from_static(&[b'x'; 4096])));
    Ok(Response::new(match request.uri().path() {
        "/endless" => BodyExt::boxed(StreamBody::new(futures_util::stream::repeat_with(chunk))),
        "/hang" => {
            hanging.send_modify(|hanging| *hanging += 1);
            std::future::pending().await
        }
        _ => BodyExt::boxed(Full::from("OK")),
    }))
}

/// Who signs certificates, and its own.
fn authority(name: &str) -> (Issuer<'static, KeyPair>, Certificate) {
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let key = KeyPair::generate().unwrap();
    let certificate = params.self_signed(&key).unwrap();
    (Issuer::new(params, key), certificate)
}

fn no_tls(reason: &str) -> serde_json::Value {
    failed(&format!("TLS handshake failed: {reason}"))
}

#[tokio::test]
async fn each_fault_of_a_certificate_has_its_own_reason() {
    let database = Database::fresh(Kind::Sqlite).await;
    let (known, root) = authority("Known");
    let (stranger, _) = authority("Nobody You Know");
    let server = TestServer::with(Config { egress_ca: vec![root.pem().into_bytes()], ..config(&database) }).await;
    let good = json!({ "status": "success", "response": "OK" });
    let unknown = no_tls("unknown certificate authority");
    let other = Certified { names: vec!["other.example".to_owned()], ..Certified::good() };
    for (certificate, authority, expected) in [
        (Certified::good(), Some(&known), good),
        (Certified { until: 2020, ..Certified::good() }, Some(&known), no_tls("certificate expired")),
        (Certified { from: 2080, ..Certified::good() }, Some(&known), no_tls("certificate not yet valid")),
        (other, Some(&known), no_tls("certificate not valid for this host")),
        (Certified::good(), Some(&stranger), unknown.clone()),
        (Certified::good(), None, unknown.clone()),
        (Certified { is_authority: true, ..Certified::good() }, None, unknown),
    ] {
        for versions in [ALL_VERSIONS, &[&TLS12]] {
            let (port, _) = certificate.serve(authority, versions).await;
            let test = assert_ends(&server, &format!("https://localhost:{port}/"), expected.clone()).await;
            if test["status"] == "success" {
                let endless = format!("https://localhost:{port}/endless");
                let test = assert_ends(&server, &endless, json!({ "status": "success" })).await;
                assert_eq!(test["response"].as_str().unwrap().len(), 16 * 1024);
            }
        }
    }
    server.stop().await;
}

/// One host may have webhooks of many tenants, as that of a platform whose users paste its URLs.
#[tokio::test]
async fn paths_that_hang_hold_nobody_up_at_the_same_host() {
    let database = Database::fresh(Kind::Sqlite).await;
    let (issuer, root) = authority("Known");
    let (port, mut hanging) = Certified::good().serve(Some(&issuer), ALL_VERSIONS).await;
    let (egress_ca, request_timeout) = (vec![root.pem().into_bytes()], 5 * TIMEOUT);
    let server = TestServer::with(Config { egress_ca, request_timeout, ..config(&database) }).await;
    server.webhook(&format!("https://localhost:{port}/hang"), &["content.errored"]).await;
    for _ in 0..2 * STREAMS {
        server.publish("content.errored", "{}").await;
    }
    let all = hanging.wait_for(|hanging| *hanging == 2 * STREAMS as usize);
    soon("all that hang are under way", all).await.unwrap();
    assert_ends(&server, &format!("https://localhost:{port}/"), json!({ "status": "success" })).await;
    server.stop().await;
}

#[tokio::test]
async fn a_handshake_ends_in_time_and_with_a_reason() {
    let database = Database::fresh(Kind::Sqlite).await;
    let server = server(&database).await;
    let https = |url: String| url.replace("http:", "https:");
    let silent = raw(async |stream| {
        let _open = stream;
        std::future::pending().await
    })
    .await;
    assert_ends(&server, &https(silent), no_tls("timeout")).await;
    let slow = raw(async |mut stream| {
        // The head of a record that is long in coming.
        stream.write_all(&[22, 3, 3, 0x40, 0]).await?;
        drip(stream).await
    })
    .await;
    assert_ends(&server, &https(slow), no_tls("timeout")).await;
    let gone = raw(async |mut stream| stream.shutdown().await).await;
    assert_ends(&server, &https(gone), no_tls("connection closed")).await;
    let plain = raw(async |mut stream| accept(&mut stream).await).await;
    assert_ends(&server, &https(plain), no_tls("protocol error")).await;
    let alert = raw(async |mut stream| stream.write_all(&[21, 3, 3, 0, 2, 2, 70]).await).await;
    assert_ends(&server, &https(alert), no_tls("protocol error")).await;
    server.stop().await;
}
