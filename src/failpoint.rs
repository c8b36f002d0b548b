//! Steps of an event's way at which a test ends the process, as a crash at that very place would.
//!
//! Only with the feature `failpoints`, which nothing that is shipped has; without it nothing of this is there.

/// Ends the process here, if `SHORTKIT_CRASH_AT` is `what moment:count` and this is that many times it came by.
#[cfg(feature = "failpoints")]
pub(crate) fn reached(what: &str, moment: &str) {
    use std::sync::{
        LazyLock,
        atomic::{AtomicUsize, Ordering},
    };
    static PLAN: LazyLock<Option<(String, AtomicUsize)>> = LazyLock::new(|| {
        let plan = std::env::var("SHORTKIT_CRASH_AT").ok()?;
        let (step, count) = plan.split_once(':')?;
        Some((step.to_owned(), AtomicUsize::new(count.parse().ok()?)))
    });
    if let Some((planned, left)) = &*PLAN
        && *planned == format!("{what} {moment}")
        && left.fetch_sub(1, Ordering::SeqCst) == 1
    {
        std::process::abort();
    }
}

#[cfg(not(feature = "failpoints"))]
#[inline]
pub(crate) fn reached(_what: &str, _moment: &str) {}
