//! One attempt from top to bottom: sign, POST, decide, record.

use std::{sync::Arc, time::Duration};

use bytes::BytesMut;
use http::{HeaderMap, HeaderName, HeaderValue, header::CONTENT_TYPE};
use tokio::sync::mpsc;

use super::{Engine, lease_length, pace::Ended};
use crate::{
    clock::{self, Seldom},
    egress, failpoint,
    store::{Error, Finished, Leased, Store, Target},
    telemetry::Kind,
    webhook::{self, Answer, Attempt, Outcome, Plan, Timestamp, WebhookStatus},
};

const SIGNATURE: HeaderName = HeaderName::from_static("x-shortform-signature");
const TIMESTAMP: HeaderName = HeaderName::from_static("x-shortform-timestamp");
const WEBHOOK_ID: HeaderName = HeaderName::from_static("x-shortform-webhook-id");
const DELIVERY_ID: HeaderName = HeaderName::from_static("x-shortform-delivery-id");
const DELIVERY_ATTEMPT: HeaderName = HeaderName::from_static("x-shortform-delivery-attempt");
const STANDARD_ID: HeaderName = HeaderName::from_static("webhook-id");
const STANDARD_TIMESTAMP: HeaderName = HeaderName::from_static("webhook-timestamp");
const STANDARD_SIGNATURE: HeaderName = HeaderName::from_static("webhook-signature");

/// With what the client adds: whom it asks, who asks, what it takes, and how long the body is.
const MAX_HEADERS: usize = 13;

/// An attempt begins only when its lease lasts this much longer than the attempt may: time to record the result.
const TO_RECORD: Duration = Duration::from_secs(5);
/// Where the clock is set forward by less than what counts, the requests on the wire still end within their leases.
const _: () = assert!(clock::LEAP.as_secs() < TO_RECORD.as_secs());
/// Between tries to record a result, or to give leases back, while the database fails.
pub(super) const RECORD_AGAIN: Duration = Duration::from_secs(1);
/// What a database that fails does to thousands of attempts is said once in this time.
const SAY_AGAIN: Duration = Duration::from_secs(1);
static NOT_READ: Seldom = Seldom::new(SAY_AGAIN);
static NOT_OPENED: Seldom = Seldom::new(SAY_AGAIN);
static NOT_GIVEN_BACK: Seldom = Seldom::new(SAY_AGAIN);
static RAN_OUT: Seldom = Seldom::new(SAY_AGAIN);
static NOT_RECORDED: Seldom = Seldom::new(SAY_AGAIN);
static NEVER_RECORDED: Seldom = Seldom::new(SAY_AGAIN);
static LOST: Seldom = Seldom::new(SAY_AGAIN);
/// Before a delivery that could not be attempted here is given back. It keeps its place meanwhile: not all that wait are
/// to try in vain.
const NO_ATTEMPT_PAUSE: Duration = Duration::from_secs(1);
/// What the log of a delivery says of an attempt that could not be signed.
const UNSIGNED: &str = "Signing secret cannot be read";
/// What it says of a test event whose caller was told that it is not sent.
const UNSENT_TEST: &str = "The test was not sent";

/// A place on the wire, given back as soon as the request has ended, and not only when its result is recorded: the next
/// attempt for the webhook need not wait for a commit.
pub(super) struct Slot {
    freed: Freed,
    to: mpsc::UnboundedSender<Freed>,
}

/// A place in memory, given back however the attempt ends.
pub(super) struct Place {
    store: Store,
    webhook_id: Arc<str>,
    bytes: usize,
}

/// What the engine is told when a place on the wire is free again.
#[derive(Clone, Copy)]
pub(super) struct Freed {
    /// Whose it was, as the queue knows it.
    pub(super) line: usize,
    /// How the attempt ended; none when it was not made.
    pub(super) ended: Option<Ended>,
}

