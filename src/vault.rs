//! Seals what must not lie readable in the database, under a master key that is not in it.
//!
//! AES-256-GCM by ring. Every value gets a data key and a nonce of its own: the data key comes by HKDF-SHA256 from the
//! master key and fresh bytes, so that no number of values comes near what random nonces under one key allow. What a
//! value is and whose it is goes in as associated data: a sealed value that is moved to another row, column or tenant
//! does not open.
//!
//! A master key is named by an id that is computed from it, and the id is stored beside each sealed value. Several
//! master keys may be known: the first seals, the others still open while one replaces another.

use std::{fmt, sync::Arc};

use base64::{Engine, engine::general_purpose::STANDARD};
use ring::{
    aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey},
    hkdf, hmac,
};
use zeroize::Zeroizing;

use crate::clock;

/// Length of a master key.
const KEY_BYTES: usize = 32;
/// What makes the data key of a value its own.
const SALT_BYTES: usize = 16;
/// First byte of every sealed value: how the rest is to be read.
const FORMAT: u8 = 1;
/// Salt and nonce stand between the format and the ciphertext.
const HEAD_BYTES: usize = 1 + SALT_BYTES + NONCE_LEN;
/// Bytes of a master key's id, which has two hexadecimal digits for each.
const ID_BYTES: usize = 8;

/// What a sealed value is for; one sealed for one purpose does not open for another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// The secret that signs.
    SigningSecret,
    /// The one before, for the hour in which both sign.
    PreviousSigningSecret,
    /// The answer to a named request, which may carry a secret.
    Answer,
}

/// A value that cannot be read without its master key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sealed {
    /// Id of the master key that opens it, to be stored beside it.
    pub master_key_id: String,
    /// Everything else.
    pub bytes: Vec<u8>,
}

/// The master keys. Cheap to clone; never shown, and wiped when the last clone is gone.
#[derive(Clone, PartialEq, Eq)]
pub struct Vault(Arc<[MasterKey]>);

#[derive(PartialEq, Eq)]
struct MasterKey {
    id: String,
    bytes: Zeroizing<[u8; KEY_BYTES]>,
}

/// Why a text does not hold master keys; it never repeats the text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ParseError {
    /// Nothing but blanks and comments.
    #[error("holds no master key")]
    Empty,
    /// One of them, counted from 1, is something else.
    #[error("master key {0} is not the base64 form of {KEY_BYTES} bytes")]
    Malformed(usize),
    /// The same one again.
    #[error("master key {0} is there twice")]
    Doubled(usize),
}

/// Why a value cannot be opened.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum OpenError {
    /// It was sealed under a master key that is not known.
    #[error("master key {0} is needed, and not known")]
    UnknownKey(String),
    /// It was changed, moved to another place, or sealed under another master key than the one named beside it.
    #[error("a sealed value does not open: it was changed or moved")]
    Damaged,
}

impl Purpose {
    /// The word for it in the associated data, with a version of its meaning.
    fn as_str(self) -> &'static str {
        match self {
            Self::SigningSecret => "signing-secret/1",
            Self::PreviousSigningSecret => "previous-signing-secret/1",
            Self::Answer => "answer/1",
        }
    }
}

impl Vault {
    /// Reads master keys in base64 with blanks, commas or line ends between them; a `#` begins a comment.
    pub fn parse(text: &str) -> Result<Self, ParseError> {
        let lines = text.lines().map(|line| line.split('#').next().unwrap_or_default());
        let words = lines.flat_map(|line| line.split(|char: char| char == ',' || char.is_whitespace()));
        let mut keys: Vec<MasterKey> = Vec::new();
        for (index, word) in words.filter(|word| !word.is_empty()).enumerate() {
            let key = MasterKey::parse(word).ok_or(ParseError::Malformed(index + 1))?;
            if keys.contains(&key) {
                return Err(ParseError::Doubled(index + 1));
            }
            keys.push(key);
        }
        if keys.is_empty() { Err(ParseError::Empty) } else { Ok(Self(keys.into())) }
    }

    /// A new master key as [`Vault::parse`] reads it.
    pub fn new_master_key() -> Zeroizing<String> {
        Zeroizing::new(STANDARD.encode(*Zeroizing::new(clock::random::<KEY_BYTES>())))
    }

    /// Id of the master key that seals.
    pub fn current(&self) -> &str {
        &self.0[0].id
    }

    /// Ids of all master keys, the one that seals first.
    pub fn ids(&self) -> impl Iterator<Item = &str> {
        self.0.iter().map(|key| key.id.as_str())
    }

