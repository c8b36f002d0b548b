//! Gives up a gRPC call that takes too long: the caller's `grpc-timeout`, and one of our own. For a stream it is the
//! time until the stream begins.

use std::{
    task::{Context, Poll},
    time::Duration,
};

use futures_util::future::BoxFuture;
use http::{HeaderMap, Request, Response};
use tonic::{Status, body::Body};
use tower::{Layer, Service};

/// Digits that `grpc-timeout` may have.
const MAX_DIGITS: usize = 8;

/// The layer, with the time that no call may exceed.
#[derive(Clone, Copy)]
pub(crate) struct Deadline(pub(crate) Duration);

/// The layer around a service.
#[derive(Clone)]
pub(crate) struct WithDeadline<S> {
    longest: Duration,
    inner: S,
}

impl<S> Layer<S> for Deadline {
    type Service = WithDeadline<S>;

    fn layer(&self, inner: S) -> Self::Service {
        WithDeadline { longest: self.0, inner }
    }
}

impl<S> Service<Request<Body>> for WithDeadline<S>
where
    S: Service<Request<Body>, Response = Response<Body>>,
    S::Future: Send + 'static,
{
    type Response = Response<Body>;
    type Error = S::Error;
    type Future = BoxFuture<'static, Result<Self::Response, Self::Error>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let time = asked(request.headers()).map_or(self.longest, |asked| asked.min(self.longest));
        let answer = self.inner.call(request);
        Box::pin(async move {
            let refuse = |_| Ok(Status::deadline_exceeded("the call took too long and was given up").into_http());
            // Dropping the call also drops the handler.
            tokio::time::timeout(time, answer).await.unwrap_or_else(refuse)
        })
    }
}

/// `grpc-timeout`, as gRPC over HTTP/2 defines it; none when it is not of that form.
fn asked(headers: &HeaderMap) -> Option<Duration> {
    let text = headers.get("grpc-timeout")?.to_str().ok()?;
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    if digits.len() > MAX_DIGITS || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let count = digits.parse().ok()?;
    match unit {
        "H" => Some(Duration::from_secs(count * 60 * 60)),
        "M" => Some(Duration::from_secs(count * 60)),
        "S" => Some(Duration::from_secs(count)),
        "m" => Some(Duration::from_millis(count)),
        "u" => Some(Duration::from_micros(count)),
        "n" => Some(Duration::from_nanos(count)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_callers_ask_for() {
        let asked = |text: &str| {
            let mut headers = HeaderMap::new();
            headers.insert("grpc-timeout", text.parse().unwrap());
            asked(&headers)
        };
        assert_eq!(asked("200m"), Some(Duration::from_millis(200)));
        assert_eq!(asked("99999999H"), Some(Duration::from_secs(99_999_999 * 3_600)));
        for wrong in ["", "m", "1", "1x", "-1m", "+1m", "123456789m", "1 m", "1mm"] {
            assert_eq!(asked(wrong), None, "{wrong}");
        }
    }
}
