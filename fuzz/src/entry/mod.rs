//! Where bytes of strangers come in, and what must hold whatever they are. Each function panics when it does not.

mod rest;

use serde::de::IgnoredAny;
use shortkit_webhooks::{
    egress::{MAX_URL_BYTES, Policy, RetryAfter, is_public},
    grpc::{Purpose, Tokens},
    webhook::{
        Environment, EventData, EventDataError, Secret, SigningKey, Tenant, Timestamp, signature_headers, verify,
        verify_shortform,
    },
};

pub use self::rest::{rest_body, rest_uri};

/// The name of its corpus, and what to do with a file of it.
pub type Target = (&'static str, fn(&[u8]));

/// Every target.
pub const TARGETS: [Target; 7] = [
    ("rest_body", rest_body),
    ("rest_uri", rest_uri),
    ("token", token),
    ("url", url),
    ("retry_after", retry_after),
    ("signature", signature),
    ("event_data", event_data),
];

/// A moment within the age of what is signed here.
const NOW_MS: i64 = 1_707_048_000_000;

fn text(data: &[u8]) -> Option<&str> {
    std::str::from_utf8(data).ok()
}

/// A tenant, a filter and a token, each on a line: none opens that was not sealed, and what was sealed opens for its
/// purpose and for no other.
pub fn token(data: &[u8]) {
    let Some(text) = text(data) else { return };
    let mut lines = text.splitn(3, '\n');
    let (organization, filter, given) = (lines.next(), lines.next(), lines.next());
    let (organization, filter, given) =
        (organization.unwrap_or_default(), filter.unwrap_or_default(), given.unwrap_or_default());
    let Some(tenant) = Tenant::new(organization, Environment::Live) else { return };
    let tokens = Tokens::new(&[7; 32]);
    let parts: Vec<&str> = filter.split(',').collect();
    let purpose = Purpose { call: "list", tenant: &tenant, filter: &parts };
    assert_eq!(tokens.open(&purpose, given), None);
    let sealed = tokens.seal(&purpose, given);
    assert_eq!(tokens.open(&purpose, &sealed).as_deref(), Some(given));
    let other = Purpose { call: "watch", ..purpose };
    assert_eq!(tokens.open(&other, &sealed), None);
    let joined = [filter];
    if parts.len() > 1 {
        assert_eq!(tokens.open(&Purpose { filter: &joined, ..purpose }, &sealed), None);
    }
}

/// The URL of a webhook: what is accepted is what every attempt will use, and names the host that it seems to.
pub fn url(data: &[u8]) {
    let Some(text) = text(data) else { return };
    let development = Policy { allow: Vec::new(), allow_loopback: true, allow_http: true };
    for policy in [Policy::default(), development] {
        let Ok(url) = policy.parse(text) else { continue };
        assert!(url.as_str().len() <= MAX_URL_BYTES);
        assert!(url.scheme() == "https" || (policy.allow_http && url.scheme() == "http"));
        assert!(url.username().is_empty() && url.password().is_none() && url.fragment().is_none());
        // What is stored is judged again, and must mean the same.
        assert_eq!(policy.parse(url.as_str()).as_ref(), Ok(&url));
        // The one that is judged and the one that is dialled are read by two parsers.
        let dialled: http::Uri = url.as_str().parse().expect("it can be requested");
        assert_eq!(dialled.host(), url.host_str());
        assert_eq!(dialled.port_u16(), url.port());
        let bare = url.host_str().unwrap_or_default().trim_matches(['[', ']', '.']);
        if let Ok(address) = bare.parse() {
            assert!(is_public(address) || (policy.allow_loopback && address.to_canonical().is_loopback()), "{url}");
        }
    }
}

/// The `Retry-After` of a receiver: a wait, or nothing.
pub fn retry_after(data: &[u8]) {
    let Some(text) = text(data) else { return };
    let Some(after) = RetryAfter::parse(text) else { return };
    for now in [i64::MIN, 0, NOW_MS, i64::MAX] {
        let wait = after.wait(now);
        if let RetryAfter::Delay(delay) = after {
            assert_eq!(wait, delay);
        }
    }
}

/// Id, timestamp, signatures and body, each on a line: none verifies that was not signed, and the right one does in
/// whatever company.
pub fn signature(data: &[u8]) {
    let Some(text) = text(data) else { return };
    let mut lines = text.splitn(4, '\n');
    let mut next = || lines.next().unwrap_or_default();
    let (id, timestamp, given, body) = (next(), next(), next(), next().as_bytes());
    if let Some(secret) = Secret::parse(given) {
        assert_eq!(secret.expose(), given);
    }
    let key = SigningKey::new(&Secret::from_random(&[9; 32]));
    let now = Timestamp::from_millis(NOW_MS);
    assert!(verify(&key, id, timestamp, given, body, now).is_err());
    assert!(verify_shortform(&key, given, body).is_err());
    let (shortform, standard) = signature_headers(std::slice::from_ref(&key), id, now, body);
    let seconds = now.secs().to_string();
    let verified = verify(&key, id, &seconds, &format!("{given} {standard}"), body, now);
    assert_eq!(verified.is_ok(), !id.is_empty());
    assert_eq!(verify_shortform(&key, &format!("{given},{shortform}"), body), Ok(()));
}

/// The data of an event: accepted as it is, or no JSON object.
pub fn event_data(data: &[u8]) {
    let Some(text) = text(data) else { return };
    let is_json = serde_json::from_str::<IgnoredAny>(text).is_ok();
    match EventData::parse(text) {
        Ok(data) => {
            assert!(is_json && data.as_str().starts_with('{'), "{text}");
            assert_eq!(data.as_str(), text.trim_matches([' ', '\t', '\r', '\n']));
        }
        Err(EventDataError::Invalid { line, column }) => {
            assert!(!is_json, "{text}");
            assert!(line >= 1 && line <= text.lines().count() + 1 && column <= text.len() + 1, "{line} {column}");
        }
        Err(EventDataError::Missing) => assert!(text.trim().is_empty()),
        Err(EventDataError::NotAnObject | EventDataError::TooDeep) => {}
    }
}
