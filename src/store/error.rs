//! What can go wrong, and whether it passes.

use std::sync::Arc;

use crate::vault;

/// What can go wrong with the database.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Error {
    /// It cannot be reached, or not within two seconds.
    #[error("the database cannot be reached: {0}")]
    Unavailable(Arc<sea_orm::DbErr>),
    /// It refused a statement, or holds what it must not.
    #[error("the database failed: {0}")]
    Failed(Arc<sea_orm::DbErr>),
    /// A row holds a word that this version does not know.
    #[error("the database holds an unknown {0}")]
    Corrupt(&'static str),
    /// Secrets are needed, and [`super::Store::unlock`] has not been called.
    #[error("a master key is needed for the signing secrets, and none was given")]
    Locked,
    /// Secrets are sealed under master keys that were not given.
    #[error(
        "the signing secrets are encrypted under master key {missing}, which was not given (given: {given})\n  \
         Add it after the first one to --master-key-file or SHORTKIT_MASTER_KEY: the first encrypts, the others decrypt."
    )]
    MissingMasterKey {
        /// Ids of those that are missing.
        missing: String,
        /// Ids of those that are not.
        given: String,
    },
    /// A secret does not open.
    #[error(transparent)]
    Sealed(#[from] vault::OpenError),
    /// More writes wait than may, or a read has waited behind others for two seconds.
    #[error("too many requests are waiting for the database")]
    Overloaded,
    /// As many publishes of the organisation wait as may, lest there be no room for others.
    #[error("too many publishes of the organization are waiting for the database")]
    OrganizationOverloaded,
    /// As many reads of the organisation are under way as may be, and have been for two seconds.
    #[error("too many calls of the organization are under way")]
    OrganizationBusy,
    /// As many deliveries of the organisation are pending as may be.
    #[error("too many deliveries of the organization are pending")]
    OrganizationBacklog,
    /// As many deliveries are pending as may be.
    #[error("too many deliveries are pending")]
    Backlog,
    /// The organisation has as many webhooks as it may.
    #[error("the organization has {0} webhooks, as many as it may")]
    TooManyWebhooks(u64),
    /// As many test events of the organisation are under way as may be beside those of others.
    #[error("too many test events of the organization are under way")]
    OrganizationTests,
    /// As many test events are under way as may be.
    #[error("too many test events are under way")]
    Tests,
    /// Events published together would make more deliveries than they may.
    #[error("the events would make more than {0} deliveries together")]
    TooManyDeliveries(usize),
    /// Another request with the same idempotency key was faster; this one was not done.
    #[error("another request with the same idempotency key was faster")]
    Repeated,
    /// Another node stores it, or has discarded it.
    #[error("another node has taken it over")]
    TakenOver,
    /// It would not fit where it is to be kept.
    #[error("the {0} is too long")]
    TooLong(&'static str),
    /// The store is shutting down.
    #[error("the store is closed")]
    Closed,
    /// Another process serves this SQLite database, or migrates it.
    #[error(
        "another process is serving {0}, or bringing it up to date; stop it first, or use PostgreSQL for several nodes"
    )]
    Taken(String),
    /// It has not seen this migration.
    #[error(
        "the schema is that of an earlier version: it lacks the migration {0}\n  \
         Where a node of this version is bringing it up to date, wait for that. Else stop what serves it, then run \
         `shortkit-webhooks migrate`, or start `serve`."
    )]
    OlderSchema(String),
    /// It has seen this migration, which this version does not know.
    #[error(
        "the schema is that of a later version: it has the migration {0}, which this one does not know\n  \
         Run that version or a later one, or restore a backup from before it."
    )]
    NewerSchema(String),
    /// The file that keeps others off cannot be used.
    #[error("{0}.lock, which keeps other processes off the database, cannot be locked: {1}")]
    Lock(String, Arc<std::io::Error>),
}

impl Error {
    /// Whether the same may well succeed later: the database is away, or has too much to do.
    pub fn passes(&self) -> bool {
        matches!(self, Self::Unavailable(_) | Self::Overloaded)
    }

    /// Whether it waited in vain for somebody else's lock, on a PostgreSQL that is there.
    pub fn is_locked(&self) -> bool {
        matches!(self, Self::Unavailable(error) if code(error).as_deref() == Some("55P03"))
    }

