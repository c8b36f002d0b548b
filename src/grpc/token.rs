//! Cursors and resume tokens: opaque, bound to tenant and filter, and worthless when changed.

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use ring::hmac;

use crate::webhook::Tenant;

/// Bytes of the HMAC that are kept: nobody forges 128 bits.
const MAC_BYTES: usize = 16;

/// Seals and opens tokens with a key that all nodes share.
#[derive(Clone)]
pub struct Tokens(hmac::Key);

/// What a token is for; one for another purpose, tenant or filter does not open.
pub struct Purpose<'a> {
    /// Name of the call.
    pub call: &'static str,
    /// Whose it is.
    pub tenant: &'a Tenant,
    /// The filter, in any unambiguous spelling.
    pub filter: &'a [&'a str],
}

impl Tokens {
    /// Tokens under this key.
    pub fn new(key: &[u8; 32]) -> Self {
        Self(hmac::Key::new(hmac::HMAC_SHA256, key))
    }

    /// The token that stands for `content`.
    pub fn seal(&self, purpose: &Purpose<'_>, content: &str) -> String {
        let mut bytes = self.mac(purpose, content.as_bytes());
        bytes.extend_from_slice(content.as_bytes());
        URL_SAFE_NO_PAD.encode(bytes)
    }

    /// What [`Tokens::seal`] sealed for the same purpose; none for anything else.
    pub fn open(&self, purpose: &Purpose<'_>, token: &str) -> Option<String> {
        let bytes = URL_SAFE_NO_PAD.decode(token).ok()?;
        let (mac, content) = bytes.split_at_checked(MAC_BYTES)?;
        // Compared whole and without an early end: a timing tells nothing of the right value.
        let differs = self.mac(purpose, content).iter().zip(mac).fold(0, |all, (a, b)| all | (a ^ b));
        (differs == 0).then(|| String::from_utf8(content.to_vec()).ok()).flatten()
    }

    fn mac(&self, purpose: &Purpose<'_>, content: &[u8]) -> Vec<u8> {
        let mut context = hmac::Context::with_key(&self.0);
        let tenant = purpose.tenant;
        let fixed = [purpose.call, tenant.organization(), tenant.environment().as_str()];
        for part in fixed.iter().chain(purpose.filter) {
            // With the length, no two lists of parts look the same.
            context.update(&(part.len() as u64).to_be_bytes());
            context.update(part.as_bytes());
        }
        context.update(content);
        context.sign().as_ref()[..MAC_BYTES].to_vec()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::webhook::Environment;

    #[test]
    fn opens_only_for_its_purpose_and_unchanged() {
        let tokens = Tokens::new(&[1; 32]);
        let tenant = Tenant::new("acme", Environment::Live).unwrap();
        let other = Tenant::new("acme", Environment::Test).unwrap();
        let purpose = |tenant, filter| Purpose { call: "list", tenant, filter };
        let token = tokens.seal(&purpose(&tenant, &["ab", ""]), "del_1");
        assert_eq!(tokens.open(&purpose(&tenant, &["ab", ""]), &token).as_deref(), Some("del_1"));
        assert_eq!(tokens.open(&purpose(&other, &["ab", ""]), &token), None);
        assert_eq!(tokens.open(&purpose(&tenant, &["a", "b"]), &token), None);
        assert_eq!(Tokens::new(&[2; 32]).open(&purpose(&tenant, &["ab", ""]), &token), None);
        for index in 0..token.len() {
            let mut changed = token.clone().into_bytes();
            changed[index] = if changed[index] == b'A' { b'B' } else { b'A' };
            let changed = String::from_utf8(changed).unwrap();
            assert_eq!(tokens.open(&purpose(&tenant, &["ab", ""]), &changed), None, "{index}");
        }
        assert_eq!(tokens.open(&purpose(&tenant, &[]), ""), None);
    }
}
