//! Orders over REST, version 1.

use std::collections::BTreeMap;
use std::sync::Arc;

use axum::extract::rejection::{JsonRejection, QueryRejection};
use axum::extract::{FromRequest, FromRequestParts, Path, Query, State};
use axum::http::request::Parts;
use axum::http::{HeaderMap, HeaderName, StatusCode, header};
use axum::response::IntoResponse;
use axum::{Extension, Json};
use serde::Deserialize;
use utoipa::IntoResponses;
use utoipa::openapi::{ContentBuilder, Ref, RefOr, Response, ResponseBuilder};

use super::fault::Fault;
use super::problem::{Problem, idempotency_key, order_id};
use crate::app::{App, Created};
use crate::auth::Caller;
use crate::domain::orders::{Order, OrderId, OrderRequest, Page, PageRequest, Total};

const KEY: HeaderName = HeaderName::from_static("idempotency-key");
/// Whether the answer is one that was given before.
pub const REPLAYED: HeaderName = HeaderName::from_static("idempotent-replayed");

/// The group of these operations in the API's description.
const ORDERS: &str = "orders";

type Answer<T> = Result<T, Problem>;

/// Places an order. With an `Idempotency-Key` the same request again gets the same answer, and places
/// no other order.
#[utoipa::path(
    post,
    path = "/v1/orders",
    tag = ORDERS,
    operation_id = "placeOrder",
    params(
        ("Idempotency-Key" = Option<String>, Header, min_length = 1, max_length = 255,
            pattern = "^[!-~]+$"),
    ),
    request_body = OrderRequest,
    responses(
        (status = 201, description = "The order", body = Order, headers(
            ("Location" = String, description = "Where the order is"),
            ("Idempotent-Replayed" = bool, description = "Whether it had been placed before"),
        )),
        Unacceptable,
        Common,
    ),
)]
pub async fn create(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    headers: HeaderMap,
    Body(request): Body<OrderRequest>,
) -> Answer<(StatusCode, [(HeaderName, String); 2], Json<Order>)> {
    let key = headers.get(KEY);
    let key = idempotency_key(key.map(|key| key.to_str().unwrap_or_default()))?;
    let Created { order, repeated } = app.create_order(&caller, request, key).await?;
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

/// What a customer has ordered and not cancelled, by currency; it follows the orders a moment later.
#[utoipa::path(
    get,
    path = "/v1/customers/{customer}/totals",
    tag = ORDERS,
    operation_id = "getTotals",
    params(("customer" = String, Path, min_length = 1)),
    responses((status = 200, description = "One for each currency", body = [Total]), Common),
)]
pub async fn totals(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    Segment(customer): Segment,
) -> Answer<Json<Vec<Total>>> {
    Ok(Json(app.totals(&caller, &customer).await?))
}

/// An order.
#[utoipa::path(
    get,
    path = "/v1/orders/{id}",
    tag = ORDERS,
    operation_id = "getOrder",
    params(("id" = OrderId, Path)),
    responses((status = 200, description = "The order", body = Order), Missing, Common),
)]
pub async fn get(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    Segment(id): Segment,
) -> Answer<Json<Order>> {
    Ok(Json(app.order(&caller, order_id(&id, "/id")?).await?))
}

