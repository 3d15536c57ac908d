//! Traces: W3C's `traceparent` comes in with a request, goes out with its events and comes back with
//! their consumers; spans go to a collector by OTLP where one is configured.
//! <https://www.w3.org/TR/trace-context/>, <https://opentelemetry.io/docs/specs/otlp/>

use std::collections::HashMap;
use std::sync::LazyLock;

use anyhow::Context as _;
use axum::http::HeaderMap;
use opentelemetry::propagation::{Extractor, TextMapPropagator};
use opentelemetry::trace::TraceContextExt;
use opentelemetry::{Context, KeyValue};
use opentelemetry_otlp::{SpanExporter, WithExportConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::propagation::TraceContextPropagator;
use opentelemetry_sdk::trace::{Sampler, SdkTracerProvider};
use tracing::Span;
use tracing_opentelemetry::OpenTelemetrySpanExt;

use crate::config::Tracing;

/// The field of a request, and the attribute of an event.
const TRACEPARENT: &str = "traceparent";

static PROPAGATOR: LazyLock<TraceContextPropagator> = LazyLock::new(TraceContextPropagator::new);

/// Where spans go. Without a collector they go nowhere, but have ids for the log all the same.
pub fn provider(config: &Tracing) -> anyhow::Result<SdkTracerProvider> {
    let name = env!("CARGO_PKG_NAME");
    let version = KeyValue::new("service.version", env!("CARGO_PKG_VERSION"));
    let resource = Resource::builder().with_service_name(name);
    let builder =
        SdkTracerProvider::builder().with_resource(resource.with_attribute(version).build());
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

/// Makes a span part of the trace that a request's fields name, or of a new one; and notes which one
/// that is in its field `trace_id`.
pub fn adopt_request(span: &Span, headers: &HeaderMap) {
    adopt(span, &Fields(headers));
}

/// Makes a span part of the trace that an event was caused in.
pub fn adopt_event(span: &Span, traceparent: Option<&str>) {
    let carried: HashMap<String, String> = traceparent
        .map(|value| (TRACEPARENT.to_owned(), value.to_owned()))
        .into_iter()
        .collect();
    adopt(span, &carried);
}

fn adopt(span: &Span, carrier: &dyn Extractor) {
    if carrier.get(TRACEPARENT).is_some() {
        let parent = PROPAGATOR.extract_with_context(&Context::new(), carrier);
        // A span that nobody looks at has no place in a trace.
        let _ = span.set_parent(parent);
    }
    let context = span.context();
    let id = context.span().span_context().trace_id();
    span.record("trace_id", tracing::field::display(id));
}

/// What says, to whoever comes next, in which trace and span this happens.
pub fn traceparent() -> Option<String> {
    let mut carried = HashMap::new();
    let context = Span::current().context();
    PROPAGATOR.inject_context(&context, &mut carried);
    carried.remove(TRACEPARENT)
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
