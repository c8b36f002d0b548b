//! The one door to the outside: which addresses may be dialled, and a POST that is bounded in time and size.
//!
//! `policy` judges URLs and addresses. `connector` is what reqwest is given to make connections with: it judges what
//! `names` found, at that moment, and once more whom the connection has reached. `client` sends over its connections, and
//! judges the addresses that stand in a URL, since nobody looks those up. `kept` says which of them stay open.
//!
//! A client is bound to one policy, and neither can be changed, so a connection that is kept open never outlives the
//! rules under which it was made: other rules are another client. One client serves all organisations, because the
//! operator's rules are those of all; rules of an organisation's own would need a client of its own.
//!
//! Proxies and redirects are switched off: the variables of the environment are not read, and an answer is an answer,
//! wherever its `Location` points.

mod address;
mod client;
mod connector;
mod failure;
mod kept;
mod names;
mod policy;
mod retry_after;

pub use address::is_public;
pub use client::{Answer, Client, MAX_ANSWER_BYTES, Outcome, Settings, StartError};
pub use failure::Failure;
pub use policy::{MAX_URL_BYTES, Policy, UrlError};
pub use retry_after::RetryAfter;
