//! Both signature schemes: `X-Shortform-Signature`, and that of Standard Webhooks
//! (<https://www.standardwebhooks.com>).

use base64::{Engine, engine::general_purpose::STANDARD};
use ring::hmac;

use super::{Secret, Timestamp};

/// A receiver refuses a timestamp further than this from its own clock, as Standard Webhooks recommends.
pub const TOLERANCE_SECS: i64 = 5 * 60;

/// The two HMAC keys of a secret, prepared once.
#[derive(Clone)]
pub struct SigningKey {
    /// Keyed with the whole text of the secret.
    shortform: hmac::Key,
    /// Keyed with the bytes that the secret encodes.
    standard: hmac::Key,
}

/// Why a signature does not hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum VerifyError {
    /// A header that the check needs is missing or not readable.
    #[error("a header of the signature is missing or malformed")]
    Malformed,
    /// The timestamp is too far from now.
    #[error("the timestamp is more than {TOLERANCE_SECS} seconds from now")]
    Stale,
    /// No signature matches.
    #[error("no signature matches the body and this secret")]
    Mismatch,
}

impl SigningKey {
    /// Prepares the keys of `secret`.
    pub fn new(secret: &Secret) -> Self {
        Self {
            shortform: hmac::Key::new(hmac::HMAC_SHA256, secret.expose().as_bytes()),
            standard: hmac::Key::new(hmac::HMAC_SHA256, &secret.decoded()),
        }
    }

    fn shortform(&self, body: &[u8], out: &mut String) {
        const DIGITS: &[u8; 16] = b"0123456789abcdef";
        out.push_str("sha256=");
        for byte in hmac::sign(&self.shortform, body).as_ref() {
            out.extend([byte >> 4, byte & 15].map(|digit| char::from(DIGITS[usize::from(digit)])));
        }
    }

    /// `head` is the id and the time, each with a point after it.
    fn standard(&self, head: &str, body: &[u8], out: &mut String) {
        let mut context = hmac::Context::with_key(&self.standard);
        context.update(head.as_bytes());
        context.update(body);
        out.push_str("v1,");
        STANDARD.encode_string(context.sign(), out);
    }
}

/// The values of `X-Shortform-Signature` and `webhook-signature`, one part for each key, the newest first.
pub fn signature_headers(keys: &[SigningKey], delivery_id: &str, at: Timestamp, body: &[u8]) -> (String, String) {
    let head = format!("{delivery_id}.{}.", at.secs());
    let (mut shortform, mut standard) =
        (String::with_capacity(keys.len() * 72), String::with_capacity(keys.len() * 48));
    for (index, key) in keys.iter().enumerate() {
        if index > 0 {
            shortform.push(',');
            standard.push(' ');
        }
        key.shortform(body, &mut shortform);
        key.standard(&head, body, &mut standard);
    }
    (shortform, standard)
}

/// Checks the Standard Webhooks headers of a request against `key`, as a receiver does.
pub fn verify(
    key: &SigningKey,
    id: &str,
    timestamp: &str,
    signatures: &str,
    body: &[u8],
    now: Timestamp,
) -> Result<(), VerifyError> {
    let at: i64 = timestamp.parse().map_err(|_| VerifyError::Malformed)?;
    if id.is_empty() || signatures.is_empty() {
        return Err(VerifyError::Malformed);
    }
    if at.abs_diff(now.secs()) > TOLERANCE_SECS.unsigned_abs() {
        return Err(VerifyError::Stale);
    }
    let message = [format!("{id}.{at}.").as_bytes(), body].concat();
    let matches = |signature: &str| {
        let tag = signature.strip_prefix("v1,").and_then(|encoded| STANDARD.decode(encoded).ok());
        // `hmac::verify` compares in constant time and refuses a tag of another length, an empty one too.
        tag.is_some_and(|tag| hmac::verify(&key.standard, &message, &tag).is_ok())
    };
    if signatures.split(' ').any(matches) { Ok(()) } else { Err(VerifyError::Mismatch) }
}

