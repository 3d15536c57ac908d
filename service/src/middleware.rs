//! Every layer around every request, outermost first: request id, log, metrics and trace, the
//! end of the process, what browsers are told, gRPC's own words for what the others refuse, CORS,
//! panics, who calls, limits of clients and of the process, time-out, body limit.
//!
//! Two of these layers are ours, with the panics between them. axum's own way to write one,
//! `middleware::from_fn`, copies and boxes everything inside it for every request.

use std::any::Any;
use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{self, Poll};
use std::time::{Duration, Instant};

use axum::Router;
use axum::extract::{DefaultBodyLimit, MatchedPath, Request};
use axum::http::{HeaderName, HeaderValue, Method, StatusCode, header};
use axum::response::{IntoResponse, Response};
use opentelemetry::context::FutureExt;
use opentelemetry::trace::{Status, TraceContextExt};
use opentelemetry::{Context, KeyValue};
use tower::layer::layer_fn;
use tower::{Layer, Service, ServiceBuilder};
use tower_http::catch_panic::CatchPanicLayer;
use tower_http::cors::CorsLayer;
use tracing::{Instrument, Span};
use uuid::Uuid;

use crate::api::description;
use crate::api::fault::Fault;
use crate::api::problem::Problem;
use crate::api::{graphql, grpc, rest};
use crate::app::App;
use crate::auth::{Caller, Distrust, Shown};
use crate::config::{Config, Origin};
use crate::limits::{Admitted, Client};
use crate::metrics::{Answer, METRICS, Route, observe};
use crate::{drain, limits, traces};

static REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
const MAX_REQUEST_ID: usize = 128;
/// For two years (RFC 6797).
const TLS_ONLY: HeaderValue = HeaderValue::from_static("max-age=63072000");
/// How long browsers may remember what they may send.
const PREFLIGHT_AGE: Duration = Duration::from_secs(600);

pub fn apply(routes: Router<Arc<App>>, app: &Arc<App>) -> Router<Arc<App>> {
    let config = &app.config.server;
    routes.layer(
        ServiceBuilder::new()
            .layer(around(app, surround))
            .layer(cors(&config.allowed_origins))
            .layer(CatchPanicLayer::custom(panicked))
            .layer(around(app, admit))
            .layer(DefaultBodyLimit::max(config.body_limit.get())),
    )
}

/// What gives answers: routes, and the layers around them. It never fails, and is always ready.
trait Inside:
    Service<Request, Response: IntoResponse, Error = Infallible, Future: Send + 'static>
    + Clone
    + Send
    + 'static
{
}

impl<S> Inside for S where
    S: Service<Request, Response: IntoResponse, Error = Infallible, Future: Send + 'static>
        + Clone
        + Send
        + 'static
{
}

type Answering = Pin<Box<dyn Future<Output = Result<Response, Infallible>> + Send>>;

/// A layer of ours around what is inside it.
#[derive(Clone)]
struct Around<S> {
    app: Arc<App>,
    answer: fn(&Arc<App>, &mut S, Request) -> Answering,
    inside: S,
}

fn around<S: Inside>(
    app: &Arc<App>,
    answer: fn(&Arc<App>, &mut S, Request) -> Answering,
) -> impl Layer<S, Service = Around<S>> + Clone + use<S> {
    let app = Arc::clone(app);
    layer_fn(move |inside| Around {
        app: Arc::clone(&app),
        answer,
        inside,
    })
}

impl<S: Inside> Service<Request> for Around<S> {
    type Response = Response;
    type Error = Infallible;
    type Future = Answering;

    fn poll_ready(&mut self, context: &mut task::Context<'_>) -> Poll<Result<(), Infallible>> {
        self.inside.poll_ready(context)
    }

    fn call(&mut self, request: Request) -> Answering {
        (self.answer)(&self.app, &mut self.inside, request)
    }
}

