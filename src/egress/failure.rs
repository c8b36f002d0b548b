//! Why a request got no answer, in words that stay the same.

use std::{
    error, fmt, io,
    net::{Ipv4Addr, UdpSocket},
};

use rustls::{CertificateError, Error as TlsError, pki_types::InvalidDnsNameError};

/// What Unix calls it when this process may open no more files, …
const EMFILE: i32 = 24;
/// … or all together may not.
const ENFILE: i32 = 23;

/// What kept a request from being answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Failure {
    /// No connection within the limit.
    ConnectionTimeout,
    /// A connection, but no complete answer within the limit.
    RequestTimeout,
    /// Nobody listens.
    ConnectionRefused,
    /// The connection broke.
    ConnectionReset,
    /// This process, or the system, has no file left for a connection: nothing was tried, and nobody else is to blame.
    NoSocket,
    /// There is no way to the address.
    Unreachable,
    /// The name has no address.
    DnsLookup,
    /// The address may not be dialled.
    BlockedAddress,
    /// The URL is not one that requests may go to.
    InvalidUrl,
    /// The answer is not HTTP, or more than may be read.
    InvalidResponse,
    /// The certificate is out of date.
    TlsExpired,
    /// The certificate is not valid before a later time.
    TlsNotYetValid,
    /// The certificate is for another host.
    TlsWrongHost,
    /// Nobody known vouches for the certificate.
    TlsUnknownAuthority,
    /// Something else is wrong with the certificate.
    TlsCertificate,
    /// A connection, but no end of the handshake within the limit.
    TlsTimeout,
    /// The receiver hung up during the handshake.
    TlsClosed,
    /// The receiver does not speak TLS, or none that we speak.
    TlsProtocol,
    /// Anything else.
    Connection,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::ConnectionTimeout => "Connection timeout",
            Self::RequestTimeout => "Request timeout",
            Self::ConnectionRefused => "Connection refused",
            Self::ConnectionReset => "Connection reset",
            Self::NoSocket => "No connection available",
            Self::Unreachable => "Network unreachable",
            Self::DnsLookup => "DNS lookup failed",
            Self::BlockedAddress => "Blocked address",
            Self::InvalidUrl => "Invalid URL",
            Self::InvalidResponse => "Invalid HTTP response",
            Self::TlsExpired => "TLS handshake failed: certificate expired",
            Self::TlsNotYetValid => "TLS handshake failed: certificate not yet valid",
            Self::TlsWrongHost => "TLS handshake failed: certificate not valid for this host",
            Self::TlsUnknownAuthority => "TLS handshake failed: unknown certificate authority",
            Self::TlsCertificate => "TLS handshake failed: invalid certificate",
            Self::TlsTimeout => "TLS handshake failed: timeout",
            Self::TlsClosed => "TLS handshake failed: connection closed",
            Self::TlsProtocol => "TLS handshake failed: protocol error",
            Self::Connection => "Connection failed",
        })
    }
}

impl error::Error for Failure {}

impl Failure {
    /// One word for it, where everything about TLS is one.
    pub fn name(self) -> &'static str {
        match self {
            Self::ConnectionTimeout => "connection_timeout",
            Self::RequestTimeout => "request_timeout",
            Self::ConnectionRefused => "connection_refused",
            Self::ConnectionReset => "connection_reset",
            Self::NoSocket => "no_socket",
            Self::Unreachable => "unreachable",
            Self::DnsLookup => "dns_lookup",
            Self::BlockedAddress => "blocked_address",
            Self::InvalidUrl => "invalid_url",
            Self::InvalidResponse => "invalid_response",
            Self::TlsExpired
            | Self::TlsNotYetValid
            | Self::TlsWrongHost
            | Self::TlsUnknownAuthority
            | Self::TlsCertificate
            | Self::TlsTimeout
            | Self::TlsClosed
            | Self::TlsProtocol => "tls",
            Self::Connection => "connection",
        }
    }

    /// Why there is no connection.
    pub(super) fn dialling(error: &(dyn error::Error + 'static)) -> Self {
        known(error).unwrap_or(Self::Connection)
    }

    /// Why a name could not be looked up: the resolver does not say that it had no socket to ask with, so whether there is
    /// one is tried now.
    pub(super) fn looking_up() -> Self {
        let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0));
        socket.err().and_then(|error| named(&error)).filter(|found| *found == Self::NoSocket).unwrap_or(Self::DnsLookup)
    }

    /// Why a connection could not be encrypted.
    pub(super) fn handshake(error: &(dyn error::Error + 'static)) -> Self {
        match causes(error).find_map(|cause| cause.downcast_ref::<TlsError>()) {
            Some(TlsError::InvalidCertificate(fault)) => certificate(fault),
            Some(_) => Self::TlsProtocol,
            // Only the connection itself fails without a word of TLS.
            None => Self::TlsClosed,
        }
    }

    /// Why an exchange ended without an answer.
    pub(super) fn exchanging(error: &reqwest::Error) -> Self {
        known(error).unwrap_or(if error.is_timeout() { Self::RequestTimeout } else { Self::InvalidResponse })
    }
}

/// The innermost cause that has a name here.
fn known(error: &(dyn error::Error + 'static)) -> Option<Failure> {
    causes(error).filter_map(named).last()
}

/// An error and what it was made of, from the outside in.
fn causes<'a>(error: &'a (dyn error::Error + 'static)) -> impl Iterator<Item = &'a (dyn error::Error + 'static)> {
    std::iter::successors(Some(error), |error| {
        // An io::Error shows what it wraps not as its source but as its inside.
        match error.downcast_ref::<io::Error>().and_then(io::Error::get_ref) {
            Some(inside) => Some(inside),
            None => error.source(),
        }
    })
}

fn named(error: &(dyn error::Error + 'static)) -> Option<Failure> {
    if let Some(failure) = error.downcast_ref::<Failure>() {
        return Some(*failure);
    }
    if let Some(http) = error.downcast_ref::<hyper::Error>() {
        let incomplete = http.is_incomplete_message();
        return Some(if incomplete { Failure::ConnectionReset } else { Failure::InvalidResponse });
    }
    if error.is::<InvalidDnsNameError>() {
        return Some(Failure::InvalidUrl);
    }
    let error = error.downcast_ref::<io::Error>()?;
    if matches!(error.raw_os_error(), Some(EMFILE | ENFILE)) {
        return Some(Failure::NoSocket);
    }
    match error.kind() {
        io::ErrorKind::ConnectionRefused => Some(Failure::ConnectionRefused),
        io::ErrorKind::ConnectionReset | io::ErrorKind::ConnectionAborted | io::ErrorKind::BrokenPipe => {
            Some(Failure::ConnectionReset)
        }
        io::ErrorKind::UnexpectedEof => Some(Failure::ConnectionReset),
        io::ErrorKind::TimedOut => Some(Failure::ConnectionTimeout),
        io::ErrorKind::NetworkUnreachable | io::ErrorKind::HostUnreachable => Some(Failure::Unreachable),
        _ => None,
    }
}

fn certificate(fault: &CertificateError) -> Failure {
    match fault {
        CertificateError::Expired | CertificateError::ExpiredContext { .. } => Failure::TlsExpired,
        CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => Failure::TlsNotYetValid,
        CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. } => Failure::TlsWrongHost,
        // The other one is what a certificate that vouches for itself is called.
        CertificateError::UnknownIssuer | CertificateError::Other(_) => Failure::TlsUnknownAuthority,
        _ => Failure::TlsCertificate,
    }
}
