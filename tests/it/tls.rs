//! TLS on the port: both protocols, certificates that are replaced, clients that show one.

use std::{path::PathBuf, sync::Arc, time::Duration};

use rcgen::{BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair};
use shortkit_webhooks::{
    clock,
    config::Config,
    grpc::proto::{ListWebhooksRequest, webhook_service_client::WebhookServiceClient},
    listen::{Limits, Tls, TlsFiles},
    store::KeyKind,
    webhook::Environment,
};
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    process::Command,
};
use tokio_rustls::{
    TlsConnector,
    rustls::{
        ClientConfig, HandshakeKind, RootCertStore,
        crypto::ring,
        pki_types::{CertificateDer, ServerName, pem::PemObject},
    },
};
use tonic::{
    service::interceptor::InterceptedService,
    transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity},
};

use crate::support::{Bearer, Database, Kind, TestServer, config, soon};

/// An authority, and a place for the files that it makes.
struct Authority {
    issuer: Issuer<'static, KeyPair>,
    pem: String,
    directory: TempDir,
}

impl Authority {
    fn new() -> Self {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().unwrap();
        let pem = params.self_signed(&key).unwrap().pem();
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("ca.pem"), &pem).unwrap();
        Self { issuer: Issuer::new(params, key), pem, directory }
    }

    /// A new certificate for this machine, and its key.
    fn certificate(&self, purpose: ExtendedKeyUsagePurpose, expired: bool) -> (String, String) {
        let mut params = CertificateParams::new(vec!["localhost".to_owned(), "127.0.0.1".to_owned()]).unwrap();
        params.extended_key_usages = vec![purpose];
        if expired {
            params.not_after = rcgen::date_time_ymd(2020, 1, 1);
        }
        let key = KeyPair::generate().unwrap();
        (params.signed_by(&key, &self.issuer).unwrap().pem(), key.serialize_pem())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Puts a new certificate for a server where it is served from; what it is.
    fn replace(&self) -> CertificateDer<'static> {
        let (certificate, key) = self.certificate(ExtendedKeyUsagePurpose::ServerAuth, false);
        std::fs::write(self.path("key.pem"), key).unwrap();
        std::fs::write(self.path("cert.pem"), &certificate).unwrap();
        CertificateDer::from_pem_slice(certificate.as_bytes()).unwrap()
    }

    fn files(&self) -> TlsFiles {
        TlsFiles { certificate: self.path("cert.pem"), key: self.path("key.pem"), client_authorities: None }
    }

    async fn serve(&self, files: TlsFiles) -> (TestServer, Database) {
        let database = Database::fresh(Kind::Sqlite).await;
        let limits = Limits { handshake_time: Duration::from_secs(1), ..Limits::default() };
        let tls = Some(Tls::load(files).unwrap());
        (TestServer::with(Config { tls, limits, ..config(&database) }).await, database)
    }

    /// Makes a connection; what it is, and the certificate that the server showed.
    async fn connect(
        &self,
        server: &TestServer,
        protocols: &[&[u8]],
    ) -> std::io::Result<(tokio_rustls::client::TlsStream<TcpStream>, CertificateDer<'static>)> {
        Self::connect_as(server, self.client(protocols)).await
    }

    /// What a client trusts, and remembers of earlier connections.
    fn client(&self, protocols: &[&[u8]]) -> Arc<ClientConfig> {
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_slice(self.pem.as_bytes()).unwrap()).unwrap();
        let mut config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        config.alpn_protocols = protocols.iter().map(|protocol| protocol.to_vec()).collect();
        Arc::new(config)
    }

    async fn connect_as(
        server: &TestServer,
        config: Arc<ClientConfig>,
    ) -> std::io::Result<(tokio_rustls::client::TlsStream<TcpStream>, CertificateDer<'static>)> {
        let stream = TcpStream::connect(server.address).await.unwrap();
        let name = ServerName::try_from("localhost").unwrap();
        let stream = soon("a handshake", TlsConnector::from(config).connect(name, stream)).await?;
        let shown = stream.get_ref().1.peer_certificates().unwrap()[0].clone().into_owned();
        Ok((stream, shown))
    }
}

fn origin(server: &TestServer) -> String {
    format!("https://localhost:{}", server.address.port())
}

fn grpc(
    server: &TestServer,
    key: &str,
    tls: ClientTlsConfig,
) -> WebhookServiceClient<InterceptedService<Channel, Bearer>> {
    let channel = Endpoint::from_shared(origin(server)).unwrap().tls_config(tls).unwrap().connect_lazy();
    WebhookServiceClient::with_interceptor(channel, Bearer(key.to_owned()))
}