/// Cancels an order. Cancelling a cancelled order changes nothing and answers with it.
#[utoipa::path(
    post,
    path = "/v1/orders/{id}/cancel",
    tag = ORDERS,
    operation_id = "cancelOrder",
    params(("id" = OrderId, Path)),
    responses((status = 200, description = "The order", body = Order), Missing, Common),
)]
pub async fn cancel(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    Segment(id): Segment,
) -> Answer<Json<Order>> {
    Ok(Json(
        app.cancel_order(&caller, order_id(&id, "/id")?).await?,
    ))
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ListQuery {
    limit: Option<String>,
    after: Option<String>,
}

/// The newest orders first, by keyset.
#[utoipa::path(
    get,
    path = "/v1/orders",
    tag = ORDERS,
    operation_id = "listOrders",
    params(
        ("limit" = Option<u32>, Query, description = "Orders in the page", minimum = 1, maximum = 100),
        ("after" = Option<OrderId>, Query, description = "`next` of the page before"),
    ),
    responses((status = 200, description = "A page", body = Page), Common),
)]
pub async fn list(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    query: Result<Query<ListQuery>, QueryRejection>,
) -> Answer<Json<Page>> {
    let Query(query) = query.map_err(unreadable_query)?;
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
    Ok(Json(
        app.orders(&caller, PageRequest { limit, after }).await?,
    ))
}

pub fn unreadable_query(rejection: QueryRejection) -> Problem {
    Problem::new(Fault::Invalid).detail(rejection.body_text())
}

/// What any request may be answered.
struct Common;

/// What may be answered where there is no such order.
struct Missing;

/// What may be answered to a body.
struct Unacceptable;

impl IntoResponses for Common {
    fn responses() -> BTreeMap<String, RefOr<Response>> {
        described(&[
            Fault::Unreadable,
            Fault::Unauthenticated,
            Fault::Forbidden,
            Fault::Invalid,
            Fault::RateLimited,
            Fault::Overloaded,
            Fault::Timeout,
        ])
    }
}

impl IntoResponses for Missing {
    fn responses() -> BTreeMap<String, RefOr<Response>> {
        described(&[Fault::NotFound])
    }
}

impl IntoResponses for Unacceptable {
    fn responses() -> BTreeMap<String, RefOr<Response>> {
        described(&[Fault::TooLarge, Fault::NotJson])
    }
}

/// The answers to what goes wrong, from the table of all interfaces.
fn described(faults: &[Fault]) -> BTreeMap<String, RefOr<Response>> {
    let content = ContentBuilder::new().schema(Some(Ref::from_schema_name("Problem")));
    let content = content.build();
    let answers = faults.iter().map(|fault| {
        let names = fault.names();
        let response = ResponseBuilder::new()
            .description(names.title)
            .content("application/problem+json", content.clone());
        (names.http.as_u16().to_string(), response.build().into())
    });
    answers.collect()
}

/// A part of the path; what is wrong with one is a [`Problem`], too.
pub struct Segment(pub String);

impl<S: Send + Sync> FromRequestParts<S> for Segment {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Answer<Self> {
        let path = Path::<String>::from_request_parts(parts, state).await;
        path.map(|Path(segment)| Self(segment))
            .map_err(|rejection| Problem::new(Fault::Unreadable).detail(rejection.body_text()))
    }
}

/// A JSON body; what is wrong with one is a [`Problem`] like everything else.
pub struct Body<T>(pub T);

impl<S: Send + Sync, T: serde::de::DeserializeOwned> FromRequest<S> for Body<T> {
    type Rejection = Problem;

    async fn from_request(request: axum::extract::Request, state: &S) -> Answer<Self> {
        match Json::<T>::from_request(request, state).await {
            Ok(Json(body)) => Ok(Self(body)),
            Err(rejection) => {
                let fault = match &rejection {
                    JsonRejection::JsonDataError(_) => Fault::Invalid,
                    JsonRejection::MissingJsonContentType(_) => Fault::NotJson,
                    _ if rejection.status() == StatusCode::PAYLOAD_TOO_LARGE => Fault::TooLarge,
                    _ => Fault::Unreadable,
                };
                Err(Problem::new(fault)
                    .status(rejection.status())
                    .detail(rejection.body_text()))
            }
        }
    }
}

/// Any path that no route serves.
pub async fn not_found() -> impl IntoResponse {
    Problem::new(Fault::NotFound)
}

/// A path that is served, but not with this method.
pub async fn wrong_method() -> impl IntoResponse {
    Problem::new(Fault::WrongMethod)
}
