//! Signing secrets in the database: always sealed, opened where an attempt is signed, sealed again when the master key
//! is replaced.
//!
//! Both secrets of a webhook are under the same master key, named in its row. Each is bound to its webhook, to the
//! tenant, and to whether it is the current or the previous one.

use std::sync::PoisonError;

use base64::{Engine, engine::general_purpose::STANDARD};
use sea_orm::{
    ColumnTrait, ConnectionTrait, DatabaseTransaction, EntityTrait, PaginatorTrait, QueryFilter, QueryOrder,
    QuerySelect,
};
use zeroize::Zeroizing;

use super::{
    Error, Store,
    audit::{Actor, AuditAction, Record},
    entity::webhook,
    sql::Sql,
};
use crate::{
    clock,
    vault::{OpenError, Purpose, Vault},
    webhook::Secret,
};

/// One step seals the secrets of at most this many webhooks again, so that no other write waits long.
const MAX_STEP: u64 = 100;

/// How far the secrets are from all being under the current master key.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Resealed {
    /// Webhooks whose secrets were under another one at the beginning.
    pub total: u64,
    /// Those that are under the current one by now.
    pub done: u64,
    /// Ids of those that do not open, and stay as they are.
    pub damaged: Vec<String>,
}

/// What the columns of a row hold.
pub(super) struct SealedSecrets {
    pub(super) secret: String,
    pub(super) previous: Option<String>,
    pub(super) master_key_id: String,
}

/// Both secrets of a webhook, in the clear, with whose they are.
pub(super) struct OpenSecrets<'a> {
    /// Organisation, environment and id of the webhook.
    pub(super) whose: [&'a str; 3],
    pub(super) secret: Zeroizing<Vec<u8>>,
    pub(super) previous: Option<Zeroizing<Vec<u8>>>,
}

impl OpenSecrets<'_> {
    /// As they may be stored.
    pub(super) fn seal(&self, vault: &Vault) -> SealedSecrets {
        let seal = |purpose, plain: &[u8]| vault.seal(purpose, &self.whose, plain);
        let sealed = seal(Purpose::SigningSecret, &self.secret);
        let previous = self.previous.as_ref().map(|plain| seal(Purpose::PreviousSigningSecret, plain));
        SealedSecrets {
            secret: STANDARD.encode(sealed.bytes),
            previous: previous.map(|previous| STANDARD.encode(previous.bytes)),
            master_key_id: sealed.master_key_id,
        }
    }
}

/// Opens the secrets of a row.
pub(super) fn open<'a>(vault: &Vault, row: &'a webhook::Model) -> Result<OpenSecrets<'a>, Error> {
    let whose = [row.organization.as_str(), row.environment.as_str(), row.id.as_str()];
    let master_key_id = row.master_key_id.as_deref().ok_or(Error::Corrupt("signing secret, which is not sealed"))?;
    let open = |purpose, text: &str| {
        let bytes = STANDARD.decode(text).map_err(|_| OpenError::Damaged)?;
        vault.open(purpose, &whose, master_key_id, &bytes)
    };
    let previous = row.previous_secret.as_deref();
    Ok(OpenSecrets {
        whose,
        secret: open(Purpose::SigningSecret, &row.secret)?,
        previous: previous.map(|text| open(Purpose::PreviousSigningSecret, text)).transpose()?,
    })
}

/// A secret as it signs.
pub(super) fn secret(plain: &[u8]) -> Result<Secret, Error> {
    std::str::from_utf8(plain).ok().and_then(Secret::parse).ok_or(Error::Corrupt("signing secret"))
}

impl Store {
    /// Takes the master keys, at the start and whenever they have changed. Refuses them when secrets are sealed under one
    /// that is not among them. Secrets from before there was a master key are sealed; returns how many webhooks had such.
    pub async fn unlock(&self, vault: Vault) -> Result<u64, Error> {
        let mut missing = self.master_keys_in_use().await?;
        missing.retain(|id| !vault.ids().any(|known| known == id));
        if !missing.is_empty() {
            let given = vault.ids().collect::<Vec<_>>().join(", ");
            return Err(Error::MissingMasterKey { missing: missing.join(", "), given });
        }
        *self.0.vault.write().unwrap_or_else(PoisonError::into_inner) = Some(vault.clone());
        let mut plain = Resealed::default();
        self.reseal(&vault, None, &mut plain, &mut |_| ()).await?;
        if plain.done > 0 {
            self.wipe_free_pages().await;
        }
        Ok(plain.done)
    }

