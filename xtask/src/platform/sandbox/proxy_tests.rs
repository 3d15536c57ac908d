//! The proxy between real sockets: every protocol it must carry, and drains under load.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Empty, Full};
use hyper::body::{Body, Incoming};
use hyper::client::conn::{http1, http2};
use hyper::header::{self, HeaderMap, HeaderValue};
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::proxy::{Front, Workers};
use super::routing::{Backend, Router, Table, Target};

type Payload = BoxBody<Bytes, hyper::Error>;

/// A process behind the proxy.
struct Upstream {
    backend: Arc<Backend>,
    stop: watch::Sender<()>,
    server: JoinHandle<()>,
}

impl Upstream {
    async fn start(workers: usize) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (stop, stopped) = watch::channel(());
        let server = tokio::spawn(serve(listener, stopped));
        Self {
            backend: Backend::new(address, Arc::default(), workers),
            stop,
            server,
        }
    }

    /// As the supervisor does it: no new requests, those in flight, then the end.
    async fn drain_and_stop(self) {
        self.backend.drain();
        while self.backend.in_flight() > 0 {
            tokio::task::yield_now().await;
        }
        self.backend.close_idle();
        drop(self.stop);
        self.server.await.unwrap();
    }
}

/// Like a service on SIGTERM: connections in use are finished, the others are closed.
async fn serve(listener: TcpListener, mut stopped: watch::Receiver<()>) {
    let mut connections = tokio::task::JoinSet::new();
    loop {
        let (stream, _) = tokio::select! {
            accepted = listener.accept() => accepted.unwrap(),
            _ = stopped.changed() => break,
        };
        let mut stopped = stopped.clone();
        connections.spawn(async move {
            let builder = auto::Builder::new(TokioExecutor::new());
            let service =
                service_fn(|request| async { Ok::<_, Infallible>(answer(request).await) });
            let connection = builder.serve_connection_with_upgrades(TokioIo::new(stream), service);
            tokio::pin!(connection);
            tokio::select! {
                _ = connection.as_mut() => {}
                _ = stopped.changed() => {
                    connection.as_mut().graceful_shutdown();
                    let _ = connection.await;
                }
            }
        });
    }
    while connections.join_next().await.is_some() {}
}

async fn answer(mut request: Request<Incoming>) -> Response<Payload> {
    let text = |text: String| Response::new(full(text));
    match request.uri().path() {
        "/echo" => Response::new(request.into_body().boxed()),
        "/hang" => std::future::pending().await,
        "/headers" => text(format!("{:?}", request.headers())),
        "/fail" => {
            let mut response = text("no".to_owned());
            *response.status_mut() = StatusCode::INTERNAL_SERVER_ERROR;
            response
        }
        "/upgrade" => {
            let upgrade = hyper::upgrade::on(&mut request);
            tokio::spawn(async move {
                let mut io = TokioIo::new(upgrade.await.unwrap());
                let mut buffer = [0; 64];
                while let Ok(read @ 1..) = io.read(&mut buffer).await {
                    io.write_all(&buffer[..read]).await.unwrap();
                }
            });
            let mut response = Response::new(full(String::new()));
            *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
            let headers = response.headers_mut();
            headers.insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
            headers.insert(header::UPGRADE, HeaderValue::from_static("echo"));
            response
        }
        path @ ("/grpc/ok" | "/grpc/fail") => {
            let status = if path == "/grpc/ok" { "0" } else { "13" };
            let mut trailers = HeaderMap::new();
            trailers.insert("grpc-status", HeaderValue::from_static(status));
            let body = Full::new(Bytes::from_static(b"message"))
                .with_trailers(async move { Some(Ok::<_, Infallible>(trailers)) })
                .map_err(|never| match never {});
            let mut response = Response::new(body.boxed());
            let kind = HeaderValue::from_static("application/grpc");
            response.headers_mut().insert(header::CONTENT_TYPE, kind);
            response
        }
        _ => text("hello".to_owned()),
    }
}

fn full(text: String) -> Payload {
    Full::new(Bytes::from(text))
        .map_err(|never| match never {})
        .boxed()
}

struct Fixture {
    workers: Workers,
    router: Arc<Router>,
    front: Front,
}

