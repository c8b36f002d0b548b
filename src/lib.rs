//! Shortkit Webhooks: events in, signed HTTP requests out, every step of the way visible.

pub mod clock;
pub mod config;
pub mod dispatch;
pub mod egress;
mod feed;
pub mod rest;
pub mod store;
pub mod webhook;
