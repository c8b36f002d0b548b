//! Receivers of every manner, and what they saw.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use bytes::Bytes;
use http::{Request, Response, StatusCode, header::RETRY_AFTER};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper_util::rt::{TokioExecutor, TokioIo};
use serde::{Deserialize, Serialize};
use tokio::net::{TcpListener, TcpSocket};

/// What one run of events saw arrive.
#[derive(Default)]
pub(crate) struct Arrived {
    run: AtomicU64,
    /// Nanoseconds from before the publish to the arrival.
    latencies: Mutex<Vec<u64>>,
}

/// How long `/down` is.
#[derive(Clone, Copy, Default, Serialize, Deserialize)]
pub(crate) struct Recovery {
    /// From the first request that it refuses to the time at which it tells all to come back.
    pub(crate) down: Duration,
    /// It is up before, once it has refused so many.
    pub(crate) refusals: usize,
}

/// What `/report` tells of it.
#[derive(Serialize, Deserialize)]
pub(crate) struct Report {
    pub(crate) refused: usize,
    pub(crate) accepted: usize,
    /// The most requests of a webhook that were under way at a time.
    pub(crate) most_under_way: usize,
    /// Until all come back.
    pub(crate) back_in: Duration,
    /// From the first that was accepted to the last.
    pub(crate) took: Duration,
}

/// A receiver that is down until it recovers.
struct Recovering {
    recovery: Recovery,
    /// Set by the first that is refused.
    back_at: Mutex<Option<Instant>>,
    refused: AtomicUsize,
    accepted: AtomicUsize,
    /// When the first was accepted, and the last.
    accepted_at: Mutex<Option<(Instant, Instant)>>,
    /// Requests under way by webhook, and the most there were.
    under_way: Mutex<HashMap<String, (usize, usize)>>,
}

/// What `/slow`, `/down`, `/report` of it, and every other path say.
pub(crate) struct Manners {
    pub(crate) start: Instant,
    pub(crate) slow: Duration,
    pub(crate) arrived: Arrived,
    recovering: Recovering,
}

impl Manners {
    pub(crate) fn new(start: Instant, slow: Duration, recovery: Recovery) -> Arc<Self> {
        let recovering = Recovering {
            recovery,
            back_at: Mutex::new(None),
            refused: AtomicUsize::new(0),
            accepted: AtomicUsize::new(0),
            accepted_at: Mutex::new(None),
            under_way: Mutex::default(),
        };
        Arc::new(Self { start, slow, arrived: Arrived::default(), recovering })
    }

    async fn answer(&self, request: Request<Incoming>) -> Result<Response<Full<Bytes>>, hyper::Error> {
        let (head, body) = request.into_parts();
        let body = body.collect().await?.to_bytes();
        match head.uri.path() {
            "/hang" => std::future::pending().await,
            "/slow" => tokio::time::sleep(self.slow).await,
            "/down" => {
                let webhook_id = head.headers["x-shortform-webhook-id"].to_str().unwrap_or_default();
                return Ok(self.recovering.answer(webhook_id).await);
            }
            "/report" => {
                let report = serde_json::to_vec(&self.recovering.report()).expect("JSON");
                return Ok(Response::new(Full::new(report.into())));
            }
            "/counted" => self.arrived.note(&body, self.start),
            _ => {}
        }
        Ok(Response::new(Full::new(Bytes::from_static(b"OK"))))
    }
}

impl Arrived {
    /// From now on, only what carries this number counts.
    pub(crate) fn expect(&self, run: u64) {
        self.run.store(run, Ordering::Relaxed);
        self.latencies.lock().expect("no panic").clear();
    }

    pub(crate) fn latencies(&self) -> Vec<u64> {
        self.latencies.lock().expect("no panic").clone()
    }

