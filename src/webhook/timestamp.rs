//! A moment, to the millisecond.

use std::{
    fmt,
    time::{Duration, UNIX_EPOCH},
};

/// 9999-12-31T23:59:59.999Z.
const LAST_MILLIS: i64 = 253_402_300_799_999;

/// Milliseconds since 1970-01-01T00:00:00Z.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Timestamp(i64);

impl Timestamp {
    /// The moment this many milliseconds after the epoch; earlier ones count as the epoch.
    pub const fn from_millis(millis: i64) -> Self {
        Self(if millis < 0 { 0 } else { millis })
    }

    /// Milliseconds since the epoch.
    pub const fn millis(self) -> i64 {
        self.0
    }

    /// Whole seconds since the epoch.
    pub const fn secs(self) -> i64 {
        self.0 / 1000
    }

    /// The moment `wait` later; at the end of time it stays there.
    pub fn after(self, wait: Duration) -> Self {
        Self(self.0.saturating_add(i64::try_from(wait.as_millis()).unwrap_or(i64::MAX)))
    }

    /// The moment `wait` earlier; at the epoch it stays there.
    pub fn before(self, wait: Duration) -> Self {
        Self::from_millis(self.0.saturating_sub(i64::try_from(wait.as_millis()).unwrap_or(i64::MAX)))
    }

    /// How long it is until `later`; zero when that has passed.
    pub fn until(self, later: Self) -> Duration {
        Duration::from_millis(u64::try_from(later.0.saturating_sub(self.0)).unwrap_or(0))
    }
}

/// RFC 3339 in UTC, ending in `Z`, with milliseconds only when they are not zero.
impl fmt::Display for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // RFC 3339 has four digits for the year.
        let since_epoch = Duration::from_millis(u64::try_from(self.0.min(LAST_MILLIS)).unwrap_or(0));
        if self.0 % 1000 == 0 {
            humantime::format_rfc3339_seconds(UNIX_EPOCH + since_epoch).fmt(f)
        } else {
            humantime::format_rfc3339_millis(UNIX_EPOCH + since_epoch).fmt(f)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shows_milliseconds_only_when_there_are_some() {
        assert_eq!(Timestamp::from_millis(1_707_048_000_000).to_string(), "2024-02-04T12:00:00Z");
        assert_eq!(Timestamp::from_millis(1_707_048_000_050).to_string(), "2024-02-04T12:00:00.050Z");
    }

    #[test]
    fn waits_never_go_backwards() {
        let (early, late) = (Timestamp::from_millis(1_000), Timestamp::from_millis(4_000));
        assert_eq!(early.until(late), Duration::from_secs(3));
        assert_eq!(late.until(early), Duration::ZERO);
        assert_eq!(late.after(Duration::MAX).millis(), i64::MAX);
        assert_eq!(late.before(Duration::from_secs(3)), early);
        assert_eq!(late.before(Duration::MAX).millis(), 0);
    }
}
