//! A trace goes through the request, the outbox and the consumer, and to a collector.

use std::process::Stdio;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use opentelemetry_proto::tonic::collector::trace::v1::trace_service_server::{
    TraceService, TraceServiceServer,
};
use opentelemetry_proto::tonic::collector::trace::v1::{
    ExportTraceServiceRequest, ExportTraceServiceResponse,
};
use opentelemetry_proto::tonic::trace::v1::Span;
use serde_json::{Value, json};
use service::api::grpc::pb::orders_client::OrdersClient;
use service::hex::hex;
use tonic::server::NamedService;
use tonic::transport::Channel;

use crate::broker::Broker;
use crate::interfaces::{PLACE, new_order, place};
use crate::test_app::{config_dir, free_port, order};

/// What another system keeps in a trace.
const STATE: &str = "vendor=its-own,other=1";

/// A collector that keeps what it is sent.
#[derive(Clone, Default)]
struct Collector {
    spans: Arc<Mutex<Vec<Span>>>,
    /// What their processes say of themselves.
    attributes: Arc<Mutex<Vec<String>>>,
}

#[tonic::async_trait]
impl TraceService for Collector {
    async fn export(
        &self,
        request: tonic::Request<ExportTraceServiceRequest>,
    ) -> Result<tonic::Response<ExportTraceServiceResponse>, tonic::Status> {
        let resources = request.into_inner().resource_spans;
        for resource in resources.iter().filter_map(|spans| spans.resource.as_ref()) {
            let said = resource.attributes.iter().map(|said| format!("{said:?}"));
            self.attributes.lock().unwrap().extend(said);
        }
        let resources = resources.into_iter();
        let scopes = resources.flat_map(|resource| resource.scope_spans);
        self.spans
            .lock()
            .unwrap()
            .extend(scopes.flat_map(|scope| scope.spans));
        Ok(tonic::Response::new(ExportTraceServiceResponse::default()))
    }
}

impl Collector {
    async fn start() -> (Self, String) {
        type Server = TraceServiceServer<Collector>;
        let collector = Self::default();
        let path = format!("/{}/{{method}}", Server::NAME);
        let routes = axum::Router::new().route_service(&path, Server::new(collector.clone()));
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        tokio::spawn(async { axum::serve(listener, routes).await });
        (collector, address)
    }

    /// The span of that name in a trace, and in any where that is empty.
    fn span(&self, name: &str, trace: &str) -> Option<Span> {
        let spans = self.spans.lock().unwrap();
        let is_wanted = |span: &&Span| span.name == name && hex(&span.trace_id).starts_with(trace);
        spans.iter().find(is_wanted).cloned()
    }
}

/// Whichever the interface is that an order comes by, and the bus that its event takes.
#[tokio::test(flavor = "multi_thread")]
async fn a_trace_goes_through_to_the_consumer() {
    for broker in Broker::each().await {
        goes_through(broker).await;
    }
}