impl Slot {
    pub(super) fn new(line: usize, to: mpsc::UnboundedSender<Freed>) -> Self {
        Self { freed: Freed { line, ended: None }, to }
    }

    fn ended(&mut self, attempt: &Attempt) {
        let took = Duration::from_millis(u64::try_from(attempt.duration_ms).unwrap_or(0));
        self.freed.ended = Some(Ended { took, answered: attempt.answer.is_some() });
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        let _ = self.to.send(self.freed);
    }
}

impl Place {
    pub(super) fn new(store: Store, leased: &Leased) -> Self {
        Self { store, webhook_id: Arc::clone(&leased.webhook_id), bytes: leased.event.data.as_str().len() }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.store.let_go(&self.webhook_id, self.bytes);
    }
}

impl Engine {
    /// Makes the attempt and records it.
    #[tracing::instrument(level = "debug", skip_all, fields(webhook = &*leased.webhook_id, delivery = leased.delivery_id, attempt = leased.attempt))]
    pub(super) async fn attempt(self: Arc<Self>, leased: Leased, place: Option<(Slot, Place)>) {
        let (mut slot, _place) = place.unzip();
        let target = match self.store.target(&leased.webhook_id).await {
            Ok(target) => target,
            // It is the row, or the master keys of this node, and asking at once again would change neither: the delivery is
            // to go on by its schedule, and to end where everybody sees it.
            Err(error @ (Error::Sealed(_) | Error::Corrupt(_))) => {
                if let Some(count) = NOT_OPENED.reasons() {
                    let webhook = &*leased.webhook_id;
                    tracing::error!(webhook, %error, count, "signing secrets cannot be read, this one at least; attempts fail");
                }
                drop(slot);
                let kind = kind(&leased);
                return self.fail(leased, kind, UNSIGNED).await;
            }
            Err(error) => {
                if let Some(count) = NOT_READ.reasons() {
                    tracing::warn!(%error, count, "webhooks could not be read; leases are given back");
                }
                tokio::time::sleep(NO_ATTEMPT_PAUSE).await;
                return self.give_back(leased, clock::now()).await;
            }
        };
        let is_test = leased.done.is_some();
        let sendable = target.filter(|target| is_test || target.status == WebhookStatus::Active);
        let in_time = clock::now().after(self.request_timeout + TO_RECORD) < leased.expires_at;
        let Some(target) = sendable.filter(|_| in_time) else {
            // Queued for so long that the lease would not last; or deleted or disabled, of which a claim may know less for a
            // moment, and is not to have it again at once.
            let due_at = clock::now().after(if in_time { NO_ATTEMPT_PAUSE } else { Duration::ZERO });
            return self.give_back(leased, due_at).await;
        };
        failpoint::reached("post", "before");
        let Some((attempt, outcome)) = self.post(&leased, &target).await else {
            tokio::time::sleep(NO_ATTEMPT_PAUSE).await;
            return self.give_back(leased, clock::now()).await;
        };
        if let Some(mut slot) = slot.take() {
            slot.ended(&attempt);
        }
        failpoint::reached("post", "after");
        self.end(leased, attempt, &outcome).await;
    }

    /// Records an attempt that failed before there was a request, by no fault of the receiver.
    async fn fail(&self, leased: Leased, kind: Kind, reason: &str) {
        self.store.metrics().not_sent(kind);
        let (number, started_at, error) = (leased.attempt, clock::now(), Some(reason.to_owned()));
        let attempt = Attempt { number, started_at, duration_ms: 0, answer: None, error };
        self.end(leased, attempt, &Outcome::Refused { retry_after: None }).await;
    }

