//! Connections that stay: WebSockets and streams. So many there may be, and when the process ends they
//! are told, and waited for.

use std::sync::Arc;

use futures_util::{Stream, StreamExt};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tokio_util::task::task_tracker::TaskTrackerToken;

pub struct Sessions {
    places: Arc<Semaphore>,
    tracker: TaskTracker,
    ending: CancellationToken,
}

/// One of them, until it is dropped.
pub struct Session {
    _place: OwnedSemaphorePermit,
    _tracked: TaskTrackerToken,
    ending: CancellationToken,
}

impl Sessions {
    pub fn new(places: usize) -> Self {
        Self {
            places: Arc::new(Semaphore::new(places)),
            tracker: TaskTracker::new(),
            ending: CancellationToken::new(),
        }
    }

    /// `None` where there are as many as there may be, or the process is about to end.
    pub fn begin(&self) -> Option<Session> {
        if self.ending.is_cancelled() {
            return None;
        }
        let place = Arc::clone(&self.places).try_acquire_owned().ok()?;
        metrics::gauge!("sessions_open").increment(1.0);
        Some(Session {
            _place: place,
            _tracked: self.tracker.token(),
            ending: self.ending.clone(),
        })
    }

    /// Tells all of them to end, and waits until they have.
    pub async fn end(&self) {
        self.ending.cancel();
        self.tracker.close();
        self.tracker.wait().await;
    }
}

impl Session {
    /// Returns when the process is about to end.
    pub async fn ending(&self) {
        self.ending.cancelled().await;
    }

    /// The stream, ended with the process; the session lasts as long as it.
    pub fn until_the_end<S: Stream + Send>(
        self,
        stream: S,
    ) -> impl Stream<Item = S::Item> + Send + use<S> {
        let ending = self.ending.clone();
        stream
            .take_until(ending.cancelled_owned())
            .map(move |item| {
                let _ = &self;
                item
            })
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        metrics::gauge!("sessions_open").decrement(1.0);
    }
}
