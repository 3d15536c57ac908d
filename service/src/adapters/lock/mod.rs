//! Who, of several processes, does what only one does at a time: one trait, chosen by `lock.kind`.
//!
//! A lock ends by itself when its time is over, so its holder may be one that was paused and does not
//! know yet that it is none. Whatever it then writes must be refused: storage takes writes with a
//! [`Fence`], and none from behind the newest token that it has seen (Martin Kleppmann, "How to do
//! distributed locking", 2016).

mod database;
mod in_process;
mod redis;

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;

use crate::adapters::storage::{Storage, StorageError};
use crate::config::{Config, LockKind};

#[async_trait]
pub trait Lock: Send + Sync {
    /// Becomes, or stays, the holder of `name` for `time` from now; `None` while somebody else is.
    /// The token is a larger one each time that the holder is another: milliseconds since the Unix
    /// epoch, or one more than the last, so that it grows though what kept it is lost.
    async fn hold(
        &self,
        name: &'static str,
        owner: &str,
        time: Duration,
    ) -> Result<Option<Fence>, LockError>;

    /// Lets somebody else become the holder at once, unless somebody else is.
    async fn give_up(&self, name: &'static str, owner: &str) -> Result<(), LockError>;

    /// From the next holder on, tokens are larger than this one: another lock may have given it, whose clock
    /// was ahead.
    async fn outdo(&self, name: &'static str, token: i64) -> Result<(), LockError>;
}

/// What a holder of a lock shows with its writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fence {
    pub name: &'static str,
    pub token: i64,
}

/// Why nobody knows who the holder is; it is tried again.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    #[error(transparent)]
    Storage(#[from] StorageError),
    #[error("the lock: {0}")]
    Redis(#[from] ::redis::RedisError),
}

/// The adapter that the configuration names; it connects when it is used.
pub fn open(config: &Config, storage: &Arc<dyn Storage>) -> anyhow::Result<Arc<dyn Lock>> {
    Ok(match config.lock.kind {
        LockKind::InProcess => Arc::new(in_process::InProcess::default()),
        LockKind::Database => Arc::new(database::Database(Arc::clone(storage))),
        LockKind::Redis => Arc::new(redis::Redis::new(&config.redis)?),
    })
}
