//! The signing secret of a webhook.

use std::fmt;

use base64::{Engine, engine::general_purpose::STANDARD};
use zeroize::Zeroizing;

/// Every secret starts with this.
const PREFIX: &str = "whsec_";

/// `whsec_` and the base64 form of 32 random bytes. Wiped on drop, and never shown by `Debug`.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(Zeroizing<String>);

impl Secret {
    /// The secret made of these random bytes.
    pub fn from_random(bytes: &[u8; 32]) -> Self {
        // Long enough from the start: a text that grows leaves its beginning behind.
        let mut text = Zeroizing::new(String::with_capacity(PREFIX.len() + 44));
        text.push_str(PREFIX);
        STANDARD.encode_string(bytes, &mut text);
        Self(text)
    }

    /// A secret in text form, as a person or the database gives it; none when it is not one.
    pub fn parse(text: &str) -> Option<Self> {
        let encoded = text.strip_prefix(PREFIX)?;
        let decoded = Zeroizing::new(STANDARD.decode(encoded).ok()?);
        (!decoded.is_empty()).then(|| Self(Zeroizing::new(text.to_owned())))
    }

    /// The whole text, for the one answer that shows it, for storing it, and for signing.
    pub fn expose(&self) -> &str {
        &self.0
    }

    /// The bytes that the text encodes.
    pub(super) fn decoded(&self) -> Zeroizing<Vec<u8>> {
        Zeroizing::new(STANDARD.decode(&self.0[PREFIX.len()..]).unwrap_or_default())
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(…)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn is_never_shown() {
        let secret = Secret::from_random(&[7; 32]);
        assert!(secret.expose().starts_with("whsec_BwcH"));
        assert_eq!(format!("{secret:?}"), "Secret(…)");
        assert_eq!(Secret::parse(secret.expose()), Some(secret));
        assert_eq!(Secret::parse("whsec_"), None);
        assert_eq!(Secret::parse("whsec_***"), None);
    }
}
