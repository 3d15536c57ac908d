//! Orders over gRPC, on the same port: `proto/orders/v1/orders.proto`, with health and reflection.

use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::Body;
use axum::extract::Request as HttpRequest;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response as HttpResponse};
use futures_util::{Stream, StreamExt};
use jiff::Timestamp;
use opentelemetry::Context;
use tonic::server::NamedService;
use tonic::{Request, Response, Status};
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_server::{Health, HealthServer};
use tonic_health::pb::{HealthCheckRequest, HealthCheckResponse};
use tonic_types::{ErrorDetails, StatusExt};

use super::fault::Fault;
use super::problem::{Problem, idempotency_key, order_id};
use crate::app::{App, Created, is_ready};
use crate::auth::Caller;
use crate::domain::events::{Event, Kind};
use crate::domain::orders::{self, OrderRequest, PageRequest};
use crate::metrics::{Call, METRICS, observe};
use pb::orders_server::{Orders, OrdersServer};

/// Made from the .proto file: `tests/integration/generated.rs`.
#[expect(
    unused_qualifications,
    clippy::all,
    clippy::allow_attributes,
    reason = "it is generated"
)]
pub mod pb {
    include!("grpc/orders.v1.rs");
}

const DESCRIPTORS: &[u8] = include_bytes!("grpc/descriptors.bin");
const KEY: &str = "idempotency-key";
const DETAILS: &str = "grpc-status-details-bin";
/// How often a watched health is looked at.
const HEALTH_INTERVAL: Duration = Duration::from_secs(1);

/// Under which `ErrorInfo`'s reasons are.
const DOMAIN: &str = "orders.v1";

type Answer<T> = Result<Response<T>, Status>;
type Streaming<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// Every service and method, and an answer to those that are none.
pub fn routes(app: &Arc<App>) -> anyhow::Result<Router<Arc<App>>> {
    let reflection = tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(DESCRIPTORS)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        .build_v1()?;
    let limit = app.config.server.body_limit.get();
    let orders = OrdersServer::new(Interface(Arc::clone(app))).max_decoding_message_size(limit);
    let health = HealthServer::new(Readiness(Arc::clone(app)));
    Ok(route(
        route(route(Router::new(), orders), health),
        reflection,
    ))
}

fn route<S>(router: Router<Arc<App>>, service: S) -> Router<Arc<App>>
where
    S: tower::Service<HttpRequest, Error = std::convert::Infallible> + NamedService,
    S: Clone + Send + Sync + 'static,
    S::Response: IntoResponse,
    S::Future: Send + 'static,
{
    router.route_service(&format!("/{}/{{method}}", S::NAME), service)
}

pub fn is_call(request: &HttpRequest) -> bool {
    let content = request.headers().get(header::CONTENT_TYPE);
    content.is_some_and(|value| value.as_bytes().starts_with(b"application/grpc"))
}

/// gRPC's clients read no problem details: what the layers around the interfaces refuse is said to
/// them in a status.
pub fn translated(response: HttpResponse) -> HttpResponse {
    let (mut parts, body) = response.into_parts();
    let Some(problem) = parts.extensions.remove::<Problem>() else {
        return HttpResponse::from_parts(parts, body);
    };
    // Orders that are not there have their own answer; this is a service that is not there.
    let status = match problem.fault {
        Fault::NotFound => Status::unimplemented("there is no such service"),
        _ => Status::from(problem),
    };
    let mut answer = status.into_http::<Body>();
    parts.headers.remove(header::CONTENT_LENGTH);
    parts.headers.remove(header::CONTENT_TYPE);
    answer.headers_mut().extend(parts.headers);
    answer
}

/// An answer's status in the words of HTTP, by which all interfaces are counted: gRPC's own says 200 of
/// what failed, too.
/// <https://github.com/googleapis/googleapis/blob/master/google/rpc/code.proto>
pub fn status(answer: &HttpResponse) -> StatusCode {
    let code = answer.headers().get(Status::GRPC_STATUS);
    let Some(code) = code.map(|code| tonic::Code::from_bytes(code.as_bytes())) else {
        return answer.status();
    };
    match code {
        tonic::Code::Ok => answer.status(),
        tonic::Code::InvalidArgument
        | tonic::Code::FailedPrecondition
        | tonic::Code::OutOfRange
        | tonic::Code::Cancelled => StatusCode::BAD_REQUEST,
        tonic::Code::Unauthenticated => StatusCode::UNAUTHORIZED,
        tonic::Code::PermissionDenied => StatusCode::FORBIDDEN,
        // A method that is not there is the caller's fault, not the server's.
        tonic::Code::NotFound | tonic::Code::Unimplemented => StatusCode::NOT_FOUND,
        tonic::Code::AlreadyExists | tonic::Code::Aborted => StatusCode::CONFLICT,
        tonic::Code::ResourceExhausted => StatusCode::TOO_MANY_REQUESTS,
        tonic::Code::Unavailable => StatusCode::SERVICE_UNAVAILABLE,
        tonic::Code::DeadlineExceeded => StatusCode::GATEWAY_TIMEOUT,
        // What fails here has details; without, the library could not read what was sent.
        tonic::Code::Internal if !answer.headers().contains_key(DETAILS) => StatusCode::BAD_REQUEST,
        tonic::Code::Unknown | tonic::Code::Internal | tonic::Code::DataLoss => {
            StatusCode::INTERNAL_SERVER_ERROR
        }
    }
}

