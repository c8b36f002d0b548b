//! API keys: shown once, stored as a hash.

use std::{
    collections::HashMap,
    fmt,
    ops::Deref,
    sync::{Mutex, PoisonError},
};

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use ring::digest::{SHA256, digest};
use sea_orm::{
    ActiveModelTrait, ColumnTrait, ConnectionTrait, EntityTrait, QueryFilter, QueryOrder, Set, sea_query::Expr,
};
use zeroize::Zeroizing;

use super::{
    Error, Store,
    audit::{Actor, AuditAction, Record},
    entity::api_key::{ActiveModel, Column, Entity, Model},
    revisions::Changed,
    rows::{self, MAX_ROWS, Rows},
};
use crate::{
    clock,
    webhook::{Environment, Tenant, Timestamp},
};

/// The checksum at the end of a key, which misses one mistake in four thousand millions …
const CHECKSUM_BYTES: usize = 4;
/// … as base64.
const CHECKSUM_CHARS: usize = 6;
/// No key is longer.
const MAX_KEY_BYTES: usize = 64;
/// How much of a key is kept to recognise it by.
const PREFIX_CHARS: usize = 12;

const USES: &[rows::Column] = &[rows::text("id"), rows::int("at")];
/// A time never goes back: another node may have seen the key later.
const NOTE_USES: &str = "UPDATE api_keys SET last_used_at_ms = rows.at FROM {rows} WHERE api_keys.id = rows.id \
    AND (api_keys.last_used_at_ms IS NULL OR api_keys.last_used_at_ms < rows.at)";

/// What a key may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KeyKind {
    /// `sk_`: everything in its organisation and environment.
    Secret,
    /// `pk_`: nothing here.
    Publishable,
    /// `svc_`: every call, on behalf of any organisation.
    Service,
}

/// The key to make.
#[derive(Debug, Clone)]
pub struct NewKey {
    /// Whose key it is; none exactly for a service key.
    pub organization: Option<String>,
    /// Its environment.
    pub environment: Environment,
    /// What it may do.
    pub kind: KeyKind,
    /// From when on it is refused.
    pub expires_at: Option<Timestamp>,
}

/// The only sight of a key.
pub struct CreatedKey {
    /// The key itself.
    pub key: ApiKey,
    /// What is stored of it.
    pub info: KeyInfo,
}

/// The text of a key. Wiped on drop, and never shown by `Debug`.
pub struct ApiKey(Zeroizing<String>);

/// What is known of a key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyInfo {
    /// `key_` and a time-ordered unique part.
    pub id: String,
    /// Its first characters.
    pub prefix: String,
    /// What it may do.
    pub kind: KeyKind,
    /// Whose it is.
    pub organization: Option<String>,
    /// Its environment.
    pub environment: Environment,
    /// When it was made.
    pub created_at: Timestamp,
    /// When it was last accepted, to about ten seconds.
    pub last_used_at: Option<Timestamp>,
    /// From when on it is refused.
    pub expires_at: Option<Timestamp>,
    /// When it was revoked.
    pub revoked_at: Option<Timestamp>,
}

/// SHA-256 of a key: what is known of a key is found by it, and the key cannot be found from it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct KeyHash([u8; 32]);

/// Uses of keys that are not yet written down: a write per request would be too dear.
#[derive(Default)]
pub(super) struct UsedKeys(Mutex<HashMap<String, Timestamp>>);

impl KeyKind {
    /// The word for it on the command line and in the database.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Secret => "secret",
            Self::Publishable => "publishable",
            Self::Service => "service",
        }
    }

    /// The kind that a word names.
    pub fn parse(word: &str) -> Option<Self> {
        [Self::Secret, Self::Publishable, Self::Service].into_iter().find(|kind| kind.as_str() == word)
    }

    fn prefix(self) -> &'static str {
        match self {
            Self::Secret => "sk",
            Self::Publishable => "pk",
            Self::Service => "svc",
        }
    }
}

/// For the one answer that shows it, and for its hash.
impl Deref for ApiKey {
    type Target = str;

    fn deref(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for ApiKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ApiKey(…)")
    }
}

impl KeyHash {
    /// The hash of a key in its full text. Keys are 256 random bits: a plain hash cannot be turned back, and no salt is
    /// needed.
    pub fn of(key: &str) -> Self {
        let mut hash = [0; 32];
        hash.copy_from_slice(digest(&SHA256, key.as_bytes()).as_ref());
        Self(hash)
    }

    /// The hash of what may be a key; none when its checksum is wrong, so that what was made up, cut or mistyped costs no
    /// look-up.
    pub fn checked(key: &str) -> Option<Self> {
        let (text, sum) = key.split_at_checked(key.len().checked_sub(CHECKSUM_CHARS)?)?;
        (checksum(text) == sum).then(|| Self::of(key))
    }
}

/// As it is stored: lower-case hex.
impl fmt::Display for KeyHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// A key: what it is for, 256 random bits, and a checksum, by which also scanners of secrets know one when they see it.
fn key_text(kind: KeyKind, environment: Environment, random: &[u8; 32]) -> Zeroizing<String> {
    // As long as it gets, lest a piece stay behind where it grew.
    let mut text = Zeroizing::new(String::with_capacity(MAX_KEY_BYTES));
    text.push_str(kind.prefix());
    text.push('_');
    text.push_str(environment.as_str());
    text.push('_');
    URL_SAFE_NO_PAD.encode_string(random, &mut text);
    let sum = checksum(&text);
    text.push_str(&sum);
    text
}

/// The first bytes of SHA-256.
fn checksum(text: &str) -> String {
    URL_SAFE_NO_PAD.encode(&digest(&SHA256, text.as_bytes()).as_ref()[..CHECKSUM_BYTES])
}

