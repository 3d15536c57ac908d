//! Connections that stay: WebSockets and streams. So many there may be, and when the process ends they
//! are told, and waited for.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use futures_util::{Stream, StreamExt};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tokio_util::task::task_tracker::TaskTrackerToken;

use crate::limits::Client;
use crate::metrics::METRICS;

pub struct Sessions {
    places: Arc<Semaphore>,
    /// How many one client may have, and who has how many.
    share: usize,
    held: Arc<Mutex<HashMap<Client, usize>>>,
    tracker: TaskTracker,
    ending: CancellationToken,
}

/// One of them, until it is dropped.
pub struct Session {
    _place: OwnedSemaphorePermit,
    client: Client,
    held: Arc<Mutex<HashMap<Client, usize>>>,
    _tracked: TaskTrackerToken,
    ending: CancellationToken,
}

impl Sessions {
    /// So many places there are, and so many of them for one client.
    pub fn new(places: usize, share: usize) -> Self {
        Self {
            places: Arc::new(Semaphore::new(places)),
            share,
            held: Arc::default(),
            tracker: TaskTracker::new(),
            ending: CancellationToken::new(),
        }
    }

    /// `None` where there are as many as there may be, or as one client may have, or the process is
    /// about to end.
    pub fn begin(&self, client: &Client) -> Option<Session> {
        if self.ending.is_cancelled() {
            return None;
        }
        let place = Arc::clone(&self.places).try_acquire_owned().ok()?;
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        let number = held.entry(client.clone()).or_default();
        if *number >= self.share {
            return None;
        }
        *number += 1;
        drop(held);
        METRICS.sessions_open.inc();
        Some(Session {
            _place: place,
            client: client.clone(),
            held: Arc::clone(&self.held),
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
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(number) = held.get_mut(&self.client) {
            *number -= 1;
            if *number == 0 {
                held.remove(&self.client);
            }
        }
        METRICS.sessions_open.dec();
    }
}
