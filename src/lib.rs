//! Shortkit Webhooks: events in, signed HTTP requests out, every step of the way visible.

pub mod clock;
pub mod egress;
pub mod rest;
pub mod webhook;