    /// Decides what follows an attempt, and records both.
    async fn end(&self, mut leased: Leased, attempt: Attempt, outcome: &Outcome) {
        let now = clock::now();
        let transition = webhook::decide(attempt.number, leased.plan, outcome, &self.schedule, now);
        let status_code = attempt.answer.as_ref().map(|answer| answer.status_code);
        let (status, error, duration_ms) = (transition.status.as_str(), &attempt.error, attempt.duration_ms);
        tracing::debug!(status, status_code, error, duration_ms, "attempted");
        let done = leased.done.take();
        // Whoever waits for a test hears of it when it is recorded.
        let told = done.map(|done| (done, attempt.clone()));
        let finished = Arc::new(Finished {
            tenant: leased.tenant,
            webhook_id: leased.webhook_id,
            delivery_id: leased.delivery_id,
            event: leased.event,
            attempt,
            transition,
            ended_at: now,
        });
        self.record(&finished, leased.plan, leased.expires_at).await;
        if let Some((done, attempt)) = told {
            done.tell(attempt);
        }
    }

    /// Gives the lease back unused, again and again while the database fails and the lease lasts. A test event ends by it.
    async fn give_back(&self, mut leased: Leased, due_at: Timestamp) {
        // Whoever waits for a test hears at once that there is none; it is not to go out later then.
        if leased.done.take().is_some() {
            return self.fail(leased, Kind::Test, UNSENT_TEST).await;
        }
        while let Err(error) = self.store.release_one(&leased, due_at).await {
            if clock::now().after(RECORD_AGAIN) >= leased.expires_at {
                if let Some(count) = RAN_OUT.reasons() {
                    tracing::warn!(%error, count, "leases could not be given back; they will run out");
                }
                return;
            }
            if let Some(count) = NOT_GIVEN_BACK.reasons() {
                tracing::warn!(%error, count, "leases could not be given back; trying again");
            }
            tokio::time::sleep(RECORD_AGAIN).await;
        }
    }

    /// None when this node had no file left for a connection, which is no attempt, unless somebody waits for it.
    async fn post(&self, leased: &Leased, target: &Target) -> Option<(Attempt, Outcome)> {
        let started_at = clock::now();
        let stopwatch = clock::stopwatch();
        let body = webhook::body(&leased.event, &leased.webhook_id);
        let in_flight = self.store.metrics().begun();
        let answered = match (&target.url, headers(leased, target, started_at, &body)) {
            (Some(url), Some(headers)) => self.client.post(url, headers, body).await,
            _ => egress::Outcome::Failed(egress::Failure::InvalidUrl),
        };
        drop(in_flight);
        let took = stopwatch.elapsed();
        let duration_ms = i32::try_from(took.as_millis()).unwrap_or(i32::MAX);
        let mut attempt = Attempt { number: leased.attempt, started_at, duration_ms, answer: None, error: None };
        let result = result(&answered);
        let outcome = match answered {
            egress::Outcome::Answered(answer) => {
                attempt.error = refusal(answer.status);
                attempt.answer = Some(Answer { status_code: answer.status, body: text(&answer.body) });
                match attempt.error {
                    None => Outcome::Accepted,
                    Some(_) => {
                        let now_ms = clock::now().millis();
                        Outcome::Refused { retry_after: answer.retry_after.map(|after| after.wait(now_ms)) }
                    }
                }
            }
            egress::Outcome::Failed(egress::Failure::NoSocket) if leased.done.is_none() => return None,
            egress::Outcome::Failed(failure) => {
                attempt.error = Some(failure.to_string());
                Outcome::Refused { retry_after: None }
            }
        };
        let since_event = leased.event.created_at.until(started_at);
        self.store.metrics().attempted(kind(leased), since_event, result, took);
        Some((attempt, outcome))
    }

    /// Whether a result is not tried again: its lease has ended, and it is not that the database is away. Where somebody keeps
    /// a lock, others wait for that as well whenever it is tried, so it is given one more lease.
    fn gives_up(&self, error: &Error, expires_at: Timestamp) -> bool {
        let until = match error {
            error if error.is_locked() => expires_at.after(lease_length(self.request_timeout)),
            error if error.passes() => return false,
            _ => expires_at,
        };
        clock::now().after(RECORD_AGAIN) >= until
    }

