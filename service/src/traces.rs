//! Traces: W3C's `traceparent` and `tracestate` come in with a request, go out with its events and come back
//! with their consumers; spans go to a collector by OTLP where one is configured.
//! <https://www.w3.org/TR/trace-context/>, <https://opentelemetry.io/docs/specs/otlp/>

use std::collections::HashMap;
use std::sync::{LazyLock, OnceLock};

use anyhow::Context as _;
use axum::http::HeaderMap;
use opentelemetry::propagation::{Extractor, TextMapPropagator};
use opentelemetry::trace::{SpanBuilder, SpanKind, TraceContextExt, Tracer, TracerProvider};
use opentelemetry::{Context, KeyValue};
use opentelemetry_otlp::{SpanExporter, WithExportConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::propagation::TraceContextPropagator;
use opentelemetry_sdk::trace::{Sampler, SdkTracer, SdkTracerProvider};

use crate::app;
use crate::config::{self, Tracing};
use crate::domain::events::Trace;

/// Fields of a request.
const TRACEPARENT: &str = "traceparent";
const TRACESTATE: &str = "tracestate";
/// What is longer is not passed on: events are kept by many and for long.
const MAX_TRACESTATE: usize = 512;

static PROPAGATOR: LazyLock<TraceContextPropagator> = LazyLock::new(TraceContextPropagator::new);

/// A process has one. Spans are begun by it directly: as a subscriber of `tracing` it would be told
/// of each time that a request is polled.
static TRACER: OnceLock<SdkTracer> = OnceLock::new();

/// Sends spans to the collector, if there is one; without one they go nowhere, but have ids for the log
/// all the same. What is returned sends the last of them when it is shut down.
pub fn start(config: &Tracing) -> anyhow::Result<SdkTracerProvider> {
    let provider = provider(config)?;
    let _ = TRACER.set(tracer(&provider));
    Ok(provider)
}

fn tracer(provider: &SdkTracerProvider) -> SdkTracer {
    provider.tracer(env!("CARGO_PKG_NAME"))
}

fn provider(config: &Tracing) -> anyhow::Result<SdkTracerProvider> {
    // <https://opentelemetry.io/docs/specs/semconv/resource/>
    let mut attributes = vec![KeyValue::new("service.version", app::version())];
    let environment = config::environment();
    attributes.extend(environment.map(|name| KeyValue::new("deployment.environment.name", name)));
    let resource = Resource::builder().with_service_name(config.service_name.clone());
    let resource = resource.with_attributes(attributes).build();
    let builder = SdkTracerProvider::builder().with_resource(resource);
    let Some(endpoint) = &config.endpoint else {
        return Ok(builder.with_sampler(Sampler::AlwaysOff).build());
    };
    let exporter = SpanExporter::builder()
        .with_tonic()
        .with_endpoint(endpoint)
        .build()
        .with_context(|| format!("sending traces to tracing.endpoint = {endpoint:?}"))?;
    // Who has called decides for its whole trace.
    let ratio = Sampler::TraceIdRatioBased(config.sample.0);
    let sampler = Sampler::ParentBased(Box::new(ratio));
    Ok(builder
        .with_sampler(sampler)
        .with_batch_exporter(exporter)
        .build())
}

/// Begins the span of a request, in the trace that its fields name or in a new one.
pub fn request(name: String, fields: &HeaderMap) -> Context {
    begin(name, SpanKind::Server, &Fields(fields))
}

/// Begins the span of a consumer's work, in the trace that an event was caused in.
pub fn event(name: String, trace: Option<Trace>) -> Context {
    let mut carried = HashMap::new();
    if let Some(Trace { parent, state }) = trace {
        carried.insert(TRACEPARENT.to_owned(), parent);
        carried.extend(state.map(|state| (TRACESTATE.to_owned(), state)));
    }
    begin(name, SpanKind::Consumer, &carried)
}

/// The span ends when nobody has its context any more.
fn begin(name: String, kind: SpanKind, carrier: &dyn Extractor) -> Context {
    let parent = PROPAGATOR.extract_with_context(&Context::new(), carrier);
    let builder = SpanBuilder::from_name(name).with_kind(kind);
    let nobody = || {
        let unseen = SdkTracerProvider::builder().with_sampler(Sampler::AlwaysOff);
        tracer(&unseen.build())
    };
    let span = TRACER
        .get_or_init(nobody)
        .build_with_context(builder, &parent);
    parent.with_span(span)
}

/// What says, to whoever comes next, in which trace and span this happens.
pub fn current() -> Option<Trace> {
    let mut carried = HashMap::new();
    PROPAGATOR.inject_context(&Context::current(), &mut carried);
    let state = carried.remove(TRACESTATE);
    Some(Trace {
        parent: carried.remove(TRACEPARENT)?,
        state: state.filter(|state| (1..=MAX_TRACESTATE).contains(&state.len())),
    })
}

struct Fields<'a>(&'a HeaderMap);

impl Extractor for Fields<'_> {
    fn get(&self, key: &str) -> Option<&str> {
        self.0.get(key)?.to_str().ok()
    }

    fn keys(&self) -> Vec<&str> {
        self.0.keys().map(axum::http::HeaderName::as_str).collect()
    }
}
