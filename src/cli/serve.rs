//! `serve`, and what `--dev` prints.

use std::{
    fs,
    io::Write,
    net::SocketAddr,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use super::{Error, connect, print};
use crate::{
    config::{Invalid, ServeArgs, read_master_keys},
    server::{self, Listeners},
    store::{KeyHash, KeyKind, NewKey, Store, sqlite_path},
    telemetry,
    vault::Vault,
    webhook::Environment,
};

/// The organisation of development keys.
const ORGANIZATION: &str = "dev";

/// Keys of development mode, kept beside the database so that every start prints lines that work.
#[derive(Default, Serialize, Deserialize)]
struct DevKeys {
    secret: String,
    service: String,
}

pub(super) async fn serve(args: ServeArgs, stop: CancellationToken) -> Result<(), Error> {
    let dev = args.dev();
    let mut config = args.load()?;
    telemetry::start(&config.log);
    let store = connect(&config.database_url, config.database_connections).await?;
    // Before anything is changed or promised.
    store.take_exclusively()?;
    tokio::select! {
        migrated = store.migrate() => migrated?,
        // What is under way is undone.
        () = stop.cancelled() => return Ok(()),
    }
    let made = beside(&config.database_url, "dev-master-key");
    if dev && config.vault.is_none() {
        config.vault = Some(dev_master_key(&made)?);
        config.master_key_file = Some(made);
    }
    // A wrong master key is found out here, not at the first delivery.
    if let Some(vault) = &config.vault {
        let sealed = store.unlock(vault.clone()).await?;
        if sealed > 0 {
            tracing::info!(webhooks = sealed, "signing secrets in plain text were encrypted");
        }
    }
    let keys_path = beside(&config.database_url, "dev-keys.json");
    let keys = if dev { Some(dev_keys(&store, &keys_path).await?) } else { None };
    let public = bind(config.listen, "--listen").await?;
    let internal = match config.internal_listen {
        Some(address) => Some(bind(address, "--internal-listen").await?),
        None => None,
    };
    let address = public.local_addr()?;
    let tls = config.tls.is_some();
    // A service serves on, also when nobody reads what it prints.
    let _ = print(format_args!("listening on {}://{address}", if tls { "https" } else { "http" }));
    if let Some(internal) = &internal {
        let _ = print(format_args!("internal port on http://{}", internal.local_addr()?));
    }
    if let Some(keys) = keys {
        let master_key = config.master_key_file.as_deref().unwrap_or(Path::new("SHORTKIT_MASTER_KEY"));
        let _ = print(welcome(&address.to_string(), tls, &keys, master_key));
    }
    Ok(server::run(Listeners { public, internal }, config, store, stop).await?)
}

async fn bind(address: SocketAddr, flag: &str) -> Result<TcpListener, Error> {
    TcpListener::bind(address).await.map_err(|error| {
        Error::Failed(format!("cannot listen on {address}: {error}\n  Choose another address with {flag}."))
    })
}

/// A file of development mode, beside the database.
fn beside(database_url: &str, what: &str) -> PathBuf {
    PathBuf::from(format!("{}.{what}", sqlite_path(database_url).unwrap_or("shortkit")))
}

/// The master key of the last start, else a new one.
fn dev_master_key(path: &Path) -> Result<Vault, Error> {
    if !path.exists() {
        write_private(path, Vault::new_master_key().as_bytes())?;
    }
    Ok(read_master_keys(path).map_err(|fault| Invalid(vec![fault]))?)
}

/// The keys of the last start, when the database still knows them, else new ones.
async fn dev_keys(store: &Store, path: &Path) -> Result<DevKeys, Error> {
    let mut keys: DevKeys =
        fs::read(path).ok().and_then(|bytes| serde_json::from_slice(&bytes).ok()).unwrap_or_default();
    let mut fresh = false;
    for (key, kind) in [(&mut keys.secret, KeyKind::Secret), (&mut keys.service, KeyKind::Service)] {
        let known = match KeyHash::checked(key) {
            Some(hash) => store.find_key(hash).await?,
            None => None,
        };
        let works = known.is_some_and(|info| info.revoked_at.is_none());
        if !works {
            let organization = (kind == KeyKind::Secret).then(|| ORGANIZATION.to_owned());
            let new = NewKey { organization, environment: Environment::Test, kind, expires_at: None };
            *key = store.create_key(new).await?.key.to_owned();
            fresh = true;
        }
    }
    if fresh {
        write_private(path, &serde_json::to_vec_pretty(&keys).unwrap_or_default())?;
    }
    Ok(keys)
}

/// Writes a file that only its owner can read.
fn write_private(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    use std::os::unix::fs::OpenOptionsExt;
    let mut file = fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path)?;
    file.write_all(bytes)
}

fn welcome(address: &str, tls: bool, keys: &DevKeys, master_key: &Path) -> String {
    let DevKeys { secret, service } = keys;
    let (origin, plain) =
        if tls { (format!("https://{address}"), "") } else { (format!("http://{address}"), "-plaintext ") };
    let master_key = master_key.display();
    // The one that runs, since it need not be on the path.
    let program =
        std::env::current_exe().map_or_else(|_| "shortkit-webhooks".to_owned(), |path| path.display().to_string());
    format!(
        r#"
Development mode: receivers on this machine and plain http are allowed. Never open it to others.

  secret key   {secret}   (organization {ORGANIZATION})
  service key  {service}   (any organization)
  master key   in {master_key}   (encrypts the signing secrets)

See a signed delivery: in a second terminal

  {program} listen --port 9000

and in a third, with curl

  curl -X POST {origin}/v1/webhooks -H 'Authorization: Bearer {secret}' -H 'Content-Type: application/json' -d '{{"url":"http://localhost:9000/","events":["content.ready"]}}'
  curl -X POST {origin}/v1/events -H 'Authorization: Bearer {secret}' -H 'Content-Type: application/json' -d '{{"event":"content.ready","data":{{"contentId":"cnt_abc123","title":"My Video","duration":45.2}}}}'
  curl {origin}/v1/webhooks -H 'Authorization: Bearer {secret}'

or with grpcurl

  grpcurl {plain}{address} list
  grpcurl {plain}-H 'authorization: Bearer {service}' -H 'x-shortkit-organization: {ORGANIZATION}' -d '{{"event":"content.ready","data":"{{\"contentId\":\"cnt_abc123\"}}"}}' {address} shortkit.webhooks.v1.DeliveryService/PublishEvent
  grpcurl {plain}-H 'authorization: Bearer {secret}' {address} shortkit.webhooks.v1.DeliveryService/WatchDeliveries
"#
    )
}
