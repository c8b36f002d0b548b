//! `Retry-After` (RFC 9110, section 10.2.3): seconds, or a date.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// When the receiver wants to be asked again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RetryAfter {
    /// So long after its answer.
    Delay(Duration),
    /// Not before this many milliseconds after the epoch.
    At(u64),
}

impl RetryAfter {
    /// Reads the header; what is neither number nor date is as good as absent.
    pub fn parse(value: &str) -> Option<Self> {
        let value = value.trim();
        if !value.is_empty() && value.bytes().all(|byte| byte.is_ascii_digit()) {
            return Some(Self::Delay(Duration::from_secs(value.parse().unwrap_or(u64::MAX))));
        }
        let at: SystemTime = httpdate::parse_http_date(value).ok()?;
        let since_epoch = at.duration_since(UNIX_EPOCH).unwrap_or_default();
        Some(Self::At(u64::try_from(since_epoch.as_millis()).unwrap_or(u64::MAX)))
    }

    /// The wait that it means at `now_ms`, milliseconds since the epoch.
    pub fn wait(self, now_ms: i64) -> Duration {
        match self {
            Self::Delay(delay) => delay,
            Self::At(at) => Duration::from_millis(at.saturating_sub(u64::try_from(now_ms).unwrap_or(0))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_seconds_and_dates() {
        assert_eq!(RetryAfter::parse(" 120 "), Some(RetryAfter::Delay(Duration::from_secs(120))));
        let huge = "99999999999999999999999";
        assert_eq!(RetryAfter::parse(huge), Some(RetryAfter::Delay(Duration::from_secs(u64::MAX))));
        let date = RetryAfter::parse("Sun, 04 Feb 2024 12:00:00 GMT").unwrap();
        assert_eq!(date.wait(1_707_047_990_000), Duration::from_secs(10));
        assert_eq!(date.wait(1_707_048_990_000), Duration::ZERO);
        for nonsense in ["", "soon", "-5", "1.5", "Sun, 99 Feb 2024"] {
            assert_eq!(RetryAfter::parse(nonsense), None, "{nonsense}");
        }
    }
}
