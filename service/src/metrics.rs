//! Every metric of the process: its name, its labels and what it says. Labels have few values:
//! routes and not paths, kinds of trouble and not their words.
//! <https://prometheus.io/docs/practices/naming/>

use std::fmt::{self, Debug};
use std::hash::Hash;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, LazyLock};
use std::time::SystemTime;

use metrics_process::collector::collect;
use opentelemetry::Context;
use opentelemetry::trace::TraceContextExt;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{
    DescriptorEncoder, EncodeLabelSet, EncodeMetric, prometheus_text, text,
};
use prometheus_client::metrics::counter::{ConstCounter, Counter};
use prometheus_client::metrics::exemplar::HistogramWithExemplars;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::{ConstGauge, Gauge};
use prometheus_client::registry::{Metric, Registry};

use crate::telemetry;

/// Upper bounds of the latency buckets, in seconds. OpenMetrics has the whole ones as `1.0`, which is
/// another label to Prometheus 2.
const LATENCY_BUCKETS: [f64; 14] = [
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0,
];

/// A process has one set of them.
pub static METRICS: LazyLock<Metrics> = LazyLock::new(Metrics::new);

/// The name and the value of a metric's only label.
pub type Label = [(&'static str, &'static str); 1];

/// One request's.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct Route {
    pub method: &'static str,
    pub route: Arc<str>,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct Answer {
    pub method: &'static str,
    pub route: Arc<str>,
    pub status: u16,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct Call {
    pub method: &'static str,
    /// gRPC's name of it.
    pub code: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct Consumed {
    pub consumer: &'static str,
    pub outcome: &'static str,
}

/// What leads from a number to one of the requests behind it.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct Exemplar {
    pub trace_id: String,
}

impl Exemplar {
    /// Of the trace that a collector gets, and when that was.
    fn of(trace: &Context) -> (Option<Self>, Option<SystemTime>) {
        let span = trace.span();
        let seen = span.span_context();
        let exemplar = || Self {
            trace_id: seen.trace_id().to_string(),
        };
        seen.is_sampled()
            .then(|| (exemplar(), SystemTime::now()))
            .unzip()
    }
}

/// Notes how many seconds a request took, and by which trace it can be found.
pub fn observe<L>(durations: &Durations<L>, labels: &L, seconds: f64, trace: &Context)
where
    L: EncodeLabelSet + Clone + Debug + Eq + Hash + Send + Sync + 'static,
{
    let (exemplar, now) = Exemplar::of(trace);
    durations
        .get_or_create(labels)
        .observe(seconds, exemplar, now);
}

pub type Latency = HistogramWithExemplars<Exemplar>;
pub type Durations<L> = Family<L, Latency, fn() -> Latency>;

#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    pub http_requests: Family<Answer, Counter>,
    pub http_duration: Durations<Route>,
    pub grpc_duration: Durations<Label>,
    pub http_in_flight: Gauge,
    pub http_refused: Family<Label, Counter>,
    pub grpc_requests: Family<Call, Counter>,
    pub graphql_requests: Family<Label, Counter>,
    pub sessions_open: Gauge,
    pub connections_open: Family<Label, Gauge>,
    pub connections_max: Family<Label, Gauge>,
    pub connections_late: Family<Label, Counter>,
    pub tls_handshakes: Family<Label, Counter>,
    pub tls_renewals: Family<Label, Counter>,
    pub tokens_refused: Counter,
    pub jwks_failures: Counter,
    pub orders_created: Counter,
    pub outbox_waiting: Gauge,
    pub outbox_age: Gauge<f64, AtomicU64>,
    pub audit_waiting: Gauge,
    pub dead_letters: Gauge,
    pub events_told: Counter,
    pub events_consumed: Family<Consumed, Counter>,
    pub duty_failures: Family<Label, Counter>,
    pub database_connections: Family<Label, Gauge>,
    pub database_connections_max: Gauge,
    pub database_waiting: Gauge,
    pub database_failovers: Counter,
    pub database_dead_connections: Counter,
    pub database_retries_refused: Counter,
    pub cache_requests: Family<Label, Counter>,
    pub cache_entries: Gauge,
    pub circuit_open: Family<Label, Gauge>,
    pub circuit_refused: Family<Label, Counter>,
}

