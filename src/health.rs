//! Whether this node is to be sent work, for those who ask: the gRPC health service, and two paths for those who can only
//! fetch one. What they are told is known already: nobody who asks makes work for the database.

use std::time::Duration;

use http::{HeaderValue, Method, Request, Response, StatusCode, header};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tonic::body::Body;
use tonic_health::{ServingStatus, pb::health_server, server::HealthReporter};

/// The node as a whole, in the health service.
const NODE: &str = "";

/// Between two times that watchers are let go.
const LET_GO: Duration = Duration::from_secs(1);

/// What is known. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Health(watch::Receiver<Readiness>);

/// Finds it out.
pub(crate) struct Checks {
    ready: watch::Sender<Readiness>,
    reporter: HealthReporter,
    services: &'static [&'static str],
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Readiness {
    Ready,
    /// The database does not answer this node; others may be answered.
    NoDatabase,
    Stopping,
}

impl Health {
    /// A node with these services that is ready, the gRPC service that says so, and what keeps both true.
    pub(crate) async fn of(
        services: &'static [&'static str],
    ) -> (Self, health_server::HealthServer<impl health_server::Health>, Checks) {
        let (reporter, service) = tonic_health::server::health_reporter();
        let (ready, known) = watch::channel(Readiness::Ready);
        let checks = Checks { ready, reporter, services };
        checks.report(Readiness::Ready).await;
        (Self(known), service, checks)
    }

    /// The answer to a request for `/livez`, whether the process is there, or `/readyz`, whether it is to be sent work.
    pub(crate) fn answer<B>(&self, request: &Request<B>) -> Option<Response<Body>> {
        let readiness = match request.uri().path() {
            "/livez" => Readiness::Ready,
            "/readyz" => *self.0.borrow(),
            _ => return None,
        };
        let (status, text) = match readiness {
            Readiness::Ready => (StatusCode::OK, "ok\n"),
            Readiness::NoDatabase => (StatusCode::SERVICE_UNAVAILABLE, "the database does not answer\n"),
            Readiness::Stopping => (StatusCode::SERVICE_UNAVAILABLE, "shutting down\n"),
        };
        Some(fetched(request, || plain(status, text.to_owned())))
    }
}

impl Checks {
    /// Keeps what is told true, for ever: whether the database answers, which `available` says, and whether the node was
    /// `told` to stop. Whoever still watches at its `shutdown` is let go, since that waits for all streams.
    pub(crate) async fn follow(
        self,
        mut available: watch::Receiver<bool>,
        told: CancellationToken,
        shutdown: CancellationToken,
    ) {
        let changes = async {
            loop {
                let answers = *available.borrow_and_update();
                self.report(if answers { Readiness::Ready } else { Readiness::NoDatabase }).await;
                if available.changed().await.is_err() {
                    // It never changes.
                    std::future::pending::<()>().await;
                }
            }
        };
        tokio::select! {
            () = changes => {}
            () = told.cancelled() => {}
        }
        self.report(Readiness::Stopping).await;
        shutdown.cancelled().await;
        let mut reporter = self.reporter.clone();
        loop {
            for name in self.names() {
                reporter.clear_service_status(name).await;
            }
            self.report(Readiness::Stopping).await;
            // Some clients watch again at once, over a connection that is about to end.
            tokio::time::sleep(LET_GO).await;
        }
    }

    /// The node as a whole is there, whatever its database does: who restarts it for that would make nothing better.
    async fn report(&self, readiness: Readiness) {
        self.ready.send_replace(readiness);
        for name in self.names() {
            let serves = match readiness {
                Readiness::Ready => true,
                Readiness::NoDatabase => name == NODE,
                Readiness::Stopping => false,
            };
            let status = if serves { ServingStatus::Serving } else { ServingStatus::NotServing };
            self.reporter.set_service_status(name, status).await;
        }
    }

    fn names(&self) -> impl Iterator<Item = &'static str> {
        [NODE].into_iter().chain(self.services.iter().copied())
    }
}

/// What is there, for those who fetch it; for HEAD without its body, which HTTP/2 would send.
pub(crate) fn fetched<B>(request: &Request<B>, there: impl FnOnce() -> Response<Body>) -> Response<Body> {
    match *request.method() {
        Method::GET => there(),
        Method::HEAD => there().map(|_| Body::empty()),
        _ => {
            let mut refused = plain(StatusCode::METHOD_NOT_ALLOWED, "this can only be fetched\n".to_owned());
            refused.headers_mut().insert(header::ALLOW, HeaderValue::from_static("GET, HEAD"));
            refused
        }
    }
}

/// An answer in plain text, of this moment.
pub(crate) fn plain(status: StatusCode, text: String) -> Response<Body> {
    let mut response = Response::new(Body::new(http_body_util::Full::from(text)));
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}