    /// Records the result, again and again while the database is away, and else while the lease lasts: nobody else can have
    /// taken it over then, and what a receiver accepted is not to be sent again for that (see `claim.rs`).
    async fn record(&self, finished: &Arc<Finished>, plan: Plan, expires_at: Timestamp) {
        let mut kept = None;
        loop {
            match self.store.record(Arc::clone(finished)).await {
                Ok(true) => {
                    self.store.count_end(finished.transition.status, plan);
                    return;
                }
                Ok(false) => {
                    self.store.metrics().dropped();
                    if let Some(count) = LOST.reasons() {
                        tracing::warn!(
                            count,
                            "leases were lost before results were recorded, or these had been; they are dropped"
                        );
                    }
                    return;
                }
                Err(error) if self.gives_up(&error, expires_at) => {
                    if let Some(count) = NEVER_RECORDED.reasons() {
                        tracing::error!(%error, count, "results could not be recorded while their leases lasted");
                    }
                    return;
                }
                Err(error) => {
                    if error.passes() {
                        kept.get_or_insert_with(|| self.leases.keep_result());
                    }
                    if let Some(count) = NOT_RECORDED.reasons() {
                        tracing::warn!(%error, count, "results could not be recorded; trying again");
                    }
                }
            }
            tokio::time::sleep(RECORD_AGAIN).await;
        }
    }
}

/// Why there is an attempt.
fn kind(leased: &Leased) -> Kind {
    match leased {
        Leased { done: Some(_), .. } => Kind::Test,
        Leased { attempt: 1, .. } => Kind::First,
        _ => Kind::Retry,
    }
}

/// How an attempt ended, in as few words as metrics may have.
fn result(outcome: &egress::Outcome) -> &'static str {
    match outcome {
        egress::Outcome::Failed(failure) => failure.name(),
        egress::Outcome::Answered(answer) => match answer.status {
            200..=299 => "success",
            300..=399 => "http_3xx",
            400..=499 => "http_4xx",
            500..=599 => "http_5xx",
            _ => "http_other",
        },
    }
}

/// Why an answer of this status is a failure; none for a 2xx.
fn refusal(status: u16) -> Option<String> {
    match status {
        200..=299 => None,
        300..=399 => Some("Redirects are not followed".to_owned()),
        _ => Some(format!("HTTP {status}")),
    }
}

/// The answer as text that both databases can hold.
fn text(body: &[u8]) -> String {
    String::from_utf8_lossy(body).replace('\0', "\u{fffd}")
}

/// None when a value is no header value, which ids and signatures always are.
fn headers(leased: &Leased, target: &Target, now: Timestamp, body: &[u8]) -> Option<HeaderMap> {
    let keys = target.keys(now);
    let (shortform, standard) = webhook::signature_headers(&keys, &leased.delivery_id, now, body);
    let (created_at, attempt) = (leased.event.created_at.to_string(), leased.attempt.to_string());
    let secs = now.secs().to_string();
    let values = [
        (SIGNATURE, &*shortform),
        (TIMESTAMP, &created_at),
        (WEBHOOK_ID, &leased.webhook_id),
        (DELIVERY_ID, &leased.delivery_id),
        (DELIVERY_ATTEMPT, &attempt),
        (STANDARD_ID, &leased.delivery_id),
        (STANDARD_TIMESTAMP, &secs),
        (STANDARD_SIGNATURE, &standard),
    ];
    // One piece of memory for all of them: the client copies them, which then costs none.
    let mut bytes = BytesMut::with_capacity(values.iter().map(|(_, value)| value.len()).sum());
    let mut headers = HeaderMap::with_capacity(MAX_HEADERS);
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    for (name, value) in values {
        bytes.extend_from_slice(value.as_bytes());
        headers.insert(name, HeaderValue::from_maybe_shared(bytes.split().freeze()).ok()?);
    }
    Some(headers)
}
