//! `keys`: create, list and revoke.

use std::time::Duration;

use clap::{Args, Subcommand, ValueEnum};
use serde_json::json;

use super::{Error, open, print, print_table};
use crate::{
    clock,
    config::{DatabaseArgs, MasterKeyArgs, MasterKeyConfig},
    store::{KeyInfo, KeyKind, NewKey, Store},
    telemetry,
    vault::Vault,
    webhook::{Environment, MAX_ORGANIZATION_BYTES, Tenant, Timestamp},
};

/// A key that expires does so within this time.
const MAX_LIFETIME: Duration = Duration::from_secs(100 * 365 * 24 * 60 * 60);

/// How often a long command says how far it is.
const PROGRESS: Duration = Duration::from_secs(1);

/// Arguments of `keys`.
#[derive(Args)]
pub(super) struct KeysArgs {
    #[command(subcommand)]
    command: KeysCommand,
}

#[derive(Subcommand)]
enum KeysCommand {
    /// Make a key and print it, once
    Create(CreateArgs),
    /// List keys, the newest first; never the keys themselves
    List(ListArgs),
    /// End a key for good, within a second
    Revoke(RevokeArgs),
    /// Make a master key and print it, the same as `openssl rand -base64 32`
    NewMaster,
    /// Encrypt every signing secret anew under the first master key, while nodes are serving
    ///
    /// To replace a master key: put the new one before the old one into the file of every node (they read it again
    /// within a second), run this, and remove the old one. May be ended and run again at any time.
    RotateMaster(RotateMasterArgs),
}

