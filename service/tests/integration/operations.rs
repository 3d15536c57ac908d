//! Health, build info, metrics, limits and a lossless end.

use std::time::Duration;

use serde_json::json;
use service::config::{Scheme, Timeout};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::database::Database;
use crate::test_app::{TestApp, eventually, order, without_limit};

#[tokio::test]
async fn health_info_and_metrics_tell_what_runs() {
    let app = TestApp::start().await;
    assert_eq!(
        app.get("/health/live").await,
        (200, json!({ "status": "live" }))
    );
    assert_eq!(app.get("/health/ready").await.0, 200);
    let (_, info) = app.get("/info").await;
    assert_eq!(info["version"], env!("CARGO_PKG_VERSION"));
    assert_eq!(info["schema_version"], 7);
    assert_eq!(info["config_hash"].as_str().unwrap().len(), 64);

    app.get("/v1/orders?limit=3").await;
    app.get("/no/such/path").await;
    let metrics = app.admin_text("/metrics").await;
    for wanted in [
        "http_requests_total{method=\"GET\",route=\"/v1/orders\",status=\"200\"}",
        "http_requests_total{method=\"GET\",route=\"unmatched\",status=\"404\"}",
        "http_request_duration_seconds_bucket{method=\"GET\",route=\"/v1/orders\",le=\"0.1\"}",
        "process_resident_memory_bytes",
        "database_connections{state=\"idle\"} ",
        "database_connections_max ",
        "database_waiting ",
        "outbox_age_seconds ",
        "cache_entries ",
    ] {
        assert!(metrics.contains(wanted), "{wanted} is not in\n{metrics}");
    }
}

/// Whoever tries paths and methods makes no series of their own.
#[tokio::test]
async fn a_scan_makes_no_series() {
    let app = TestApp::start_with(without_limit).await;
    let client = reqwest::Client::new();
    for i in 0..300 {
        let address = format!("http://{}/scan-{i}/of?paths={i}", app.public);
        let method = format!("SCAN{}", i % 100).parse().unwrap();
        let answer = client.request(method, address).send().await.unwrap();
        assert_eq!(answer.status(), 404);
        assert_eq!(app.get(&format!("/v1/orders/scan-{i}")).await.0, 422);
    }
    let metrics = app.admin_text("/metrics").await;
    assert!(!metrics.to_lowercase().contains("scan"), "{metrics}");
    let lines = metrics.lines();
    let unmatched = lines.filter(|line| line.contains("route=\"unmatched\""));
    let requests = unmatched.filter(|line| line.starts_with("http_requests_total{"));
    // A few methods by a few statuses, of all tests in this process.
    assert!(requests.count() < 50, "{metrics}");
}

#[tokio::test]
async fn readiness_names_the_part_that_is_not_ready() {
    let app = TestApp::start().await;
    app.app.close().await;
    // Why is for operators.
    let (status, body) = app.get("/health/ready").await;
    assert_eq!((status, body), (503, json!({ "status": "not ready" })));
    let body = app.admin_text("/health/ready").await;
    let body: serde_json::Value = serde_json::from_str(&body).unwrap();
    let database = &body["parts"][1];
    assert_eq!(
        (&database["part"], &database["ready"]),
        (&json!("database"), &json!(false))
    );
    assert!(
        database["reason"].as_str().unwrap().contains("closed"),
        "{body}"
    );
}

/// Where every connection waits for the database, so does whoever asks, and nobody is turned away.
#[tokio::test]
async fn a_process_that_waits_for_its_database_is_ready() {
    for database in Database::each().await {
        let patience = Timeout(Duration::from_secs(40));
        let app = TestApp::start_on(database.clone(), |config| {
            config.database.max_connections = 1.try_into().unwrap();
            config.database.acquire_timeout = patience;
            config.database.statement_timeout = patience;
            config.database.busy_timeout = patience;
            config.server.request_timeout = patience;
        })
        .await;
        let held = database.hold().await;
        let orders =
            futures_util::future::join_all((0..4).map(|_| app.post("/v1/orders", order())));
        let asked = async {
            eventually("the connection waits", async || {
                let read = app.app.storage().buried(1);
                let read = tokio::time::timeout(Duration::from_millis(200), read);
                read.await.is_err()
            })
            .await;
            for _ in 0..3 {
                assert_eq!(app.get("/health/ready").await.0, 200, "{}", database.kind);
            }
            drop(held);
        };
        let (orders, ()) = tokio::join!(orders, asked);
        assert!(
            orders.iter().all(|(status, _)| *status == 201),
            "{orders:?}"
        );
    }
}

