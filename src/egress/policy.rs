//! Which URLs and addresses the operator lets requests go to.

use std::net::{IpAddr, Ipv4Addr};

use http::Uri;
use ipnet::IpNet;
use url::{Host, Url};

use super::is_public;

/// A URL is at most this long, as given and as normalised; a longer one is refused.
pub const MAX_URL_BYTES: usize = 2_048;

/// Where requests may go: public addresses, and what the operator adds.
#[derive(Debug, Clone, Default)]
pub struct Policy {
    /// Ranges allowed beside public addresses.
    pub allow: Vec<IpNet>,
    /// Whether loopback is allowed, for development.
    pub allow_loopback: bool,
    /// Whether plain `http` is allowed.
    pub allow_http: bool,
}

/// Why a URL is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum UrlError {
    /// It is empty.
    #[error("url is required")]
    Missing,
    /// It is longer than [`MAX_URL_BYTES`].
    #[error("url must be at most {MAX_URL_BYTES} bytes")]
    TooLong,
    /// It is not an absolute URL with a host.
    #[error("url must be an absolute URL")]
    Invalid,
    /// It is neither `https` nor, where allowed, `http`.
    #[error("url must start with https://")]
    Scheme,
    /// It names a user or a password.
    #[error("url must not contain a user name or password")]
    UserInfo,
    /// It has a fragment, which no server ever sees.
    #[error("url must not contain a fragment")]
    Fragment,
    /// Its port is below 1024 and neither 80 nor 443.
    #[error("url must use port 443, 80 or one above 1023")]
    Port,
    /// Its host is, or resolves to, an address that is not public.
    #[error("url must not point to an address that is not public")]
    Blocked,
}

impl UrlError {
    /// A stable word for programs.
    pub fn reason(self) -> &'static str {
        match self {
            Self::Missing => "required",
            Self::TooLong => "too_long",
            Self::Invalid => "invalid",
            Self::Scheme => "scheme",
            Self::UserInfo => "user_info",
            Self::Fragment => "fragment",
            Self::Port => "port",
            Self::Blocked => "blocked_address",
        }
    }
}

impl Policy {
    /// Whether an address may be dialled.
    pub fn permits(&self, address: IpAddr) -> bool {
        let address = address.to_canonical();
        is_public(address)
            || (self.allow_loopback && address.is_loopback())
            || self.allow.iter().any(|range| range.contains(&address))
    }

    /// Reads a URL as requests will use it, and judges it.
    pub fn parse(&self, text: &str) -> Result<Url, UrlError> {
        if text.is_empty() {
            return Err(UrlError::Missing);
        }
        if text.len() > MAX_URL_BYTES {
            return Err(UrlError::TooLong);
        }
        let url = Url::parse(text).map_err(|_| UrlError::Invalid)?;
        self.judge(&url)?;
        if url.as_str().len() > MAX_URL_BYTES {
            return Err(UrlError::TooLong);
        }
        // The few characters that a request line cannot hold.
        if Uri::try_from(url.as_str()).is_err() {
            return Err(UrlError::Invalid);
        }
        Ok(url)
    }

    /// Judges a URL that was read before, maybe under other rules. A host that is an address is judged here, since nobody
    /// looks it up; a name is judged when it is.
    pub fn judge(&self, url: &Url) -> Result<(), UrlError> {
        if url.scheme() != "https" && !(url.scheme() == "http" && self.allow_http) {
            return Err(UrlError::Scheme);
        }
        if !url.username().is_empty() || url.password().is_some() {
            return Err(UrlError::UserInfo);
        }
        if url.fragment().is_some() {
            return Err(UrlError::Fragment);
        }
        if !matches!(url.port_or_known_default(), Some(80 | 443 | 1024..)) {
            return Err(UrlError::Port);
        }
        // The parser has already turned every spelling of an address into one.
        let permitted = match url.host().ok_or(UrlError::Invalid)? {
            Host::Ipv4(address) => self.permits(address.into()),
            Host::Ipv6(address) => self.permits(address.into()),
            Host::Domain(name) => match name.trim_end_matches('.') {
                // With dots too many, which the parser leaves alone and another one may not.
                bare if let Ok(address) = bare.parse::<IpAddr>() => self.permits(address),
                bare => !is_localhost(bare) || self.permits(Ipv4Addr::LOCALHOST.into()),
            },
        };
        if permitted { Ok(()) } else { Err(UrlError::Blocked) }
    }
}

/// Names, without their last dot, that always mean this machine (RFC 6761).
fn is_localhost(name: &str) -> bool {
    name == "localhost" || name.ends_with(".localhost")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn judges_every_spelling_of_an_inside_address() {
        for host in [
            "127.0.0.1",
            "127.1",
            "2130706433",
            "0x7f000001",
            "0177.0.0.1",
            "127.0.0.1.",
            "127.0.0.1..",
            "localhost..",
            "①②⑦.0.0.1",
            "127。0。0。1",
            "[::1]",
            "[::ffff:127.0.0.1]",
            "[::ffff:7f00:1]",
            "[64:ff9b::7f00:1]",
            "[2002:7f00:1::]",
            "localhost",
            "LOCALHOST.",
            "a.localhost",
            "169.254.169.254",
            "0",
        ] {
            let judged = Policy::default().parse(&format!("https://{host}/hook"));
            assert_eq!(judged, Err(UrlError::Blocked), "{host}");
        }
        assert_eq!(Policy::default().parse("https:\\\\127.0.0.1\\x"), Err(UrlError::Blocked));
    }

    #[test]
    fn names_what_is_wrong() {
        let refuse = |text: &str| Policy::default().parse(text).unwrap_err();
        assert_eq!(refuse(""), UrlError::Missing);
        assert_eq!(refuse("example.com"), UrlError::Invalid);
        assert_eq!(refuse("http://example.com"), UrlError::Scheme);
        assert_eq!(refuse("ftp://example.com"), UrlError::Scheme);
        assert_eq!(refuse("https://user@example.com"), UrlError::UserInfo);
        assert_eq!(refuse("https://example.com/#a"), UrlError::Fragment);
        assert_eq!(refuse("https://example.com:22/"), UrlError::Port);
        assert_eq!(refuse("https://example.com:0/"), UrlError::Port);
        assert_eq!(refuse(&format!("https://example.com/{}", "a".repeat(2_100))), UrlError::TooLong);
        assert_eq!(Policy::default().parse("https://EXAMPLE.com:443/a").unwrap().as_str(), "https://example.com/a");
    }

    #[test]
    fn the_operator_can_allow_ranges() {
        let policy = Policy { allow: vec!["10.1.0.0/16".parse().unwrap()], ..Policy::default() };
        assert!(policy.parse("https://10.1.2.3/").is_ok());
        assert!(policy.parse("https://10.2.2.3/").is_err());
        let development = Policy { allow_loopback: true, allow_http: true, ..Policy::default() };
        assert!(development.parse("http://localhost:9000/").is_ok());
        assert!(development.parse("http://[::1]:9000/").is_ok());
        assert!(development.parse("http://10.0.0.1:9000/").is_err());
    }
}