async fn goes_through(broker: Broker) {
    let (collector, endpoint) = Collector::start().await;
    let dir = tempfile::tempdir().unwrap();
    let [port, admin] = [free_port(), free_port()];
    let mut running = tokio::process::Command::new(env!("CARGO_BIN_EXE_service"))
        .kill_on_drop(true)
        .env("SERVICE_CONFIG_DIR", config_dir())
        .envs(broker.variables())
        .env("SERVICE__TRACING__ENDPOINT", &endpoint)
        .env("SERVICE__TRACING__SERVICE_NAME", "orders-of-ada")
        .env("IMAGE_VERSION", "7.8.9")
        .env("SERVICE__LOGGING__FILE", dir.path().join("log"))
        .env("SERVICE__LOGGING__FORMAT", "json")
        .env(
            "SERVICE__DATABASE__URL",
            format!("sqlite://{}/orders.db", dir.path().display()),
        )
        .env("SERVICE__SERVER__LISTEN", format!("127.0.0.1:{port}"))
        .env(
            "SERVICE__SERVER__ADMIN_LISTEN",
            format!("127.0.0.1:{admin}"),
        )
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let client = reqwest::Client::new();
    let (trace, caller) = ("4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7");
    let (by_graphql, by_grpc) = (trace.replace("4bf9", "aaaa"), trace.replace("4bf9", "bbbb"));
    let parent = |trace: &str| format!("00-{trace}-{caller}-01");
    let began = Instant::now();
    loop {
        let placed = client
            .post(format!("http://127.0.0.1:{port}/v1/orders"))
            .header("traceparent", parent(trace))
            .header("tracestate", STATE)
            .json(&order())
            .send()
            .await;
        match placed {
            Ok(placed) => break assert_eq!(placed.status(), 201),
            Err(error) => assert!(began.elapsed() < Duration::from_secs(20), "{error}"),
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let graphql = client.post(format!("http://127.0.0.1:{port}/graphql"));
    let graphql = graphql.header("traceparent", parent(&by_graphql));
    let graphql = graphql.header("tracestate", STATE);
    let graphql =
        graphql.json(&json!({ "query": PLACE, "variables": { "order": new_order(&order()) } }));
    let graphql: Value = graphql.send().await.unwrap().json().await.unwrap();
    assert_eq!(graphql["errors"], Value::Null, "{graphql}");
    let channel = Channel::from_shared(format!("http://127.0.0.1:{port}"));
    let channel = channel.unwrap().connect().await.unwrap();
    let mut request = tonic::Request::new(place(&order()));
    let metadata = parent(&by_grpc).parse().unwrap();
    request.metadata_mut().insert("traceparent", metadata);
    let state = STATE.parse().unwrap();
    request.metadata_mut().insert("tracestate", state);
    OrdersClient::new(channel)
        .place_order(request)
        .await
        .unwrap();
    // Consumers act on them; then the end sends what is left.
    let totals = format!("http://127.0.0.1:{port}/v1/customers/ada/totals");
    loop {
        let totals = client
            .get(&totals)
            .send()
            .await
            .unwrap()
            .text()
            .await
            .unwrap();
        if totals.contains("\"orders\":3") {
            break;
        }
        assert!(
            began.elapsed() < Duration::from_secs(60),
            "{}: {totals}",
            broker.kind
        );
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    // Numbers lead to the traces behind them, for whoever reads OpenMetrics.
    let metrics = async |accept: &str| {
        let address = format!("http://127.0.0.1:{admin}/metrics");
        let asked = client.get(address).header("accept", accept).send().await;
        let answer = asked.unwrap();
        let kind = answer.headers()["content-type"]
            .to_str()
            .unwrap()
            .to_owned();
        (kind, answer.text().await.unwrap())
    };
    let prometheus = "application/openmetrics-text;version=1.0.0;q=0.5,text/plain;q=0.2";
    let (kind, text) = metrics(prometheus).await;
    assert!(kind.starts_with("application/openmetrics-text"), "{kind}");
    let exemplar = format!("# {{trace_id=\"{trace}\"}} ");
    let line = text.lines().find(|line| line.contains(&exemplar)).unwrap();
    let bucket = "http_request_duration_seconds_bucket{";
    assert!(line.starts_with(bucket), "{line}");
    assert!(line.contains("route=\"/v1/orders\""), "{line}");
    assert!(text.ends_with("# EOF\n"), "{text}");
    let of_grpc = format!("# {{trace_id=\"{by_grpc}\"}} ");
    let bucket_of_grpc = "grpc_request_duration_seconds_bucket{";
    let leads = |line: &str| line.starts_with(bucket_of_grpc) && line.contains(&of_grpc);
    assert!(text.lines().any(leads), "{text}");
    let (kind, text) = metrics("text/plain").await;
    assert!(kind.starts_with("text/plain; version=0.0.4"), "{kind}");
    assert!(text.contains(bucket) && !text.contains("# {"), "{text}");

    let pid = i32::try_from(running.id().unwrap()).unwrap();
    let pid = rustix::process::Pid::from_raw(pid).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    assert!(running.wait().await.unwrap().success());

    let attributes = collector.attributes.lock().unwrap().join("\n");
    for said in ["7.8.9", "orders-of-ada"] {
        assert!(attributes.contains(said), "{attributes}");
    }
    let ways = [
        ("POST /v1/orders", trace),
        ("POST /graphql", by_graphql.as_str()),
        ("POST /orders.v1.Orders/{method}", by_grpc.as_str()),
    ];
    for (name, trace) in ways {
        let why = format!("{name} and {}", broker.kind);
        let request = collector.span(name, trace).expect(&why);
        assert_eq!(hex(&request.parent_span_id), caller);
        let consumer = collector.span("totals order.placed.v1", trace).expect(&why);
        assert_eq!(consumer.parent_span_id, request.span_id, "{why}");
        let states = [&request, &consumer].map(|span| span.trace_state.as_str());
        assert_eq!(states, [STATE; 2], "{why}");
    }
    // One that nobody had begun is a trace of its own.
    let name = "GET /v1/customers/{customer}/totals";
    let other = collector.span(name, "").unwrap();
    assert_ne!(hex(&other.trace_id), trace);

    // The log, in its file of today, names the trace.
    let files: Vec<_> = std::fs::read_dir(&dir).unwrap().flatten().collect();
    let is_log = |name: &std::ffi::OsString| name.to_string_lossy().starts_with("log.");
    let file = files.iter().find(|file| is_log(&file.file_name())).unwrap();
    let log = std::fs::read_to_string(file.path()).unwrap();
    let line = log.lines().find(|line| line.contains("answered")).unwrap();
    let line: Value = serde_json::from_str(line).unwrap();
    assert_eq!(line["span"]["trace_id"], trace, "{line}");
}
