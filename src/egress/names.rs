//! Looks names up. Not through the system's own function, which keeps a thread busy for as long as a name server is
//! silent: whoever owns a domain could use up the threads of all. Nor may they use up the look-ups: a name that took long
//! has a part of them apart, and what is in memory needs none.

use std::{
    collections::HashMap,
    net::IpAddr,
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use futures_util::FutureExt;
use hickory_resolver::{
    ResolverBuilder, TokioResolver,
    config::{LookupIpStrategy, NameServerConfig, ResolverConfig},
    lookup_ip::LookupIp,
    net::{NetError, runtime::TokioRuntimeProvider},
};
use tokio::sync::Semaphore;

use super::Failure;
use crate::clock;

/// Look-ups under way at a time, where enough files may be open; the others wait, within the time they have.
const MAX_LOOKUPS: usize = 4_096;
/// One for every so many files: it has two sockets, and a dozen when name servers are silent (two families, two servers,
/// three tries) …
const FILES_PER_LOOKUP: usize = 32;
/// … and so many, however few files.
const MIN_LOOKUPS: usize = 64;
/// A name whose look-up takes as long is slow. The next ones are of those that are for slow names …
const SLOW: Duration = Duration::from_secs(1);
/// … for this time: who only lost a packet does not stand behind those that never answer for longer …
const SLOW_FOR: Duration = Duration::from_secs(5 * 60);
/// … and of so many one is for those; the rest is for all other names, which so never wait for those.
const LOOKUPS_PER_SLOW: usize = 4;
/// So many slow names are known; beyond, all are forgotten, and known again when they have been looked up once more.
const MAX_SLOW: usize = 8_192;
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
    permits_of_slow: Semaphore,
    /// Since when names are slow.
    slow: Mutex<HashMap<Box<str>, Instant>>,
}

/// A look-up that is under way.
struct Lookup<'a> {
    of: &'a Names,
    name: &'a str,
    began: Instant,
    ended: bool,
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
        let of_slow = lookups / LOOKUPS_PER_SLOW;
        Ok(Self {
            resolver: builder.build()?,
            permits: Semaphore::new(lookups - of_slow),
            permits_of_slow: Semaphore::new(of_slow),
            slow: Mutex::default(),
        })
    }

    /// Every address of a name, not judged.
    pub(super) async fn addresses(&self, name: &str) -> Result<Vec<IpAddr>, Failure> {
        let permits = if self.is_slow(name) { &self.permits_of_slow } else { &self.permits };
        let _permit = match permits.try_acquire() {
            Ok(permit) => permit,
            Err(_) => {
                // What is in memory is there at once. Else this was the beginning of a look-up, of which nothing remains.
                if let Some(found) = self.resolver.lookup_ip(name).now_or_never() {
                    return all(found);
                }
                permits.acquire().await.map_err(|_| Failure::DnsLookup)?
            }
        };
        let mut lookup = Lookup { of: self, name, began: clock::stopwatch(), ended: false };
        let found = self.resolver.lookup_ip(name).await;
        lookup.ended = true;
        drop(lookup);
        all(found)
    }

    fn is_slow(&self, name: &str) -> bool {
        self.slow().get(name).is_some_and(|since| since.elapsed() < SLOW_FOR)
    }

    fn slow(&self) -> MutexGuard<'_, HashMap<Box<str>, Instant>> {
        self.slow.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn all(found: Result<LookupIp, NetError>) -> Result<Vec<IpAddr>, Failure> {
    Ok(found.map_err(|_| Failure::looking_up())?.iter().collect())
}

