//! Keys that callers use, kept in memory as long as [`super::revisions`] lets them be trusted.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Instant,
};

use futures_util::{
    FutureExt,
    future::{BoxFuture, Shared},
};
use sea_orm::{ColumnTrait, DatabaseConnection, EntityTrait, QueryFilter};

use super::{
    Error, Store,
    entity::api_key::{Column, Entity},
    keys::{KeyHash, KeyInfo, info},
};
use crate::clock;

/// At most this many keys are remembered; beyond, all are forgotten and learned anew.
const MAX_KEYS: usize = 10_000;

/// What the database says of a key. Many may wait for one look-up: a node with a thousand streams of one key, told that
/// keys have changed, asks once.
type Answer = Shared<BoxFuture<'static, Result<Option<Arc<KeyInfo>>, Error>>>;

/// By the hash of the key: a key itself is not kept.
#[derive(Default)]
pub(super) struct KnownKeys(Mutex<HashMap<KeyHash, (Instant, Answer)>>);

impl KnownKeys {
    /// Forgets everything, because a key has changed.
    pub(super) fn forget(&self) {
        self.lock().clear();
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<KeyHash, (Instant, Answer)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Store {
    /// What is known of a key; none when there is no such key.
    pub async fn find_key(&self, hash: KeyHash) -> Result<Option<Arc<KeyInfo>>, Error> {
        self.ask_for_key(hash).await
    }

    /// The answer that is known or on its way, or a new question. It is put in its place before it is asked, so that what
    /// is forgotten while it is on its way stays forgotten.
    fn ask_for_key(&self, hash: KeyHash) -> Answer {
        let mut known = self.0.known_keys.lock();
        if let Some((asked_at, answer)) = known.get(&hash)
            && self.0.revisions.hold(*asked_at)
        {
            return answer.clone();
        }
        if known.len() >= MAX_KEYS {
            known.clear();
        }
        // A task of its own: callers who leave in the middle must not leave a connection with a question half asked, nor
        // what should be forgotten.
        let asked_at = clock::stopwatch();
        let store = self.clone();
        let asking = tokio::spawn(async move {
            let answered = store.looked_up(read_key(&store.0.read, hash)).await;
            // Only keys that exist are remembered: those that callers make up are without number.
            if !matches!(answered, Ok(Some(_))) {
                let mut known = store.0.known_keys.lock();
                if known.get(&hash).is_some_and(|(since, _)| *since == asked_at) {
                    known.remove(&hash);
                }
            }
            answered
        });
        let answer = asking.map(|ended| ended.unwrap_or(Err(Error::Closed))).boxed().shared();
        known.insert(hash, (asked_at, answer.clone()));
        answer
    }
}

async fn read_key(database: &DatabaseConnection, hash: KeyHash) -> Result<Option<Arc<KeyInfo>>, Error> {
    let row = Entity::find().filter(Column::Hash.eq(hash.to_string())).one(database).await?;
    Ok(row.map(info).transpose()?.map(Arc::new))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        store::{KeyKind, NewKey},
        webhook::Environment,
    };

    #[tokio::test]
    async fn remembers_keys_that_exist_and_no_others() {
        let directory = tempfile::tempdir().unwrap();
        let url = format!("sqlite://{}?mode=rwc", directory.path().join("test.db").display());
        let store = Store::connect(&url).await.unwrap();
        // A failure is not remembered either.
        assert!(store.find_key(KeyHash::of("sk_test_x")).await.is_err());
        store.migrate().await.unwrap();
        for number in 0..100 {
            assert_eq!(store.find_key(KeyHash::of(&format!("sk_test_{number}"))).await.unwrap(), None);
        }
        assert!(store.0.known_keys.lock().is_empty());
        let new =
            NewKey { organization: None, environment: Environment::Test, kind: KeyKind::Service, expires_at: None };
        let hash = KeyHash::of(&store.create_key(new).await.unwrap().key);
        let found = store.find_key(hash).await.unwrap().unwrap();
        assert!(Arc::ptr_eq(&found, &store.find_key(hash).await.unwrap().unwrap()));
        store.revoke_key(&found.id).await.unwrap();
        assert!(store.0.known_keys.lock().is_empty(), "a change forgets them");
    }
}
