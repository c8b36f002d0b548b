//! One connection: the settings of both protocols, and an end in time.

use std::{
    convert::Infallible,
    pin::{Pin, pin},
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use http::{Request, Response, Version};
use hyper::{body::Incoming, service::service_fn};
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    server::{conn::auto::Builder, graceful::GracefulConnection},
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
    time::sleep,
};
use tokio_util::sync::CancellationToken;
use tonic::{body::Body, transport::server::TcpConnectInfo};
use tower::Service;

use super::{
    ClientCertificate, Limits, Tls,
    body::{Receiving, Sending, Streams},
    caller::Peer,
    peers::{Admitted, Memory, Reserved},
    stream::Watched,
};
use crate::clock;

/// Bytes of a request's head, over either protocol; more are a 431.
const MAX_HEAD_BYTES: u32 = 16 * 1024;
/// Headers of a request over HTTP/1.1; more are a 431. Over HTTP/2 their bytes bound them.
const MAX_HEADERS: usize = 100;
/// Calls at a time on one HTTP/2 connection; one more is refused.
const MAX_STREAMS: u32 = 100;
/// Streams that a peer may reset before they are looked at; one more ends the connection (rapid reset, CVE-2023-44487).
const MAX_PENDING_RESETS: usize = 20;
/// Streams that are refused or reset for an error of the peer; one more ends the connection (CVE-2024-2758 and its kin).
const MAX_LOCAL_RESETS: usize = 1024;
/// Bytes of bodies that may be on their way on one HTTP/2 stream …
const STREAM_WINDOW: u32 = 64 * 1024;
/// … and on the whole connection, before the service has read them.
const CONNECTION_WINDOW: u32 = 256 * 1024;
/// Payload of a frame.
const MAX_FRAME_BYTES: u32 = 16 * 1024;
/// Bytes of answers that wait on one HTTP/2 stream beside the piece that is being sent.
const MAX_SEND_BYTES: usize = 64 * 1024;
/// A connection that is asked to end has this time between two looks at whether anything is under way on it.
const CLOSING: Duration = Duration::from_secs(5);

/// How connections speak.
pub(super) struct Protocols {
    tls: Option<Tls>,
    limits: Limits,
    builder: Builder<Streams>,
}

/// Where a connection is from.
struct Origin {
    addresses: TcpConnectInfo,
    certificate: Option<ClientCertificate>,
}

/// What goes on on a connection.
#[derive(Default)]
struct Activity {
    under_way: AtomicUsize,
    /// Calls begun and calls ended.
    changes: AtomicU64,
}

/// A call that is under way until this is dropped.
pub(super) struct Call(Arc<Activity>);

impl Call {
    fn begin(activity: &Arc<Activity>) -> Self {
        activity.under_way.fetch_add(1, Ordering::Relaxed);
        activity.changes.fetch_add(1, Ordering::Relaxed);
        Self(Arc::clone(activity))
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        self.0.under_way.fetch_sub(1, Ordering::Relaxed);
        self.0.changes.fetch_add(1, Ordering::Relaxed);
    }
}

impl Protocols {
    pub(super) fn new(tls: Option<Tls>, limits: Limits) -> Self {
        let mut builder = Builder::new(Streams { write_time: limits.write_time });
        builder
            .http1()
            .timer(TokioTimer::new())
            .header_read_timeout(limits.head_time)
            .max_buf_size(MAX_HEAD_BYTES as usize)
            .max_headers(MAX_HEADERS)
            .half_close(false)
            .pipeline_flush(false);
        builder
            .http2()
            .timer(TokioTimer::new())
            .max_concurrent_streams(MAX_STREAMS)
            .max_pending_accept_reset_streams(MAX_PENDING_RESETS)
            .max_local_error_reset_streams(MAX_LOCAL_RESETS)
            .max_header_list_size(MAX_HEAD_BYTES)
            .max_frame_size(MAX_FRAME_BYTES)
            .initial_stream_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .adaptive_window(false)
            .max_send_buf_size(MAX_SEND_BYTES)
            .keep_alive_interval(limits.silent_time)
            .keep_alive_timeout(limits.ping_time);
        Self { tls, limits, builder }
    }

