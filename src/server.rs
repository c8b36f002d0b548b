//! Wires everything, and takes it apart in order.

use std::{path::PathBuf, sync::Arc, time::Duration};

use http::Method;
use tokio::{net::TcpListener, task::JoinSet};
use tokio_util::sync::CancellationToken;
use tonic::service::Routes;
use tower::ServiceBuilder;

use crate::{
    auth::Auth,
    config::{Config, read_master_keys},
    deadline::Deadline,
    dispatch::{self, Engine},
    egress,
    gateway::Gateway,
    grpc::{self, Api, DESCRIPTORS, Parts, Services, Tokens},
    health::Health,
    idempotency::Idempotency,
    internal, listen,
    rate_limit::RateLimits,
    rest,
    store::{self, BacklogLimits, Lease, Store},
    telemetry::Counted,
    vault::Vault,
};

/// Callers may be connected for one of so many files that may be open …
const FILES_PER_CALLER: usize = 4;
/// … and so many, however few files.
const MIN_CALLERS: usize = 16;

/// A message to health or reflection, which need no key, is at most this long: far more than the name of anything here. A
/// longer one is refused, since what it names is said again in the answer, and that is to fit into one piece of
/// `listen/body.rs`, for which no room is counted.
const MAX_OPEN_MESSAGE_BYTES: usize = 256;

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

