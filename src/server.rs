//! Wires everything, and takes it apart in order.

mod background;

use std::{sync::Arc, time::Duration};

use http::Method;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tonic::service::Routes;
use tower::ServiceBuilder;

use crate::{
    auth::Auth,
    config::Config,
    deadline::Deadline,
    dispatch::{self, Engine},
    egress,
    gateway::Gateway,
    grpc::{self, Api, DESCRIPTORS, Parts, Services, Tokens},
    health::{Checks, Health},
    idempotency::Idempotency,
    internal, listen,
    rate_limit::RateLimits,
    rest,
    store::{self, BacklogLimits, Lease, Store},
    telemetry::Counted,
};

/// Callers may be connected for one of so many files that may be open …
const FILES_PER_CALLER: usize = 4;
/// … and so many, however few files.
const MIN_CALLERS: usize = 16;

/// A message to health or reflection, which need no key, is at most this long: far more than the name of anything here. A
/// longer one is refused, since what it names is said again in the answer, and that is to fit into one piece of
/// `listen/body.rs`, for which no room is counted.
const MAX_OPEN_MESSAGE_BYTES: usize = 256;

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
    let mut open = Open::of(&config).await?;
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
    let mut background = background::start(&config, &store);
    if let Some(checks) = open.checks.take() {
        background.spawn(checks.follow(store.available(), told.clone(), shutdown.clone()));
    }
    if let Some(internal) = listeners.internal {
        let Open { routes, health, .. } = std::mem::take(&mut open);
        background.spawn(internal::serve(internal, store.clone(), health, routes));
    }
    background.spawn(stop_later(told.clone(), config.shutdown_delay, shutdown.clone()));
    let stopping = shutdown.clone();
    let (node, address) = (store.node(), listeners.public.local_addr().map(|address| address.to_string()));
    tracing::info!(version = env!("CARGO_PKG_VERSION"), node, address = address.unwrap_or_default(), "serving");

    let mut serving = std::pin::pin!(serve(listeners.public, &config, api, open, shutdown));
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
        what = died => {
            let early = !stopping.is_cancelled();
            stopping.cancel();
            told.cancel();
            let served = serving.await;
            if early { Err(Error::Died(what)) } else { served }
        }
    };
    // Also when the server failed: the engine then stops as at any other end, and no more work is to come here.
    told.cancel();
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
    open: Open,
    shutdown: CancellationToken,
) -> Result<(), Error> {
    let store = api.0.store.clone();
    let certified = config.tls.as_ref().is_some_and(listen::Tls::asks_clients);
    let auth = Auth::new(store.clone(), config.environments.clone(), certified);
    let services = Services::new(api, open.routes);
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
    let gateway = Gateway::new(services, transcode, open.health);
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

/// What is told to whoever asks, without a key.
#[derive(Default)]
struct Open {
    routes: Routes,
    health: Option<Health>,
    checks: Option<Checks>,
}

impl Open {
    /// As far as it is wanted.
    async fn of(config: &Config) -> Result<Self, Error> {
        let mut open = Self::default();
        if config.health {
            let (health, service, checks) = Health::of(&grpc::SERVICES).await;
            open.routes = open.routes.add_service(service.max_decoding_message_size(MAX_OPEN_MESSAGE_BYTES));
            (open.health, open.checks) = (Some(health), Some(checks));
        }
        if config.reflection {
            let reflection = || {
                tonic_reflection::server::Builder::configure()
                    .register_encoded_file_descriptor_set(DESCRIPTORS)
                    .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
                    // What errors carry, so that clients who know us by reflection only can read it.
                    .register_encoded_file_descriptor_set(tonic_types::pb::FILE_DESCRIPTOR_SET)
            };
            let v1 = reflection().build_v1()?.max_decoding_message_size(MAX_OPEN_MESSAGE_BYTES);
            let v1alpha = reflection().build_v1alpha()?.max_decoding_message_size(MAX_OPEN_MESSAGE_BYTES);
            open.routes = open.routes.add_service(v1).add_service(v1alpha);
        }
        Ok(open)
    }
}

/// Passes on that the server is to stop, after the delay in which it only says so.
async fn stop_later(told: CancellationToken, delay: Duration, shutdown: CancellationToken) {
    told.cancelled().await;
    if !shutdown.is_cancelled() {
        tracing::info!(?delay, "stopping");
        tokio::time::sleep(delay).await;
    }
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
