//! Shortkit Webhooks: events in, signed HTTP requests out, every step of the way visible.
//!
//! In reading order: [`webhook`] is the domain, pure. [`store`] keeps it, on SQLite and PostgreSQL; its secrets are
//! sealed by [`vault`]. [`dispatch`] makes attempts and sends them through [`egress`]. [`grpc`] is the way in, [`rest`]
//! the same as JSON, [`auth`] the lock on both, `gateway` the way to them, [`listen`] the way from a socket to that.
//! `internal` is the way in for those who run it. [`server`] puts them together, [`cli`] starts it.
//!
//! # Invariants
//!
//! - What was acknowledged is on disk, and ends as delivered or as a visible failure.
//! - An attempt is leased and counted before its request leaves; a result is recorded only while the lease holds.
//! - Nothing crosses a tenant.
//! - A secret is never stored, logged or shown in the clear, but for the one answer that hands it out.
//! - Event data is never parsed into values and printed again.
//! - [`webhook::decide`] alone chooses the state after an attempt; [`clock`] alone knows the time and makes ids.
//!
//! # Deliberately absent
//!
//! Order of deliveries, exactly-once, redirects, a queue beside the database, transformations of payloads.
//! `docs/architecture.md` says why.

pub mod auth;
pub mod cli;
pub mod clock;
pub mod config;
mod cors;
mod deadline;
pub mod dispatch;
pub mod egress;
mod failpoint;
mod feed;
mod gateway;
pub mod grpc;
mod health;
mod idempotency;
mod internal;
pub mod listen;
mod rate_limit;
pub mod rest;
pub mod server;
pub mod store;
mod telemetry;
pub mod vault;
pub mod webhook;
