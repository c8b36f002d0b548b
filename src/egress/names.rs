//! Looks names up. Not through the system's own function, which keeps a thread busy for as long as a name server is
//! silent: whoever owns a domain could use up the threads of all.

use std::{net::IpAddr, time::Duration};

use hickory_resolver::{
    ResolverBuilder, TokioResolver,
    config::{LookupIpStrategy, NameServerConfig, ResolverConfig},
    net::{NetError, runtime::TokioRuntimeProvider},
};
use tokio::sync::Semaphore;

use super::Failure;

/// Look-ups under way at a time, where enough files may be open; the others wait, within the time they have.
const MAX_LOOKUPS: usize = 4_096;
/// One for every so many files: it has two sockets, and a dozen when name servers are silent (two families, two servers,
/// three tries) …
const FILES_PER_LOOKUP: usize = 32;
/// … and so many, however few files: names that are remembered need one for a moment, too.
const MIN_LOOKUPS: usize = 64;
/// Answers that are remembered, for as long as their owner says.
const MAX_REMEMBERED: u64 = 8_192;
/// No answer is remembered for longer …
const MAX_REMEMBERED_FOR: Duration = Duration::from_secs(5 * 60);
/// … and that there is none only for a moment: whoever mends a name wants to try it.
const MAX_MISSING_FOR: Duration = Duration::from_secs(5);
/// A silent name server is asked again after this time, at most once.
const TRY: Duration = Duration::from_secs(2);

/// Looks names up as `/etc/hosts` and `/etc/resolv.conf` say.
pub(super) struct Names {
    resolver: TokioResolver,
    permits: Semaphore,
}

impl Names {
    /// As this machine does. One without a usable `resolv.conf` asks itself, as the C library would.
    pub(super) fn system(open_files: usize) -> Result<Self, NetError> {
        let here = || ResolverConfig::from_name_servers(vec![NameServerConfig::udp_and_tcp([127, 0, 0, 1].into())]);
        let builder = TokioResolver::builder_tokio().unwrap_or_else(|error| {
            tracing::warn!(%error, "/etc/resolv.conf cannot be used; names are looked up on this machine");
            TokioResolver::builder_with_config(here(), TokioRuntimeProvider::default())
        });
        Self::new(builder, (open_files / FILES_PER_LOOKUP).clamp(MIN_LOOKUPS, MAX_LOOKUPS))
    }

    fn new(mut builder: ResolverBuilder<TokioRuntimeProvider>, lookups: usize) -> Result<Self, NetError> {
        let options = builder.options_mut();
        // Both, or a blocked address could hide behind the other family's.
        options.ip_strategy = LookupIpStrategy::Ipv4AndIpv6;
        options.cache_size = MAX_REMEMBERED;
        options.positive_max_ttl = Some(MAX_REMEMBERED_FOR);
        options.negative_max_ttl = Some(MAX_MISSING_FOR);
        options.timeout = options.timeout.clamp(Duration::from_secs(1), TRY);
        options.attempts = options.attempts.min(1);
        Ok(Self { resolver: builder.build()?, permits: Semaphore::new(lookups) })
    }

    /// Every address of a name, not judged.
    pub(super) async fn addresses(&self, name: &str) -> Result<Vec<IpAddr>, Failure> {
        let _permit = self.permits.acquire().await.map_err(|_| Failure::DnsLookup)?;
        let found = self.resolver.lookup_ip(name).await.map_err(|_| Failure::looking_up())?;
        Ok(found.iter().collect())
    }
}