    /// Serves a connection to its end.
    pub(super) async fn serve<S>(&self, stream: TcpStream, admitted: Admitted, service: S, shutdown: CancellationToken)
    where
        S: Service<Request<Body>, Response = Response<Body>, Error = Infallible> + Clone + Send + 'static,
        S::Future: Send,
    {
        let _ = stream.set_nodelay(true);
        let addresses = TcpConnectInfo { local_addr: stream.local_addr().ok(), remote_addr: stream.peer_addr().ok() };
        let Some(tls) = &self.tls else {
            return self.speak(stream, Origin { addresses, certificate: None }, admitted, service, shutdown).await;
        };
        let handshake = tokio::select! {
            () = shutdown.cancelled() => return,
            handshake = tls.accept(stream, self.limits.handshake_time) => handshake,
        };
        if let Some((stream, certificate)) = handshake {
            self.speak(stream, Origin { addresses, certificate }, admitted, service, shutdown).await;
        }
    }

    async fn speak<S>(
        &self,
        stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
        origin: Origin,
        admitted: Admitted,
        service: S,
        shutdown: CancellationToken,
    ) where
        S: Service<Request<Body>, Response = Response<Body>, Error = Infallible> + Clone + Send + 'static,
        S::Future: Send,
    {
        let (activity, admitted) = (Arc::new(Activity::default()), Arc::new(admitted));
        let peer = Arc::<Peer>::default();
        let stream = Watched::new(stream, Arc::clone(&peer), self.limits.write_time);
        let (of_calls, body_time) = (Arc::clone(&activity), self.limits.body_time);
        let service = service_fn(move |request: Request<Incoming>| {
            let call = Call::begin(&of_calls);
            if request.version() < Version::HTTP_2 {
                peer.called();
            }
            let caller = peer.call();
            let of = |memory| Reserved::new(Arc::clone(&admitted), caller.clone(), memory);
            let (reserved, answer) = (Arc::new(of(Memory::Bodies)), of(Memory::Answers));
            let held = Arc::clone(&reserved);
            let (request, mut unread) = Receiving::new(request, held, body_time);
            let mut request = request.map(Body::new);
            request.extensions_mut().insert(origin.addresses.clone());
            request.extensions_mut().insert(caller);
            if let Some(certificate) = origin.certificate {
                request.extensions_mut().insert(certificate);
            }
            let mut service = service.clone();
            async move {
                std::future::poll_fn(|context| service.poll_ready(context)).await?;
                let response = service.call(request).await?;
                if let Ok(unread) = unread.try_recv() {
                    unread.discard().await;
                }
                // The body has been read, and what was made of it has been answered.
                drop(reserved);
                Ok::<_, Infallible>(Sending::of(response, answer, call))
            }
        });
        let connection = pin!(self.builder.serve_connection(TokioIo::new(stream), service));
        self.to_its_end(connection, &activity, &shutdown).await;
    }

    /// Lets a connection be until it ends by itself, is idle, too old, or the server stops.
    async fn to_its_end<C>(&self, mut connection: Pin<&mut C>, activity: &Activity, shutdown: &CancellationToken)
    where
        C: GracefulConnection<Error: std::fmt::Display>,
    {
        let Limits { head_time, idle_time, age_grace, .. } = self.limits;
        let (mut closing, mut aged, mut seen) = (false, false, 0);
        let mut age = pin!(sleep(self.limits.age.mul_f64(1.0 + jitter())));
        let mut look = pin!(sleep(head_time));
        loop {
            let close = tokio::select! {
                ended = &mut connection => {
                    if let Err(error) = ended {
                        tracing::debug!(%error, "a connection ended");
                    }
                    return;
                }
                () = shutdown.cancelled(), if !closing => true,
                () = &mut age => {
                    if aged {
                        return;
                    }
                    aged = true;
                    age.set(sleep(age_grace));
                    true
                }
                () = &mut look => {
                    let changes = activity.changes.load(Ordering::Relaxed);
                    let nothing = activity.under_way.load(Ordering::Relaxed) == 0;
                    if nothing && (closing || changes == 0) {
                        return;
                    }
                    let idle = nothing && changes == seen;
                    seen = changes;
                    look.set(sleep(if closing { CLOSING } else { idle_time }));
                    idle
                }
            };
            if close && !closing {
                closing = true;
                connection.as_mut().graceful_shutdown();
                look.set(sleep(CLOSING));
            }
        }
    }
}

/// Up to a tenth, so that connections made together do not end together.
fn jitter() -> f64 {
    f64::from(clock::random::<1>()[0]) / 2560.0
}
