//! What goes on beside the calls and the deliveries, until the end.

use std::{path::PathBuf, time::Duration};

use tokio::task::JoinSet;

use crate::{
    config::{Config, read_master_keys},
    store::Store,
    vault::Vault,
};

/// Between looks at the file of the master keys.
const READ_MASTER_KEYS: Duration = Duration::from_secs(1);
/// Between two looks at the database's clock.
const KEEP_TIME: Duration = Duration::from_secs(2);
/// Between rounds of tidying up.
const TIDY: Duration = Duration::from_secs(10);
/// The backlog, if it cannot be counted, is tried again within this time.
const MAX_LOOK: Duration = Duration::from_secs(60);
/// Between two notes of which keys were used, whatever there is to tidy up.
const NOTE_KEYS: Duration = Duration::from_secs(10);

/// Starts all of it; none of it ends.
pub(super) fn start(config: &Config, store: &Store) -> JoinSet<()> {
    let mut background = JoinSet::new();
    background.spawn(follow(store.clone()));
    background.spawn(learn(store.clone()));
    background.spawn(tidy(store.clone()));
    background.spawn(note_keys(store.clone()));
    background.spawn(remove_old(store.clone()));
    background.spawn(remove_deleted(store.clone()));
    background.spawn(keep_time(store.clone()));
    background.spawn(look(store.clone()));
    if let Some(tls) = config.tls.clone() {
        background.spawn(tls.follow());
    }
    if let (Some(vault), Some(path)) = (config.vault.clone(), config.master_key_file.clone()) {
        background.spawn(follow_master_keys(store.clone(), vault, path));
    }
    background
}

/// Feeds the live streams, through every failure of the database.
async fn follow(store: Store) {
    loop {
        if let Err(error) = store.follow_changes().await {
            tracing::warn!(%error, "the log of changes could not be read; trying again");
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
    }
}

/// Learns what others change, through every failure of the database.
async fn learn(store: Store) {
    loop {
        if let Err(error) = store.follow_revisions().await {
            tracing::warn!(%error, "the revisions could not be read; until they can be, what is known is asked for again");
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
    }
}

/// Takes the master keys anew when their file has changed, so that one can be replaced without a restart. Keys that
/// cannot be taken, because one in use is missing or the file cannot be read, leave those of before in place.
async fn follow_master_keys(store: Store, mut vault: Vault, path: PathBuf) {
    let mut last_fault = String::new();
    loop {
        tokio::time::sleep(READ_MASTER_KEYS).await;
        let taken = match read_master_keys(&path) {
            Ok(read) if read == vault => Ok(()),
            Ok(read) => store.unlock(read.clone()).await.map_err(|error| error.to_string()).map(|_| {
                tracing::info!(master_keys = ?read, "the master keys have changed");
                vault = read;
            }),
            Err(fault) => Err(fault),
        };
        let fault = taken.err().unwrap_or_default();
        if !fault.is_empty() && fault != last_fault {
            tracing::error!(fault, "the changed master keys are not used");
        }
        last_fault = fault;
    }
}

/// Goes by the database's clock. While the database is away, time goes on from where it stood.
async fn keep_time(store: Store) {
    loop {
        tokio::time::sleep(KEEP_TIME).await;
        if let Err(error) = store.follow_clock().await {
            tracing::debug!(%error, "the database's clock could not be read; trying again");
        }
    }
}

/// Forgets old changes and answers.
async fn tidy(store: Store) {
    loop {
        if let Err(error) = store.purge().await {
            tracing::warn!(%error, "tidying up failed; trying again");
        }
        tokio::time::sleep(TIDY).await;
    }
}

/// Writes down which keys were used.
async fn note_keys(store: Store) {
    loop {
        tokio::time::sleep(NOTE_KEYS).await;
        if let Err(error) = store.write_used_keys().await {
            tracing::warn!(%error, "the last use of some keys is not written down");
        }
    }
}

/// Removes what is older than it is kept.
async fn remove_old(store: Store) {
    loop {
        let wait = store.remove_old().await.unwrap_or_else(|error| {
            tracing::warn!(%error, "what is old could not be removed; trying again");
            TIDY
        });
        tokio::time::sleep(wait).await;
    }
}

/// Removes what deleted webhooks left.
async fn remove_deleted(store: Store) {
    loop {
        if let Err(error) = store.remove_deleted().await {
            tracing::warn!(%error, "what deleted webhooks left could not be removed; trying again");
        }
        tokio::time::sleep(TIDY).await;
    }
}

/// Keeps the counts of the backlog up to date.
async fn look(store: Store) {
    let mut wait = Duration::from_secs(1);
    loop {
        tokio::time::sleep(wait).await;
        match store.look_at_backlog().await {
            Ok(next) => wait = next,
            Err(error) => {
                tracing::warn!(%error, "the backlog could not be counted; trying again");
                // If it takes too long, it is not to be what keeps the database busy.
                wait = (2 * wait).min(MAX_LOOK);
            }
        }
    }
}
