//! The L7 proxy in front of an environment: HTTP/1.1 with keep-alive and upgrades, HTTP/2 without
//! TLS (gRPC with trailers), bodies streamed both ways.
//!
//! Each worker is a thread with its own runtime and its own connections, so a request never
//! changes threads. A request that never reached the wire goes to another process, whatever its
//! method; one that did, only where it has no body and is safe to repeat (RFC 9110, 9.2.2).

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use hyper::body::{Body, Incoming};
use hyper::client::conn::{http1, http2};
use hyper::header::{self, HeaderMap, HeaderName, HeaderValue};
use hyper::http::request::Parts;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode, Uri, Version};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::{Builder, Handle};
use tokio::sync::watch;

use super::bodies::{BrokenOff, End, Link, RequestBody, ResponseBody};
use super::routing::{Flight, Pool, Router};

const X_RELEASE: HeaderName = HeaderName::from_static("x-release");
const X_FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
/// How many processes are tried for one request.
const ATTEMPTS: usize = 3;
const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);
/// How long a process may take to begin its answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(60);
/// The same for a request with a body, which must first be sent.
const UPLOAD_TIMEOUT: Duration = Duration::from_secs(600);
/// hyper's servers allow 200 streams a connection; beyond this many another one is opened.
const STREAMS_PER_CONNECTION: u64 = 100;
/// Bytes of a stream that may be on their way unread.
const STREAM_WINDOW: u32 = 1 << 20;
/// gRPC codes that are the server's fault: unknown, deadline exceeded, unimplemented, internal,
/// unavailable, data loss. <https://grpc.io/docs/guides/status-codes/>
const GRPC_ERRORS: [&str; 6] = ["2", "4", "12", "13", "14", "15"];
const GRPC_UNAVAILABLE: &str = "14";

/// The threads that all environments' proxies run on.
pub struct Workers {
    handles: Vec<Handle>,
}

/// A proxy on a port; dropping it stops listening.
pub struct Front {
    pub address: SocketAddr,
    _stop: watch::Sender<()>,
}

impl Workers {
    pub fn start() -> Result<Self> {
        let count = std::thread::available_parallelism()
            .map_or(1, usize::from)
            .min(4);
        let mut handles = Vec::new();
        for number in 0..count {
            let runtime = Builder::new_current_thread().enable_all().build();
            let runtime = runtime.context("starting a proxy thread")?;
            handles.push(runtime.handle().clone());
            std::thread::Builder::new()
                .name(format!("proxy-{number}"))
                .spawn(move || runtime.block_on(std::future::pending::<()>()))
                .context("starting a proxy thread")?;
        }
        Ok(Self { handles })
    }

    pub fn count(&self) -> usize {
        self.handles.len()
    }

    /// Serves `router` on `address`.
    pub fn serve(&self, address: SocketAddr, router: &Arc<Router>) -> std::io::Result<Front> {
        let listener = std::net::TcpListener::bind(address)?;
        listener.set_nonblocking(true)?;
        let address = listener.local_addr()?;
        let (stop, stopped) = watch::channel(());
        for (worker, handle) in self.handles.iter().enumerate() {
            let listener = {
                let _runtime = handle.enter();
                TcpListener::from_std(listener.try_clone()?)?
            };
            handle.spawn(accept(
                listener,
                Arc::clone(router),
                worker,
                stopped.clone(),
            ));
        }
        Ok(Front {
            address,
            _stop: stop,
        })
    }
}

async fn accept(
    listener: TcpListener,
    router: Arc<Router>,
    worker: usize,
    mut stopped: watch::Receiver<()>,
) {
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            _ = stopped.changed() => return,
        };
        match accepted {
            Ok((stream, peer)) => {
                // Without it small answers wait for the client's acknowledgement.
                let _ = stream.set_nodelay(true);
                tokio::spawn(connection(
                    stream,
                    peer,
                    Arc::clone(&router),
                    worker,
                    stopped.clone(),
                ));
            }
            // Out of file descriptors: connections that end will free some.
            Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
        }
    }
}

