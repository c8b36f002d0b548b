//! The only source of now, randomness and ids.

use std::{
    sync::Mutex,
    time::{Instant, SystemTime, UNIX_EPOCH},
};

use ring::rand::{SecureRandom, SystemRandom};
use ulid::Ulid;

use crate::webhook::Timestamp;

/// The last id given out: ids made within one millisecond count up from it, so that a list keeps their order.
static LAST_ID: Mutex<Ulid> = Mutex::new(Ulid::nil());

/// The time of day.
#[expect(clippy::disallowed_methods, reason = "this is the one place")]
pub fn now() -> Timestamp {
    let millis = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis());
    Timestamp::from_millis(i64::try_from(millis).unwrap_or(i64::MAX))
}

/// A moment to measure from, which no change of the time of day moves.
#[expect(clippy::disallowed_methods, reason = "this is the one place")]
pub fn stopwatch() -> Instant {
    Instant::now()
}

/// Bytes that nobody can guess.
///
/// # Panics
///
/// When the operating system has no randomness to give: nothing that needs a secret may go on then.
pub fn random<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    SystemRandom::new().fill(&mut bytes).expect("the operating system gives randomness");
    bytes
}

/// A new id: `prefix`, `_`, and 26 characters that sort by time and then by order of making.
pub fn new_id(prefix: &str) -> String {
    let millis = u64::try_from(now().millis()).unwrap_or(0);
    let mut last = LAST_ID.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let fresh = match last.increment() {
        Ok(next) if millis <= last.timestamp_ms() => next,
        _ => Ulid::from_parts(millis, u128::from_be_bytes(random())),
    };
    *last = fresh;
    drop(last);
    format!("{prefix}_{}", fresh.to_string().to_ascii_lowercase())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_sort_in_the_order_they_were_made() {
        let ids: Vec<String> = (0..10_000).map(|_| new_id("del")).collect();
        assert!(ids.is_sorted_by(|earlier, later| earlier < later));
        assert!(ids.iter().all(|id| id.len() == 30 && !id.contains('.')));
    }
}