#[tokio::test]
async fn both_protocols() {
    let authority = Authority::new();
    authority.replace();
    let (server, _database) = authority.serve(authority.files()).await;
    for (version, http1) in [(http::Version::HTTP_11, true), (http::Version::HTTP_2, false)] {
        let root = reqwest::Certificate::from_pem(authority.pem.as_bytes()).unwrap();
        let client = reqwest::Client::builder().no_proxy().tls_certs_only([root]);
        let client = if http1 { client.http1_only() } else { client }.build().unwrap();
        let request = client.get(format!("{}/v1/webhooks", origin(&server))).bearer_auth(&server.key);
        let response = soon("an answer", request.send()).await.unwrap();
        assert_eq!((response.status().as_u16(), response.version()), (200, version));
        assert_eq!(response.text().await.unwrap(), r#"{"data":[],"meta":{"total":0}}"#);
    }
    let tls = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(&authority.pem));
    let listed = grpc(&server, &server.key, tls).list_webhooks(ListWebhooksRequest::default()).await.unwrap();
    assert_eq!(listed.into_inner().total, 0);
    server.stop().await;
}

#[tokio::test]
async fn what_is_no_tls_ends() {
    let authority = Authority::new();
    authority.replace();
    let (server, _database) = authority.serve(authority.files()).await;
    // Cleartext, and nothing at all: it ends with the time of a handshake.
    for beginning in ["GET / HTTP/1.1\r\nhost: x\r\n\r\n", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", ""] {
        let mut client = TcpStream::connect(server.address).await.unwrap();
        client.write_all(beginning.as_bytes()).await.unwrap();
        let mut said = Vec::new();
        let _ = soon("the end of the connection", client.read_to_end(&mut said)).await;
        assert!(!said.windows(4).any(|text| text == b"HTTP"), "{said:?}");
    }
    assert!(authority.connect(&server, &[b"spdy/3"]).await.is_err(), "a protocol that is not spoken");
    assert!(authority.connect(&server, &[]).await.is_ok(), "a client without ALPN");
    server.stop().await;

    // The other way round.
    let cleartext = TestServer::on_sqlite().await;
    assert!(authority.connect(&cleartext, &[b"h2"]).await.is_err());
    assert_eq!(cleartext.get("/v1/webhooks").await.status, 200);
    cleartext.stop().await;
}

#[tokio::test]
async fn a_certificate_is_replaced_while_serving() {
    let authority = Authority::new();
    let first = authority.replace();
    let (server, _database) = authority.serve(authority.files()).await;
    let (mut open, shown) = authority.connect(&server, &[b"http/1.1"]).await.unwrap();
    assert_eq!(shown, first);

    let second = authority.replace();
    soon("the second certificate", async { while authority.connect(&server, &[b"h2"]).await.unwrap().1 != second {} })
        .await;
    // A file that is no certificate, for longer than between two looks.
    std::fs::write(authority.path("cert.pem"), "-----BEGIN CERTIFICATE-----\nnope\n").unwrap();
    let started = clock::stopwatch();
    while started.elapsed() < Duration::from_secs(3) {
        assert_eq!(authority.connect(&server, &[b"h2"]).await.unwrap().1, second);
    }
    let third = authority.replace();
    soon("the third certificate", async { while authority.connect(&server, &[b"h2"]).await.unwrap().1 != third {} })
        .await;
    // The connection from before all that.
    open.write_all(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
    let mut first = [0; 12];
    soon("an answer", open.read_exact(&mut first)).await.unwrap();
    assert_eq!(&first, b"HTTP/1.1 404");
    drop(open);
    server.stop().await;
}

#[tokio::test]
async fn service_keys_need_a_certificate_where_it_is_asked_for() {
    let authority = Authority::new();
    authority.replace();
    let (clients, strangers) = (Authority::new(), Authority::new());
    let files = TlsFiles { client_authorities: Some(clients.path("ca.pem")), ..authority.files() };
    let (server, _database) = authority.serve(files).await;
    let service = server.new_key(None, KeyKind::Service, Environment::Test).await;
    let list = async |key: &str, shown: Option<(String, String)>| {
        let tls = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(&authority.pem));
        let tls = match shown {
            Some((certificate, key)) => tls.identity(Identity::from_pem(certificate, key)),
            None => tls,
        };
        let mut request = tonic::Request::new(ListWebhooksRequest::default());
        request.metadata_mut().insert("x-shortkit-organization", "acme".parse().unwrap());
        soon("an answer", grpc(&server, key, tls).list_webhooks(request)).await.map_err(|status| status.code())
    };
    let of = |authority: &Authority, expired| Some(authority.certificate(ExtendedKeyUsagePurpose::ClientAuth, expired));
    assert_eq!(list(&service, None).await.unwrap_err(), tonic::Code::PermissionDenied);
    assert!(list(&server.key, None).await.is_ok(), "a tenant needs none");
    assert!(list(&service, of(&clients, false)).await.is_ok());
    for refused in [of(&strangers, false), of(&clients, true)] {
        let code = list(&server.key, refused).await.unwrap_err();
        // In TLS 1.3 the client learns of it after its own half of the handshake, with the first call under way.
        assert!(matches!(code, tonic::Code::Unavailable | tonic::Code::Unknown), "the connection ends: {code:?}");
    }
    let serving = Some(clients.certificate(ExtendedKeyUsagePurpose::ServerAuth, false));
    assert!(list(&service, serving).await.is_err(), "a certificate for another purpose");
    server.stop().await;
}