/// Why the server ends.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The database.
    #[error(transparent)]
    Store(#[from] store::Error),
    /// The HTTP client.
    #[error(transparent)]
    Egress(#[from] egress::StartError),
    /// The annotations of the proto.
    #[error(transparent)]
    Rest(#[from] rest::StartError),
    /// A task that goes on until the end is gone.
    #[error("a task {0} has ended; see the log for why, and report it")]
    Died(&'static str),
    /// Reflection.
    #[error("reflection cannot be served: {0}")]
    Reflection(#[from] tonic_reflection::server::Error),
}

/// Where the server is reached.
pub struct Listeners {
    /// By everybody.
    pub public: TcpListener,
    /// By those who run it; none when [`Config::internal_listen`] names no address.
    pub internal: Option<TcpListener>,
}

/// Serves on `listeners` until `told` to stop and for [`Config::shutdown_delay`] more, then stops in order: no new
/// connections, no new calls, open streams end, what is on the wire finishes, the rest is given back.
pub async fn run(listeners: Listeners, mut config: Config, store: Store, told: CancellationToken) -> Result<(), Error> {
    store.take_exclusively()?;
    store.follow_clock().await?;
    store.unlock(config.vault.clone().ok_or(store::Error::Locked)?).await?;
    let lease_length = dispatch::lease_length(config.request_timeout);
    let rescued = store.rescue_all_at_start(&config.retry_schedule, lease_length).await?;
    store.release_claims_at_start().await?;
    if rescued > 0 {
        tracing::info!(count = rescued, "deliveries that were interrupted go out again");
    }
    store.limit_backlog(BacklogLimits { total: config.max_backlog, organization: config.max_backlog_per_organization });
    // Where it takes too long, or something holds the counts, a node has to start all the same.
    if let Err(error) = store.look_at_backlog().await {
        tracing::warn!(%error, "the backlog could not be counted; until it is, what was pending before does not count");
    }
    store.retain(config.retention);
    if config.shutdown_grace < config.request_timeout {
        tracing::warn!(
            shutdown_grace = ?config.shutdown_grace,
            request_timeout = ?config.request_timeout,
            "shutting down cuts requests off that may have arrived, and are sent again; raise --shutdown-grace"
        );
    }
    let open_files = raise_open_files();
    config.limits.connections = callers(config.limits.connections, open_files);
    let client = client(&config, open_files)?;
    let shutdown = CancellationToken::new();
    let engine = Arc::new(Engine {
        store: store.clone(),
        client: client.clone(),
        schedule: config.retry_schedule.clone(),
        request_timeout: config.request_timeout,
        max_in_flight_per_webhook: config.max_in_flight_per_webhook,
        open_files,
        leases: dispatch::LeaseEnds::default(),
    });
    let api = Api(Arc::new(Parts {
        tokens: Tokens::new(&store.token_key().await?),
        store: store.clone(),
        client,
        event_types: config.event_types.clone(),
        max_webhooks: config.max_webhooks,
        lease: Lease { length: lease_length, first_wait: config.retry_schedule.first_wait() },
        shutdown: shutdown.clone(),
    }));
    let calls_ended = CancellationToken::new();
    let mut engine = tokio::spawn(engine.run(shutdown.clone(), calls_ended.clone(), config.shutdown_grace));
    let mut background = JoinSet::new();
    background.spawn(follow(store.clone()));
    background.spawn(learn(store.clone()));
    background.spawn(tidy(store.clone()));
    background.spawn(note_keys(store.clone()));
    background.spawn(remove_old(store.clone()));
    background.spawn(remove_deleted(store.clone()));
    if let Some(tls) = config.tls.clone() {
        background.spawn(tls.follow());
    }
    if let (Some(vault), Some(path)) = (config.vault.clone(), config.master_key_file.clone()) {
        background.spawn(follow_master_keys(store.clone(), vault, path));
    }
    background.spawn(keep_time(store.clone()));
    background.spawn(look(store.clone()));
    let (mut health, mut open) = (None, Routes::builder().routes());
    if config.health {
        let (known, service, checks) = Health::of(&grpc::SERVICES).await;
        background.spawn(checks.follow(store.available(), told.clone()));
        health = Some(known);
        open = open.add_service(service.max_decoding_message_size(MAX_OPEN_MESSAGE_BYTES));
    }
    if config.reflection {
        open = reflection(open)?;
    }
    if let Some(internal) = listeners.internal {
        let (health, open) = (health.take(), std::mem::replace(&mut open, Routes::builder().routes()));
        background.spawn(internal::serve(internal, store.clone(), health, open));
    }
    background.spawn(stop_later(told, config.shutdown_delay, shutdown.clone()));
    let stopping = shutdown.clone();
    let (node, address) = (store.node(), listeners.public.local_addr().map(|address| address.to_string()));
    tracing::info!(version = env!("CARGO_PKG_VERSION"), node, address = address.unwrap_or_default(), "serving");

    let mut serving = std::pin::pin!(serve(listeners.public, &config, api, open, health, shutdown));
    let died = async {
        tokio::select! {
            _ = &mut engine => "that sends deliveries",
            () = store.writer_died() => "that writes to the database",
            _ = background.join_next() => "in the background",
        }
    };
    let served = tokio::select! {
        served = &mut serving => served,
        // None of these ends before the server does. What is accepted would not be delivered, or what is told not be true.
        what = died => if stopping.is_cancelled() { serving.await } else { Err(Error::Died(what)) },
    };
    // Also when the server failed: the engine then stops as at any other end.
    stopping.cancel();
    calls_ended.cancel();
    if !engine.is_finished() {
        let _ = engine.await;
    }
    if let Err(error) = store.write_used_keys().await {
        tracing::warn!(%error, "the last use of some keys is not written down");
    }
    background.shutdown().await;
    tracing::info!(node, "stopped");
    served
}

async fn serve(
    listener: TcpListener,
    config: &Config,
    api: Api,
    open: Routes,
    health: Option<Health>,
    shutdown: CancellationToken,
) -> Result<(), Error> {
    let store = api.0.store.clone();
    let certified = config.tls.as_ref().is_some_and(listen::Tls::asks_clients);
    let auth = Auth::new(store.clone(), config.environments.clone(), certified);
    let services = Services::new(api, open);
    // An attempt made for a test may take its whole time, and looking up its name comes on top.
    let deadline = config.request_timeout + Duration::from_secs(10);
    let limits = rest::Limits {
        deadline,
        shutdown: shutdown.clone(),
        // A request has its principal only inside; what came with its connection is told of it there.
        organization: |extensions| extensions.get::<listen::Caller>()?.organization().cloned(),
        ..rest::Limits::default()
    };
    let transcode = rest::Transcode::new(DESCRIPTORS, limits)?;
    // The other methods may be repeated anyway.
    let named = transcode.calls(&Method::POST).map(str::to_owned).collect();
    let silent = store.clone();
    let useless = move || {
        let store = silent.clone();
        async move {
            store.silent().await;
            grpc::no_database()
        }
    };
    // Once for every protocol.
    let services = ServiceBuilder::new()
        .layer(Counted::new(store.metrics(), grpc::methods()))
        .layer(Deadline { longest: deadline, useless })
        .layer(auth)
        .layer(RateLimits::new(config.rate_limit))
        .layer(Idempotency::new(store, named, deadline))
        .service(services);
    let gateway = Gateway::new(services, transcode, health);
    let serving = listen::serve(listener, config.tls.clone(), config.limits.clone(), gateway, shutdown.clone());
    let overdue = async {
        shutdown.cancelled().await;
        tokio::time::sleep(config.shutdown_grace).await;
    };
    tokio::select! {
        () = serving => Ok(()),
        () = overdue => {
            tracing::warn!("some calls did not end within the grace and were cut off");
            Ok(())
        }
    }
}

/// With reflection of everything that can be called, with or without a key.
fn reflection(open: Routes) -> Result<Routes, Error> {
    let reflection = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(DESCRIPTORS)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
            // What errors carry, so that clients who know us by reflection only can read it.
            .register_encoded_file_descriptor_set(tonic_types::pb::FILE_DESCRIPTOR_SET)
    };
    let v1 = reflection().build_v1()?.max_decoding_message_size(MAX_OPEN_MESSAGE_BYTES);
    let v1alpha = reflection().build_v1alpha()?.max_decoding_message_size(MAX_OPEN_MESSAGE_BYTES);
    Ok(open.add_service(v1).add_service(v1alpha))
}

/// Passes on that the server is to stop, after the delay in which it only says so.
async fn stop_later(told: CancellationToken, delay: Duration, shutdown: CancellationToken) {
    told.cancelled().await;
    tracing::info!(?delay, "stopping");
    tokio::time::sleep(delay).await;
    shutdown.cancel();
    std::future::pending().await
}

/// Lets this process have as many files open as it may, and says how many. What a shell sets is a fraction of what is
/// allowed. Half of them are for attempts (`dispatch/shares.rs`), a quarter for callers ([`callers`]), an eighth for idle
/// connections (`egress/kept.rs`), the rest for look-ups (`egress/names.rs`) and the database.
fn raise_open_files() -> usize {
    let files = rlimit::increase_nofile_limit(u64::MAX).unwrap_or_else(|error| {
        tracing::warn!(%error, "the limit of open files could not be raised");
        rlimit::Resource::NOFILE.get_soft().unwrap_or(0)
    });
    usize::try_from(files).unwrap_or(usize::MAX)
}

/// How many callers may be connected: no more than a part of the files that may be open, or deliveries would wait for
/// theirs.
fn callers(configured: usize, open_files: usize) -> usize {
    let most = (open_files / FILES_PER_CALLER).max(MIN_CALLERS);
    if most < configured {
        tracing::warn!(
            open_files,
            connections = most,
            "fewer callers may be connected than configured; raise the limit of open files (ulimit -n)"
        );
    }
    configured.min(most)
}

fn client(config: &Config, open_files: usize) -> Result<egress::Client, egress::StartError> {
    let policy = egress::Policy {
        allow: config.egress_allow.clone(),
        allow_loopback: config.allow_loopback,
        allow_http: config.allow_http,
    };
    let settings = egress::Settings {
        request_timeout: config.request_timeout,
        user_agent: concat!("Shortkit-Webhooks/", env!("CARGO_PKG_VERSION")).to_owned(),
        extra_roots: config.egress_ca.clone(),
        open_files,
    };
    egress::Client::new(policy, &settings)
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
