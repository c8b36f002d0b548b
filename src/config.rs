//! What the operator can set.

use std::{net::SocketAddr, time::Duration};

use ipnet::IpNet;

use crate::webhook::{Environment, EventTypes, RetrySchedule};

/// Everything that `serve` needs to know, valid.
#[derive(Debug, Clone)]
pub struct Config {
    /// Address to serve on; port 0 picks a free one.
    pub listen: SocketAddr,
    /// `sqlite://…` or `postgres://…`.
    pub database_url: String,
    /// Ranges where requests may go beside public addresses.
    pub egress_allow: Vec<IpNet>,
    /// PEM files of certificate authorities that receivers are trusted by, beside the system's.
    pub egress_ca: Vec<Vec<u8>>,
    /// Whether webhooks may have `http` URLs.
    pub allow_http: bool,
    /// Whether loopback receivers are allowed; only `--dev` says so.
    pub allow_loopback: bool,
    /// When failed attempts are made again.
    pub retry_schedule: RetrySchedule,
    /// The event types that exist.
    pub event_types: EventTypes,
    /// How long one attempt may take, from the look-up of the name to the last byte of the answer.
    pub request_timeout: Duration,
    /// The environments whose keys this server accepts.
    pub environments: Vec<Environment>,
    /// Attempts under way to one webhook at a time.
    pub max_in_flight_per_webhook: usize,
    /// How long shutting down may take before what is under way is cut off.
    pub shutdown_grace: Duration,
    /// Whether gRPC reflection is served, which needs no key.
    pub reflection: bool,
    /// Whether the health service is served, which needs no key.
    pub health: bool,
}