/// Whoever has given up on a statement leaves none that goes on, and keeps others waiting with its locks.
#[tokio::test]
async fn the_server_ends_a_statement_that_takes_too_long() {
    let database = Database::postgres().await;
    let app = TestApp::start_on(database.clone(), |config| {
        config.database.statement_timeout = Timeout(Duration::from_millis(300));
        config.server.request_timeout = Timeout(Duration::from_secs(40));
    })
    .await;
    let held = database.hold().await;
    let (status, problem) = app.post("/v1/orders", order()).await;
    assert_eq!((status, &problem["type"]), (503, &json!("overloaded")));
    drop(held);
    assert_eq!(app.post("/v1/orders", order()).await.0, 201);
}

/// Where none comes back for long, it is not for being busy.
#[tokio::test]
async fn a_process_that_gets_no_connection_any_more_is_not_ready() {
    for database in Database::each().await {
        let app = TestApp::start_on(database.clone(), |config| {
            // SQLite's writes have one turn, and need no more than one.
            if config.database.url.scheme() == Scheme::Postgres {
                config.database.max_connections = 1.try_into().unwrap();
            }
            config.database.acquire_timeout = Timeout(Duration::from_millis(500));
            config.database.statement_timeout = Timeout(Duration::from_secs(80));
            config.database.busy_timeout = Timeout(Duration::from_secs(80));
            config.server.request_timeout = Timeout(Duration::from_secs(80));
        })
        .await;
        let held = database.hold().await;
        let waits = app.post("/v1/orders", order());
        let seen = async {
            let is_ready = async || app.get("/health/ready").await.0 == 200;
            eventually("it is not ready", async || !is_ready().await).await;
            let why = app.admin_text("/health/ready").await;
            assert!(why.contains("nothing has been done"), "{why}");
            drop(held);
            eventually("it is ready again", is_ready).await;
        };
        // It has the connection, or whoever tells events has it.
        let (_, ()) = tokio::join!(waits, seen);
    }
}

#[tokio::test]
async fn request_ids_are_kept_or_made() {
    let app = TestApp::start().await;
    let client = reqwest::Client::new();
    let url = format!("http://{}/health/live", app.public);
    let echoed = client
        .get(&url)
        .header("x-request-id", "mine-1")
        .send()
        .await
        .unwrap();
    assert_eq!(echoed.headers()["x-request-id"], "mine-1");
    let made = client.get(&url).send().await.unwrap();
    assert_eq!(made.headers()["x-request-id"].len(), 36);
}

/// A body that never comes is cut off by `request_timeout`, not waited for.
#[tokio::test]
async fn slow_requests_end_with_504() {
    let app = TestApp::start_with(|config| {
        config.server.request_timeout = Timeout(Duration::from_millis(50));
    })
    .await;
    let mut socket = TcpStream::connect(app.public).await.unwrap();
    let head = "POST /v1/orders HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n\
                content-length: 100\r\n\r\n{";
    socket.write_all(head.as_bytes()).await.unwrap();
    let mut answer = [0; 12];
    socket.read_exact(&mut answer).await.unwrap();
    assert_eq!(&answer, b"HTTP/1.1 504");
}

/// A request whose body is still on its way when the end begins is answered all the same.
#[tokio::test]
async fn a_request_in_flight_survives_shutdown() {
    let mut app = TestApp::start().await;
    let body = order().to_string();
    let mut socket = TcpStream::connect(app.public).await.unwrap();
    let head = format!(
        "POST /v1/orders HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n\
         content-length: {}\r\nexpect: 100-continue\r\n\r\n",
        body.len()
    );
    socket.write_all(head.as_bytes()).await.unwrap();
    // The interim answer shows that the handler has begun to read the body.
    let mut interim = [0; 25];
    socket.read_exact(&mut interim).await.unwrap();
    assert_eq!(&interim, b"HTTP/1.1 100 Continue\r\n\r\n");

    app.begin_stop();
    socket.write_all(body.as_bytes()).await.unwrap();
    let mut answer = String::new();
    socket.read_to_string(&mut answer).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 201"), "{answer}");
    app.stopped().await.unwrap();
}

