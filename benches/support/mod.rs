//! What the programs that measure stand on.

#![allow(dead_code, reason = "each program uses a part of it")]

pub(crate) mod load;
pub(crate) mod service;