    /// Seals every secret again that is not under the current master key, in small steps, while others read and write.
    /// May be ended at any time and begun again. Only the command line does.
    pub async fn reseal_secrets(&self, mut progress: impl FnMut(&Resealed)) -> Result<Resealed, Error> {
        let vault = self.vault()?;
        let stale = webhook::Entity::find().filter(webhook::Column::MasterKeyId.ne(vault.current()));
        let mut resealed = Resealed { total: stale.count(&self.0.read).await?, ..Resealed::default() };
        for id in self.master_keys_in_use().await? {
            if id != vault.current() {
                self.reseal(&vault, Some(&id), &mut resealed, &mut progress).await?;
            }
        }
        Ok(resealed)
    }

    /// The master keys, to seal and to open with.
    pub(super) fn vault(&self) -> Result<Vault, Error> {
        self.0.vault.read().unwrap_or_else(PoisonError::into_inner).clone().ok_or(Error::Locked)
    }

    /// Ids of the master keys that secrets are sealed under: one look into the index for each.
    async fn master_keys_in_use(&self) -> Result<Vec<String>, Error> {
        let mut ids: Vec<String> = Vec::new();
        loop {
            let mut next = Sql::new("SELECT min(master_key_id) FROM webhooks WHERE master_key_id > ");
            next.value(ids.last().map_or("", String::as_str));
            let row = self.0.read.query_one_raw(next.build(self.0.read.get_database_backend())).await?;
            match row.map(|row| row.try_get_by_index::<Option<String>>(0)).transpose()?.flatten() {
                Some(id) => ids.push(id),
                None => return Ok(ids),
            }
        }
    }

    /// Seals what `stale` seals under the current master key; none stands for plain text.
    async fn reseal(
        &self,
        vault: &Vault,
        stale: Option<&str>,
        resealed: &mut Resealed,
        progress: &mut impl FnMut(&Resealed),
    ) -> Result<(), Error> {
        let mut after = String::new();
        loop {
            let transaction = self.write().await?;
            let mut find = webhook::Entity::find()
                .filter(match stale {
                    Some(id) => webhook::Column::MasterKeyId.eq(id),
                    None => webhook::Column::MasterKeyId.is_null(),
                })
                .filter(webhook::Column::Id.gt(after))
                .order_by_asc(webhook::Column::Id)
                .limit(MAX_STEP);
            // SQLite has one writer and no row locks.
            if !self.sqlite() {
                find = find.lock_exclusive();
            }
            let rows = find.all(&transaction).await?;
            let Some(last) = rows.last() else { return Ok(()) };
            after = last.id.clone();
            let before = resealed.done;
            for row in &rows {
                match reseal_row(&transaction, vault, row).await {
                    Ok(()) => resealed.done += 1,
                    Err(Error::Sealed(_)) => resealed.damaged.push(row.id.clone()),
                    Err(error) => return Err(error),
                }
            }
            // One entry for each run, in the transaction of its first change.
            if stale.is_some() && before == 0 && resealed.done > 0 {
                let record = Record {
                    action: AuditAction::MasterKeyRotated,
                    organization: None,
                    environment: None,
                    resource_id: vault.current(),
                    webhook_id: None,
                    changed_fields: &[],
                };
                record.write(&transaction, &Actor::command_line()).await?;
            }
            transaction.commit().await?;
            progress(resealed);
        }
    }

    /// Removes from the file what was overwritten: SQLite leaves it in free pages and in the write-ahead log.
    async fn wipe_free_pages(&self) {
        if !self.sqlite() {
            return;
        }
        let write = async |statement| self.0.write.execute_unprepared(statement).await.map_err(Error::from);
        // Each for itself: one that fails leaves something for the next to wipe.
        let failed = [
            self.work_in_files(true).await.err(),
            write("VACUUM").await.err(),
            self.work_in_files(false).await.err(),
            write("PRAGMA wal_checkpoint(TRUNCATE)").await.err(),
        ];
        for error in failed.into_iter().flatten() {
            tracing::warn!(%error, "remains of secrets in plain text may be left in the database file");
        }
    }
}

async fn reseal_row(transaction: &DatabaseTransaction, vault: &Vault, row: &webhook::Model) -> Result<(), Error> {
    let plain = |text: &str| Zeroizing::new(text.as_bytes().to_vec());
    let mut secrets = match row.master_key_id {
        Some(_) => open(vault, row)?,
        None => OpenSecrets {
            whose: [&row.organization, &row.environment, &row.id],
            secret: plain(&row.secret),
            previous: row.previous_secret.as_deref().map(plain),
        },
    };
    if row.previous_secret_expires_at_ms.is_some_and(|expires_at| expires_at <= clock::now().millis()) {
        secrets.previous = None;
    }
    let sealed = secrets.seal(vault);
    let mut update = Sql::new("UPDATE webhooks SET secret = ");
    update.value(sealed.secret).text(", previous_secret = ").value(sealed.previous);
    update.text(", master_key_id = ").value(sealed.master_key_id);
    update.text(" WHERE id = ").value(row.id.as_str());
    transaction.execute_raw(update.build(transaction.get_database_backend())).await?;
    Ok(())
}
