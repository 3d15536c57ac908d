//! One client's share, and a process that has its hands full.

use std::num::{NonZeroU32, NonZeroUsize};

use reqwest::Response;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::test_app::{TestApp, order};

/// More requests than a client may have at once, at a pace that lets a new one through each second.
const MANY: usize = 50;

async fn start(trusted: &[&str]) -> TestApp {
    TestApp::start_with(|config| {
        config.rate_limit.per_second = NonZeroU32::MIN;
        config.rate_limit.burst = NonZeroU32::new(5).unwrap();
        config.server.trusted_proxies = trusted.iter().map(|net| net.parse().unwrap()).collect();
    })
    .await
}

async fn get(app: &TestApp, path: &str, forwarded_for: &str) -> Response {
    let url = format!("http://{}{path}", app.public);
    let request = reqwest::Client::new().get(url);
    let request = request.header("x-forwarded-for", forwarded_for);
    request.send().await.unwrap()
}

/// The first refusal, where there is one, after how many requests.
async fn refused(
    app: &TestApp,
    forwarded_for: impl Fn(usize) -> String,
) -> Option<(usize, Response)> {
    for n in 0..MANY {
        let response = get(app, "/v1/orders", &forwarded_for(n)).await;
        match response.status().as_u16() {
            200 => {}
            429 => return Some((n, response)),
            other => panic!("{other}"),
        }
    }
    None
}

#[tokio::test]
async fn a_client_that_asks_for_too_much_is_told_when_to_come_back() {
    let app = start(&[]).await;
    let first = get(&app, "/v1/orders", "").await;
    assert_eq!(first.headers()["ratelimit-policy"], "\"client\";q=5;w=5");
    assert_eq!(first.headers()["ratelimit"], "\"client\";r=4;t=1");
    let (after, response) = refused(&app, |_| String::new()).await.unwrap();
    assert!(after >= 4, "{after}");
    assert_eq!(response.headers()["retry-after"], "1");
    assert_eq!(response.headers()["ratelimit"], "\"client\";r=0;t=1");
    let kind = "application/problem+json";
    assert_eq!(response.headers()["content-type"], kind);
    // Whoever watches it must not take it for dead.
    for _ in 0..MANY {
        assert_eq!(get(&app, "/health/ready", "").await.status(), 200);
    }
    let metrics = app.admin_text("/metrics").await;
    assert!(metrics.contains("http_requests_refused_total{why=\"rate-limited\"}"));
}

#[tokio::test]
async fn a_forged_address_gets_no_other_share() {
    // Nobody is trusted; then the proxy is, and adds the client's real address at the end.
    let app = start(&[]).await;
    assert!(refused(&app, |n| format!("1.1.1.{n}")).await.is_some());
    let app = start(&["127.0.0.0/8"]).await;
    let forged = |n| format!("1.1.1.{n}, 9.9.9.9");
    assert!(refused(&app, forged).await.is_some());
    // Another client has a share of its own.
    assert_eq!(get(&app, "/v1/orders", "9.9.9.8").await.status(), 200);
    assert!(refused(&app, |n| format!("2.2.2.{n}")).await.is_none());
}

#[tokio::test]
async fn what_is_too_much_for_the_process_is_refused_at_once() {
    let app = TestApp::start_with(|config| config.server.max_in_flight = NonZeroUsize::MIN).await;
    let body = order().to_string();
    let mut socket = TcpStream::connect(app.public).await.unwrap();
    let head = format!(
        "POST /v1/orders HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n\
         connection: close\r\ncontent-length: {}\r\nexpect: 100-continue\r\n\r\n",
        body.len()
    );
    socket.write_all(head.as_bytes()).await.unwrap();
    // Its handler waits for the body, and has the only place.
    let mut interim = [0; 25];
    socket.read_exact(&mut interim).await.unwrap();
    let shed = get(&app, "/v1/orders", "").await;
    assert_eq!(shed.status(), 503);
    assert_eq!(shed.headers()["retry-after"], "1");
    assert_eq!(get(&app, "/health/live", "").await.status(), 200);

    socket.write_all(body.as_bytes()).await.unwrap();
    let mut answer = String::new();
    socket.read_to_string(&mut answer).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 201"), "{answer}");
    assert_eq!(get(&app, "/v1/orders", "").await.status(), 200);
}
