//! What the service is compared with: axum and the same driver and statements, and nothing else; and
//! the same order by a transaction of three statements, as one writes it at first.

use std::net::SocketAddr;

use axum::Json;
use axum::Router;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::routing::{get, post};
use opentelemetry_proto::tonic::collector::trace::v1::trace_service_server::{
    TraceService, TraceServiceServer,
};
use opentelemetry_proto::tonic::collector::trace::v1::{
    ExportTraceServiceRequest, ExportTraceServiceResponse,
};
use serde::{Deserialize, Serialize};
use sqlx::PgPool;
use sqlx::postgres::PgPoolOptions;
use tonic::server::NamedService;
use uuid::Uuid;

#[derive(Serialize, Deserialize)]
struct Order {
    #[serde(default)]
    id: Uuid,
    customer: String,
    currency: String,
    items: Vec<Item>,
}

#[derive(Serialize, Deserialize)]
struct Item {
    sku: String,
    quantity: i64,
    unit_price_cents: i64,
}

type Line = (Uuid, String, String, String, i64, i64, String, i64, i64);

pub const BY_TRANSACTION: &str = "/v1/orders-by-transaction";

/// Serves until it is killed.
pub async fn serve(url: &str, connections: u32) {
    let pool = PgPoolOptions::new()
        .max_connections(connections)
        .test_before_acquire(false)
        .connect(url)
        .await
        .unwrap();
    let routes = Router::new()
        .route("/v1/orders/{id}", get(find))
        .route("/v1/orders", post(place))
        .route(BY_TRANSACTION, post(place_by_transaction))
        .with_state(pool);
    let address = std::env::var("LISTEN").unwrap();
    let address: SocketAddr = address.parse().unwrap();
    let listener = tokio::net::TcpListener::bind(address).await.unwrap();
    axum::serve(listener, routes).await.unwrap();
}

async fn find(State(pool): State<PgPool>, Path(id): Path<Uuid>) -> Result<Json<Order>, StatusCode> {
    let lines: Vec<Line> = sqlx::query_as(
        "SELECT o.id, customer, currency, status, created_at, updated_at,
                sku, quantity, unit_price_cents
         FROM (SELECT * FROM orders WHERE id = $1) o JOIN order_items i ON i.order_id = o.id
         ORDER BY o.id DESC, i.line",
    )
    .bind(id)
    .fetch_all(&pool)
    .await
    .map_err(failed)?;
    let (id, customer, currency, ..) = lines.first().cloned().ok_or(StatusCode::NOT_FOUND)?;
    let items = lines.into_iter();
    let items = items.map(|(.., sku, quantity, unit_price_cents)| Item {
        sku,
        quantity,
        unit_price_cents,
    });
    Ok(Json(Order {
        id,
        customer,
        currency,
        items: items.collect(),
    }))
}

/// The columns of an order's lines.
fn columns(items: &[Item]) -> (Vec<&str>, Vec<i64>, Vec<i64>) {
    let skus = items.iter().map(|item| item.sku.as_str());
    let quantities = items.iter().map(|item| item.quantity);
    let prices = items.iter().map(|item| item.unit_price_cents);
    (skus.collect(), quantities.collect(), prices.collect())
}

async fn place(
    State(pool): State<PgPool>,
    Json(mut order): Json<Order>,
) -> Result<(StatusCode, Json<Order>), StatusCode> {
    order.id = Uuid::now_v7();
    let event = serde_json::to_string(&order).map_err(failed)?;
    let (skus, quantities, prices) = columns(&order.items);
    sqlx::query(
        "WITH placed AS (
             INSERT INTO orders (id, customer, currency, status, created_at, updated_at)
             VALUES ($1, $2, $3, 'open', 0, 0) RETURNING id
         ), lines AS (
             INSERT INTO order_items (order_id, line, sku, quantity, unit_price_cents)
             SELECT id, line - 1, sku, quantity, price
             FROM placed, unnest($4::text[], $5::bigint[], $6::bigint[])
                  WITH ORDINALITY AS item (sku, quantity, price, line)
         )
         INSERT INTO outbox (event, created_at) SELECT $7, 0 FROM placed",
    )
    .bind(order.id)
    .bind(&order.customer)
    .bind(&order.currency)
    .bind(skus)
    .bind(quantities)
    .bind(prices)
    .bind(event)
    .execute(&pool)
    .await
    .map_err(failed)?;
    Ok((StatusCode::CREATED, Json(order)))
}

async fn place_by_transaction(
    State(pool): State<PgPool>,
    Json(mut order): Json<Order>,
) -> Result<(StatusCode, Json<Order>), StatusCode> {
    order.id = Uuid::now_v7();
    let event = serde_json::to_string(&order).map_err(failed)?;
    let (skus, quantities, prices) = columns(&order.items);
    let mut tx = pool.begin().await.map_err(failed)?;
    sqlx::query(
        "INSERT INTO orders (id, customer, currency, status, created_at, updated_at)
         VALUES ($1, $2, $3, 'open', 0, 0)",
    )
    .bind(order.id)
    .bind(&order.customer)
    .bind(&order.currency)
    .execute(&mut *tx)
    .await
    .map_err(failed)?;
    sqlx::query(
        "INSERT INTO order_items (order_id, line, sku, quantity, unit_price_cents)
         SELECT $1, line - 1, sku, quantity, price
         FROM unnest($2::text[], $3::bigint[], $4::bigint[])
              WITH ORDINALITY AS item (sku, quantity, price, line)",
    )
    .bind(order.id)
    .bind(skus)
    .bind(quantities)
    .bind(prices)
    .execute(&mut *tx)
    .await
    .map_err(failed)?;
    sqlx::query("INSERT INTO outbox (event, created_at) VALUES ($1, 0)")
        .bind(event)
        .execute(&mut *tx)
        .await
        .map_err(failed)?;
    tx.commit().await.map_err(failed)?;
    Ok((StatusCode::CREATED, Json(order)))
}

fn failed(_: impl std::error::Error) -> StatusCode {
    StatusCode::INTERNAL_SERVER_ERROR
}

/// Takes traces and throws them away.
#[derive(Clone)]
struct Collector;

#[tonic::async_trait]
impl TraceService for Collector {
    async fn export(
        &self,
        _: tonic::Request<ExportTraceServiceRequest>,
    ) -> Result<tonic::Response<ExportTraceServiceResponse>, tonic::Status> {
        Ok(tonic::Response::new(ExportTraceServiceResponse::default()))
    }
}

/// Starts a collector; its address.
pub async fn collector() -> String {
    type Server = TraceServiceServer<Collector>;
    let path = format!("/{}/{{method}}", Server::NAME);
    let routes = Router::new().route_service(&path, Server::new(Collector));
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    tokio::spawn(async { axum::serve(listener, routes).await });
    address
}