impl Metrics {
    /// Counters' names get `_total` at their end.
    fn new() -> Self {
        let mut registry = Registry::default();
        registry.register_collector(Box::new(Process));
        let all = &mut registry;
        Self {
            http_duration: histogram(
                all,
                "http_request_duration_seconds",
                "Time until a request's answer began",
            ),
            grpc_duration: histogram(
                all,
                "grpc_request_duration_seconds",
                "Time until a call by gRPC was answered, or its stream began",
            ),
            http_requests: register(all, "http_requests", "Requests that were answered"),
            http_in_flight: register(all, "http_requests_in_flight", "Requests being answered"),
            http_refused: register(
                all,
                "http_requests_refused",
                "Requests that were not let in, by why",
            ),
            grpc_requests: register(all, "grpc_requests", "Calls by gRPC that were answered"),
            graphql_requests: register(all, "graphql_requests", "GraphQL queries and mutations"),
            sessions_open: register(all, "sessions_open", "WebSockets and streams"),
            connections_open: register(all, "connections_open", "Connections, by port"),
            connections_max: register(all, "connections_max", "Connections that there may be"),
            connections_late: register(
                all,
                "connections_late",
                "Connections that were closed because a request's head took too long",
            ),
            tls_handshakes: register(all, "tls_handshakes", "Handshakes that came to an end"),
            tls_renewals: register(
                all,
                "tls_renewals",
                "Changed certificates, by what came of it",
            ),
            tokens_refused: register(all, "tokens_refused", "Tokens that were not believed"),
            jwks_failures: register(
                all,
                "jwks_failures",
                "Times the keys of tokens were not had",
            ),
            orders_created: register(all, "orders_created", "Orders that were placed"),
            outbox_waiting: register(
                all,
                "outbox_waiting",
                "Events not told yet, of all processes on the database; at most 10,000 are counted",
            ),
            outbox_age: register(
                all,
                "outbox_age_seconds",
                "For how long the oldest event waits to be told",
            ),
            audit_waiting: register(
                all,
                "audit_waiting",
                "Events that are not in the audit log yet; at most 10,000 are counted",
            ),
            dead_letters: register(
                all,
                "dead_letters",
                "Events that were put aside, at most 10,000; `service replay` tries them again",
            ),
            events_told: register(all, "events_told", "Events that the bus has taken"),
            events_consumed: register(all, "events_consumed", "Events that came to consumers"),
            duty_failures: register(all, "duty_failures", "Rounds of a duty that failed"),
            database_connections: register(
                all,
                "database_connections",
                "Connections of the pool, used and idle",
            ),
            database_connections_max: register(
                all,
                "database_connections_max",
                "Connections that the pool may have",
            ),
            database_waiting: register(
                all,
                "database_waiting",
                "Those who wait for their turn to write, or to place or find an order",
            ),
            database_failovers: register(all, "database_failovers", "Changes of the primary"),
            database_dead_connections: register(
                all,
                "database_dead_connections",
                "Statements that met a connection which was gone",
            ),
            database_retries_refused: register(
                all,
                "database_retries_refused",
                "Statements not tried again, since too many were",
            ),
            cache_requests: register(all, "cache_requests", "Questions to the cache"),
            cache_entries: register(all, "cache_entries", "Orders in this process' cache"),
            circuit_open: register(all, "circuit_open", "1 where nobody waits for a dependency"),
            circuit_refused: register(
                all,
                "circuit_refused",
                "Calls of a dependency that nobody made, since its circuit was open",
            ),
            registry,
        }
    }

    /// Prometheus' text format, version 0.0.4.
    pub fn prometheus(&self) -> Result<String, fmt::Error> {
        let mut written = String::new();
        prometheus_text::encode(&mut written, &self.registry)?;
        Ok(written)
    }

    /// The same in OpenMetrics' format, version 1.0, which has exemplars.
    pub fn open_metrics(&self) -> Result<String, fmt::Error> {
        let mut written = String::new();
        text::encode(&mut written, &self.registry)?;
        Ok(written)
    }
}

fn register<M: Metric + Clone + Default>(registry: &mut Registry, name: &str, says: &str) -> M {
    let metric = M::default();
    registry.register(name, says, metric.clone());
    metric
}

fn histogram<L>(registry: &mut Registry, name: &str, says: &str) -> Durations<L>
where
    L: EncodeLabelSet + Clone + Debug + Eq + Hash + Send + Sync + 'static,
{
    let latency: fn() -> Latency = || HistogramWithExemplars::new(LATENCY_BUCKETS.into_iter());
    let metric = Family::new_with_constructor(latency);
    registry.register(name, says, metric.clone());
    metric
}

/// What the log and the operating system say of the process, looked up for each answer.
/// <https://prometheus.io/docs/instrumenting/writing_clientlibs/#process-metrics>
#[derive(Debug)]
struct Process;

impl Collector for Process {
    fn encode(&self, mut encoder: DescriptorEncoder) -> fmt::Result {
        let dropped = u64::try_from(telemetry::lines_dropped()).unwrap_or(u64::MAX);
        let metric = ConstCounter::new(dropped);
        let says = "Lines of the log that nobody took in time";
        let kind = metric.metric_type();
        metric.encode(encoder.encode_descriptor("log_lines_dropped", says, None, kind)?)?;
        let seen = collect();
        if let Some(seconds) = seen.cpu_seconds_total {
            let metric = ConstCounter::new(seconds);
            let says = "User and system time";
            let kind = metric.metric_type();
            metric.encode(encoder.encode_descriptor("process_cpu_seconds", says, None, kind)?)?;
        }
        for (name, says, value) in [
            ("process_open_fds", "Open files", seen.open_fds),
            ("process_max_fds", "Files that may be open", seen.max_fds),
            (
                "process_virtual_memory_bytes",
                "Virtual memory",
                seen.virtual_memory_bytes,
            ),
            (
                "process_virtual_memory_max_bytes",
                "Virtual memory that may be used",
                seen.virtual_memory_max_bytes,
            ),
            (
                "process_resident_memory_bytes",
                "Memory in use",
                seen.resident_memory_bytes,
            ),
            (
                "process_start_time_seconds",
                "Seconds from the Unix epoch to the start",
                seen.start_time_seconds,
            ),
            ("process_threads", "Threads", seen.threads),
        ] {
            if let Some(value) = value {
                let metric = ConstGauge::new(value);
                let kind = metric.metric_type();
                metric.encode(encoder.encode_descriptor(name, says, None, kind)?)?;
            }
        }
        Ok(())
    }
}
