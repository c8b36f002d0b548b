//! What reqwest is given to make connections with: whom it may dial, how it encrypts, and one limit of time for all of it.
//! It looks names up here, dials and encrypts by itself, and hands every connection over to be judged once more.

use std::{
    cell::Cell,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use http::Extensions;
use hyper_util::client::legacy::connect::{Connection, HttpInfo};
use reqwest::dns::{Addrs, Name, Resolve, Resolving};
use rustls::{
    ClientConfig, SignatureScheme,
    client::{ResolvesClientCert, Resumption},
    pki_types::{CertificateDer, pem::PemObject},
    sign::CertifiedKey,
};
use rustls_platform_verifier::Verifier;
use tower::BoxError;

use super::{Failure, Policy, StartError, names::Names};

/// TLS sessions that are remembered: rustls reckons with eight of a host.
const MAX_SESSIONS: usize = 8 * 1_024;

tokio::task_local! {
    /// Whether the connection that is being made is past dialling.
    static SHAKING_HANDS: Cell<bool>;
}

/// The addresses of a name that may be dialled: of good and bad ones, the good ones.
#[derive(Clone)]
pub(super) struct Permitted {
    pub(super) names: Arc<Names>,
    pub(super) policy: Arc<Policy>,
}

impl Permitted {
    async fn addresses(&self, name: &str) -> Result<Vec<IpAddr>, Failure> {
        let mut addresses = self.names.addresses(name).await?;
        if addresses.is_empty() {
            return Err(Failure::DnsLookup);
        }
        addresses.retain(|address| self.policy.permits(*address));
        if addresses.is_empty() { Err(Failure::BlockedAddress) } else { Ok(addresses) }
    }
}

impl Resolve for Permitted {
    fn resolve(&self, name: Name) -> Resolving {
        let this = self.clone();
        Box::pin(async move {
            let addresses = this.addresses(name.as_str()).await?;
            // The port is that of the URL.
            Ok(Box::new(addresses.into_iter().map(|address| SocketAddr::new(address, 0))) as Addrs)
        })
    }
}

/// Makes a connection within `limit`, from the look-up to the end of the handshake, and says what it failed at.
pub(super) fn watch<C: Connection>(
    connecting: impl Future<Output = Result<C, BoxError>>,
    policy: Arc<Policy>,
    limit: Duration,
) -> impl Future<Output = Result<C, BoxError>> {
    // Counts from now on, and so ends before reqwest's own limit, which does not tell dialling from encrypting.
    let connecting = tokio::time::timeout(limit, connecting);
    SHAKING_HANDS.scope(Cell::new(false), async move {
        let ended = connecting.await;
        let connection = match (ended, SHAKING_HANDS.with(Cell::get)) {
            (Ok(Ok(connection)), _) => connection,
            (Ok(Err(error)), false) => return Err(Failure::dialling(error.as_ref()).into()),
            (Ok(Err(error)), true) => return Err(Failure::handshake(error.as_ref()).into()),
            (Err(_), false) => return Err(Failure::ConnectionTimeout.into()),
            (Err(_), true) => return Err(Failure::TlsTimeout.into()),
        };
        // Whatever led here: no request goes to an address that may not hear it.
        let mut about = Extensions::new();
        connection.connected().get_extras(&mut about);
        match about.get::<HttpInfo>() {
            Some(info) if policy.permits(info.remote_addr().ip()) => Ok(connection),
            _ => Err(Failure::BlockedAddress.into()),
        }
    })
}

/// TLS that trusts the system's authorities and those of these PEM files.
pub(super) fn tls(extra_roots: &[Vec<u8>]) -> Result<ClientConfig, StartError> {
    let mut roots = Vec::new();
    for pem in extra_roots {
        let before = roots.len();
        for root in CertificateDer::pem_slice_iter(pem) {
            roots.push(root.map_err(|error| StartError::Certificates(error.to_string()))?);
        }
        if roots.len() == before {
            return Err(StartError::Certificates("a file holds none".to_owned()));
        }
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let verifier = Verifier::new_with_extra_roots(roots, Arc::clone(&provider))?;
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        // Its own word for a verifier that is not its own: this one asks the system.
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier))
        .with_client_cert_resolver(Arc::new(NoCertificate));
    // A handshake that resumes is cheap, and who connects anew for each request has many.
    config.resumption = Resumption::in_memory_sessions(MAX_SESSIONS);
    // An attempt has a connection to itself. Over HTTP/2 all tenants with webhooks at one host would share one, and a few
    // paths that hang would take all streams that its server allows, or what it takes of bodies that nobody reads.
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(config)
}

/// No certificate of ours. It is asked for as a handshake begins, which is how we know that one has: reqwest dials and
/// encrypts in one step, and a receiver that cannot be reached is another matter than one that does not answer.
#[derive(Debug)]
struct NoCertificate;

impl ResolvesClientCert for NoCertificate {
    fn resolve(&self, _: &[&[u8]], _: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        None
    }

    fn has_certs(&self) -> bool {
        let _ = SHAKING_HANDS.try_with(|shaking_hands| shaking_hands.set(true));
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn of_good_and_bad_addresses_the_good_ones_are_dialled() {
        let names = Arc::new(Names::system(usize::MAX).unwrap());
        let localhost = async |policy: Policy| {
            let permitted = Permitted { names: Arc::clone(&names), policy: Arc::new(policy) };
            let resolved = permitted.resolve("localhost".parse().unwrap()).await;
            resolved.map(Iterator::collect::<Vec<_>>).map_err(|error| *error.downcast::<Failure>().unwrap())
        };
        assert_eq!(localhost(Policy::default()).await, Err(Failure::BlockedAddress));
        let v4 = Policy { allow: vec!["127.0.0.1/32".parse().unwrap()], ..Policy::default() };
        assert_eq!(localhost(v4).await, Ok(vec![SocketAddr::from(([127, 0, 0, 1], 0))]));
    }

    #[test]
    fn a_file_without_authorities_is_refused() {
        assert!(tls(&[]).is_ok());
        assert!(matches!(tls(&[b"no certificate".to_vec()]), Err(StartError::Certificates(_))));
    }
}
