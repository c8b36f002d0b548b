//! How long what is finished is kept.

use std::time::Duration;

/// How long what is finished is kept; for ever where nothing is said.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Retention {
    /// Deliveries, with all that belongs to them.
    pub deliveries: Option<Duration>,
    /// What was sent, and could be sent again by hand.
    pub payloads: Option<Duration>,
    /// The log of attempts, and what receivers answered.
    pub attempts: Option<Duration>,
}

impl Retention {
    /// How long payloads are kept: at most as long as what was sent with them.
    pub fn payloads(&self) -> Option<Duration> {
        [self.payloads, self.deliveries].into_iter().flatten().min()
    }
}