async fn connection(
    stream: TcpStream,
    peer: SocketAddr,
    router: Arc<Router>,
    worker: usize,
    mut stopped: watch::Receiver<()>,
) {
    let client = HeaderValue::from_str(&peer.ip().to_string())
        .unwrap_or_else(|_| HeaderValue::from_static("unknown"));
    let service = service_fn(|request| {
        let router = Arc::clone(&router);
        let client = client.clone();
        async move { Ok::<_, Infallible>(answer(&router, worker, client, request).await) }
    });
    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(Duration::from_secs(60));
    builder
        .http2()
        .timer(TokioTimer::new())
        .max_concurrent_streams(1000)
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(4 * STREAM_WINDOW);
    let connection = builder.serve_connection_with_upgrades(TokioIo::new(stream), service);
    tokio::pin!(connection);
    // A connection that breaks is the client's affair.
    tokio::select! {
        _ = connection.as_mut() => {}
        _ = stopped.changed() => {
            connection.as_mut().graceful_shutdown();
            let _ = connection.await;
        }
    }
}

/// The answer of a process to one request, or the proxy's own where there is none.
async fn answer(
    router: &Router,
    worker: usize,
    client: HeaderValue,
    mut request: Request<Incoming>,
) -> Response<ResponseBody> {
    let started = Instant::now();
    let grpc = is_grpc(request.headers());
    let upgrade = is_upgrade(&request).then(|| hyper::upgrade::on(&mut request));
    let (mut parts, body) = request.into_parts();
    prepare(&mut parts, client, upgrade.is_some());
    let repeatable = body.is_end_stream() && parts.method.is_safe();
    let (body, broken_off) = RequestBody::new(body);
    let mut body = Some(body);
    let mut refused: Vec<SocketAddr> = Vec::new();

    for _ in 0..ATTEMPTS {
        let Some(mut flight) = router.pick(&refused, started) else {
            break;
        };
        let copy = repeatable.then(|| parts.clone());
        let request = Request::from_parts(parts, body.take().unwrap_or(RequestBody::Empty));
        let limit = if request.body().is_end_stream() {
            ANSWER_TIMEOUT
        } else {
            UPLOAD_TIMEOUT
        };
        let sent = tokio::time::timeout(limit, send(&flight, worker, request)).await;
        match sent {
            Ok(Ok((response, link))) => {
                return deliver(flight, response, link, upgrade, grpc, broken_off);
            }
            Ok(Err(Failure::NotSent(request))) => {
                flight.end();
                refused.push(flight.backend.address);
                let (same, unsent) = request.into_parts();
                (parts, body) = (same, Some(unsent));
            }
            Ok(Err(Failure::Lost)) => {
                let address = flight.backend.address;
                if broken_off.is_noted() {
                    flight.broken_by_client();
                } else {
                    flight.backend.counters.lost();
                    flight.end();
                }
                refused.push(address);
                let Some(copy) = copy else {
                    return own_answer(StatusCode::BAD_GATEWAY, "the process gave no answer", grpc);
                };
                (parts, body) = (copy, Some(RequestBody::Empty));
            }
            Err(_) => {
                flight.backend.counters.lost();
                flight.end();
                return own_answer(
                    StatusCode::GATEWAY_TIMEOUT,
                    "the process took too long",
                    grpc,
                );
            }
        }
    }
    let text = if refused.is_empty() {
        "no process is ready"
    } else {
        "no process could be reached"
    };
    own_answer(StatusCode::SERVICE_UNAVAILABLE, text, grpc)
}

enum Failure {
    /// Nothing reached the wire: here it is again, whole.
    NotSent(Box<Request<RequestBody>>),
    /// It was sent, at least in part.
    Lost,
}

async fn send(
    flight: &Flight,
    worker: usize,
    request: Request<RequestBody>,
) -> Result<(Response<Incoming>, Link), Failure> {
    if request.version() == Version::HTTP_2 {
        return send_http2(flight, worker, request).await;
    }
    let pool = flight.backend.pool(worker);
    let mut request = request;
    loop {
        let idle = pool.take_http1();
        let fresh = idle.is_none();
        let mut sender = match idle {
            Some(sender) => sender,
            None => match connect_http1(flight.backend.address).await {
                Ok(sender) => sender,
                Err(_) => return Err(Failure::NotSent(Box::new(request))),
            },
        };
        if sender.ready().await.is_err() && !fresh {
            continue;
        }
        match sender.try_send_request(request).await {
            Ok(response) => return Ok((response, Link::Http1(sender, worker))),
            // An idle connection may have been closed meanwhile: the next one may do.
            Err(mut error) => match error.take_message() {
                Some(unsent) if !fresh => request = unsent,
                Some(unsent) => return Err(Failure::NotSent(Box::new(unsent))),
                None => return Err(Failure::Lost),
            },
        }
    }
}