impl Fixture {
    fn start() -> Self {
        let workers = Workers::start().unwrap();
        let router = Arc::new(Router::default());
        let front = workers
            .serve("127.0.0.1:0".parse().unwrap(), &router)
            .unwrap();
        Self {
            workers,
            router,
            front,
        }
    }

    async fn upstream(&self) -> Upstream {
        Upstream::start(self.workers.count()).await
    }

    fn route(&self, targets: &[(u8, &[&Upstream])]) {
        let target = |(weight, upstreams): &(u8, &[&Upstream])| {
            let backends = upstreams
                .iter()
                .map(|upstream| Arc::clone(&upstream.backend))
                .collect();
            Target::new(
                &format!("release-{weight}").as_str().into(),
                *weight,
                backends,
            )
        };
        self.router.set(Table {
            targets: targets.iter().map(target).collect(),
        });
    }

    async fn http1<B: Body + Send + 'static>(&self) -> http1::SendRequest<B>
    where
        B::Data: Send,
        B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        let stream = TcpStream::connect(self.front.address).await.unwrap();
        let (sender, connection) = http1::handshake(TokioIo::new(stream)).await.unwrap();
        tokio::spawn(connection.with_upgrades());
        sender
    }

    async fn http2<B: Body + Send + Unpin + 'static>(&self) -> http2::SendRequest<B>
    where
        B::Data: Send,
        B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        let stream = TcpStream::connect(self.front.address).await.unwrap();
        let io = TokioIo::new(stream);
        let (sender, connection) = http2::handshake(TokioExecutor::new(), io).await.unwrap();
        tokio::spawn(connection);
        sender
    }
}

fn get(address: SocketAddr, path: &str) -> Request<Empty<Bytes>> {
    Request::get(format!("http://{address}{path}"))
        .header(header::HOST, address.to_string())
        .body(Empty::new())
        .unwrap()
}

fn post(address: SocketAddr, path: &str, body: Bytes) -> Request<Full<Bytes>> {
    Request::post(format!("http://{address}{path}"))
        .header(header::HOST, address.to_string())
        .body(Full::new(body))
        .unwrap()
}

#[tokio::test]
async fn http1_with_keep_alive_streams_and_counts() {
    let fixture = Fixture::start();
    let upstream = fixture.upstream().await;
    fixture.route(&[(100, &[&upstream])]);
    let address = fixture.front.address;

    let mut sender = fixture.http1().await;
    let megabytes = Bytes::from(vec![7; 3 << 20]);
    for _ in 0..3 {
        sender.ready().await.unwrap();
        let response = sender
            .send_request(post(address, "/echo", megabytes.clone()))
            .await
            .unwrap();
        assert_eq!(response.headers()["x-release"], "release-100");
        assert_eq!(
            response.into_body().collect().await.unwrap().to_bytes(),
            megabytes
        );
    }
    sender.ready().await.unwrap();
    let response = sender
        .send_request(post(address, "/fail", Bytes::new()))
        .await
        .unwrap();
    assert_eq!(response.status(), 500);
    response.into_body().collect().await.unwrap();

    let counts = upstream.backend.counters.read();
    assert_eq!((counts.requests, counts.errors), (4, 1));
    assert_eq!(upstream.backend.in_flight(), 0);
}

#[tokio::test]
async fn hop_by_hop_headers_stay_behind_and_the_client_is_named() {
    let fixture = Fixture::start();
    let upstream = fixture.upstream().await;
    fixture.route(&[(100, &[&upstream])]);
    let mut sender = fixture.http1().await;
    let mut request = get(fixture.front.address, "/headers");
    let headers = request.headers_mut();
    headers.insert(
        header::CONNECTION,
        HeaderValue::from_static("close, x-private"),
    );
    headers.insert("x-private", HeaderValue::from_static("1"));
    headers.insert("x-kept", HeaderValue::from_static("1"));
    let response = sender.send_request(request).await.unwrap();
    let seen = response.into_body().collect().await.unwrap().to_bytes();
    let seen = String::from_utf8_lossy(&seen);
    assert!(!seen.contains("x-private"), "{seen}");
    assert!(
        seen.contains("x-kept") && seen.contains("\"x-forwarded-for\": \"127.0.0.1\""),
        "{seen}"
    );
}

