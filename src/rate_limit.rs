//! How fast an organisation may call: a layer behind `auth`, for both protocols.
//!
//! Each environment of an organisation has an allowance of its own, so that a trial cannot use up what production needs.
//! Each node counts for itself, in memory: a count that all nodes share would cost a trip to the database for every call,
//! to protect the database. Behind a balancer that spreads calls evenly, so many nodes allow so many times the rate.

use std::{
    collections::HashMap,
    future::ready,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll},
    time::{Duration, Instant},
};

use futures_util::{
    FutureExt,
    future::{BoxFuture, Either},
};
use http::{HeaderName, HeaderValue, Request, Response};
use tonic::body::Body;
use tower::{Layer, Service};

use crate::{
    auth::Principal,
    clock,
    grpc::rate_limited,
    store::KeyKind,
    webhook::{Admission, RateLimit, Tenant},
};

const LIMIT: HeaderName = HeaderName::from_static("x-ratelimit-limit");
const REMAINING: HeaderName = HeaderName::from_static("x-ratelimit-remaining");
const RESET: HeaderName = HeaderName::from_static("x-ratelimit-reset");
/// At most this many tenants that have used something up are remembered; beyond, what all of them used is forgiven.
const MAX_TENANTS: usize = 65_536;

/// The layer. Cheap to clone.
#[derive(Clone)]
pub(crate) struct RateLimits(Option<Arc<Counts>>);

struct Counts {
    limit: RateLimit,
    /// Where the clock of `full_at` begins.
    start: Instant,
    /// From when on a tenant has its whole allowance again; one who has it is not there.
    full_at: Mutex<HashMap<Tenant, Duration>>,
}

/// The layer around a service.
#[derive(Clone)]
pub(crate) struct Limited<S> {
    counts: Option<Arc<Counts>>,
    inner: S,
}

impl RateLimits {
    /// Every tenant may call at this rate; at any, when there is none.
    pub(crate) fn new(limit: Option<RateLimit>) -> Self {
        let counts = |limit| Counts { limit, start: clock::stopwatch(), full_at: Mutex::default() };
        Self(limit.map(|limit| Arc::new(counts(limit))))
    }
}

impl<S> Layer<S> for RateLimits {
    type Service = Limited<S>;

    fn layer(&self, inner: S) -> Self::Service {
        Limited { counts: self.0.clone(), inner }
    }
}

impl<S> Service<Request<Body>> for Limited<S>
where
    S: Service<Request<Body>, Response = Response<Body>>,
    S::Future: Send + 'static,
    S::Error: Send + 'static,
{
    type Response = Response<Body>;
    type Error = S::Error;
    type Future = Either<S::Future, BoxFuture<'static, Result<Self::Response, Self::Error>>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let principal = request.extensions().get::<Principal>().filter(|principal| principal.kind != KeyKind::Service);
        let Some((counts, principal)) = self.counts.as_ref().zip(principal) else {
            return Either::Left(self.inner.call(request));
        };
        let now = counts.start.elapsed();
        let admission = counts.take(&principal.tenant, now);
        let headers = headers(counts.limit, &admission, now);
        let answered = match admission.refused_for {
            Some(wait) => Either::Left(ready(Ok(rate_limited(wait).into_http()))),
            None => Either::Right(self.inner.call(request)),
        };
        Either::Right(answered.map(|answered| answered.map(|response| with(response, headers))).boxed())
    }
}

impl Counts {
    fn take(&self, tenant: &Tenant, now: Duration) -> Admission {
        let mut full_at = self.full_at.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(place) = full_at.get_mut(tenant) {
            let admission = self.limit.admit(*place, now);
            *place = admission.full_at;
            return admission;
        }
        if full_at.len() >= MAX_TENANTS {
            full_at.retain(|_, full_at| *full_at > now);
            // Not one by one, each after a look at all of them.
            if full_at.len() > MAX_TENANTS / 2 {
                full_at.clear();
            }
        }
        let admission = self.limit.admit(now, now);
        full_at.insert(tenant.clone(), admission.full_at);
        admission
    }
}

fn headers(limit: RateLimit, admission: &Admission, now: Duration) -> [(HeaderName, HeaderValue); 3] {
    let full = clock::now().after(admission.full_at.saturating_sub(now)).millis();
    // Not before the whole allowance is there.
    let reset = u64::try_from(full).unwrap_or(0).div_ceil(1000);
    [(LIMIT, limit.calls().into()), (REMAINING, admission.remaining.into()), (RESET, reset.into())]
}

fn with(mut response: Response<Body>, headers: [(HeaderName, HeaderValue); 3]) -> Response<Body> {
    response.headers_mut().extend(headers);
    response
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::webhook::Environment;

    #[test]
    fn remembers_no_more_tenants_than_it_may() {
        let counts =
            Counts { limit: RateLimit::parse("1/h").unwrap(), start: clock::stopwatch(), full_at: Mutex::default() };
        let tenant = |number: usize| Tenant::new(&format!("t{number}"), Environment::Live).unwrap();
        for number in 0..2 * MAX_TENANTS + 10 {
            assert!(counts.take(&tenant(number), Duration::ZERO).refused_for.is_none());
            assert!(counts.full_at.lock().unwrap().len() <= MAX_TENANTS);
        }
        let last = tenant(2 * MAX_TENANTS + 9);
        assert!(counts.take(&last, Duration::ZERO).refused_for.is_some());
    }
}
