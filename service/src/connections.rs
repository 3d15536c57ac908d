//! Connections: how many there may be, and how long one may take to say what it wants.
//!
//! Whoever opens connections and says nothing, or says it a byte a minute, takes a place from others
//! for as long as that is let pass (Slowloris). A connection that has been answered may be idle for as
//! long as it likes: proxies keep theirs, and one that is closed under their hands loses a request.

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::ConnectInfo;
use axum::http::{Request, Response, StatusCode, Version};
use axum::serve::Listener;
use hyper::body::{Frame, Incoming, SizeHint};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto::Builder;
use hyper_util::server::graceful::GracefulShutdown;
use prometheus_client::metrics::counter::Counter;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::{Semaphore, watch};
use tokio::time::{Instant, Sleep};
use tower::Service;

use crate::metrics::METRICS;

/// How often an HTTP/2 client is asked whether it is still there, and how long it may take to say so.
const PING: Duration = Duration::from_secs(20);

/// What connections of one port may do.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// What metrics call the port.
    pub port: &'static str,
    /// More wait until one of them ends.
    pub most: usize,
    /// How long the head of a request may take, from its first byte; the first one's from the
    /// connection's beginning.
    pub head_timeout: Duration,
}

/// Answers until `stopped` says so; then takes no more connections, and lets those that are there
/// finish what is in flight.
pub async fn serve<L>(
    mut listener: L,
    routes: Router,
    limits: Limits,
    mut stopped: watch::Receiver<bool>,
) where
    L: Listener<Addr = SocketAddr>,
    L::Io: 'static,
{
    let port = [("port", limits.port)];
    let open = METRICS.connections_open.get_or_create(&port).clone();
    let most = i64::try_from(limits.most).unwrap_or(i64::MAX);
    METRICS.connections_max.get_or_create(&port).set(most);
    let late = METRICS.connections_late.get_or_create(&port).clone();
    let places = Arc::new(Semaphore::new(limits.most));
    let graceful = GracefulShutdown::new();
    let mut builder = Builder::new(TokioExecutor::new());
    let mut http2 = builder.http2();
    http2
        .timer(TokioTimer::new())
        .keep_alive_interval(PING)
        .keep_alive_timeout(PING)
        // WebSockets over HTTP/2, RFC 8441.
        .enable_connect_protocol();
    loop {
        let next = async {
            let place = Arc::clone(&places).acquire_owned().await;
            (listener.accept().await, place)
        };
        let ((io, peer), place) = tokio::select! {
            // An error means that the sender is gone, which also ends the service.
            _ = stopped.wait_for(|stopping| *stopping) => break,
            next = next => next,
        };
        let heard = Arc::new(Heard::default());
        let io = Patient::new(io, Arc::clone(&heard), limits.head_timeout, late.clone());
        let routes = routes.clone();
        let service = service_fn(move |request| answer(routes.clone(), request, peer, &heard));
        let connection = builder.serve_connection_with_upgrades(TokioIo::new(io), service);
        let connection = graceful.watch(connection.into_owned());
        open.inc();
        let open = open.clone();
        tokio::spawn(async move {
            if let Err(error) = connection.await {
                tracing::trace!(%peer, %error, "a connection broke off");
            }
            open.dec();
            drop(place);
        });
    }
    drop(listener);
    graceful.shutdown().await;
}

fn answer(
    mut routes: Router,
    mut request: Request<Incoming>,
    peer: SocketAddr,
    heard: &Arc<Heard>,
) -> impl Future<Output = Result<Response<Answer>, Infallible>> + use<> {
    request.extensions_mut().insert(ConnectInfo(peer));
    let pending = heard.begin(&request);
    async move {
        let response = routes.call(request.map(Body::new)).await?;
        if response.status() == StatusCode::SWITCHING_PROTOCOLS {
            pending.heard.is_free.store(true, Ordering::Relaxed);
        }
        Ok(response.map(|body| Answer {
            body,
            _pending: pending,
        }))
    }
}

/// What a connection has said so far.
#[derive(Debug, Default)]
struct Heard {
    /// Requests whose heads came whole.
    requests: AtomicU32,
    /// Those that are not answered whole.
    pending: AtomicU32,
    /// Whether it speaks HTTP/2, or something else by now: then what comes need not be a request's head.
    is_free: AtomicBool,
}

impl Heard {
    fn begin(self: &Arc<Self>, request: &Request<Incoming>) -> Pending {
        if request.version() == Version::HTTP_2 {
            self.is_free.store(true, Ordering::Relaxed);
        }
        self.pending.fetch_add(1, Ordering::Relaxed);
        self.requests.fetch_add(1, Ordering::Relaxed);
        Pending {
            heard: Arc::clone(self),
        }
    }
}

/// A request until its answer has been given whole, or given up.
struct Pending {
    heard: Arc<Heard>,
}

impl Drop for Pending {
    fn drop(&mut self) {
        self.heard.pending.fetch_sub(1, Ordering::Relaxed);
    }
}

struct Answer {
    body: Body,
    _pending: Pending,
}

impl hyper::body::Body for Answer {
    type Data = <Body as hyper::body::Body>::Data;
    type Error = <Body as hyper::body::Body>::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Self::Data>, Self::Error>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// A stream that waits for the head of a request only so long.
struct Patient<S> {
    stream: S,
    heard: Arc<Heard>,
    timeout: Duration,
    late: Counter,
    /// Runs while a head is on its way: the number of requests before it, and its time.
    head: Option<(u32, Pin<Box<Sleep>>)>,
}

impl<S> Patient<S> {
    fn new(stream: S, heard: Arc<Heard>, timeout: Duration, late: Counter) -> Self {
        let first = Box::pin(tokio::time::sleep(timeout));
        Self {
            stream,
            heard,
            timeout,
            late,
            head: Some((0, first)),
        }
    }

    /// Whether the head that is on its way has taken too long.
    fn is_late(&mut self, cx: &mut Context<'_>) -> bool {
        let requests = self.heard.requests.load(Ordering::Relaxed);
        match &mut self.head {
            Some((before, timer)) if *before == requests => timer.as_mut().poll(cx).is_ready(),
            head => {
                *head = None;
                false
            }
        }
    }

    /// Some bytes have come: unless they belong to something else, a head begins.
    fn note(&mut self) {
        let heard = &self.heard;
        let requests = heard.requests.load(Ordering::Relaxed);
        let has_begun = matches!(self.head, Some((before, _)) if before == requests);
        let is_of_head =
            heard.pending.load(Ordering::Relaxed) == 0 && !heard.is_free.load(Ordering::Relaxed);
        if is_of_head && !has_begun {
            let deadline = Instant::now() + self.timeout;
            self.head = Some((requests, Box::pin(tokio::time::sleep_until(deadline))));
        }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Patient<S> {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let before = buffer.filled().len();
        let read = Pin::new(&mut this.stream).poll_read(cx, buffer);
        if read.is_pending() {
            return match this.is_late(cx) {
                true => {
                    this.late.inc();
                    Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
                }
                false => Poll::Pending,
            };
        }
        ready!(read)?;
        if buffer.filled().len() > before {
            this.note();
        }
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Patient<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, bytes)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