struct Interface(Arc<App>);

#[tonic::async_trait]
impl Orders for Interface {
    type WatchOrdersStream = Streaming<pb::OrderEvent>;

    async fn place_order(
        &self,
        request: Request<pb::PlaceOrderRequest>,
    ) -> Answer<pb::PlaceOrderResponse> {
        counted("PlaceOrder", async {
            let key = request.metadata().get(KEY);
            let key = key.map(|key| key.to_str().unwrap_or_default());
            let key = idempotency_key(key)?;
            let caller = caller(&request);
            let Created { order, repeated } = self
                .0
                .create_order(&caller, request.into_inner().into(), key)
                .await?;
            let order = Some(order.into());
            Ok(pb::PlaceOrderResponse { order, repeated })
        })
        .await
    }

    async fn get_order(&self, request: Request<pb::GetOrderRequest>) -> Answer<pb::Order> {
        counted("GetOrder", async {
            let id = order_id(&request.get_ref().id, "/id")?;
            Ok(self.0.order(&caller(&request), id).await?.into())
        })
        .await
    }

    async fn list_orders(
        &self,
        request: Request<pb::ListOrdersRequest>,
    ) -> Answer<pb::ListOrdersResponse> {
        counted("ListOrders", async {
            let caller = caller(&request);
            let pb::ListOrdersRequest {
                page_size,
                page_token,
            } = request.into_inner();
            let after = match page_token.as_str() {
                "" => None,
                token => Some(order_id(token, "/page_token")?),
            };
            let limit = (page_size > 0).then_some(page_size);
            let page = self.0.orders(&caller, PageRequest { limit, after }).await?;
            Ok(pb::ListOrdersResponse {
                orders: page.items.into_iter().map(Into::into).collect(),
                next_page_token: page.next.map(|id| id.to_string()).unwrap_or_default(),
            })
        })
        .await
    }

    async fn cancel_order(&self, request: Request<pb::CancelOrderRequest>) -> Answer<pb::Order> {
        counted("CancelOrder", async {
            let id = order_id(&request.get_ref().id, "/id")?;
            Ok(self.0.cancel_order(&caller(&request), id).await?.into())
        })
        .await
    }

    async fn get_totals(
        &self,
        request: Request<pb::GetTotalsRequest>,
    ) -> Answer<pb::GetTotalsResponse> {
        counted("GetTotals", async {
            let customer = &request.get_ref().customer;
            let totals = self.0.totals(&caller(&request), customer).await?;
            let totals = totals.into_iter().map(Into::into).collect();
            Ok(pb::GetTotalsResponse { totals })
        })
        .await
    }

    async fn watch_orders(
        &self,
        request: Request<pb::WatchOrdersRequest>,
    ) -> Answer<Self::WatchOrdersStream> {
        counted("WatchOrders", async {
            let caller = caller(&request);
            let customer = request.into_inner().customer;
            let customer = (!customer.is_empty()).then_some(customer);
            let events = self.0.watch(&caller, customer)?.map(|event| match event {
                Ok(event) => Ok((&*event).into()),
                Err(error) => Err(Problem::from(error).into()),
            });
            Ok(Box::pin(events) as Self::WatchOrdersStream)
        })
        .await
    }
}

/// Who has been recognised before the request came here.
fn caller<T>(request: &Request<T>) -> Caller {
    request.extensions().get().cloned().unwrap_or_default()
}

/// Answers a call, and counts it by its outcome: HTTP's status says nothing of that.
async fn counted<T>(
    method: &'static str,
    answer: impl Future<Output = Result<T, Problem>>,
) -> Answer<T> {
    let began = Instant::now();
    let answer = answer.await.map_err(Status::from);
    let (labels, seconds) = ([("method", method)], began.elapsed().as_secs_f64());
    observe(
        &METRICS.grpc_duration,
        &labels,
        seconds,
        &Context::current(),
    );
    let code = answer
        .as_ref()
        .map_or_else(Status::code, |_| tonic::Code::Ok);
    let code = format!("{code:?}");
    METRICS
        .grpc_requests
        .get_or_create(&Call { method, code })
        .inc();
    answer.map(Response::new)
}

