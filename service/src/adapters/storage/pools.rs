//! The connections to a database: a pool that requests share, and one apart by which it is asked whether
//! the database is there, since one that is busy is.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard};
use std::time::{Duration, Instant};

use sqlx::{Database, Pool};

use super::{Connections, StorageError, has_no_connection, rows};
use crate::breaker::Breaker;
use crate::config::CircuitBreaker;

/// So many times as long as somebody waits for a connection: then it is not for being busy that none
/// comes back.
pub(super) const STUCK_AFTER: u32 = 5;
/// What a pool that is replaced may still do.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(10);

/// How often a connection that works was handed to somebody.
#[derive(Clone, Default)]
pub(super) struct Handed {
    times: Arc<AtomicU64>,
    /// Of those who wait for one, where they need not do so in vain.
    breaker: Option<Arc<Breaker>>,
}

impl Handed {
    /// Of the shared pool.
    pub(super) fn shared(settings: &CircuitBreaker) -> Self {
        Self {
            times: Arc::default(),
            breaker: Some(Arc::new(Breaker::new("database", settings))),
        }
    }

    pub(super) fn one(&self) {
        self.times.fetch_add(1, Relaxed);
        if let Some(breaker) = &self.breaker {
            breaker.works();
        }
    }

    fn times(&self) -> u64 {
        self.times.load(Relaxed)
    }
}

/// Those who wait until it is their turn: for a connection, for a place in a statement, to write.
#[derive(Clone, Default)]
pub(super) struct Waits(Arc<AtomicU32>);

/// One of them, for as long as this lives.
pub(super) struct Waiting(Waits);

impl Waits {
    pub(super) fn one(&self) -> Waiting {
        self.0.fetch_add(1, Relaxed);
        Waiting(self.clone())
    }

    pub(super) fn number(&self) -> u32 {
        self.0.load(Relaxed)
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        self.0.0.fetch_sub(1, Relaxed);
    }
}

pub(super) struct Pools<DB: Database> {
    pub(super) waits: Waits,
    both: RwLock<Both<DB>>,
    handed: Handed,
    /// What was handed when it was looked at last, and since when it is so.
    seen: Mutex<(u64, Instant)>,
    stuck_after: Duration,
}

pub(super) struct Both<DB: Database> {
    pub(super) shared: Pool<DB>,
    pub(super) probe: Pool<DB>,
}

impl<DB: Database> Pools<DB> {
    pub(super) fn new(both: Both<DB>, handed: Handed, acquire_timeout: Duration) -> Self {
        Self {
            waits: Waits::default(),
            both: RwLock::new(both),
            handed,
            seen: Mutex::new((0, Instant::now())),
            stuck_after: acquire_timeout * STUCK_AFTER,
        }
    }

    /// What a request waits for, tried again as [`rows::retried`] does, unless the circuit is open. Many at
    /// a time make some wait in vain, too: what says that the database is away is that meanwhile nobody got
    /// a connection.
    pub(super) async fn retried<T, F>(&self, attempt: impl Fn() -> F) -> Result<T, StorageError>
    where
        F: Future<Output = sqlx::Result<T>>,
    {
        let before = self.handed.times();
        let is_there = |outcome: &sqlx::Result<T>| {
            let got_none = outcome.as_ref().is_err_and(has_no_connection);
            !got_none || self.handed.times() != before
        };
        let work = rows::retried(attempt);
        let watched = match &self.handed.breaker {
            Some(breaker) => breaker.watch(work, is_there).await,
            None => Some(work.await),
        };
        match watched {
            Some(outcome) => Ok(outcome?),
            None => Err(StorageError::Busy(
                "it is left alone for a while after nobody has got a connection again and again"
                    .to_owned(),
            )),
        }
    }

    fn both(&self) -> RwLockReadGuard<'_, Both<DB>> {
        self.both.read().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn shared(&self) -> Pool<DB> {
        self.both().shared.clone()
    }

    pub(super) fn probe(&self) -> Pool<DB> {
        self.both().probe.clone()
    }

    /// From now on these are used. What is being done on those of before is left to its end, for a while.
    pub(super) fn replace(&self, both: Both<DB>) {
        let mut current = self.both.write().unwrap_or_else(PoisonError::into_inner);
        let before = std::mem::replace(&mut *current, both);
        drop(current);
        tokio::spawn(async move {
            let closed = async { tokio::join!(before.shared.close(), before.probe.close()) };
            tokio::time::timeout(CLOSE_TIMEOUT, closed).await
        });
    }

    /// For how long nobody has got a connection, though all are in use, where that is too long.
    pub(super) fn stuck_for(&self) -> Option<Duration> {
        let shared = self.shared();
        let handed = self.handed.times();
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let most = shared.options().get_max_connections();
        if seen.0 != handed || shared.num_idle() > 0 || shared.size() < most {
            *seen = (handed, Instant::now());
        }
        Some(seen.1.elapsed()).filter(|long| *long > self.stuck_after)
    }

    pub(super) fn connections(&self) -> Connections {
        let shared = self.shared();
        let idle = u32::try_from(shared.num_idle()).unwrap_or(u32::MAX);
        Connections {
            used: shared.size().saturating_sub(idle),
            idle,
            most: shared.options().get_max_connections(),
            waiting: self.waits.number(),
        }
    }

    pub(super) async fn close(&self) {
        let (shared, probe) = (self.shared(), self.probe());
        tokio::join!(shared.close(), probe.close());
    }
}