    /// Seals `plain`. It opens only with the same purpose and the same `parts`, which say whose and which value it is.
    ///
    /// # Panics
    ///
    /// When `plain` has more than the 64 GiB that AES-GCM can take.
    pub fn seal(&self, purpose: Purpose, parts: &[&str], plain: &[u8]) -> Sealed {
        let master = &self.0[0];
        let (salt, nonce) = (clock::random::<SALT_BYTES>(), clock::random::<NONCE_LEN>());
        let mut bytes = Vec::with_capacity(HEAD_BYTES + plain.len() + AES_256_GCM.tag_len());
        bytes.push(FORMAT);
        bytes.extend_from_slice(&salt);
        bytes.extend_from_slice(&nonce);
        bytes.extend_from_slice(plain);
        let associated = associated(purpose, &master.id, parts);
        let nonce = Nonce::assume_unique_for_key(nonce);
        let sealed = master.data_key(&salt).seal_in_place_separate_tag(nonce, associated, &mut bytes[HEAD_BYTES..]);
        bytes.extend_from_slice(sealed.expect("no value is that long").as_ref());
        Sealed { master_key_id: master.id.clone(), bytes }
    }

    /// Opens what [`Vault::seal`] made with the same purpose and parts; the result is wiped on drop.
    pub fn open(
        &self,
        purpose: Purpose,
        parts: &[&str],
        master_key_id: &str,
        sealed: &[u8],
    ) -> Result<Zeroizing<Vec<u8>>, OpenError> {
        let master = self.0.iter().find(|key| key.id == master_key_id);
        let master = master.ok_or_else(|| OpenError::UnknownKey(master_key_id.to_owned()))?;
        let (head, ciphertext) = sealed.split_at_checked(HEAD_BYTES).ok_or(OpenError::Damaged)?;
        let (format, head) = head.split_at(1);
        let (salt, nonce) = head.split_at(SALT_BYTES);
        if format != [FORMAT] {
            return Err(OpenError::Damaged);
        }
        let damaged = |_| OpenError::Damaged;
        let nonce = Nonce::try_assume_unique_for_key(nonce).map_err(damaged)?;
        let mut plain = Zeroizing::new(ciphertext.to_vec());
        let associated = associated(purpose, master_key_id, parts);
        let length = master.data_key(salt).open_in_place(nonce, associated, &mut plain).map_err(damaged)?.len();
        plain.truncate(length);
        Ok(plain)
    }
}

impl MasterKey {
    fn parse(word: &str) -> Option<Self> {
        let decoded = Zeroizing::new(STANDARD.decode(word).ok()?);
        let bytes = Zeroizing::new(<[u8; KEY_BYTES]>::try_from(decoded.as_slice()).ok()?);
        let tag = hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, &*bytes), b"shortkit master key id");
        let digits = tag.as_ref()[..ID_BYTES].iter().map(|byte| format!("{byte:02x}"));
        Some(Self { id: format!("mk_{}", digits.collect::<String>()), bytes })
    }

    /// The key of the one value that has this salt.
    fn data_key(&self, salt: &[u8]) -> LessSafeKey {
        let master = hkdf::Prk::new_less_safe(hkdf::HKDF_SHA256, &*self.bytes);
        let info = [b"shortkit data key".as_slice(), salt];
        let key = master.expand(&info, &AES_256_GCM).expect("HKDF gives one key");
        LessSafeKey::new(UnboundKey::from(key))
    }
}

/// Purpose, key and parts, each with its length before it, so that no two lists of parts make the same bytes.
fn associated(purpose: Purpose, master_key_id: &str, parts: &[&str]) -> Aad<Vec<u8>> {
    let mut bytes = Vec::new();
    for part in [purpose.as_str(), master_key_id].iter().chain(parts) {
        bytes.extend_from_slice(&(part.len() as u64).to_be_bytes());
        bytes.extend_from_slice(part.as_bytes());
    }
    Aad::from(bytes)
}

