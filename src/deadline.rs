//! Gives up a gRPC call that takes too long: the caller's `grpc-timeout`, and one of our own; or that waits for something
//! that is known to be gone. For a stream it is the time until the stream begins.

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

/// The layer.
#[derive(Clone)]
pub(crate) struct Deadline<F> {
    /// The time that no call may exceed.
    pub(crate) longest: Duration,
    /// Ends with what to say to the calls under way when there is no use in waiting.
    pub(crate) useless: F,
}

/// The layer around a service.
#[derive(Clone)]
pub(crate) struct WithDeadline<F, S> {
    deadline: Deadline<F>,
    inner: S,
}

impl<F: Clone, S> Layer<S> for Deadline<F> {
    type Service = WithDeadline<F, S>;

    fn layer(&self, inner: S) -> Self::Service {
        WithDeadline { deadline: self.clone(), inner }
    }
}

impl<F, Useless, S> Service<Request<Body>> for WithDeadline<F, S>
where
    F: Fn() -> Useless,
    Useless: Future<Output = Status> + Send + 'static,
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
        let longest = self.deadline.longest;
        let time = asked(request.headers()).map_or(longest, |asked| asked.min(longest));
        let (answer, useless) = (self.inner.call(request), (self.deadline.useless)());
        Box::pin(async move {
            // Dropping the call also drops the handler.
            let given_up = tokio::select! {
                biased;
                answered = answer => return answered,
                status = useless => status,
                () = tokio::time::sleep(time) => {
                    Status::deadline_exceeded("the call took too long and was given up")
                }
            };
            Ok(given_up.into_http())
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
