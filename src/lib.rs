//! Shortkit Webhooks: events in, signed HTTP requests out, every step of the way visible.

pub mod rest;

pub mod egress;
