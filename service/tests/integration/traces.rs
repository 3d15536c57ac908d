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
use tonic::server::NamedService;

use service::hex::hex;

use crate::test_app::{config_dir, free_port, order};

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

    fn span(&self, name: &str) -> Option<Span> {
        let spans = self.spans.lock().unwrap();
        spans.iter().find(|span| span.name == name).cloned()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_trace_goes_through_to_the_consumer() {
    let (collector, endpoint) = Collector::start().await;
    let dir = tempfile::tempdir().unwrap();
    let [port, admin] = [free_port(), free_port()];
    let mut running = tokio::process::Command::new(env!("CARGO_BIN_EXE_service"))
        .kill_on_drop(true)
        .env("SERVICE_CONFIG_DIR", config_dir())
        .env("SERVICE__TRACING__ENDPOINT", &endpoint)
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
    let began = Instant::now();
    loop {
        let placed = client
            .post(format!("http://127.0.0.1:{port}/v1/orders"))
            .header("traceparent", format!("00-{trace}-{caller}-01"))
            .json(&order())
            .send()
            .await;
        match placed {
            Ok(placed) => break assert_eq!(placed.status(), 201),
            Err(error) => assert!(began.elapsed() < Duration::from_secs(20), "{error}"),
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    // Consumers act on it; then the end sends what is left.
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
        if totals.contains("EUR") {
            break;
        }
        assert!(began.elapsed() < Duration::from_secs(20), "{totals}");
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
    let (kind, text) = metrics("text/plain").await;
    assert!(kind.starts_with("text/plain; version=0.0.4"), "{kind}");
    assert!(text.contains(bucket) && !text.contains("# {"), "{text}");

    let pid = i32::try_from(running.id().unwrap()).unwrap();
    let pid = rustix::process::Pid::from_raw(pid).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    assert!(running.wait().await.unwrap().success());

    let attributes = collector.attributes.lock().unwrap().join("\n");
    assert!(attributes.contains("7.8.9"), "{attributes}");
    let request = collector.span("POST /v1/orders").unwrap();
    assert_eq!(hex(&request.trace_id), trace);
    assert_eq!(hex(&request.parent_span_id), caller);
    let consumer = collector.span("totals order.placed.v1").unwrap();
    assert_eq!(hex(&consumer.trace_id), trace);
    assert_eq!(consumer.parent_span_id, request.span_id);
    // One that nobody had begun is a trace of its own.
    let other = collector
        .span("GET /v1/customers/{customer}/totals")
        .unwrap();
    assert_ne!(other.trace_id, request.trace_id);

    // The log, in its file of today, names the trace.
    let files: Vec<_> = std::fs::read_dir(&dir).unwrap().flatten().collect();
    let is_log = |name: &std::ffi::OsString| name.to_string_lossy().starts_with("log.");
    let file = files.iter().find(|file| is_log(&file.file_name())).unwrap();
    let log = std::fs::read_to_string(file.path()).unwrap();
    let line = log.lines().find(|line| line.contains("answered")).unwrap();
    let line: serde_json::Value = serde_json::from_str(line).unwrap();
    assert_eq!(line["span"]["trace_id"], trace, "{line}");
}