#[derive(Args)]
struct CreateArgs {
    #[command(flatten)]
    database: DatabaseArgs,
    /// Whose key it is: 1 to 64 letters, digits, _ and -; not for a service key, which names one with each call
    #[arg(long, value_name = "NAME", value_parser = organization)]
    organization: Option<String>,
    /// The environment it works in
    #[arg(long, value_enum)]
    environment: EnvironmentWord,
    /// What it may do
    #[arg(long, value_enum, default_value = "secret")]
    kind: KindWord,
    /// From when on it is refused, such as 90d; at most 100 years [default: never]
    #[arg(long, value_name = "DURATION", value_parser = lifetime)]
    expires_in: Option<Duration>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
struct ListArgs {
    #[command(flatten)]
    database: DatabaseArgs,
    /// Print one JSON object a line
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
struct RevokeArgs {
    #[command(flatten)]
    database: DatabaseArgs,
    /// Id of the key, `key_…`, as `keys list` shows it
    #[arg(value_name = "ID")]
    id: String,
}

#[derive(Args)]
struct RotateMasterArgs {
    #[command(flatten)]
    database: DatabaseArgs,
    #[command(flatten)]
    master_key: MasterKeyArgs,
}

#[derive(Clone, Copy, ValueEnum)]
enum EnvironmentWord {
    Live,
    Test,
}

#[derive(Clone, Copy, ValueEnum)]
enum KindWord {
    /// sk_…: everything in its organization and environment
    Secret,
    /// pk_…: refused by every call of this service
    Publishable,
    /// svc_…: every call, on behalf of any organization
    Service,
}

impl KeysArgs {
    pub(super) async fn run(self) -> Result<(), Error> {
        match self.command {
            KeysCommand::Create(args) => create(args).await,
            KeysCommand::List(args) => list(args).await,
            KeysCommand::Revoke(args) => revoke(args).await,
            KeysCommand::NewMaster => Ok(print(&*Vault::new_master_key())?),
            KeysCommand::RotateMaster(args) => rotate_master(args).await,
        }
    }
}

async fn create(args: CreateArgs) -> Result<(), Error> {
    match (args.kind, &args.organization) {
        (KindWord::Service, Some(_)) => {
            return Err(Error::Usage("a service key acts for any organization; leave --organization out".to_owned()));
        }
        (KindWord::Secret | KindWord::Publishable, None) => {
            return Err(Error::Usage("--organization NAME says whose key it is".to_owned()));
        }
        _ => {}
    }
    let store = open(args.database).await?;
    store.expect_schema().await?;
    let kind = match args.kind {
        KindWord::Secret => KeyKind::Secret,
        KindWord::Publishable => KeyKind::Publishable,
        KindWord::Service => KeyKind::Service,
    };
    let environment = match args.environment {
        EnvironmentWord::Live => Environment::Live,
        EnvironmentWord::Test => Environment::Test,
    };
    let expires_at = args.expires_in.map(|after| clock::now().after(after));
    let created = store.create_key(NewKey { organization: args.organization, environment, kind, expires_at }).await?;
    if args.json {
        let mut object = describe(&created.info);
        object["key"] = json!(&*created.key);
        print(object)?;
    } else {
        print(&*created.key)?;
        eprintln!("This is the only time the key is shown. Its id is {}.", created.info.id);
    }
    Ok(())
}

async fn list(args: ListArgs) -> Result<(), Error> {
    let store = open(args.database).await?;
    store.expect_schema().await?;
    let keys = store.list_keys().await?;
    if args.json {
        for key in &keys {
            print(describe(key))?;
        }
        return Ok(());
    }
    if keys.is_empty() {
        eprintln!(
            "There are no keys yet. Make one: shortkit-webhooks keys create --organization acme --environment test"
        );
        return Ok(());
    }
    let header = ["ID", "PREFIX", "KIND", "ORGANIZATION", "CREATED", "LAST USED", "EXPIRES", "STATE"];
    Ok(print_table(header, keys.iter().map(row))?)
}

async fn revoke(args: RevokeArgs) -> Result<(), Error> {
    let store = open(args.database).await?;
    store.expect_schema().await?;
    if !store.revoke_key(&args.id).await? {
        return Err(Error::Failed(format!("there is no key {}; `keys list` shows the ids", args.id)));
    }
    eprintln!("{} is revoked", args.id);
    Ok(())
}

async fn rotate_master(args: RotateMasterArgs) -> Result<(), Error> {
    let MasterKeyConfig { database, vault } = args.master_key.load(args.database)?;
    telemetry::start(&database.log);
    let store = Store::connect(&database.database_url).await?;
    store.expect_schema().await?;
    store.unlock(vault.clone()).await?;
    let mut shown = clock::stopwatch();
    let resealed = store
        .reseal_secrets(|so_far| {
            if shown.elapsed() >= PROGRESS {
                shown = clock::stopwatch();
                eprintln!("{} of {} webhooks", so_far.done, so_far.total);
            }
        })
        .await?;
    eprintln!("{} of {} webhooks have their secrets under {} now", resealed.done, resealed.total, vault.current());
    if !resealed.damaged.is_empty() {
        let ids = resealed.damaged.join(", ");
        return Err(Error::Failed(format!(
            "the secrets of these do not open, because their rows were changed by other means: {ids}\n  \
             Rotate their secrets or restore their rows."
        )));
    }
    eprintln!("All are; the other master keys can be removed once every node has read this one first.");
    Ok(())
}

fn organization(text: &str) -> Result<String, String> {
    let rule = || format!("must be 1 to {MAX_ORGANIZATION_BYTES} letters, digits, _ and -");
    Tenant::new(text, Environment::Test).map(|_| text.to_owned()).ok_or_else(rule)
}

fn lifetime(text: &str) -> Result<Duration, String> {
    let after = humantime::parse_duration(text).map_err(|error| error.to_string())?;
    if after > MAX_LIFETIME { Err("must be at most 100 years".to_owned()) } else { Ok(after) }
}

fn state(key: &KeyInfo) -> &'static str {
    if key.revoked_at.is_some() {
        "revoked"
    } else if key.expires_at.is_some_and(|at| at <= clock::now()) {
        "expired"
    } else {
        "active"
    }
}

fn row(key: &KeyInfo) -> [String; 8] {
    let time = |at: Option<Timestamp>| at.map_or_else(|| "never".to_owned(), |at| at.to_string());
    [
        key.id.clone(),
        key.prefix.clone(),
        key.kind.as_str().to_owned(),
        key.organization.clone().unwrap_or_else(|| "any".to_owned()),
        key.created_at.to_string(),
        time(key.last_used_at),
        time(key.expires_at),
        state(key).to_owned(),
    ]
}

fn describe(key: &KeyInfo) -> serde_json::Value {
    let mut object = json!({
        "id": key.id,
        "prefix": key.prefix,
        "kind": key.kind.as_str(),
        "environment": key.environment.as_str(),
        "state": state(key),
        "createdAt": key.created_at.to_string(),
    });
    for (name, value) in [
        ("organization", key.organization.clone()),
        ("lastUsedAt", key.last_used_at.map(|at| at.to_string())),
        ("expiresAt", key.expires_at.map(|at| at.to_string())),
        ("revokedAt", key.revoked_at.map(|at| at.to_string())),
    ] {
        if let Some(value) = value {
            object[name] = json!(value);
        }
    }
    object
}
