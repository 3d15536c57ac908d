//! Every layer around every request, outermost first: request id, log and metrics, gRPC's own
//! words for what the others refuse, panics, limits of clients and of the process, time-out, body limit.

use std::any::Any;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Router;
use axum::extract::{DefaultBodyLimit, MatchedPath, Request, State};
use axum::http::{HeaderName, HeaderValue};
use axum::middleware::{Next, from_fn, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use tower::ServiceBuilder;
use tower_http::catch_panic::CatchPanicLayer;
use tracing::Instrument;
use tracing::field::Empty;
use uuid::Uuid;

use crate::api::fault::Fault;
use crate::api::grpc;
use crate::api::problem::Problem;
use crate::app::App;
use crate::{auth, limits, traces};

static REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
const MAX_REQUEST_ID: usize = 128;

pub fn apply(routes: Router<Arc<App>>, app: &Arc<App>) -> Router<Arc<App>> {
    let config = &app.config.server;
    routes.layer(
        ServiceBuilder::new()
            .layer(from_fn(observe))
            .layer(from_fn(grpc::translate))
            .layer(CatchPanicLayer::custom(panicked))
            .layer(from_fn_with_state(Arc::clone(app), auth::authenticate))
            .layer(from_fn_with_state(Arc::clone(app), limits::admit))
            .layer(from_fn(auth::refuse))
            .layer(from_fn_with_state(config.request_timeout.0, time_limit))
            .layer(DefaultBodyLimit::max(config.body_limit.get())),
    )
}

/// Gives the request an id (the client's own, where it sent a usable one), a log line and
/// its metrics. Routes, not paths, are the label: a scan of random paths makes no new series.
async fn observe(request: Request, next: Next) -> Response {
    let started = Instant::now();
    let id = request
        .headers()
        .get(&REQUEST_ID)
        .filter(|id| id.len() <= MAX_REQUEST_ID && id.to_str().is_ok())
        .cloned()
        .or_else(|| HeaderValue::from_str(&Uuid::now_v7().to_string()).ok())
        .unwrap_or_else(|| HeaderValue::from_static("none"));
    let method = method_label(request.method().as_str());
    let route = request
        .extensions()
        .get::<MatchedPath>()
        .map_or_else(|| "unmatched".to_owned(), |path| path.as_str().to_owned());
    let span = tracing::info_span!(
        "request",
        otel.name = format!("{method} {route}"),
        otel.kind = "server",
        otel.status_code = Empty,
        http.response.status_code = Empty,
        http.route = route,
        request_id = id.to_str().unwrap_or_default(),
        trace_id = Empty,
        method,
        path = request.uri().path(),
    );
    traces::adopt_request(&span, request.headers());
    let in_flight = InFlight::begin();
    let mut response = next.run(request).instrument(span.clone()).await;
    drop(in_flight);

    let seconds = started.elapsed().as_secs_f64();
    let status = response.status();
    let labels = [
        ("method", method.to_owned()),
        ("route", route),
        ("status", status.as_u16().to_string()),
    ];
    metrics::counter!("http_requests_total", &labels).increment(1);
    metrics::histogram!("http_request_duration_seconds", &labels[..2]).record(seconds);
    span.record("http.response.status_code", status.as_u16());
    if status.is_server_error() {
        span.record("otel.status_code", "ERROR");
    }
    span.in_scope(|| {
        tracing::info!(target: "access", status = status.as_u16(), seconds, "answered");
    });
    response.headers_mut().insert(REQUEST_ID.clone(), id);
    response
}

/// Counted down however the request ends, by its client's going away too.
struct InFlight;

impl InFlight {
    fn begin() -> Self {
        metrics::gauge!("http_requests_in_flight").increment(1.0);
        Self
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        metrics::gauge!("http_requests_in_flight").decrement(1.0);
    }
}

/// The method as a metric's label: clients may invent methods, series must not follow.
fn method_label(method: &str) -> &'static str {
    const KNOWN: [&str; 7] = ["GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH"];
    KNOWN
        .into_iter()
        .find(|known| *known == method)
        .unwrap_or("other")
}

async fn time_limit(State(limit): State<Duration>, request: Request, next: Next) -> Response {
    match tokio::time::timeout(limit, next.run(request)).await {
        Ok(response) => response,
        Err(_) => Problem::new(Fault::Timeout).into_response(),
    }
}

fn panicked(cause: Box<dyn Any + Send + 'static>) -> Response {
    let message = cause
        .downcast_ref::<&str>()
        .map(|text| (*text).to_owned())
        .or_else(|| cause.downcast_ref::<String>().cloned())
        .unwrap_or_default();
    tracing::error!(message, "a request handler panicked");
    Problem::new(Fault::Internal).into_response()
}