async fn send_http2(
    flight: &Flight,
    worker: usize,
    mut request: Request<RequestBody>,
) -> Result<(Response<Incoming>, Link), Failure> {
    let pool = flight.backend.pool(worker);
    if request.uri().authority().is_none() {
        let host = request
            .headers()
            .get(header::HOST)
            .and_then(|host| host.to_str().ok());
        let uri = Uri::builder()
            .scheme("http")
            .authority(host.unwrap_or("localhost"));
        let path = request
            .uri()
            .path_and_query()
            .map_or("/", |path| path.as_str())
            .to_owned();
        if let Ok(uri) = uri.path_and_query(path).build() {
            *request.uri_mut() = uri;
        }
    }
    let Ok(mut sender) = http2_sender(flight, pool).await else {
        return Err(Failure::NotSent(Box::new(request)));
    };
    match sender.try_send_request(request).await {
        Ok(response) => Ok((response, Link::Http2)),
        Err(mut error) => Err(error
            .take_message()
            .map_or(Failure::Lost, |unsent| Failure::NotSent(Box::new(unsent)))),
    }
}

/// A connection that is there, or a new one where there are too few. One is made at a time: of a
/// crowd that comes at once each would make one, more than the process can take.
async fn http2_sender(flight: &Flight, pool: &Pool) -> Result<http2::SendRequest<RequestBody>> {
    let shared = |least: u64| {
        let mut idle = pool.http2();
        idle.retain(|sender| !sender.is_closed());
        (idle.len() as u64 >= least).then(|| {
            idle.rotate_left(1);
            idle[0].clone()
        })
    };
    let wanted = 1 + flight.backend.in_flight() / STREAMS_PER_CONNECTION;
    if let Some(sender) = shared(wanted) {
        return Ok(sender);
    }
    let _making = match pool.making.try_lock() {
        Ok(making) => making,
        Err(_) => {
            if let Some(sender) = shared(1) {
                return Ok(sender);
            }
            let making = pool.making.lock().await;
            if let Some(sender) = shared(1) {
                return Ok(sender);
            }
            making
        }
    };
    let sender = connect_http2(flight.backend.address).await?;
    pool.http2().push(sender.clone());
    Ok(sender)
}

async fn connect(address: SocketAddr) -> Result<TokioIo<TcpStream>> {
    let stream = tokio::time::timeout(CONNECT_TIMEOUT, TcpStream::connect(address)).await??;
    stream.set_nodelay(true)?;
    Ok(TokioIo::new(stream))
}

async fn connect_http1(address: SocketAddr) -> Result<http1::SendRequest<RequestBody>> {
    let (sender, connection) = http1::handshake(connect(address).await?).await?;
    // Its errors reach whoever waits for an answer.
    tokio::spawn(connection.with_upgrades());
    Ok(sender)
}

async fn connect_http2(address: SocketAddr) -> Result<http2::SendRequest<RequestBody>> {
    let (sender, connection) = http2::Builder::new(TokioExecutor::new())
        .timer(TokioTimer::new())
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(4 * STREAM_WINDOW)
        .handshake(connect(address).await?)
        .await?;
    tokio::spawn(connection);
    Ok(sender)
}

/// Counts the answer and hands it on, body and all.
fn deliver(
    mut flight: Flight,
    mut response: Response<Incoming>,
    link: Link,
    upgrade: Option<hyper::upgrade::OnUpgrade>,
    grpc: bool,
    broken_off: BrokenOff,
) -> Response<ResponseBody> {
    let time = flight.answered();
    let error = response.status().is_server_error() || grpc && grpc_failed(response.headers());
    // A gRPC call's outcome may stand in its trailers: it is counted when they are there.
    let uncounted = (grpc && !error).then_some(time);
    if uncounted.is_none() {
        flight.backend.counters.answered(time, error);
    }
    response
        .headers_mut()
        .insert(X_RELEASE, flight.header.clone());
    if response.status() == StatusCode::SWITCHING_PROTOCOLS {
        if let Some(client) = upgrade {
            let server = hyper::upgrade::on(&mut response);
            tokio::spawn(tunnel(flight, client, server));
            return response.map(|_| ResponseBody::empty());
        }
        flight.end();
        return own_answer(
            StatusCode::BAD_GATEWAY,
            "the process changed protocols unasked",
            false,
        );
    }
    strip_hop_by_hop(response.headers_mut(), false);
    response.map(|body| {
        let end = End {
            flight,
            link: Some(link),
            uncounted,
            broken_off,
        };
        ResponseBody::from_process(body, end)
    })
}