    /// Data begins with `{"run":…,"at":…`.
    fn note(&self, body: &[u8], start: Instant) {
        const MARK: &[u8] = b"{\"run\":";
        let now = nanoseconds(start);
        let Some(place) = body.windows(MARK.len()).position(|window| window == MARK) else { return };
        let numbers =
            body[place + MARK.len()..].split(|byte| !byte.is_ascii_digit()).filter(|digits| !digits.is_empty());
        let mut numbers = numbers.filter_map(|digits| std::str::from_utf8(digits).ok()?.parse::<u64>().ok());
        if let (Some(run), Some(at)) = (numbers.next(), numbers.next())
            && run == self.run.load(Ordering::Relaxed)
        {
            self.latencies.lock().expect("no panic").push(now.saturating_sub(at));
        }
    }
}

impl Recovering {
    fn report(&self) -> Report {
        let back_at = *self.back_at.lock().expect("no panic");
        let accepted_at = *self.accepted_at.lock().expect("no panic");
        Report {
            refused: self.refused.load(Ordering::Relaxed),
            accepted: self.accepted.load(Ordering::Relaxed),
            most_under_way: self.under_way.lock().expect("no panic").values().map(|(_, most)| *most).max().unwrap_or(0),
            back_in: back_at.map_or(self.recovery.down, |back_at| back_at.saturating_duration_since(now())),
            took: accepted_at.map_or(Duration::ZERO, |(first, last)| last - first),
        }
    }

    async fn answer(&self, webhook_id: &str) -> Response<Full<Bytes>> {
        let back_at = *self.back_at.lock().expect("no panic").get_or_insert_with(|| now() + self.recovery.down);
        if now() < back_at && self.refused.load(Ordering::Relaxed) < self.recovery.refusals {
            self.refused.fetch_add(1, Ordering::Relaxed);
            let wait = back_at.saturating_duration_since(now()).as_secs().max(1);
            let mut response = Response::new(Full::new(Bytes::new()));
            *response.status_mut() = StatusCode::SERVICE_UNAVAILABLE;
            response.headers_mut().insert(RETRY_AFTER, wait.into());
            return response;
        }
        {
            let mut under_way = self.under_way.lock().expect("no panic");
            let (count, most) = under_way.entry(webhook_id.to_owned()).or_default();
            *count += 1;
            *most = (*most).max(*count);
        }
        // Long enough for requests to pile up, were there no cap.
        tokio::time::sleep(Duration::from_millis(20)).await;
        self.under_way.lock().expect("no panic").entry(webhook_id.to_owned()).or_default().0 -= 1;
        self.accepted.fetch_add(1, Ordering::Relaxed);
        let now = now();
        self.accepted_at.lock().expect("no panic").get_or_insert((now, now)).1 = now;
        Response::new(Full::new(Bytes::new()))
    }
}

pub(crate) fn now() -> Instant {
    shortkit_webhooks::clock::stopwatch()
}

/// Since the start of this process.
pub(crate) fn nanoseconds(start: Instant) -> u64 {
    u64::try_from(start.elapsed().as_nanos()).unwrap_or(u64::MAX)
}

/// Serves with these manners on a port of its own.
pub(crate) async fn serve(manners: &Arc<Manners>) -> String {
    let socket = TcpSocket::new_v4().expect("a socket");
    socket.bind("127.0.0.1:0".parse().expect("an address")).expect("a port");
    let listener: TcpListener = socket.listen(4_096).expect("a listener");
    let base = format!("http://{}", listener.local_addr().expect("an address"));
    let manners = Arc::clone(manners);
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let manners = Arc::clone(&manners);
            let _ = stream.set_nodelay(true);
            tokio::spawn(async move {
                let service = hyper::service::service_fn(move |request| {
                    let manners = Arc::clone(&manners);
                    async move { manners.answer(request).await }
                });
                let connection = hyper_util::server::conn::auto::Builder::new(TokioExecutor::new());
                let _ = connection.serve_connection(TokioIo::new(stream), service).await;
            });
        }
    });
    base
}

/// Listens and never accepts: the system takes a connection or two, and then answers nobody.
pub(crate) fn never_accepts() -> (String, TcpListener) {
    let socket = TcpSocket::new_v4().expect("a socket");
    socket.bind("127.0.0.1:0".parse().expect("an address")).expect("a port");
    let listener = socket.listen(0).expect("a listener");
    (format!("http://{}", listener.local_addr().expect("an address")), listener)
}
