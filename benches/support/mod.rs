//! What the programs that measure stand on.

#![allow(dead_code, reason = "each program uses a part of it")]

pub(crate) mod load;
pub(crate) mod postgres;
pub(crate) mod server;
pub(crate) mod service;

use tokio::signal::unix::{SignalKind, signal};

/// Waits for a signal that ends the program; everything that was started then ends with what holds it.
pub(crate) async fn told_to_end() {
    let mut terminated = signal(SignalKind::terminate()).expect("signals");
    tokio::select! {
        _ = tokio::signal::ctrl_c() => {}
        _ = terminated.recv() => {}
    }
}