/// Proxies send requests for a while after a process was told to end. They are answered, each on a
/// connection that closes, until they stop.
#[tokio::test]
async fn requests_that_come_late_are_answered() {
    let mut app = TestApp::start_with(|config| {
        config.server.linger = Some(Timeout(Duration::from_secs(2)));
    })
    .await;
    let url = format!("http://{}/v1/orders", app.public);
    let client = reqwest::Client::new();
    let open = client.get(&url).send().await.unwrap();
    assert!(!open.headers().contains_key("connection"));
    open.bytes().await.unwrap();
    app.begin_stop();
    eventually("it says that it is going", async || {
        app.admin_text("/health/ready")
            .await
            .contains("shutting down")
    })
    .await;
    for _ in 0..20 {
        let late = client.get(&url).send().await.unwrap();
        assert_eq!(late.status(), 200);
        assert_eq!(late.headers()["connection"], "close");
        late.bytes().await.unwrap();
    }
    app.stopped().await.unwrap();
    assert!(client.get(&url).send().await.unwrap_err().is_connect());
}

/// Whoever never notices does not keep the process alive.
#[tokio::test]
async fn requests_that_do_not_stop_are_not_waited_for() {
    let mut app = TestApp::start_with(|config| {
        config.server.linger = Some(Timeout(Duration::from_millis(400)));
        config.server.drain_timeout = Timeout(Duration::from_secs(2));
    })
    .await;
    let url = format!("http://{}/v1/orders", app.public);
    let client = reqwest::Client::new();
    app.begin_stop();
    let mut late = 0;
    while let Ok(answer) = client.get(&url).send().await {
        late += u32::from(answer.headers().contains_key("connection"));
    }
    assert!(late > 0);
    app.stopped().await.unwrap();
}

#[tokio::test]
async fn a_request_that_never_ends_does_not_hold_the_process_for_ever() {
    let mut app = TestApp::start_with(|config| {
        config.server.drain_timeout = Timeout(Duration::from_millis(100));
    })
    .await;
    let mut socket = TcpStream::connect(app.public).await.unwrap();
    let head = "POST /v1/orders HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n\
                content-length: 9\r\nexpect: 100-continue\r\n\r\n";
    socket.write_all(head.as_bytes()).await.unwrap();
    let mut interim = [0; 25];
    socket.read_exact(&mut interim).await.unwrap();
    app.begin_stop();
    let error = app.stopped().await.unwrap_err();
    assert!(error.to_string().contains("drain_timeout"), "{error:#}");
}

/// Pages of other origins than the configured ones may not call, and no answer is more than data.
#[tokio::test]
async fn browsers_are_told_what_they_may_do() {
    let app = TestApp::start_with(|config| {
        config.server.allowed_origins =
            vec![service::config::Origin("https://shop.example".into())];
    })
    .await;
    let client = reqwest::Client::new();
    let orders = format!("http://{}/v1/orders", app.public);
    for (origin, allowed) in [
        ("https://shop.example", true),
        ("https://evil.example", false),
        ("https://shop.example.evil", false),
        ("null", false),
    ] {
        let preflight = client
            .request(reqwest::Method::OPTIONS, &orders)
            .header("origin", origin)
            .header("access-control-request-method", "POST")
            .header(
                "access-control-request-headers",
                "authorization,content-type",
            );
        for request in [preflight, client.get(&orders).header("origin", origin)] {
            let answer = request.send().await.unwrap();
            let said = answer.headers().get("access-control-allow-origin");
            assert_eq!(
                said.is_some_and(|said| said == origin),
                allowed,
                "{origin}: {said:?}"
            );
            assert!(allowed || said.is_none(), "{origin}: {said:?}");
        }
    }
    let shop = client.get(&orders).header("origin", "https://shop.example");
    let answer = shop.send().await.unwrap();
    let shown = &answer.headers()["access-control-expose-headers"];
    for name in [
        "idempotent-replayed",
        "ratelimit",
        "ratelimit-policy",
        "retry-after",
    ] {
        let mut all = shown.to_str().unwrap().split(',');
        assert!(all.any(|shown| shown.trim() == name), "{name} in {shown:?}");
    }
    let answer = client.get(&orders).send().await.unwrap();
    for (name, value) in [
        ("x-content-type-options", "nosniff"),
        (
            "content-security-policy",
            "default-src 'none'; frame-ancestors 'none'",
        ),
        ("cache-control", "no-store"),
        ("referrer-policy", "no-referrer"),
    ] {
        assert_eq!(answer.headers()[name], value);
    }
}
