//! What goes on beside the calls and the deliveries, until the end.

use std::{path::PathBuf, time::Duration};

use tokio::task::JoinSet;

use crate::{
    config::{Config, read_master_keys},
    store::{Error, Store},
    vault::Vault,
};

/// Between looks at the file of the master keys.
const READ_MASTER_KEYS: Duration = Duration::from_secs(1);
/// Between two looks at the database's clock.
const KEEP_TIME: Duration = Duration::from_secs(2);
/// Before what other nodes write is followed again.
const FOLLOW_AGAIN: Duration = Duration::from_secs(1);
/// Between rounds of tidying up.
const TIDY: Duration = Duration::from_secs(10);
/// The backlog, if it cannot be counted, is tried again within this time.
const MAX_LOOK: Duration = Duration::from_secs(60);
/// Between two notes of which keys were used, whatever there is to tidy up.
const NOTE_KEYS: Duration = Duration::from_secs(10);

/// Starts all of it; none of it ends.
pub(super) fn start(config: &Config, store: &Store) -> JoinSet<()> {
    let mut background = JoinSet::new();
    // Feeds the live streams, and ends only by an error.
    background.spawn(repeat(
        store.clone(),
        FOLLOW_AGAIN,
        "the log of changes could not be read; trying again",
        |store: Store| async move { store.follow_changes().await },
    ));
    // Learns what others change; so does this.
    background.spawn(repeat(
        store.clone(),
        FOLLOW_AGAIN,
        "the revisions could not be read; until they can be, what is known is asked for again",
        |store: Store| async move { store.follow_revisions().await },
    ));
    // Forgets old changes and answers.
    background.spawn(repeat(store.clone(), TIDY, "tidying up failed; trying again", |store: Store| async move {
        store.purge().await
    }));
    background.spawn(repeat(
        store.clone(),
        NOTE_KEYS,
        "the last use of some keys is not written down",
        |store: Store| async move { store.write_used_keys().await },
    ));
    background.spawn(repeat(
        store.clone(),
        TIDY,
        "what deleted webhooks left could not be removed; trying again",
        |store: Store| async move { store.remove_deleted().await },
    ));
    background.spawn(remove_old(store.clone()));
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

/// Does something for ever, so long after it ended, through every failure of the database.
async fn repeat<W: Future<Output = Result<(), Error>>>(
    store: Store,
    pause: Duration,
    failed: &'static str,
    work: impl Fn(Store) -> W,
) {
    loop {
        if let Err(error) = work(store.clone()).await {
            tracing::warn!(%error, "{failed}");
        }
        tokio::time::sleep(pause).await;
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