/// Checks the value of `X-Shortform-Signature` against `key`, as a receiver does.
pub fn verify_shortform(key: &SigningKey, signatures: &str, body: &[u8]) -> Result<(), VerifyError> {
    if signatures.is_empty() {
        return Err(VerifyError::Malformed);
    }
    let matches = |signature: &str| {
        let tag = signature.trim().strip_prefix("sha256=").and_then(unhex);
        tag.is_some_and(|tag| hmac::verify(&key.shortform, body, &tag).is_ok())
    };
    if signatures.split(',').any(matches) { Ok(()) } else { Err(VerifyError::Mismatch) }
}

fn unhex(text: &str) -> Option<Vec<u8>> {
    let digit = |byte: u8| char::from(byte).to_digit(16).and_then(|digit| u8::try_from(digit).ok());
    let pairs = text.as_bytes().chunks(2);
    pairs.map(|pair| Some(digit(*pair.first()?)? * 16 + digit(*pair.get(1)?)?)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Published by the Standard Webhooks project and by Svix for their own libraries.
    const VECTORS: [(&str, &str, i64, &str, &str); 2] = [
        (
            "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw",
            "msg_p5jXN8AQM9LWM0D4loKWxJek",
            1_614_265_330,
            r#"{"test": 2432232314}"#,
            "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=",
        ),
        (
            "whsec_C2FVsBQIhrscChlQIMV+b5sSYspob7oD",
            "msg_27UH4WbU6Z5A5EzD8u03UvzRbpk",
            1_649_367_553,
            r#"{"email":"test@example.com","username":"test_user"}"#,
            "v1,tZ1I4/hDygAJgO5TYxiSd6Sd0kDW6hPenDe+bTa3Kkw=",
        ),
    ];

    fn key(secret: &str) -> SigningKey {
        SigningKey::new(&Secret::parse(secret).unwrap())
    }

    #[test]
    fn agrees_with_the_published_vectors() {
        for (secret, id, secs, body, signature) in VECTORS {
            let (key, at) = (key(secret), Timestamp::from_millis(secs * 1000));
            let (_, standard) = signature_headers(std::slice::from_ref(&key), id, at, body.as_bytes());
            assert_eq!(standard, signature);
            assert_eq!(verify(&key, id, &secs.to_string(), signature, body.as_bytes(), at), Ok(()));
        }
    }

    #[test]
    fn shortform_is_keyed_with_the_whole_text() {
        // printf '{}' | openssl dgst -sha256 -hmac whsec_BwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwc=
        let key = SigningKey::new(&Secret::from_random(&[7; 32]));
        let (shortform, _) = signature_headers(&[key.clone(), key.clone()], "del_1", Timestamp::from_millis(0), b"{}");
        let (first, second) = shortform.split_once(',').unwrap();
        assert_eq!(first, second);
        assert_eq!(first, SHORTFORM);
        assert_eq!(verify_shortform(&key, &format!("sha256=00,{first}"), b"{}"), Ok(()));
        for forged in ["sha256=", "sha256=0", "sha256=zz", &first[7..], &first[..first.len() - 2]] {
            assert_eq!(verify_shortform(&key, forged, b"{}"), Err(VerifyError::Mismatch), "{forged}");
        }
        assert_eq!(verify_shortform(&key, "", b"{}"), Err(VerifyError::Malformed));
    }
    const SHORTFORM: &str = "sha256=6a966e9fbe372d844479178763f2318c6bc0a7b3fe5caa5265ff1b9c9eb552c6";

    #[test]
    fn refuses_what_was_not_signed() {
        let (secret, id, secs, body, signature) = VECTORS[0];
        let (key, at, text) = (key(secret), Timestamp::from_millis(secs * 1000), secs.to_string());
        let check = |id: &str, stamp: &str, signature: &str, body: &[u8], now| {
            verify(&key, id, stamp, signature, body, now).unwrap_err()
        };
        assert_eq!(check(id, &text, signature, b"{}", at), VerifyError::Mismatch);
        assert_eq!(check("other", &text, signature, body.as_bytes(), at), VerifyError::Mismatch);
        for forged in ["v1,", "v1", "v2,AAAA", "v1,AAAA v1,"] {
            assert_eq!(check(id, &text, forged, body.as_bytes(), at), VerifyError::Mismatch);
        }
        assert_eq!(check(id, "now", signature, body.as_bytes(), at), VerifyError::Malformed);
        let late = Timestamp::from_millis((secs + TOLERANCE_SECS + 1) * 1000);
        assert_eq!(check(id, &text, signature, body.as_bytes(), late), VerifyError::Stale);
    }
}