impl fmt::Debug for Vault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.ids()).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAIN: &[u8] = b"whsec_canary";
    const PARTS: [&str; 3] = ["acme", "live", "whk_1"];

    fn vault(bytes: &[u8]) -> Vault {
        let keys: Vec<String> = bytes.iter().map(|byte| STANDARD.encode([*byte; KEY_BYTES])).collect();
        Vault::parse(&keys.join("\n")).unwrap()
    }

    fn open(vault: &Vault, purpose: Purpose, parts: &[&str], sealed: &Sealed) -> Result<Vec<u8>, OpenError> {
        vault.open(purpose, parts, &sealed.master_key_id, &sealed.bytes).map(|plain| plain.to_vec())
    }

    #[test]
    fn opens_only_where_it_was_sealed() {
        let vault = vault(&[1]);
        let sealed = vault.seal(Purpose::SigningSecret, &PARTS, PLAIN);
        assert_eq!(open(&vault, Purpose::SigningSecret, &PARTS, &sealed).unwrap(), PLAIN);
        assert!(!sealed.bytes.windows(PLAIN.len()).any(|window| window == PLAIN));
        let moved: [&[&str]; 6] = [
            &["other", "live", "whk_1"],
            &["acme", "test", "whk_1"],
            &["acme", "live", "whk_2"],
            &["acme", "live"],
            &["acme", "live", "whk_1", ""],
            &["acmel", "ive", "whk_1"],
        ];
        for parts in moved {
            assert_eq!(open(&vault, Purpose::SigningSecret, parts, &sealed), Err(OpenError::Damaged), "{parts:?}");
        }
        assert_eq!(open(&vault, Purpose::PreviousSigningSecret, &PARTS, &sealed), Err(OpenError::Damaged));
    }

    #[test]
    fn any_changed_bit_and_any_cut_is_noticed() {
        let vault = vault(&[1]);
        let sealed = vault.seal(Purpose::SigningSecret, &PARTS, PLAIN);
        for bit in 0..sealed.bytes.len() * 8 {
            let mut changed = sealed.clone();
            changed.bytes[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(open(&vault, Purpose::SigningSecret, &PARTS, &changed), Err(OpenError::Damaged), "bit {bit}");
        }
        for length in 0..sealed.bytes.len() {
            let cut = Sealed { bytes: sealed.bytes[..length].to_vec(), ..sealed.clone() };
            assert_eq!(open(&vault, Purpose::SigningSecret, &PARTS, &cut), Err(OpenError::Damaged), "{length}");
        }
    }

    #[test]
    fn one_value_sealed_twice_has_nothing_in_common() {
        let vault = vault(&[1]);
        let [one, two] = std::array::from_fn(|_| vault.seal(Purpose::SigningSecret, &PARTS, PLAIN).bytes);
        assert_ne!(one[1..=SALT_BYTES], two[1..=SALT_BYTES]);
        assert_ne!(one[1 + SALT_BYTES..HEAD_BYTES], two[1 + SALT_BYTES..HEAD_BYTES]);
        assert_ne!(one[HEAD_BYTES..], two[HEAD_BYTES..]);
    }

    #[test]
    fn the_first_key_seals_and_the_others_open() {
        let (old, both, new) = (vault(&[1]), vault(&[2, 1]), vault(&[2]));
        let before = old.seal(Purpose::SigningSecret, &PARTS, PLAIN);
        assert_eq!(before.master_key_id, old.current());
        assert_eq!(open(&both, Purpose::SigningSecret, &PARTS, &before).unwrap(), PLAIN);
        let after = both.seal(Purpose::SigningSecret, &PARTS, PLAIN);
        assert_eq!((after.master_key_id.as_str(), new.current()), (both.current(), both.current()));
        assert_eq!(open(&new, Purpose::SigningSecret, &PARTS, &after).unwrap(), PLAIN);
        let unknown = OpenError::UnknownKey(before.master_key_id.clone());
        assert_eq!(open(&new, Purpose::SigningSecret, &PARTS, &before), Err(unknown));
        let renamed = Sealed { master_key_id: after.master_key_id, ..before };
        assert_eq!(open(&both, Purpose::SigningSecret, &PARTS, &renamed), Err(OpenError::Damaged));
    }

    #[test]
    fn reads_what_openssl_prints_and_repeats_nothing_of_what_is_wrong() {
        let (one, two) = (STANDARD.encode([1; KEY_BYTES]), STANDARD.encode([2; KEY_BYTES]));
        let parsed = Vault::parse(&format!("# since May\n{two} # replaces:\n\n{one}\n")).unwrap();
        assert_eq!(parsed, vault(&[2, 1]));
        assert_eq!(Vault::parse(&format!("{two},{one}")).unwrap(), parsed);
        assert_eq!(Vault::parse(&Vault::new_master_key()).unwrap().ids().count(), 1);
        assert_eq!(Vault::parse(" # nothing\n"), Err(ParseError::Empty));
        assert_eq!(Vault::parse(&format!("{one} {}", &two[..40])), Err(ParseError::Malformed(2)));
        assert_eq!(Vault::parse(&format!("{one} {one}")), Err(ParseError::Doubled(2)));
        let shown = format!("{parsed:?}");
        assert!(
            shown.contains(parsed.current()) && !shown.contains(&one[..8]) && !shown.contains(&two[..8]),
            "{shown}"
        );
    }
}