/// A session that is resumed brings its certificate along unverified, which may have expired or lost its authority since.
#[tokio::test]
async fn certificates_of_clients_are_verified_at_every_connection() {
    let authority = Authority::new();
    authority.replace();
    for (client_authorities, kind) in
        [(None, HandshakeKind::Resumed), (Some(authority.path("ca.pem")), HandshakeKind::Full)]
    {
        let (server, _database) = authority.serve(TlsFiles { client_authorities, ..authority.files() }).await;
        let client = authority.client(&[b"http/1.1"]);
        let mut kinds = Vec::new();
        for _ in 0..2 {
            let (mut stream, _) = Authority::connect_as(&server, Arc::clone(&client)).await.unwrap();
            // What a session is resumed with comes after the handshake.
            stream.write_all(b"GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").await.unwrap();
            soon("an answer", stream.read_to_end(&mut Vec::new())).await.unwrap();
            kinds.extend(stream.get_ref().1.handshake_kind());
        }
        assert_eq!(kinds, [HandshakeKind::Full, kind]);
        server.stop().await;
    }
}

#[tokio::test]
async fn the_command_line_serves_and_calls() {
    let authority = Authority::new();
    authority.replace();
    let (server, _database) = authority.serve(authority.files()).await;
    let run = async |arguments: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_shortkit-webhooks"));
        command.args(arguments).current_dir(authority.directory.path()).kill_on_drop(true);
        command.env("SHORTKIT_SERVER", origin(&server)).env("SHORTKIT_KEY", &server.key);
        let output = soon("the end", command.output()).await.unwrap();
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        (output.status.code().unwrap(), text(output.stdout), text(output.stderr))
    };
    let publish = ["publish", "content.ready", "--data", "{}"];
    let (code, out, error) = run(&[&publish[..], &["--ca", "ca.pem"]].concat()).await;
    assert!(code == 0 && out.starts_with("evt_"), "{out}{error}");
    let stranger = Authority::new();
    let other = stranger.path("ca.pem").display().to_string();
    assert_eq!(run(&[&publish[..], &["--ca", &other]].concat()).await.0, 1, "an authority that is not its");

    for (arguments, word) in [
        (&["serve", "--tls-cert", "cert.pem"][..], "go together"),
        (&["serve", "--tls-client-ca", "ca.pem"], "needs tls-cert"),
        (&["serve", "--tls-cert", "none.pem", "--tls-key", "key.pem"], "none.pem"),
        (&["serve", "--tls-cert", "key.pem", "--tls-key", "key.pem"], "no certificate"),
        (&["serve", "--tls-cert", "ca.pem", "--tls-key", "key.pem"], "ca.pem"),
    ] {
        let (code, _, error) = run(arguments).await;
        assert!(code == 64 && error.contains(word), "{arguments:?}: {code} {error}");
    }
    let mut serving = Command::new(env!("CARGO_BIN_EXE_shortkit-webhooks"));
    serving.args(["serve", "--dev", "--listen", "127.0.0.1:0", "--tls-cert", "cert.pem", "--tls-key", "key.pem"]);
    serving.current_dir(authority.directory.path()).stdout(std::process::Stdio::piped()).kill_on_drop(true);
    let mut serving = serving.spawn().unwrap();
    let mut first = [0; 28];
    soon("a line", serving.stdout.take().unwrap().read_exact(&mut first)).await.unwrap();
    assert_eq!(&first, b"listening on https://127.0.0");
    serving.start_kill().unwrap();
    serving.wait().await.unwrap();
    server.stop().await;
}
