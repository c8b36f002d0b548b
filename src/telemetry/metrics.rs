//! What a node counts and measures of itself, by the names under which Prometheus reads it. Labels have few values, which are
//! all known here or to the protocol: never an id, a URL or an organisation.

use std::{sync::Arc, time::Duration};

use prometheus_client::{
    encoding::{EncodeLabelSet, EncodeLabelValue, LabelValueEncoder, prometheus_text},
    metrics::{
        counter::Counter,
        family::{Family, MetricConstructor},
        gauge::Gauge,
        histogram::Histogram,
        info::Info,
    },
    registry::{Metric, Registry, Unit},
};
use tonic::Code;

/// How an attempt ended for which there was no request.
const NOT_SENT: &str = "not_sent";

/// Every name begins so, but for those of calls, which are the usual ones for gRPC.
const PREFIX: &str = "shortkit";

/// Of what takes microseconds to seconds: commits and calls.
const SHORT_SECS: [f64; 13] = [0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0];
/// Of what takes milliseconds to minutes: attempts, and the waits before them.
const LONG_SECS: [f64; 14] = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0, 15.0, 30.0, 300.0];
/// What waits together goes into one commit, up to 256.
const ITEMS: [f64; 9] = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0];

/// What a node counts and measures of itself.
pub(crate) struct Metrics {
    registry: Registry,
    attempts: Family<AttemptLabels, Counter>,
    attempt_duration: Histogram,
    attempts_in_flight: Gauge,
    first_attempt_delay: Histogram,
    deliveries: Counter,
    deliveries_ended: Family<EndLabels, Counter>,
    results_dropped: Counter,
    leases_taken_over: Counter,
    commit_duration: Histogram,
    commit_items: Histogram,
    commits_failed: Counter,
    calls: Family<CallLabels, Counter>,
    call_duration: Family<MethodLabels, Histogram, Seconds>,
    pending: Gauge,
    held: Gauge,
    publish_bytes: Gauge,
    streams: Gauge,
    database_available: Gauge,
}

/// What is read when somebody asks, since it is kept elsewhere anyway.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Levels {
    /// Pending deliveries of all nodes.
    pub(crate) pending: u64,
    /// Places that are taken by deliveries held by this node.
    pub(crate) held: usize,
    /// Bytes of events that wait for their commit.
    pub(crate) publish_bytes: usize,
    /// Open streams of changes.
    pub(crate) streams: usize,
    /// Whether the database answers.
    pub(crate) database_available: bool,
}

