//! Orders over REST, version 1.

use std::sync::Arc;

use axum::Json;
use axum::extract::rejection::JsonRejection;
use axum::extract::{FromRequest, Path, Query, State};
use axum::http::{HeaderMap, HeaderName, StatusCode, header};
use axum::response::IntoResponse;
use serde::Deserialize;

use super::problem::Problem;
use crate::app::{App, Created, Key};
use crate::domain::orders::{Order, OrderId, OrderRequest, Page, PageRequest, Total};

const KEY: HeaderName = HeaderName::from_static("idempotency-key");
const MAX_KEY: usize = 255;
/// Whether the answer is one that was given before.
const REPLAYED: HeaderName = HeaderName::from_static("idempotent-replayed");

type Answer<T> = Result<T, Problem>;

/// `POST /v1/orders`: 201 with the order and its `Location`. With an `Idempotency-Key` the same
/// request again gets the same answer, and places no other order.
pub async fn create(
    State(app): State<Arc<App>>,
    headers: HeaderMap,
    Body(request): Body<OrderRequest>,
) -> Answer<(StatusCode, [(HeaderName, String); 2], Json<Order>)> {
    let Created { order, repeated } = app.create_order(request, key(&headers)?).await?;
    let location = format!("/v1/orders/{}", order.id);
    Ok((
        StatusCode::CREATED,
        [
            (header::LOCATION, location),
            (REPLAYED, repeated.to_string()),
        ],
        Json(order),
    ))
}

/// `GET /v1/customers/{customer}/totals`: by currency.
pub async fn totals(
    State(app): State<Arc<App>>,
    Path(customer): Path<String>,
) -> Answer<Json<Vec<Total>>> {
    Ok(Json(app.totals(&customer).await?))
}

/// The key of a request that may be sent again.
/// <https://datatracker.ietf.org/doc/draft-ietf-httpapi-idempotency-key-header/>
fn key(headers: &HeaderMap) -> Answer<Option<Key>> {
    let Some(key) = headers.get(KEY) else {
        return Ok(None);
    };
    let wrong = || {
        Problem::rejected(
            "Idempotency-Key",
            "must have 1 to 255 visible ASCII characters",
        )
    };
    let key = key.to_str().map_err(|_| wrong())?.to_owned();
    if key.is_empty() || key.len() > MAX_KEY {
        return Err(wrong());
    }
    // Until clients say who they are, all are one.
    let client = String::new();
    Ok(Some(Key { client, key }))
}

/// `GET /v1/orders/{id}`
pub async fn get(State(app): State<Arc<App>>, Path(id): Path<String>) -> Answer<Json<Order>> {
    Ok(Json(app.order(order_id(&id, "/id")?).await?))
}

/// `POST /v1/orders/{id}/cancel`
pub async fn cancel(State(app): State<Arc<App>>, Path(id): Path<String>) -> Answer<Json<Order>> {
    Ok(Json(app.cancel_order(order_id(&id, "/id")?).await?))
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ListQuery {
    limit: Option<String>,
    after: Option<String>,
}

/// `GET /v1/orders?limit=20&after=ID`: newest first, by keyset.
pub async fn list(
    State(app): State<Arc<App>>,
    query: Result<Query<ListQuery>, axum::extract::rejection::QueryRejection>,
) -> Answer<Json<Page>> {
    let Query(query) = query.map_err(|rejection| {
        Problem::new(
            StatusCode::UNPROCESSABLE_ENTITY,
            "invalid-request",
            "The request is not valid",
        )
        .detail(rejection.body_text())
    })?;
    let limit = query
        .limit
        .map(|text| {
            text.parse()
                .map_err(|_| Problem::rejected("/limit", "must be a whole number"))
        })
        .transpose()?;
    let after = query
        .after
        .map(|text| order_id(&text, "/after"))
        .transpose()?;
    Ok(Json(app.orders(PageRequest { limit, after }).await?))
}

fn order_id(text: &str, field: &str) -> Answer<OrderId> {
    text.parse()
        .map_err(|_| Problem::rejected(field, "must be an order's id (a UUID)"))
}

/// A JSON body; what is wrong with one is a [`Problem`] like everything else.
pub struct Body<T>(pub T);

impl<S: Send + Sync, T: serde::de::DeserializeOwned> FromRequest<S> for Body<T> {
    type Rejection = Problem;

    async fn from_request(request: axum::extract::Request, state: &S) -> Answer<Self> {
        match Json::<T>::from_request(request, state).await {
            Ok(Json(body)) => Ok(Self(body)),
            Err(rejection) => {
                let (kind, title) = match &rejection {
                    JsonRejection::JsonDataError(_) => {
                        ("invalid-request", "The request is not valid")
                    }
                    JsonRejection::JsonSyntaxError(_) => ("not-json", "The body is not JSON"),
                    JsonRejection::MissingJsonContentType(_) => {
                        ("not-json", "The body must be application/json")
                    }
                    _ if rejection.status() == StatusCode::PAYLOAD_TOO_LARGE => {
                        ("too-large", "The body is too large")
                    }
                    _ => ("unreadable", "The body could not be read"),
                };
                Err(Problem::new(rejection.status(), kind, title).detail(rejection.body_text()))
            }
        }
    }
}

/// Any path that no route serves.
pub async fn not_found() -> impl IntoResponse {
    Problem::new(StatusCode::NOT_FOUND, "not-found", "Not found")
}

/// A path that is served, but not with this method.
pub async fn wrong_method() -> impl IntoResponse {
    Problem::new(
        StatusCode::METHOD_NOT_ALLOWED,
        "method-not-allowed",
        "Method not allowed",
    )
}