/// What every answer gets, whoever gives it.
fn surround(app: &Arc<App>, inside: &mut impl Inside, request: Request) -> Answering {
    let observed = Observed::begin(&request);
    let is_going = app.drain.notes(&request);
    let is_grpc = grpc::is_call(&request);
    let is_page = request.uri().path().starts_with(description::PAGE);
    let answer = inside.call(request).with_context(observed.trace.clone());
    let answer = answer.instrument(observed.span.clone());
    let app = Arc::clone(app);
    Box::pin(async move {
        let mut response = answer.await?.into_response();
        let status = if is_grpc {
            response = grpc::translated(response);
            grpc::status(&response)
        } else {
            graphql::status(&response)
        };
        protect(&mut response, is_page, &app.config);
        if is_going {
            drain::turn_away(&mut response);
        }
        observed.end(status, &mut response);
        Ok(response)
    })
}

/// Lets a request through, or says why not.
fn admit(app: &Arc<App>, inside: &mut impl Inside, mut request: Request) -> Answering {
    let (app, mut inside) = (Arc::clone(app), inside.clone());
    Box::pin(async move {
        let shown = match limits::is_exempt(&request) {
            // Whoever watches the service need not say who they are.
            true => None,
            false => Some(app.auth.shown(request.headers())),
        };
        let network = app.limits.network_of(&request);
        let (recognised, admitted) = match receive(&app, shown, network).await {
            Ok(received) => received,
            Err(refusal) => return Ok(refusal),
        };
        let mut response = match recognised {
            Ok(caller) => {
                request.extensions_mut().insert(caller);
                let (answer, limit) = (inside.call(request), app.config.server.request_timeout.0);
                match tokio::time::timeout(limit, answer).await {
                    Ok(response) => response?.into_response(),
                    Err(_) => Problem::new(Fault::Timeout).into_response(),
                }
            }
            Err(distrust) => distrust.into_response(),
        };
        admitted.tell(&mut response);
        Ok(response)
    })
}

/// Who calls, or why they are not believed, where there is a place for them; `shown` is nothing for those
/// who are always let in.
async fn receive(
    app: &App,
    shown: Option<Result<Shown, Distrust>>,
    network: Client,
) -> Result<(Result<Caller, Distrust>, Admitted<'_>), Response> {
    let limits = &app.limits;
    let recognised = match shown {
        None => {
            let mut caller = Caller::default();
            caller.client = network;
            return Ok((Ok(caller), Admitted::uncounted()));
        }
        Some(Ok(Shown::Caller(caller))) => Ok(caller),
        Some(Ok(Shown::Stranger(token))) => {
            let _place = limits.place_for_stranger(&network)?;
            app.auth.verify(token).await
        }
        Some(Err(distrust)) => Err(distrust),
    };
    // Whoever tries tokens is a client like any other.
    match recognised {
        Ok(mut caller) => {
            if caller.subject.is_none() {
                caller.client = network;
            }
            let admitted = limits.admit(&caller.client)?;
            Ok((Ok(caller), admitted))
        }
        Err(distrust) => Ok((Err(distrust), limits.admit_distrusted(network)?)),
    }
}

/// A request's id (the client's own, where it sent a usable one), its span, its log line and its
/// metrics. Routes, not paths, are the label: a scan of random paths makes no new series.
struct Observed {
    /// For the log.
    span: Span,
    /// For the collector.
    trace: Context,
    id: HeaderValue,
    method: &'static str,
    route: Arc<str>,
    started: Instant,
    _in_flight: InFlight,
}

impl Observed {
    fn begin(request: &Request) -> Self {
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
            .map_or("unmatched", MatchedPath::as_str);
        let (path, request_id) = (request.uri().path(), id.to_str().unwrap_or_default());
        let trace = traces::request(format!("{method} {route}"), request.headers());
        let trace_id = trace.span().span_context().trace_id();
        if trace.span().is_recording() {
            // <https://opentelemetry.io/docs/specs/semconv/http/http-spans/#http-server>
            trace.span().set_attributes([
                KeyValue::new("http.request.method", method),
                KeyValue::new("http.route", route.to_owned()),
                KeyValue::new("url.path", path.to_owned()),
                KeyValue::new("request_id", request_id.to_owned()),
            ]);
        }
        let span = tracing::info_span!("request", request_id, %trace_id, method, route, path);
        Self {
            id,
            method,
            route: route.into(),
            trace,
            span,
            started,
            _in_flight: InFlight::begin(),
        }
    }