/// Bytes both ways until either side ends; the process counts as busy so long.
async fn tunnel(
    mut flight: Flight,
    client: hyper::upgrade::OnUpgrade,
    server: hyper::upgrade::OnUpgrade,
) {
    if let (Ok(client), Ok(server)) = tokio::join!(client, server) {
        let (mut client, mut server) = (TokioIo::new(client), TokioIo::new(server));
        // However a tunnel ends, it has ended.
        let _ = tokio::io::copy_bidirectional(&mut client, &mut server).await;
    }
    flight.end();
}

/// What the proxy says itself. gRPC clients want 200 and a status of their own.
fn own_answer(status: StatusCode, text: &'static str, grpc: bool) -> Response<ResponseBody> {
    let mut response = Response::new(ResponseBody::text(if grpc { "" } else { text }));
    let headers = response.headers_mut();
    if grpc {
        headers.insert(
            header::CONTENT_TYPE,
            HeaderValue::from_static("application/grpc"),
        );
        headers.insert("grpc-status", HeaderValue::from_static(GRPC_UNAVAILABLE));
        headers.insert("grpc-message", HeaderValue::from_static(text));
    } else {
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/plain"));
        *response.status_mut() = status;
    }
    response
}

fn is_grpc(headers: &HeaderMap) -> bool {
    headers
        .get(header::CONTENT_TYPE)
        .is_some_and(|kind| kind.as_bytes().starts_with(b"application/grpc"))
}

pub fn grpc_failed(headers: &HeaderMap) -> bool {
    headers
        .get("grpc-status")
        .and_then(|status| status.to_str().ok())
        .is_some_and(|status| GRPC_ERRORS.contains(&status))
}

fn is_upgrade(request: &Request<Incoming>) -> bool {
    request.version() == Version::HTTP_11
        && request.method() == Method::GET
        && request.headers().contains_key(header::UPGRADE)
}

/// Makes a client's request one of the proxy's own.
fn prepare(parts: &mut Parts, client: HeaderValue, upgrade: bool) {
    strip_hop_by_hop(&mut parts.headers, upgrade);
    let forwarded = match parts.headers.get(X_FORWARDED_FOR) {
        None => client,
        Some(before) => {
            let both = [before.as_bytes(), b", ", client.as_bytes()].concat();
            HeaderValue::from_bytes(&both).unwrap_or(client)
        }
    };
    parts.headers.insert(X_FORWARDED_FOR, forwarded);
    if parts.version != Version::HTTP_2 {
        parts.version = Version::HTTP_11;
        if !parts.headers.contains_key(header::HOST) {
            // HTTP/1.0 needs none; whoever is behind may.
            parts
                .headers
                .insert(header::HOST, HeaderValue::from_static("localhost"));
        }
        // Whoever sent an absolute address meant it for a proxy like this.
        if parts.uri.authority().is_some()
            && let Some(path) = parts.uri.path_and_query().cloned()
        {
            parts.uri = Uri::from(path);
        }
    }
}

/// Removes what belongs to one connection only (RFC 9110, 7.6.1).
fn strip_hop_by_hop(headers: &mut HeaderMap, keep_upgrade: bool) {
    if keep_upgrade {
        return;
    }
    if let Some(named) = headers.remove(header::CONNECTION) {
        for name in named.to_str().unwrap_or_default().split(',') {
            if let Ok(name) = HeaderName::try_from(name.trim()) {
                headers.remove(name);
            }
        }
    }
    for name in [
        header::PROXY_AUTHENTICATE,
        header::PROXY_AUTHORIZATION,
        header::TRANSFER_ENCODING,
        header::UPGRADE,
        HeaderName::from_static("keep-alive"),
        HeaderName::from_static("proxy-connection"),
    ] {
        headers.remove(name);
    }
}
