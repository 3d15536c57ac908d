//! What operators and platforms ask: health, build info, metrics, what is logged.

use std::str::FromStr;
use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use prometheus_client::encoding::prometheus_text;
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::fault::Fault;
use super::problem::Problem;
use super::rest::Body;
use crate::app::{App, Info, PartStatus, is_ready};
use crate::config::LogFilter;
use crate::metrics::METRICS;
use crate::telemetry;

/// <https://prometheus.io/docs/specs/om/open_metrics_spec/>
const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// `GET /health/live`: the process turns its event loop.
pub async fn live() -> impl IntoResponse {
    Json(json!({ "status": "live" }))
}

/// `GET /health/ready` for operators: 200 where every part is ready, else 503; the body says which is
/// not.
pub async fn ready(State(app): State<Arc<App>>) -> impl IntoResponse {
    let parts = app.readiness().await;
    let (code, status) = summary(&parts);
    (code, Json(json!({ "status": status, "parts": parts })))
}

/// The same for everybody: why it is not ready is for operators.
pub async fn ready_in_brief(State(app): State<Arc<App>>) -> impl IntoResponse {
    let (code, status) = summary(&app.readiness().await);
    (code, Json(json!({ "status": status })))
}

fn summary(parts: &[PartStatus]) -> (StatusCode, &'static str) {
    match is_ready(parts) {
        true => (StatusCode::OK, "ready"),
        false => (StatusCode::SERVICE_UNAVAILABLE, "not ready"),
    }
}

/// `GET /log-level`: the filter of the process's log.
pub async fn log_level() -> Result<Json<LogLevel>, Problem> {
    let LogFilter(level) = telemetry::log_level().ok_or_else(|| Problem::new(Fault::Internal))?;
    Ok(Json(LogLevel { level }))
}

/// `PUT /log-level`: another filter, such as `{"level": "info,sqlx=debug"}`, until the process ends.
pub async fn set_log_level(Body(wanted): Body<LogLevel>) -> Result<Json<LogLevel>, Problem> {
    let filter = LogFilter::from_str(&wanted.level)
        .map_err(|reason| Problem::rejected("/level", &reason))?;
    telemetry::set_log_level(filter).map_err(|error| {
        tracing::error!(%error, "the log's level could not be changed");
        Problem::new(Fault::Internal)
    })?;
    tracing::info!(filter = wanted.level, "the log's level was changed");
    Ok(Json(wanted))
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LogLevel {
    level: String,
}

/// `GET /info`
pub async fn info(State(app): State<Arc<App>>) -> Json<Info> {
    Json(app.info().await)
}

/// `GET /metrics`: OpenMetrics for whoever names it, as Prometheus does, else its older text.
/// <https://prometheus.io/docs/instrumenting/content_negotiation/>
pub async fn metrics(State(app): State<Arc<App>>, headers: HeaderMap) -> Response {
    app.observe();
    let mut accepted = headers.get_all(header::ACCEPT).iter();
    let is_open = accepted.any(|field| {
        field
            .to_str()
            .is_ok_and(|kinds| kinds.contains("application/openmetrics-text"))
    });
    let (kind, text) = if is_open {
        (OPEN_METRICS, METRICS.open_metrics())
    } else {
        (prometheus_text::CONTENT_TYPE, METRICS.prometheus())
    };
    match text {
        Ok(text) => ([(header::CONTENT_TYPE, kind)], text).into_response(),
        Err(_) => Problem::new(Fault::Internal).into_response(),
    }
}
