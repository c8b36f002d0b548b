//! How many calls an organisation may make, by the generic cell rate algorithm.
//!
//! GCRA in its virtual scheduling form (ITU-T I.371, annex A): each call admitted moves a point in time, from which on the
//! caller has its whole allowance again, one interval further, and a call that would move it too far is refused. That is
//! a bucket of tokens that fills evenly, with one number to remember.

use std::{fmt, time::Duration};

/// More calls than this in a period are not told from no limit.
const MAX_CALLS: u32 = 1_000_000_000;

/// So many calls in such a time, all at once or evenly.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RateLimit {
    calls: u32,
    per: Period,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Period {
    Second,
    Minute,
    Hour,
}

/// What becomes of a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Admission {
    /// When the caller has its whole allowance again, on the clock of the question; to be remembered.
    pub full_at: Duration,
    /// How many more calls would be admitted now.
    pub remaining: u32,
    /// How long to wait before the call is admitted; none when it is.
    pub refused_for: Option<Duration>,
}

impl Period {
    const ALL: [Self; 3] = [Self::Second, Self::Minute, Self::Hour];

    fn as_str(self) -> &'static str {
        match self {
            Self::Second => "s",
            Self::Minute => "min",
            Self::Hour => "h",
        }
    }

    fn length(self) -> Duration {
        Duration::from_secs(match self {
            Self::Second => 1,
            Self::Minute => 60,
            Self::Hour => 60 * 60,
        })
    }
}

impl RateLimit {
    /// Reads `1000/min`, `20/s` or `5000/h`.
    pub fn parse(text: &str) -> Result<Self, String> {
        let parsed = text.split_once('/').and_then(|(calls, per)| {
            let calls = calls.parse().ok().filter(|calls| (1..=MAX_CALLS).contains(calls))?;
            let per = Period::ALL.into_iter().find(|period| period.as_str() == per)?;
            Some(Self { calls, per })
        });
        parsed.ok_or_else(|| format!("`{text}` is neither off nor a rate such as 1000/min, 20/s or 5000/h"))
    }

    /// Calls in a period.
    pub fn calls(self) -> u32 {
        self.calls
    }

    /// Judges a call made `now` by a caller who has its whole allowance from `full_at` on; both on one clock that begins
    /// anywhere.
    pub fn admit(self, full_at: Duration, now: Duration) -> Admission {
        let (period, interval) = (self.per.length(), self.interval());
        let used_until = full_at.max(now) + interval;
        let (full_at, refused_for) = match used_until.checked_sub(now + period) {
            Some(too_far) if !too_far.is_zero() => (full_at, Some(too_far)),
            _ => (used_until, None),
        };
        let left = (now + period).saturating_sub(full_at).as_nanos() / interval.as_nanos();
        Admission { full_at, remaining: u32::try_from(left).unwrap_or(u32::MAX).min(self.calls), refused_for }
    }

    /// Between two calls that are made evenly.
    fn interval(self) -> Duration {
        self.per.length() / self.calls
    }
}

impl fmt::Display for RateLimit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.calls, self.per.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn is_written_as_it_is_read() {
        for text in ["1000/min", "20/s", "1/h", "1000000000/s"] {
            assert_eq!(RateLimit::parse(text).unwrap().to_string(), text);
        }
        for text in ["", "off", "0/min", "-1/min", "1000", "1000/day", "1000 / min", "1000000001/s", "1.5/s"] {
            assert!(RateLimit::parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn admits_a_period_s_calls_at_once_and_then_evenly() {
        for text in ["5/min", "7/min", "1/s", "1000/min"] {
            let limit = RateLimit::parse(text).unwrap();
            let (mut full_at, mut now) = (Duration::ZERO, Duration::from_secs(1_000_000));
            for left in (0..limit.calls()).rev() {
                let admission = limit.admit(full_at, now);
                assert_eq!((admission.remaining, admission.refused_for), (left, None), "{text}");
                full_at = admission.full_at;
            }
            let refused = limit.admit(full_at, now);
            assert_eq!((refused.remaining, refused.full_at), (0, full_at), "a refused call uses nothing up");
            let wait = refused.refused_for.unwrap();
            assert!(wait <= limit.interval(), "{text}: {wait:?}");
            assert!(limit.admit(full_at, now + wait - Duration::from_nanos(1)).refused_for.is_some(), "{text}");
            now += wait;
            let admission = limit.admit(full_at, now);
            assert_eq!((admission.remaining, admission.refused_for), (0, None), "{text}");
            assert_eq!(limit.admit(admission.full_at, now + limit.per.length()).remaining, limit.calls() - 1);
        }
    }
}
