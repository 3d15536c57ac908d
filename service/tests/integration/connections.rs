//! Connections that say nothing, or too many.

use std::num::NonZeroUsize;
use std::time::Duration;

use futures_util::StreamExt;
use service::config::Timeout;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::test_app::{TestApp, order};

const REQUEST: &str = "GET /v1/orders HTTP/1.1\r\nhost: x\r\n\r\n";

async fn connect(app: &TestApp) -> TcpStream {
    TcpStream::connect(app.public).await.unwrap()
}

/// Asks once more on a connection, and reads the answer, whose body is short.
async fn ask(socket: &mut TcpStream) -> std::io::Result<()> {
    socket.write_all(REQUEST.as_bytes()).await?;
    read(socket).await
}

async fn read(socket: &mut TcpStream) -> std::io::Result<()> {
    let mut answer = Vec::new();
    while !answer.ends_with(b"}") {
        if socket.read_buf(&mut answer).await? == 0 {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
    }
    assert!(answer.starts_with(b"HTTP/1.1 200"), "{answer:?}");
    Ok(())
}

/// Whether the other side ends it without an answer.
async fn is_closed(socket: &mut TcpStream) -> bool {
    let mut rest = Vec::new();
    // A reset is an end, too.
    let _ = socket.read_to_end(&mut rest).await;
    rest.is_empty()
}

/// The first head that does not come, one that comes in part, and one that drips are all given up;
/// what has been answered may be idle, and sockets may be silent.
#[tokio::test]
async fn a_head_that_does_not_come_is_not_waited_for() {
    let app = TestApp::start_with(|config| {
        config.server.head_timeout = Timeout(Duration::from_secs(2));
    })
    .await;
    let mut kept = connect(&app).await;
    ask(&mut kept).await.unwrap();
    let address = format!("ws://{}/v1/events", app.public);
    let (mut events, _) = tokio_tungstenite::connect_async(address).await.unwrap();

    let mut silent = connect(&app).await;
    let mut half = connect(&app).await;
    half.write_all(b"GET /v1/or").await.unwrap();
    let mut second = connect(&app).await;
    ask(&mut second).await.unwrap();
    second.write_all(b"GET /v1/or").await.unwrap();
    let (mut dripping, mut drops) = connect(&app).await.into_split();
    let drip = tokio::spawn(async move {
        for byte in REQUEST.bytes().cycle() {
            if drops.write_all(&[byte]).await.is_err() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(400)).await;
        }
    });
    for socket in [&mut silent, &mut half, &mut second] {
        assert!(is_closed(socket).await);
    }
    let mut rest = Vec::new();
    let _ = dripping.read_to_end(&mut rest).await;
    assert_eq!(rest, b"");
    drip.abort();
    // Other tests' are counted with these.
    let metrics = app.admin_text("/metrics").await;
    let mut lines = metrics.lines();
    let late = lines.find_map(|line| line.strip_prefix("connections_late_total{port=\"public\"} "));
    assert!(late.unwrap().parse::<u64>().unwrap() >= 4, "{metrics}");

    // By now these have been silent for as long as any of those.
    ask(&mut kept).await.unwrap();
    let (status, _) = app.post("/v1/orders", order()).await;
    assert_eq!(status, 201);
    loop {
        let event = events.next().await.unwrap().unwrap();
        if event.is_text() {
            assert!(event.to_text().unwrap().contains("placed"), "{event:?}");
            break;
        }
    }
}

#[tokio::test]
async fn connections_beyond_the_most_wait() {
    let app = TestApp::start_with(|config| config.server.max_connections = NonZeroUsize::MIN).await;
    let mut first = connect(&app).await;
    ask(&mut first).await.unwrap();
    let mut second = connect(&app).await;
    second.write_all(REQUEST.as_bytes()).await.unwrap();
    let waits = tokio::time::timeout(Duration::from_millis(500), read(&mut second));
    assert!(waits.await.is_err(), "it was answered");
    let metrics = app.admin_text("/metrics").await;
    assert!(
        metrics.contains("connections_open{port=\"public\"}"),
        "{metrics}"
    );
    drop(first);
    read(&mut second).await.unwrap();
}

/// Whoever is gone without a word is noticed: the system asks after them.
#[tokio::test]
async fn a_silent_connection_is_asked_after() {
    let app = TestApp::start().await;
    let mut socket = connect(&app).await;
    ask(&mut socket).await.unwrap();
    let ends = [app.public, socket.local_addr().unwrap()].map(|end| format!("{:04X}", end.port()));
    // proc_pid_net(5): both ends, a state, two queues, and which timer runs; 2 is keepalive's.
    let is_asked = |line: &str| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let port = |field: usize| fields[field].rsplit(':').next().unwrap();
        fields[0] != "sl"
            && [port(1), port(2)] == [&ends[0], &ends[1]]
            && fields[5].starts_with("02:")
    };
    let deadline = tokio::time::Instant::now() + Duration::from_secs(20);
    while !std::fs::read_to_string("/proc/net/tcp")
        .unwrap()
        .lines()
        .any(is_asked)
    {
        assert!(tokio::time::Instant::now() < deadline);
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
