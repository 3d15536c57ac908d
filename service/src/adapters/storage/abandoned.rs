//! Whether somebody has just given up waiting for the database.
//!
//! Whoever does leaves a connection that may never say anything again, and the pool would wait for it
//! without end. To ask every connection whether it is alive would cost a round trip each time.

use std::pin::Pin;
use std::sync::{Mutex, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

/// The connection comes back at once; the rest is for a process that is very busy.
const LATELY: Duration = Duration::from_secs(1);

static LAST: Mutex<Option<Instant>> = Mutex::new(None);

/// Whether work was dropped before its end lately.
pub(super) fn lately() -> bool {
    let last = LAST.lock().unwrap_or_else(PoisonError::into_inner);
    last.is_some_and(|last| last.elapsed() < LATELY)
}

/// Work on the database that may be dropped before its end.
pub(super) struct Watched<F> {
    work: Pin<Box<F>>,
    is_done: bool,
}

pub(super) fn watched<F: Future>(work: F) -> Watched<F> {
    Watched {
        work: Box::pin(work),
        is_done: false,
    }
}

impl<F: Future> Future for Watched<F> {
    type Output = F::Output;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<F::Output> {
        let output = ready!(self.work.as_mut().poll(context));
        self.is_done = true;
        Poll::Ready(output)
    }
}

/// Before the work goes, and its connection with it.
impl<F> Drop for Watched<F> {
    fn drop(&mut self) {
        if !self.is_done {
            *LAST.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
        }
    }
}
