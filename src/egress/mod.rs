//! The one door to the outside: which addresses may be dialled, and a POST that is bounded in time and size.

mod address;
mod client;
mod failure;
mod policy;
mod resolver;
mod retry_after;

pub use address::is_public;
pub use client::{Answer, Client, MAX_ANSWER_BYTES, Outcome, Settings, StartError};
pub use failure::Failure;
pub use policy::{MAX_URL_BYTES, Policy, UrlError};
pub use retry_after::RetryAfter;
