//! What flows through the proxy: bodies both ways, and what their ends mean.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use hyper::body::{Body, Frame, Incoming, SizeHint};
use hyper::client::conn::http1;

use super::proxy::grpc_failed;
use super::routing::Flight;

/// The connection that an answer comes by, to be used again when the answer has been read.
pub enum Link {
    Http1(http1::SendRequest<RequestBody>, usize),
    Http2,
}

/// Whether a client broke off its request's body: what then goes wrong is not the process's
/// fault. A request without a body has nothing to break off.
#[derive(Clone, Default)]
pub struct BrokenOff(Option<Arc<AtomicBool>>);

impl BrokenOff {
    fn note(&self) {
        if let Some(broken) = &self.0 {
            broken.store(true, Ordering::Relaxed);
        }
    }

    pub fn is_noted(&self) -> bool {
        self.0
            .as_ref()
            .is_some_and(|broken| broken.load(Ordering::Relaxed))
    }
}

/// What is sent to a process.
pub enum RequestBody {
    Client {
        body: Incoming,
        broken_off: BrokenOff,
    },
    Empty,
}

impl RequestBody {
    pub fn new(body: Incoming) -> (Self, BrokenOff) {
        if body.is_end_stream() {
            return (Self::Empty, BrokenOff::default());
        }
        let broken_off = BrokenOff(Some(Arc::default()));
        (
            Self::Client {
                body,
                broken_off: broken_off.clone(),
            },
            broken_off,
        )
    }
}

impl Body for RequestBody {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        match self.get_mut() {
            Self::Client { body, broken_off } => {
                let frame = std::task::ready!(Pin::new(body).poll_frame(context));
                if matches!(frame, Some(Err(_))) {
                    broken_off.note();
                }
                Poll::Ready(frame)
            }
            Self::Empty => Poll::Ready(None),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Client { body, .. } => body.is_end_stream(),
            Self::Empty => true,
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Client { body, .. } => body.size_hint(),
            Self::Empty => SizeHint::with_exact(0),
        }
    }
}

/// What is sent to a client.
pub struct ResponseBody {
    content: Content,
    /// What is left to do when a process's answer has been read.
    end: Option<End>,
}

enum Content {
    Process(Incoming),
    Text(Option<Bytes>),
}

pub struct End {
    pub flight: Flight,
    pub link: Option<Link>,
    /// The time to the answer's head, where the request is to be counted only at its end.
    pub uncounted: Option<Duration>,
    pub broken_off: BrokenOff,
}

impl ResponseBody {
    pub fn empty() -> Self {
        Self {
            content: Content::Text(None),
            end: None,
        }
    }

    pub fn text(text: &'static str) -> Self {
        let text = (!text.is_empty()).then(|| Bytes::from_static(text.as_bytes()));
        Self {
            content: Content::Text(text),
            end: None,
        }
    }

    pub fn from_process(body: Incoming, end: End) -> Self {
        if body.is_end_stream() {
            end.complete();
            return Self {
                content: Content::Process(body),
                end: None,
            };
        }
        Self {
            content: Content::Process(body),
            end: Some(end),
        }
    }
}

impl End {
    /// The answer was read to its end: the connection can carry another request.
    fn complete(mut self) {
        if let Some(Link::Http1(sender, worker)) = self.link.take() {
            self.flight.backend.pool(worker).http1().push(sender);
        }
        if let Some(time) = self.uncounted {
            self.flight.backend.counters.answered(time, false);
        }
        self.flight.end();
    }

    /// The trailers told how the call has ended: that counts before the client can know it.
    fn told(&mut self, failed: bool) {
        if let Some(time) = self.uncounted.take() {
            self.flight.backend.counters.answered(time, failed);
        }
    }

    /// The answer broke off.
    fn broken(mut self) {
        if self.broken_off.is_noted() {
            return;
        }
        match self.uncounted {
            Some(time) => self.flight.backend.counters.answered(time, true),
            None => self.flight.backend.counters.lost(),
        }
        self.flight.end();
    }
}

impl Body for ResponseBody {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        let this = self.get_mut();
        let body = match &mut this.content {
            Content::Text(text) => {
                return Poll::Ready(text.take().map(|text| Ok(Frame::data(text))));
            }
            Content::Process(body) => body,
        };
        let frame = std::task::ready!(Pin::new(&mut *body).poll_frame(context));
        match &frame {
            Some(Ok(frame)) => {
                if let (Some(end), Some(trailers)) = (&mut this.end, frame.trailers_ref()) {
                    end.told(grpc_failed(trailers));
                }
                if body.is_end_stream()
                    && let Some(end) = this.end.take()
                {
                    end.complete();
                }
            }
            Some(Err(_)) => {
                if let Some(end) = this.end.take() {
                    end.broken();
                }
            }
            None => {
                if let Some(end) = this.end.take() {
                    end.complete();
                }
            }
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        match &self.content {
            Content::Process(body) => body.is_end_stream(),
            Content::Text(text) => text.is_none(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.content {
            Content::Process(body) => body.size_hint(),
            Content::Text(text) => {
                SizeHint::with_exact(text.as_ref().map_or(0, |text| text.len() as u64))
            }
        }
    }
}