impl Drop for Lookup<'_> {
    /// Also when nobody waits for it any more, as when it takes longer than a connection may.
    fn drop(&mut self) {
        let mut slow = self.of.slow();
        if self.began.elapsed() >= SLOW {
            if slow.len() >= MAX_SLOW {
                slow.clear();
            }
            slow.insert(self.name.into(), clock::stopwatch());
        } else if self.ended {
            slow.remove(self.name);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{net::Ipv4Addr, pin::pin};

    use futures_util::future::{join, join_all, poll_immediate};
    use tokio::net::UdpSocket;

    use super::*;

    /// What stands before the question, which ends with a nought, type and class.
    const HEAD: usize = 12;
    /// Who gives up after this time was slow, whoever else has the processors.
    const LONGER: Duration = SLOW.saturating_add(Duration::from_millis(200));

    /// Four look-ups at a time, of which one is for slow names, with a name server that never answers about any that
    /// begins with `s`, and gives the others an address for a minute.
    async fn names() -> Names {
        let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let mut server = NameServerConfig::udp(Ipv4Addr::LOCALHOST.into());
        server.connections[0].port = socket.local_addr().unwrap().port();
        tokio::spawn(async move {
            let mut query = [0; 512];
            loop {
                let (_, client) = socket.recv_from(&mut query).await.unwrap();
                if query[HEAD + 1] != b's' {
                    let end = HEAD + query[HEAD..].iter().position(|byte| *byte == 0).unwrap() + 5;
                    let is_v6 = query[end - 3] == 28;
                    let mut answer = query[..end].to_vec();
                    // An answer, with one question and one record, of the name of the question, for 60 seconds.
                    answer[2..HEAD].copy_from_slice(&[0x81, 0x80, 0, 1, 0, 1, 0, 0, 0, 0]);
                    answer.extend([0xc0, 0x0c, 0, if is_v6 { 28 } else { 1 }, 0, 1, 0, 0, 0, 60, 0]);
                    answer.extend(if is_v6 { [16].repeat(17) } else { vec![4, 8, 8, 8, 8] });
                    socket.send_to(&answer, client).await.unwrap();
                }
            }
        });
        let config = ResolverConfig::from_parts(None, Vec::new(), vec![server]);
        let mut builder = TokioResolver::builder_with_config(config, TokioRuntimeProvider::default());
        builder.options_mut().timeout = Duration::from_secs(1);
        Names::new(builder, 4).unwrap()
    }

    #[tokio::test]
    async fn what_is_in_memory_waits_for_no_look_up() {
        let names = names().await;
        let mut silent = pin!(join_all(["s1", "s2", "s3", "s4"].map(|name| names.addresses(name))));
        let found = names.addresses("a.example").await.unwrap();
        assert_eq!(found.len(), 2);
        assert!(poll_immediate(&mut silent).await.is_none());
        assert_eq!(names.permits.available_permits(), 0);
        assert_eq!(names.addresses("a.example").now_or_never(), Some(Ok(found)));
        assert_eq!(names.addresses("b.example").now_or_never(), None);
    }

    #[tokio::test]
    async fn nobody_waits_for_names_that_are_slow() {
        let names = names().await;
        let silent = || join_all(["s1", "s2", "s3"].map(|name| names.addresses(name)));
        // Two are given up by those who wait for them.
        let given_up = ["s4", "s5"].map(|name| tokio::time::timeout(LONGER, names.addresses(name)));
        assert!(join_all(given_up).await.iter().all(Result::is_err));
        assert!(silent().await.iter().all(Result::is_err));
        let mut again = Box::pin(join(silent(), names.addresses("s4")));
        assert!(poll_immediate(&mut again).await.is_none());
        assert_eq!((names.permits.available_permits(), names.permits_of_slow.available_permits()), (3, 0));
        let found = tokio::select! {
            found = names.addresses("a.example") => found,
            _ = &mut again => panic!("it waited for those"),
        };
        assert!(found.is_ok());
        // Who was slow long ago is like all others, and so is who is quick again.
        names.slow().insert("b.example".into(), clock::stopwatch() - SLOW_FOR);
        let found = tokio::select! {
            found = names.addresses("b.example") => found,
            _ = &mut again => panic!("it waited for those"),
        };
        assert!(found.is_ok() && !names.slow().contains_key("b.example"));
        drop(again);
        names.slow().insert("c.example".into(), clock::stopwatch());
        assert!(names.addresses("c.example").await.is_ok() && !names.is_slow("c.example"));
    }

    #[tokio::test]
    async fn not_too_many_slow_names_are_known() {
        let names = names().await;
        names.slow().extend((0..MAX_SLOW).map(|number| (number.to_string().into(), clock::stopwatch())));
        let _ = tokio::time::timeout(LONGER, names.addresses("s1")).await;
        assert_eq!(names.slow().keys().map(|name| &**name).collect::<Vec<_>>(), ["s1"]);
    }
}
