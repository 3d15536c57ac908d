//! Every route the service has.

use std::sync::Arc;

use axum::routing::get;
use axum::{Extension, Router};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::api::{description, graphql, grpc, operations, rest, websocket};
use crate::app::App;
use crate::middleware;

/// What clients reach: every interface on one port.
pub fn public(app: &Arc<App>) -> anyhow::Result<Router> {
    let (rest, description) = OpenApiRouter::with_openapi(description::description())
        .routes(routes!(rest::create, rest::list))
        .routes(routes!(rest::get))
        .routes(routes!(rest::cancel))
        .routes(routes!(rest::totals))
        .split_for_parts();
    let routes = rest
        .merge(description::routes(description, &app.config.auth))
        .merge(grpc::routes(app)?)
        // A WebSocket begins with GET, and over HTTP/2 with CONNECT: RFC 8441.
        .route(
            "/v1/events",
            get(websocket::events).connect(websocket::events),
        )
        .route(
            "/graphql",
            get(graphql::subscribe)
                .connect(graphql::subscribe)
                .post(graphql::execute),
        )
        .route("/graphql/schema", get(graphql::definition))
        .layer(Extension(graphql::schema(app)))
        .route("/health/live", get(operations::live))
        .route("/health/ready", get(operations::ready_in_brief))
        .route("/info", get(operations::info))
        .fallback(rest::not_found)
        .method_not_allowed_fallback(rest::wrong_method);
    Ok(middleware::apply(routes, app).with_state(Arc::clone(app)))
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