    /// What to do about a PostgreSQL that does not let itself be used, where its SQLSTATE says enough.
    pub fn remedy(&self) -> Option<&'static str> {
        let (Self::Unavailable(error) | Self::Failed(error)) = self else { return None };
        Some(match code(error)?.as_str() {
            "28P01" | "28000" => {
                "Correct the user and the password of --database-url, or what the server's pg_hba.conf allows."
            }
            "3D000" => "Make the database, for example with `createdb`, or correct the name in --database-url.",
            "42501" => {
                "The user of --database-url may not do that. Let it own the schema, or run `shortkit-webhooks migrate` \
                as one that does, and grant it the use of all tables."
            }
            "53300" => {
                "The server has as many connections as it takes. Raise its max_connections, or lower \
                --database-connections of each node."
            }
            _ => return None,
        })
    }
}

impl From<sea_orm::DbErr> for Error {
    fn from(error: sea_orm::DbErr) -> Self {
        if passes(&error) { Self::Unavailable(Arc::new(error)) } else { Self::Failed(Arc::new(error)) }
    }
}

/// What the driver says of it, if it is of the driver.
fn cause(error: &sea_orm::DbErr) -> Option<&sea_orm::SqlxError> {
    use sea_orm::{DbErr, RuntimeErr};
    match error {
        DbErr::Conn(RuntimeErr::SqlxError(cause))
        | DbErr::Exec(RuntimeErr::SqlxError(cause))
        | DbErr::Query(RuntimeErr::SqlxError(cause)) => Some(cause),
        _ => None,
    }
}

/// The code that the database gives an error: SQLSTATE, or what SQLite calls an extended result code.
pub(super) fn code(error: &sea_orm::DbErr) -> Option<String> {
    let sea_orm::SqlxError::Database(error) = cause(error)? else { return None };
    error.code().map(std::borrow::Cow::into_owned)
}

/// Whether the same statement may well succeed later: the database is away, restarting, full, or busy with another.
fn passes(error: &sea_orm::DbErr) -> bool {
    use sea_orm::{DbErr, SqlxError};
    let connecting = matches!(error, DbErr::ConnectionAcquire(_) | DbErr::Conn(_));
    match cause(error) {
        None => return connecting,
        Some(SqlxError::Database(_)) => {}
        // No connection, for whatever reason that is not the database's own, or ours: what is between may accept one and end it,
        // before the first answer, as long as there is no server behind it.
        Some(cause) if connecting => return !matches!(cause, SqlxError::Configuration(_)),
        Some(cause) => return matches!(cause, SqlxError::Io(_) | SqlxError::PoolTimedOut | SqlxError::PoolClosed),
    }
    let code = code(error).unwrap_or_default();
    // SQLSTATE: connection trouble, no resources, shutting down, chosen to wait, took too long, takes no writes any more.
    // SQLite: busy, locked, full; an extended code has the plain one in its low byte.
    let classes = ["08", "53", "57", "40", "55P03", "25P03", "25006"];
    let plain = code.parse::<i32>().map(|code| code & 0xff);
    // Not what took too long by itself, whose batch is tried again piece by piece.
    (code.len() == 5 && code != "57014" && classes.iter().any(|class| code.starts_with(class)))
        || matches!(plain, Ok(5 | 6 | 13))
}

#[cfg(test)]
mod tests {
    use sea_orm::Database;
    use tokio::{io::AsyncReadExt, net::TcpListener};

    use super::*;

    #[tokio::test]
    async fn who_hangs_up_before_the_first_answer_may_be_back() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("postgres://nobody@{}/nothing", listener.local_addr().unwrap());
        let hang_up = async {
            loop {
                let (mut client, _) = listener.accept().await.unwrap();
                // All that was asked is read, or the end would be a reset.
                client.read_exact(&mut [0; 8]).await.unwrap();
            }
        };
        let error = tokio::select! {
            connection = Database::connect(url) => Error::from(connection.unwrap_err()),
            () = hang_up => unreachable!(),
        };
        assert!(matches!(error, Error::Unavailable(_)), "{error}");
    }
}
