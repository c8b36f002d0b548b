//! Why a request got no answer, in words that stay the same.

use std::{error::Error, fmt, io};

use rustls::CertificateError;

use super::resolver::{AllBlocked, LookupFailed};

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
    /// The certificate is for another host.
    TlsWrongHost,
    /// Nobody known vouches for the certificate.
    TlsUnknownAuthority,
    /// Another failure of TLS.
    Tls,
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
            Self::Unreachable => "Network unreachable",
            Self::DnsLookup => "DNS lookup failed",
            Self::BlockedAddress => "Blocked address",
            Self::InvalidUrl => "Invalid URL",
            Self::InvalidResponse => "Invalid HTTP response",
            Self::TlsExpired => "TLS handshake failed: certificate expired",
            Self::TlsWrongHost => "TLS handshake failed: certificate not valid for this host",
            Self::TlsUnknownAuthority => "TLS handshake failed: unknown certificate authority",
            Self::Tls => "TLS handshake failed",
            Self::Connection => "Connection failed",
        })
    }
}

impl From<&reqwest::Error> for Failure {
    fn from(error: &reqwest::Error) -> Self {
        let mut cause: Option<&(dyn Error + 'static)> = Some(error);
        let mut known = None;
        while let Some(error) = cause {
            known = known_cause(error).or(known);
            // An io::Error shows what it wraps not as its source but as its inside.
            cause = match error.downcast_ref::<io::Error>().and_then(io::Error::get_ref) {
                Some(inner) => Some(inner),
                None => error.source(),
            };
        }
        match known {
            Some(failure) => failure,
            None if error.is_timeout() && error.is_connect() => Self::ConnectionTimeout,
            None if error.is_timeout() => Self::RequestTimeout,
            None if error.is_connect() => Self::Connection,
            None => Self::InvalidResponse,
        }
    }
}

fn known_cause(error: &(dyn Error + 'static)) -> Option<Failure> {
    if error.is::<AllBlocked>() {
        return Some(Failure::BlockedAddress);
    }
    if error.is::<LookupFailed>() {
        return Some(Failure::DnsLookup);
    }
    if let Some(tls) = error.downcast_ref::<rustls::Error>() {
        return Some(certificate(tls));
    }
    match error.downcast_ref::<io::Error>()?.kind() {
        io::ErrorKind::ConnectionRefused => Some(Failure::ConnectionRefused),
        io::ErrorKind::ConnectionReset | io::ErrorKind::ConnectionAborted | io::ErrorKind::BrokenPipe => {
            Some(Failure::ConnectionReset)
        }
        io::ErrorKind::UnexpectedEof => Some(Failure::ConnectionReset),
        io::ErrorKind::NetworkUnreachable | io::ErrorKind::HostUnreachable => Some(Failure::Unreachable),
        _ => None,
    }
}

fn certificate(error: &rustls::Error) -> Failure {
    match error {
        rustls::Error::InvalidCertificate(CertificateError::Expired | CertificateError::ExpiredContext { .. }) => {
            Failure::TlsExpired
        }
        rustls::Error::InvalidCertificate(
            CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
        ) => Failure::TlsWrongHost,
        rustls::Error::InvalidCertificate(CertificateError::UnknownIssuer | CertificateError::Other(_)) => {
            Failure::TlsUnknownAuthority
        }
        _ => Failure::Tls,
    }
}