#[tokio::test]
async fn old_clients_get_an_answer() {
    let fixture = Fixture::start();
    let upstream = fixture.upstream().await;
    fixture.route(&[(100, &[&upstream])]);
    let mut socket = TcpStream::connect(fixture.front.address).await.unwrap();
    socket.write_all(b"GET / HTTP/1.0\r\n\r\n").await.unwrap();
    let mut answer = String::new();
    socket.read_to_string(&mut answer).await.unwrap();
    assert!(
        answer.starts_with("HTTP/1.0 200") && answer.ends_with("hello"),
        "{answer}"
    );
}

#[tokio::test]
async fn upgrades_become_tunnels_that_keep_the_process_busy() {
    let fixture = Fixture::start();
    let upstream = fixture.upstream().await;
    fixture.route(&[(100, &[&upstream])]);
    let mut sender = fixture.http1().await;
    let mut request = get(fixture.front.address, "/upgrade");
    let headers = request.headers_mut();
    headers.insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
    headers.insert(header::UPGRADE, HeaderValue::from_static("echo"));
    let mut response = sender.send_request(request).await.unwrap();
    assert_eq!(response.status(), StatusCode::SWITCHING_PROTOCOLS);
    let mut io = TokioIo::new(hyper::upgrade::on(&mut response).await.unwrap());
    for word in ["one", "two"] {
        io.write_all(word.as_bytes()).await.unwrap();
        let mut back = [0; 3];
        io.read_exact(&mut back).await.unwrap();
        assert_eq!(back, word.as_bytes());
    }
    assert_eq!(upstream.backend.in_flight(), 1);
    io.shutdown().await.unwrap();
    while upstream.backend.in_flight() > 0 {
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn http2_carries_trailers_and_their_errors_count() {
    let fixture = Fixture::start();
    let upstream = fixture.upstream().await;
    fixture.route(&[(100, &[&upstream])]);
    let address = fixture.front.address;
    let mut sender = fixture.http2().await;
    for (path, status) in [("/grpc/ok", "0"), ("/grpc/fail", "13")] {
        let mut request = post(address, path, Bytes::from_static(b"call"));
        let kind = HeaderValue::from_static("application/grpc");
        request.headers_mut().insert(header::CONTENT_TYPE, kind);
        let response = sender.send_request(request).await.unwrap();
        let collected = response.into_body().collect().await.unwrap();
        assert_eq!(collected.trailers().unwrap()["grpc-status"], status);
        assert_eq!(collected.to_bytes(), "message");
    }
    let counts = upstream.backend.counters.read();
    assert_eq!((counts.requests, counts.errors), (2, 1));

    // Three hundred at once on one connection of the client's.
    let calls: Vec<_> = (0..300)
        .map(|_| {
            let mut sender = sender.clone();
            tokio::spawn(async move {
                let request = post(address, "/echo", Bytes::from_static(b"x"));
                sender.send_request(request).await.unwrap().status()
            })
        })
        .collect();
    for call in calls {
        assert_eq!(call.await.unwrap(), 200);
    }
}

#[tokio::test]
async fn without_a_process_clients_are_told_in_their_own_way() {
    let fixture = Fixture::start();
    let address = fixture.front.address;
    let mut sender = fixture.http1().await;
    assert_eq!(
        sender
            .send_request(get(address, "/"))
            .await
            .unwrap()
            .status(),
        503
    );

    let gone = fixture.upstream().await;
    fixture.route(&[(100, &[&gone])]);
    gone.server.abort();
    let _ = gone.server.await;
    let mut sender = fixture.http2().await;
    let mut request = post(address, "/", Bytes::new());
    let kind = HeaderValue::from_static("application/grpc");
    request.headers_mut().insert(header::CONTENT_TYPE, kind);
    let response = sender.send_request(request).await.unwrap();
    assert_eq!(
        (response.status(), &response.headers()["grpc-status"]),
        (StatusCode::OK, &"14".parse().unwrap())
    );
}

/// A process that cannot be reached costs no request, not even one with a body.
#[tokio::test]
async fn unreachable_processes_are_passed_over() {
    let fixture = Fixture::start();
    let (gone, good) = (fixture.upstream().await, fixture.upstream().await);
    fixture.route(&[(50, &[&gone]), (50, &[&good])]);
    gone.server.abort();
    let mut sender = fixture.http1().await;
    for _ in 0..50 {
        sender.ready().await.unwrap();
        let request = post(fixture.front.address, "/echo", Bytes::from_static(b"order"));
        let response = sender.send_request(request).await.unwrap();
        assert_eq!(response.status(), 200);
        assert_eq!(
            response.into_body().collect().await.unwrap().to_bytes(),
            "order"
        );
    }
}

#[tokio::test]
async fn clients_that_go_away_are_neither_good_nor_bad() {
    let fixture = Fixture::start();
    let upstream = fixture.upstream().await;
    fixture.route(&[(100, &[&upstream])]);
    let mut socket = TcpStream::connect(fixture.front.address).await.unwrap();
    let head = b"POST /echo HTTP/1.1\r\nhost: x\r\ncontent-length: 10\r\n\r\nhalf";
    socket.write_all(head).await.unwrap();
    let mut first = [0; 12];
    socket.read_exact(&mut first).await.unwrap();
    assert_eq!(upstream.backend.in_flight(), 1);
    drop(socket);
    while upstream.backend.in_flight() > 0 {
        tokio::task::yield_now().await;
    }
    assert_eq!(upstream.backend.counters.read().errors, 0);
}

/// A process that hangs must not go unseen because its clients lose patience.
#[tokio::test]
async fn requests_that_clients_gave_up_on_count_as_slow() {
    let fixture = Fixture::start();
    let upstream = fixture.upstream().await;
    fixture.route(&[(100, &[&upstream])]);
    let mut sender = fixture.http1().await;
    let request = get(fixture.front.address, "/hang");
    let mut answer = Box::pin(sender.send_request(request));
    while upstream.backend.in_flight() == 0 {
        let waited = tokio::time::timeout(Duration::from_millis(1), &mut answer).await;
        assert!(waited.is_err());
    }
    let waited = tokio::time::timeout(Duration::from_millis(50), answer).await;
    assert!(waited.is_err());
    drop(sender);
    while upstream.backend.in_flight() > 0 {
        tokio::task::yield_now().await;
    }
    let counts = upstream.backend.counters.read();
    assert_eq!((counts.requests, counts.errors), (1, 0));
    assert!(counts.latency.unwrap().quantile_bound(1.0).unwrap() >= 0.05);
}

/// Fifty times a process is replaced under load on both protocols: no request may fail.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn draining_and_replacing_loses_no_request() {
    let fixture = Arc::new(Fixture::start());
    let stable = fixture.upstream().await;
    let mut candidate = fixture.upstream().await;
    fixture.route(&[(50, &[&stable]), (50, &[&candidate])]);

    let (done, served) = (
        Arc::new(AtomicBool::new(false)),
        Arc::new(AtomicU64::new(0)),
    );
    let mut clients = tokio::task::JoinSet::new();
    for number in 0..8 {
        let (fixture, done, served) =
            (Arc::clone(&fixture), Arc::clone(&done), Arc::clone(&served));
        clients.spawn(async move {
            let address = fixture.front.address;
            let mut one = fixture.http1().await;
            let mut two = fixture.http2().await;
            while !done.load(Ordering::SeqCst) {
                let request = post(address, "/echo", Bytes::from_static(b"order"));
                let response = if number % 2 == 0 {
                    one.ready().await.unwrap();
                    one.send_request(request).await.unwrap()
                } else {
                    two.send_request(request).await.unwrap()
                };
                assert_eq!(response.status(), 200);
                let body = response.into_body().collect().await.unwrap().to_bytes();
                assert_eq!(body, "order");
                served.fetch_add(1, Ordering::SeqCst);
            }
        });
    }
    for _ in 0..50 {
        let next = fixture.upstream().await;
        fixture.route(&[(50, &[&stable]), (50, &[&next])]);
        let before = std::mem::replace(&mut candidate, next);
        tokio::time::timeout(Duration::from_secs(20), before.drain_and_stop())
            .await
            .expect("a drain ends");
        // The next process must have had requests before it goes, too.
        while candidate.backend.counters.read().requests < 20 {
            tokio::task::yield_now().await;
        }
    }
    done.store(true, Ordering::SeqCst);
    while let Some(client) = clients.join_next().await {
        client.expect("no request failed");
    }
    assert!(served.load(Ordering::SeqCst) > 1000);
}
