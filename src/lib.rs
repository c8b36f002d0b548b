//! Shortkit Webhooks: events in, signed HTTP requests out, every step of the way visible.

pub mod auth;
pub mod cli;
pub mod clock;
pub mod config;
mod cors;
pub mod dispatch;
pub mod egress;
mod feed;
pub mod grpc;
pub mod rest;
pub mod server;
pub mod store;
mod telemetry;
pub mod webhook;
