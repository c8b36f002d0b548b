//! TLS on the port: certificates from files, read again when they change, and those of clients when asked for.

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::{Arc, PoisonError, RwLock},
    time::Duration,
};

use rustls::{
    RootCertStore, ServerConfig,
    crypto::ring,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
    server::{NoServerSessionStorage, WebPkiClientVerifier},
};
use tokio::{io::AsyncRead, io::AsyncWrite};
use tokio_rustls::{TlsAcceptor, server::TlsStream};

/// Protocols on offer, the best first.
const PROTOCOLS: [&[u8]; 2] = [b"h2", b"http/1.1"];
/// Between two looks at the files.
const LOOK: Duration = Duration::from_secs(1);

/// Where the certificates are, as PEM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TlsFiles {
    /// The server's certificate, and those between it and its authority.
    pub certificate: PathBuf,
    /// Its private key.
    pub key: PathBuf,
    /// The authorities of clients' certificates; without it no client is asked for one.
    pub client_authorities: Option<PathBuf>,
}

/// What the files say, kept up to date by [`Tls::follow`].
#[derive(Clone)]
pub struct Tls {
    files: TlsFiles,
    read: Contents,
    current: Arc<RwLock<Arc<ServerConfig>>>,
}

/// Marks a request that came over a connection whose client showed a certificate of the right authority.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ClientCertificate;

/// Why TLS cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file cannot be read.
    #[error("{}: {error}", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
    /// A file does not hold what it should.
    #[error("{}: holds no {what} in PEM", path.display())]
    Empty {
        /// The file.
        path: PathBuf,
        /// What it should hold.
        what: &'static str,
    },
    /// The certificates cannot be used, or the key is not theirs.
    #[error("{}: {fault}", path.display())]
    Unusable {
        /// The file of the certificates.
        path: PathBuf,
        /// What is wrong.
        fault: String,
    },
}

/// The bytes of each file. Compared whole: a date of change can stay the same when a file is replaced.
#[derive(Clone, PartialEq, Eq)]
struct Contents {
    certificate: Vec<u8>,
    key: Vec<u8>,
    client_authorities: Option<Vec<u8>>,
}

impl Tls {
    /// Reads the files.
    pub fn load(files: TlsFiles) -> Result<Self, TlsError> {
        let read = Contents::read(&files)?;
        let current = Arc::new(RwLock::new(Arc::new(read.config(&files)?)));
        Ok(Self { files, read, current })
    }

    /// Whether clients are asked for certificates.
    pub fn asks_clients(&self) -> bool {
        self.files.client_authorities.is_some()
    }

    /// Reads the files again whenever they change, for as long as it is polled. Connections keep what they began with;
    /// files that cannot be used are an error in the log, and what was in use stays.
    pub async fn follow(mut self) {
        loop {
            tokio::time::sleep(LOOK).await;
            let files = self.files.clone();
            let Ok(read) = tokio::task::spawn_blocking(move || Contents::read(&files)).await else { continue };
            let read = match read {
                Ok(read) if read == self.read => continue,
                Ok(read) => read,
                // A file is away for a moment while it is replaced, and is there at the next look.
                Err(error) => {
                    tracing::warn!(%error, "the TLS certificate cannot be read; the one in use stays");
                    continue;
                }
            };
            match read.config(&self.files) {
                Ok(config) => {
                    *self.current.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(config);
                    tracing::info!("the TLS certificate was replaced");
                }
                Err(error) => tracing::error!(%error, "the new TLS certificate cannot be used; the one in use stays"),
            }
            // Also when it cannot be used: it is said once, and not at every look.
            self.read = read;
        }
    }

    /// Makes a stream private; none when the client cannot, or takes too long.
    pub(super) async fn accept<S>(&self, stream: S, time: Duration) -> Option<(TlsStream<S>, Option<ClientCertificate>)>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let config = Arc::clone(&self.current.read().unwrap_or_else(PoisonError::into_inner));
        match tokio::time::timeout(time, TlsAcceptor::from(config).accept(stream)).await {
            Ok(Ok(stream)) => {
                // One that is there was verified: rustls ends the handshake otherwise.
                let certificate = stream.get_ref().1.peer_certificates().map(|_| ClientCertificate);
                Some((stream, certificate))
            }
            Ok(Err(error)) => {
                tracing::debug!(%error, "a TLS handshake failed");
                None
            }
            Err(_) => {
                tracing::debug!("a TLS handshake took too long");
                None
            }
        }
    }
}

impl std::fmt::Debug for Tls {
    /// Where the key is, and never the key.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tls").field("files", &self.files).finish_non_exhaustive()
    }
}

impl Contents {
    fn read(files: &TlsFiles) -> Result<Self, TlsError> {
        let read = |path: &Path| fs::read(path).map_err(|error| TlsError::Unreadable { path: path.to_owned(), error });
        Ok(Self {
            certificate: read(&files.certificate)?,
            key: read(&files.key)?,
            client_authorities: files.client_authorities.as_deref().map(read).transpose()?,
        })
    }

    fn config(&self, files: &TlsFiles) -> Result<ServerConfig, TlsError> {
        let unusable = |fault: String| TlsError::Unusable { path: files.certificate.clone(), fault };
        let chain = certificates(&self.certificate, &files.certificate)?;
        let key = PrivateKeyDer::from_pem_slice(&self.key)
            .map_err(|_| TlsError::Empty { path: files.key.clone(), what: "private key" })?;
        let provider = Arc::new(ring::default_provider());
        let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_safe_default_protocol_versions()
            .map_err(|error| unusable(error.to_string()))?;
        let builder = match (&self.client_authorities, &files.client_authorities) {
            (Some(pem), Some(path)) => {
                let unusable = |fault: String| TlsError::Unusable { path: path.clone(), fault };
                let mut roots = RootCertStore::empty();
                for authority in certificates(pem, path)? {
                    roots.add(authority).map_err(|error| unusable(error.to_string()))?;
                }
                let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider)
                    .allow_unauthenticated()
                    .build()
                    .map_err(|error| unusable(error.to_string()))?;
                builder.with_client_cert_verifier(verifier)
            }
            _ => builder.with_no_client_auth(),
        };
        let mut config = builder.with_single_cert(chain, key).map_err(|error| unusable(error.to_string()))?;
        config.alpn_protocols = PROTOCOLS.map(<[u8]>::to_vec).to_vec();
        if self.client_authorities.is_some() {
            // rustls takes the certificate of a resumed session from the one before, without verifying it again: one that
            // has expired since, or whose authority was replaced, would go on opening the door.
            config.session_storage = Arc::new(NoServerSessionStorage {});
            config.send_tls13_tickets = 0;
        }
        Ok(config)
    }
}

fn certificates(pem: &[u8], path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let empty = || TlsError::Empty { path: path.to_owned(), what: "certificate" };
    let certificates: Vec<_> = CertificateDer::pem_slice_iter(pem).collect::<Result<_, _>>().map_err(|_| empty())?;
    if certificates.is_empty() { Err(empty()) } else { Ok(certificates) }
}