impl Store {
    /// Makes a key of 256 random bits. Only the command line does.
    pub async fn create_key(&self, new: NewKey) -> Result<CreatedKey, Error> {
        let key = ApiKey(key_text(new.kind, new.environment, &Zeroizing::new(clock::random())));
        let row = ActiveModel {
            id: Set(clock::new_id("key")),
            hash: Set(KeyHash::of(&key).to_string()),
            prefix: Set(key.chars().take(PREFIX_CHARS).collect()),
            kind: Set(new.kind.as_str().to_owned()),
            organization: Set(new.organization),
            environment: Set(new.environment.as_str().to_owned()),
            created_at_ms: Set(clock::now().millis()),
            last_used_at_ms: Set(None),
            expires_at_ms: Set(new.expires_at.map(Timestamp::millis)),
            revoked_at_ms: Set(None),
        };
        let transaction = self.write().await?;
        let row = row.insert(&transaction).await?;
        record(AuditAction::KeyCreated, &row).write(&transaction, &Actor::command_line()).await?;
        self.commit_change(transaction, Changed::Keys).await?;
        Ok(CreatedKey { key, info: info(row)? })
    }

    /// Every key, the newest first.
    pub async fn list_keys(&self) -> Result<Vec<KeyInfo>, Error> {
        Entity::find().order_by_desc(Column::Id).all(&self.0.read).await?.into_iter().map(info).collect()
    }

    /// Ends a key for good; false when there is none of that id. A revoked key keeps the time of its first revocation.
    /// Only the command line does.
    pub async fn revoke_key(&self, id: &str) -> Result<bool, Error> {
        let revoke = Entity::update_many()
            .col_expr(Column::RevokedAtMs, Expr::value(clock::now().millis()))
            .filter(Column::Id.eq(id))
            .filter(Column::RevokedAtMs.is_null());
        let transaction = self.write().await?;
        let revoked = revoke.exec(&transaction).await?.rows_affected > 0;
        let Some(row) = Entity::find_by_id(id).one(&transaction).await? else { return Ok(false) };
        if !revoked {
            return Ok(true);
        }
        record(AuditAction::KeyRevoked, &row).write(&transaction, &Actor::command_line()).await?;
        self.commit_change(transaction, Changed::Keys).await?;
        Ok(true)
    }

    /// Remembers that a key was accepted, for the next [`Store::write_used_keys`].
    pub fn key_used(&self, id: &str) {
        let (now, mut used) = (clock::now(), self.0.used_keys.0.lock().unwrap_or_else(PoisonError::into_inner));
        match used.get_mut(id) {
            Some(at) => *at = now,
            None => drop(used.insert(id.to_owned(), now)),
        }
    }

    /// Writes down which keys were used since the last time, [`MAX_ROWS`] in a statement.
    pub async fn write_used_keys(&self) -> Result<(), Error> {
        let used = std::mem::take(&mut *self.0.used_keys.0.lock().unwrap_or_else(PoisonError::into_inner));
        let mut used: Vec<(String, Timestamp)> = used.into_iter().collect();
        // In one order on all nodes: two that wait for each other's rows would wait for ever.
        used.sort_unstable();
        let mut rows = Rows::new(self.0.write.get_database_backend(), USES);
        used.iter().for_each(|(id, at)| rows.push([id.into(), at.millis().into()]));
        for statement in rows.pieces(MAX_ROWS).flat_map(|piece| piece.statements(NOTE_USES)) {
            self.heard(async { Ok(self.0.write.execute_raw(statement).await?) }).await?;
        }
        Ok(())
    }
}

fn record(action: AuditAction, row: &Model) -> Record<'_> {
    Record {
        action,
        organization: row.organization.as_deref(),
        environment: Some(&row.environment),
        resource_id: &row.id,
        webhook_id: None,
        changed_fields: &[],
    }
}

/// The tenant that two columns name.
pub(super) fn tenant(organization: &str, environment: &str) -> Result<Tenant, Error> {
    let environment = Environment::parse(environment).ok_or(Error::Corrupt("environment"))?;
    Tenant::new(organization, environment).ok_or(Error::Corrupt("organisation"))
}

pub(super) fn info(row: Model) -> Result<KeyInfo, Error> {
    Ok(KeyInfo {
        kind: KeyKind::parse(&row.kind).ok_or(Error::Corrupt("kind of key"))?,
        environment: Environment::parse(&row.environment).ok_or(Error::Corrupt("environment"))?,
        id: row.id,
        prefix: row.prefix,
        organization: row.organization,
        created_at: Timestamp::from_millis(row.created_at_ms),
        last_used_at: row.last_used_at_ms.map(Timestamp::from_millis),
        expires_at: row.expires_at_ms.map(Timestamp::from_millis),
        revoked_at: row.revoked_at_ms.map(Timestamp::from_millis),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_with_a_mistake_is_known_without_a_look() {
        let key = key_text(KeyKind::Secret, Environment::Test, &[7; 32]);
        assert!(key.starts_with("sk_test_") && key.len() == "sk_test_".len() + 43 + CHECKSUM_CHARS);
        assert!(key_text(KeyKind::Service, Environment::Test, &[7; 32]).len() <= MAX_KEY_BYTES);
        assert!(KeyHash::checked(&key) == Some(KeyHash::of(&key)));
        for index in 0..key.len() {
            let other = if &key[index..=index] == "A" { "B" } else { "A" };
            let changed = format!("{}{other}{}", &key[..index], &key[index + 1..]);
            assert!(KeyHash::checked(&changed).is_none(), "{changed}");
            assert!(KeyHash::checked(&key[..index]).is_none());
        }
        assert!(KeyHash::checked("größer").is_none() && KeyHash::checked("").is_none());
    }
}
