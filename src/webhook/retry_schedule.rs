//! When failed attempts are made again.

use std::time::Duration;

/// A schedule has at most this many attempts; a longer one is refused.
const MAX_ATTEMPTS: usize = 50;
/// The longest wait between two attempts, also one that a receiver asks for by `Retry-After`.
pub(crate) const MAX_WAIT: Duration = Duration::from_secs(24 * 60 * 60);

/// The waits before each attempt, the first one's included: `0s,1m,5m,30m,2h,24h`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RetrySchedule(Vec<Duration>);

impl RetrySchedule {
    /// Reads comma-separated durations such as `0s,1m,2h`; the error is a sentence for the operator.
    pub fn parse(text: &str) -> Result<Self, String> {
        let waits = text
            .split(',')
            .map(|wait| humantime::parse_duration(wait.trim()).map_err(|error| format!("`{}`: {error}", wait.trim())))
            .collect::<Result<Vec<_>, _>>()?;
        if waits.len() > MAX_ATTEMPTS {
            return Err(format!("at most {MAX_ATTEMPTS} attempts, not {}", waits.len()));
        }
        match waits.iter().find(|wait| **wait > MAX_WAIT) {
            Some(long) => Err(format!("a wait is at most 24h, not {}", humantime::format_duration(*long))),
            None => Ok(Self(waits)),
        }
    }

    /// The wait before the first attempt.
    pub fn first_wait(&self) -> Duration {
        self.0[0]
    }

    /// The wait after `attempts` attempts have failed; none when they were all.
    pub fn wait_after(&self, attempts: i32) -> Option<Duration> {
        usize::try_from(attempts).ok().and_then(|made| self.0.get(made)).copied()
    }
}

impl Default for RetrySchedule {
    fn default() -> Self {
        Self([0, 60, 5 * 60, 30 * 60, 2 * 60 * 60, 24 * 60 * 60].map(Duration::from_secs).to_vec())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_documented_schedule_is_the_default() {
        let schedule = RetrySchedule::parse("0s,1m,5m,30m,2h,24h").unwrap();
        assert_eq!(schedule, RetrySchedule::default());
        assert_eq!(schedule.first_wait(), Duration::ZERO);
        assert_eq!(schedule.wait_after(5), Some(MAX_WAIT));
        assert_eq!(schedule.wait_after(6), None);
    }

    #[test]
    fn names_what_is_wrong() {
        for (text, part) in [("0s,soon", "`soon`"), ("", "``"), ("0s,25h", "at most 24h")] {
            assert!(RetrySchedule::parse(text).unwrap_err().contains(part), "{text}");
        }
        assert!(RetrySchedule::parse(&["1s"; 51].join(",")).is_err());
    }
}