/// The health of `grpc.health.v1`: that of `/health/ready`.
struct Readiness(Arc<App>);

impl Readiness {
    async fn look(app: &App) -> HealthCheckResponse {
        let status = match is_ready(&app.readiness().await) {
            true => ServingStatus::Serving,
            false => ServingStatus::NotServing,
        };
        HealthCheckResponse {
            status: status.into(),
        }
    }

    /// Of the whole server, or of a service that it has.
    fn known(request: &HealthCheckRequest) -> bool {
        ["", OrdersServer::<Interface>::NAME].contains(&request.service.as_str())
    }
}

#[tonic::async_trait]
impl Health for Readiness {
    type WatchStream = Streaming<HealthCheckResponse>;

    async fn check(&self, request: Request<HealthCheckRequest>) -> Answer<HealthCheckResponse> {
        if !Self::known(request.get_ref()) {
            return Err(Status::not_found("there is no such service"));
        }
        Ok(Response::new(Self::look(&self.0).await))
    }

    /// The state now, and each time that it is another one.
    async fn watch(&self, request: Request<HealthCheckRequest>) -> Answer<Self::WatchStream> {
        let session = self.0.sessions.begin(&caller(&request).client);
        let session =
            session.ok_or_else(|| Status::from(Problem::from(crate::app::Error::Full)))?;
        let unknown = !Self::known(request.get_ref());
        let app = Arc::clone(&self.0);
        let states = futures_util::stream::unfold(None, move |before| {
            let app = Arc::clone(&app);
            async move {
                loop {
                    let state = match unknown {
                        true => HealthCheckResponse {
                            status: ServingStatus::ServiceUnknown.into(),
                        },
                        false => Self::look(&app).await,
                    };
                    if before != Some(state.status) {
                        let seen = Some(state.status);
                        return Some((Ok(state), seen));
                    }
                    tokio::time::sleep(HEALTH_INTERVAL).await;
                }
            }
        });
        Ok(Response::new(Box::pin(session.until_the_end(states))))
    }
}

impl From<Problem> for Status {
    fn from(problem: Problem) -> Self {
        let mut details = ErrorDetails::new();
        details.set_error_info(problem.code(), DOMAIN, std::collections::HashMap::new());
        for wrong in &problem.errors {
            details.add_bad_request_violation(&wrong.field, &wrong.reason);
        }
        let code = problem.fault.names().grpc;
        Self::with_error_details(code, problem.message(), details)
    }
}

impl From<pb::PlaceOrderRequest> for OrderRequest {
    fn from(request: pb::PlaceOrderRequest) -> Self {
        let items = request.items.into_iter().map(|item| orders::ItemRequest {
            sku: item.sku,
            quantity: item.quantity,
            unit_price_cents: item.unit_price_cents,
        });
        Self {
            customer: request.customer,
            currency: request.currency,
            items: items.collect(),
            contact: request.contact.map(orders::Contact),
        }
    }
}

impl From<orders::Order> for pb::Order {
    fn from(order: orders::Order) -> Self {
        let status = match order.status {
            orders::Status::Open => pb::Status::Open,
            orders::Status::Cancelled => pb::Status::Cancelled,
        };
        let items = order.items.into_iter().map(|item| pb::Item {
            sku: item.sku,
            quantity: item.quantity,
            unit_price_cents: item.unit_price_cents,
        });
        Self {
            id: order.id.to_string(),
            customer: order.customer,
            currency: order.currency,
            status: status.into(),
            items: items.collect(),
            total_cents: order.total_cents,
            created_at: Some(timestamp(order.created_at)),
            updated_at: Some(timestamp(order.updated_at)),
            contact: order.contact.map(|contact| contact.0),
        }
    }
}

impl From<orders::Total> for pb::Total {
    fn from(total: orders::Total) -> Self {
        Self {
            currency: total.currency,
            orders: total.orders,
            total_cents: total.total_cents,
        }
    }
}

impl From<&Event> for pb::OrderEvent {
    fn from(event: &Event) -> Self {
        let kind = match event.kind {
            Kind::Placed => pb::order_event::Kind::Placed,
            Kind::Cancelled => pb::order_event::Kind::Cancelled,
        };
        Self {
            id: event.id.to_string(),
            kind: kind.into(),
            time: Some(timestamp(event.time)),
            order: Some(event.data.clone().into()),
        }
    }
}

fn timestamp(time: Timestamp) -> prost_types::Timestamp {
    prost_types::Timestamp {
        seconds: time.as_second(),
        nanos: time.subsec_nanosecond(),
    }
}
