//! Looks names up and keeps only the addresses that may be dialled. Addresses written in a URL never come here; they are
//! judged with the URL.

use std::{net::SocketAddr, sync::Arc};

use reqwest::dns::{Addrs, Name, Resolve, Resolving};

use super::Policy;

/// What reqwest asks for addresses.
pub(super) struct Resolver(pub(super) Arc<Policy>);

/// Every address of a name is blocked.
#[derive(Debug, thiserror::Error)]
#[error("no address of this name may be dialled")]
pub(super) struct AllBlocked;

/// The name cannot be looked up.
#[derive(Debug, thiserror::Error)]
#[error("the name cannot be looked up")]
pub(super) struct LookupFailed;

impl Resolve for Resolver {
    fn resolve(&self, name: Name) -> Resolving {
        let policy = Arc::clone(&self.0);
        Box::pin(async move {
            let found = tokio::net::lookup_host((name.as_str(), 0)).await.map_err(|_| LookupFailed)?;
            let (permitted, blocked): (Vec<SocketAddr>, Vec<SocketAddr>) =
                found.partition(|address| policy.permits(address.ip()));
            match (permitted.is_empty(), blocked.is_empty()) {
                (false, _) => Ok(Box::new(permitted.into_iter()) as Addrs),
                (true, false) => Err(AllBlocked.into()),
                (true, true) => Err(LookupFailed.into()),
            }
        })
    }
}
