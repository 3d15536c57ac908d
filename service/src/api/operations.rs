//! What operators and platforms ask: health, build info, metrics, what is logged.

use std::str::FromStr;
use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::fault::Fault;
use super::problem::Problem;
use super::rest::Body;
use crate::app::{App, Info, PartStatus, is_ready};
use crate::config::LogFilter;
use crate::telemetry;

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

/// `GET /metrics`: Prometheus' text format, version 0.0.4.
pub async fn metrics(State(app): State<Arc<App>>) -> impl IntoResponse {
    (
        [(header::CONTENT_TYPE, "text/plain; version=0.0.4")],
        app.observe(),
    )
}
