//! Every route the service has.

use std::sync::Arc;

use axum::Router;
use axum::routing::{get, post};

use crate::api::{operations, rest};
use crate::app::App;
use crate::middleware;

/// What clients reach.
pub fn public(app: &Arc<App>) -> Router {
    let routes = Router::new()
        .route("/v1/orders", post(rest::create).get(rest::list))
        .route("/v1/orders/{id}", get(rest::get))
        .route("/v1/orders/{id}/cancel", post(rest::cancel))
        .route("/v1/customers/{customer}/totals", get(rest::totals))
        .route("/health/live", get(operations::live))
        .route("/health/ready", get(operations::ready))
        .route("/info", get(operations::info))
        .fallback(rest::not_found)
        .method_not_allowed_fallback(rest::wrong_method);
    middleware::apply(routes, app).with_state(Arc::clone(app))
}

/// What only operators reach, on a port of its own.
pub fn admin(app: &Arc<App>) -> Router {
    Router::new()
        .route("/health/live", get(operations::live))
        .route("/health/ready", get(operations::ready))
        .route("/info", get(operations::info))
        .route("/metrics", get(operations::metrics))
        .route(
            "/log-level",
            get(operations::log_level).put(operations::set_log_level),
        )
        .fallback(rest::not_found)
        .with_state(Arc::clone(app))
}
