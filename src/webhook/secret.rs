//! The signing secret of a webhook.

use std::fmt;

use base64::{Engine, engine::general_purpose::STANDARD};

/// Every secret starts with this.
const PREFIX: &str = "whsec_";

/// `whsec_` and the base64 form of 32 random bytes. Wiped on drop, and never shown by `Debug`.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// The secret made of these random bytes.
    pub fn from_random(bytes: &[u8; 32]) -> Self {
        Self(format!("{PREFIX}{}", STANDARD.encode(bytes)))
    }

    /// A secret in text form, as a person or the database gives it; none when it is not one.
    pub fn parse(text: &str) -> Option<Self> {
        let encoded = text.strip_prefix(PREFIX)?;
        (!encoded.is_empty() && STANDARD.decode(encoded).is_ok()).then(|| Self(text.to_owned()))
    }

    /// The whole text, for the one answer that shows it, for storing it, and for signing.
    pub fn expose(&self) -> &str {
        &self.0
    }

    /// The bytes that the text encodes.
    pub(super) fn decoded(&self) -> Vec<u8> {
        STANDARD.decode(&self.0[PREFIX.len()..]).unwrap_or_default()
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(…)")
    }
}

impl Drop for Secret {
    fn drop(&mut self) {
        // Safe code cannot overwrite a String in place except through its bytes.
        let mut bytes = std::mem::take(&mut self.0).into_bytes();
        bytes.fill(0);
        std::hint::black_box(&bytes);
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
