//! What operators and platforms ask: health, build info, metrics.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use serde_json::json;

use crate::app::{App, Info};

/// `GET /health/live`: the process turns its event loop.
pub async fn live() -> impl IntoResponse {
    Json(json!({ "status": "live" }))
}

/// `GET /health/ready`: 200 where every part is ready, else 503; the body says which is not.
pub async fn ready(State(app): State<Arc<App>>) -> impl IntoResponse {
    let parts = app.readiness().await;
    let ready = parts.iter().all(|part| part.ready);
    let code = if ready {
        StatusCode::OK
    } else {
        StatusCode::SERVICE_UNAVAILABLE
    };
    let status = if ready { "ready" } else { "not ready" };
    (code, Json(json!({ "status": status, "parts": parts })))
}

/// `GET /info`
pub async fn info(State(app): State<Arc<App>>) -> Json<Info> {
    Json(app.info().await)
}

/// `GET /metrics`: Prometheus' text format, version 0.0.4.
pub async fn metrics(State(app): State<Arc<App>>) -> impl IntoResponse {
    metrics_process::Collector::default().collect();
    (
        [(header::CONTENT_TYPE, "text/plain; version=0.0.4")],
        app.metrics.render(),
    )
}