/// Why there is an attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Kind {
    /// The first of its delivery.
    First,
    /// A later one.
    Retry,
    /// A test event's.
    Test,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct AttemptLabels {
    kind: Kind,
    result: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct EndLabels {
    status: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct MethodLabels {
    grpc_service: Arc<str>,
    grpc_method: Arc<str>,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct CallLabels {
    grpc_service: Arc<str>,
    grpc_method: Arc<str>,
    grpc_code: &'static str,
}

/// The calls of a method. Cheap to clone.
#[derive(Clone)]
pub(super) struct Calls(Arc<OfMethod>);

struct OfMethod {
    labels: MethodLabels,
    calls: Family<CallLabels, Counter>,
    /// Those that went well, which are not looked up each time.
    ok: Counter,
    duration: Histogram,
}

/// Makes the histogram of a method.
#[derive(Clone)]
struct Seconds;

impl MetricConstructor<Histogram> for Seconds {
    fn new_metric(&self) -> Histogram {
        Histogram::new(SHORT_SECS)
    }
}

impl EncodeLabelValue for Kind {
    fn encode(&self, encoder: &mut LabelValueEncoder<'_>) -> Result<(), std::fmt::Error> {
        let name = match self {
            Self::First => "first",
            Self::Retry => "retry",
            Self::Test => "test",
        };
        EncodeLabelValue::encode(&name, encoder)
    }
}

impl Default for Metrics {
    fn default() -> Self {
        let mut registry = Registry::default();
        let calls = named(
            &mut registry,
            "grpc_server_handled",
            "Calls that were answered, over gRPC, gRPC-Web and REST, by status; a stream counts when it begins",
            Family::default(),
        );
        let call_duration = in_unit(
            &mut registry,
            "grpc_server_handling",
            "How long calls took; a stream until it began",
            Unit::Seconds,
            Family::new_with_constructor(Seconds),
        );
        let ours = registry.sub_registry_with_prefix(PREFIX);
        ours.register("build", "The version of this node", Info::new([("version", env!("CARGO_PKG_VERSION"))]));
        Self {
            calls,
            call_duration,
            attempts: named(
                ours,
                "attempts",
                "Attempts that ended, by why there was one and how it ended",
                Family::default(),
            ),
            attempt_duration: in_unit(
                ours,
                "attempt_duration",
                "How long attempts took, from the look-up of the name to the last byte of the answer",
                Unit::Seconds,
                Histogram::new(LONG_SECS),
            ),
            attempts_in_flight: named(ours, "attempts_in_flight", "Attempts under way on this node", Gauge::default()),
            first_attempt_delay: in_unit(
                ours,
                "first_attempt_delay",
                "From an event to the first attempt of a delivery, with the first wait of the retry schedule",
                Unit::Seconds,
                Histogram::new(LONG_SECS),
            ),
            deliveries: named(
                ours,
                "deliveries_created",
                "Deliveries that this node stored, but for tests",
                Counter::default(),
            ),
            deliveries_ended: named(
                ours,
                "deliveries_ended",
                "Deliveries that ended on this node by the retry schedule: no tests, and no retries by hand",
                Family::default(),
            ),
            results_dropped: named(
                ours,
                "results_dropped",
                "Results that came when their lease was lost, or that had been recorded",
                Counter::default(),
            ),
            leases_taken_over: named(
                ours,
                "leases_taken_over",
                "Deliveries taken over from nodes that are gone, or stood still",
                Counter::default(),
            ),
            commit_duration: in_unit(
                ours,
                "commit_duration",
                "How long commits took of what publishing and sending write",
                Unit::Seconds,
                Histogram::new(SHORT_SECS),
            ),
            commit_items: named(
                ours,
                "commit_items",
                "Publishes, results and leases given back in a commit",
                Histogram::new(ITEMS),
            ),
            commits_failed: named(
                ours,
                "commits_failed",
                "Commits that the database refused, or did not answer, or that found a name or a part taken",
                Counter::default(),
            ),
            pending: named(
                ours,
                "deliveries_pending",
                "Pending deliveries in the database, of all nodes, as of the last look a second or more ago",
                Gauge::default(),
            ),
            held: named(
                ours,
                "deliveries_held",
                "Places of 8 KiB that are taken by deliveries in the memory of this node",
                Gauge::default(),
            ),
            publish_bytes: in_unit(
                ours,
                "publish_waiting",
                "Events that wait for their commit, each as 1 KiB at least",
                Unit::Bytes,
                Gauge::default(),
            ),
            streams: named(ours, "streams_open", "Open streams of changes on this node", Gauge::default()),
            database_available: named(
                ours,
                "database_available",
                "Whether the database answers this node: 1, or 0",
                Gauge::default(),
            ),
            registry,
        }
    }
}

/// The metric, which from now on is shown under this name.
fn named<M: Metric + Clone>(registry: &mut Registry, name: &str, help: &str, metric: M) -> M {
    registry.register(name, help, metric.clone());
    metric
}

/// The same with a unit, which ends the name.
fn in_unit<M: Metric + Clone>(registry: &mut Registry, name: &str, help: &str, unit: Unit, metric: M) -> M {
    registry.register_with_unit(name, help, unit, metric.clone());
    metric
}

impl Metrics {
    /// A request goes out.
    pub(crate) fn begun(&self) -> InFlight {
        self.attempts_in_flight.inc();
        InFlight(self.attempts_in_flight.clone())
    }

    /// An attempt that began so long after its event has ended so, after this time on the wire.
    pub(crate) fn attempted(&self, kind: Kind, since_event: Duration, result: &'static str, took: Duration) {
        if kind == Kind::First {
            self.first_attempt_delay.observe(since_event.as_secs_f64());
        }
        self.attempt_duration.observe(took.as_secs_f64());
        self.attempts.get_or_create(&AttemptLabels { kind, result }).inc();
    }

    /// An attempt has ended without a request.
    pub(crate) fn not_sent(&self, kind: Kind) {
        self.attempts.get_or_create(&AttemptLabels { kind, result: NOT_SENT }).inc();
    }

    /// So many deliveries are stored.
    pub(crate) fn created(&self, deliveries: usize) {
        self.deliveries.inc_by(deliveries as u64);
    }

    /// A delivery has ended with this status.
    pub(crate) fn ended(&self, status: &'static str) {
        self.deliveries_ended.get_or_create(&EndLabels { status }).inc();
    }

    /// A result came too late.
    pub(crate) fn dropped(&self) {
        self.results_dropped.inc();
    }

    /// Deliveries of another node are this one's.
    pub(crate) fn taken_over(&self, deliveries: usize) {
        self.leases_taken_over.inc_by(deliveries as u64);
    }

    /// A commit of so much was done within this time, or was not.
    pub(crate) fn committed<T, E>(&self, items: usize, took: Duration, done: &Result<T, E>) {
        if done.is_err() {
            self.commits_failed.inc();
            return;
        }
        if items == 0 {
            return;
        }
        self.commit_duration.observe(took.as_secs_f64());
        #[expect(clippy::cast_precision_loss, reason = "a commit has some hundreds at most")]
        self.commit_items.observe(items as f64);
    }

    /// The calls of a method.
    pub(super) fn calls(&self, service: &str, method: &str) -> Calls {
        let labels = MethodLabels { grpc_service: service.into(), grpc_method: method.into() };
        let ok = self.calls.get_or_create_owned(&labels.with(Code::Ok));
        let duration = self.call_duration.get_or_create_owned(&labels);
        Calls(Arc::new(OfMethod { labels, calls: self.calls.clone(), ok, duration }))
    }

    /// All of it in the text format of Prometheus, with these levels.
    pub(crate) fn text(&self, levels: Levels) -> String {
        let set = |gauge: &Gauge, level: u64| gauge.set(i64::try_from(level).unwrap_or(i64::MAX));
        set(&self.pending, levels.pending);
        set(&self.held, levels.held as u64);
        set(&self.publish_bytes, levels.publish_bytes as u64);
        set(&self.streams, levels.streams as u64);
        set(&self.database_available, levels.database_available.into());
        let mut text = String::new();
        prometheus_text::encode(&mut text, &self.registry).expect("a string takes what is written to it");
        text
    }
}

impl Calls {
    /// One of them was answered with this code.
    pub(super) fn answered(&self, code: Code, took: Duration) {
        let OfMethod { labels, calls, ok, duration } = &*self.0;
        match code {
            Code::Ok => ok.inc(),
            code => calls.get_or_create(&labels.with(code)).inc(),
        };
        duration.observe(took.as_secs_f64());
    }
}

impl MethodLabels {
    fn with(&self, code: Code) -> CallLabels {
        let Self { grpc_service, grpc_method } = self.clone();
        CallLabels { grpc_service, grpc_method, grpc_code: name(code) }
    }
}

/// A code as metrics of gRPC usually name it.
fn name(code: Code) -> &'static str {
    match code {
        Code::Ok => "OK",
        Code::Cancelled => "Canceled",
        Code::Unknown => "Unknown",
        Code::InvalidArgument => "InvalidArgument",
        Code::DeadlineExceeded => "DeadlineExceeded",
        Code::NotFound => "NotFound",
        Code::AlreadyExists => "AlreadyExists",
        Code::PermissionDenied => "PermissionDenied",
        Code::ResourceExhausted => "ResourceExhausted",
        Code::FailedPrecondition => "FailedPrecondition",
        Code::Aborted => "Aborted",
        Code::OutOfRange => "OutOfRange",
        Code::Unimplemented => "Unimplemented",
        Code::Internal => "Internal",
        Code::Unavailable => "Unavailable",
        Code::DataLoss => "DataLoss",
        Code::Unauthenticated => "Unauthenticated",
    }
}

/// An attempt under way, until this is dropped.
pub(crate) struct InFlight(Gauge);

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.dec();
    }
}