    /// `status` is what the answer means, whichever interface gave it.
    fn end(self, status: StatusCode, response: &mut Response) {
        let seconds = self.started.elapsed().as_secs_f64();
        let (method, route) = (self.method, self.route);
        let answer = Answer {
            method,
            route: Arc::clone(&route),
            status: status.as_u16(),
        };
        METRICS.http_requests.get_or_create(&answer).inc();
        let labels = Route { method, route };
        observe(&METRICS.http_duration, &labels, seconds, &self.trace);
        let trace = self.trace.span();
        let code = i64::from(response.status().as_u16());
        trace.set_attribute(KeyValue::new("http.response.status_code", code));
        if status.is_server_error() {
            trace.set_status(Status::error(""));
        }
        self.span.in_scope(|| {
            tracing::info!(target: "access", status = status.as_u16(), seconds, "answered");
        });
        response.headers_mut().insert(REQUEST_ID.clone(), self.id);
    }
}

/// What browsers must not do with answers (OWASP's list of secure headers).
fn protect(response: &mut Response, is_page: bool, config: &Config) {
    const NOTHING: HeaderValue =
        HeaderValue::from_static("default-src 'none'; frame-ancestors 'none'");
    let policy = match is_page {
        true => description::policy(&config.auth),
        false => NOTHING,
    };
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_SECURITY_POLICY, policy);
    for (name, value) in [
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::X_FRAME_OPTIONS, "DENY"),
        (header::REFERRER_POLICY, "no-referrer"),
    ] {
        headers.insert(name, HeaderValue::from_static(value));
    }
    if config.tls.is_some() {
        headers.insert(header::STRICT_TRANSPORT_SECURITY, TLS_ONLY);
    }
    // Orders are somebody's; the pages' files are everybody's.
    if !is_page {
        let no_store = HeaderValue::from_static("no-store");
        headers.entry(header::CACHE_CONTROL).or_insert(no_store);
    }
}

/// Lets pages of these origins call; of no others, as long as browsers are asked.
/// <https://fetch.spec.whatwg.org/#http-cors-protocol>
fn cors(origins: &[Origin]) -> CorsLayer {
    let origins = origins
        .iter()
        .filter_map(|origin| HeaderValue::from_str(&origin.0).ok());
    CorsLayer::new()
        .allow_origin(origins.collect::<Vec<_>>())
        .allow_methods([Method::GET, Method::POST])
        .allow_headers([
            header::AUTHORIZATION,
            header::CONTENT_TYPE,
            HeaderName::from_static("idempotency-key"),
            HeaderName::from_static("traceparent"),
        ])
        .expose_headers([
            header::LOCATION,
            header::RETRY_AFTER,
            REQUEST_ID.clone(),
            rest::REPLAYED,
            limits::LIMIT.clone(),
            limits::POLICY.clone(),
        ])
        .max_age(PREFLIGHT_AGE)
}

/// Counted down however the request ends, by its client's going away too.
struct InFlight;

impl InFlight {
    fn begin() -> Self {
        METRICS.http_in_flight.inc();
        Self
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        METRICS.http_in_flight.dec();
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

fn panicked(cause: Box<dyn Any + Send + 'static>) -> Response {
    let cause = cause
        .downcast_ref::<&str>()
        .map(|text| (*text).to_owned())
        .or_else(|| cause.downcast_ref::<String>().cloned())
        .unwrap_or_default();
    tracing::error!(cause, "a request handler panicked");
    Problem::new(Fault::Internal).into_response()
}
