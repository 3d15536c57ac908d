//! The end of a process, as its clients see it.
//!
//! A proxy learns only a while after that a process is going, and sends it requests until then. So a
//! process that was told to end still takes requests until none has come for `server.linger`: that
//! they stop is the sign that everybody knows. Its answers close their connections meanwhile
//! (RFC 9112, section 9.6), so that clients open the next one elsewhere.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use axum::extract::Request;
use axum::http::{HeaderValue, StatusCode, Version, header};
use axum::response::Response;
use tokio::sync::watch;

use crate::limits;

#[derive(Default)]
pub struct Drain {
    began: AtomicBool,
    /// Changes with each request that comes since.
    requests: watch::Sender<()>,
}

impl Drain {
    /// From now on the process says that it is going.
    pub fn begin(&self) {
        self.began.store(true, Ordering::SeqCst);
    }

    pub fn has_begun(&self) -> bool {
        self.began.load(Ordering::SeqCst)
    }

    /// Notes a request that somebody still sends; whether they must be told to go elsewhere.
    pub fn notes(&self, request: &Request) -> bool {
        if !self.has_begun() || limits::is_exempt(request) {
            return false;
        }
        self.requests.send_replace(());
        // Later versions have no such header.
        request.version() <= Version::HTTP_11
    }

    /// Returns once no request has come for `time`.
    pub async fn quiet(&self, time: Duration) {
        let mut requests = self.requests.subscribe();
        while tokio::time::timeout(time, requests.changed()).await.is_ok() {}
    }
}

/// Tells a client to open its next connection elsewhere.
pub fn turn_away(response: &mut Response) {
    // A WebSocket needs this header for itself.
    if response.status() != StatusCode::SWITCHING_PROTOCOLS {
        let close = HeaderValue::from_static("close");
        response.headers_mut().insert(header::CONNECTION, close);
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::Instant;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn it_is_quiet_when_requests_have_stopped() {
        let drain = Drain::default();
        drain.begin();
        let began = Instant::now();
        let requests = async {
            for _ in 0..5 {
                tokio::time::sleep(Duration::from_millis(900)).await;
                drain.requests.send_replace(());
            }
        };
        tokio::join!(drain.quiet(Duration::from_secs(1)), requests);
        assert_eq!(began.elapsed(), Duration::from_millis(5 * 900 + 1000));
    }
}
