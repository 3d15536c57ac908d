//! Whose turn it is to write, where all processes write to one file and only one may at a time.
//!
//! SQLite lets whoever finds the file locked look again later, up to a tenth of a second later, and has no
//! queue: a process that writes without pause leaves the others nothing. Here each waits in the queue of
//! its own process, and then with the other processes for a lock whose end wakes them.

use std::fs::{File, TryLockError};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Context;
use tokio::sync::OwnedMutexGuard;

use super::StorageError;
use super::pools::STUCK_AFTER;
use crate::config::Database;

pub(super) struct Turns {
    /// This process' queue, in order of coming, for the lock of all processes.
    lock: Arc<tokio::sync::Mutex<File>>,
    /// When this process has got its turn last, or begun to wait for the others'.
    taken: Mutex<Instant>,
    longest: Duration,
    stuck_after: Duration,
}

/// The right to write. It ends with its process, too.
pub(super) struct Turn(OwnedMutexGuard<File>);

impl Drop for Turn {
    fn drop(&mut self) {
        // What was not locked is not unlocked, and that is no error.
        let _ = self.0.unlock();
    }
}

impl Turns {
    /// For all processes that write to this database. Nobody waits for longer than `busy_timeout`.
    pub(super) fn of(database: &Path, config: &Database) -> anyhow::Result<Self> {
        let path = database.with_extension("turn.lock");
        let lock = File::create(&path).with_context(|| format!("creating {}", path.display()))?;
        Ok(Self {
            lock: Arc::new(tokio::sync::Mutex::new(lock)),
            taken: Mutex::new(Instant::now()),
            longest: config.busy_timeout.0,
            stuck_after: config.acquire_timeout.0 * STUCK_AFTER,
        })
    }

    /// Waits for the turn.
    ///
    /// # Errors
    /// [`StorageError::Busy`] where others have written for too long.
    pub(super) async fn next(&self) -> Result<Turn, StorageError> {
        let turn = tokio::time::timeout(self.longest, self.in_order()).await;
        turn.map_err(|_| {
            let why = format!("others have been writing for {:?}", self.longest);
            StorageError::Busy(why)
        })?
    }

    /// For how long the turn has been somebody's, where that is too long.
    pub(super) fn stuck_for(&self) -> Option<Duration> {
        let is_taken = self.lock.try_lock().is_err();
        let taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        Some(taken.elapsed()).filter(|long| is_taken && *long > self.stuck_after)
    }

    async fn in_order(&self) -> Result<Turn, StorageError> {
        let failed = |why: &dyn std::fmt::Display| StorageError::Failed(why.to_string());
        let turn = Turn(Arc::clone(&self.lock).lock_owned().await);
        *self.taken.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
        match turn.0.try_lock() {
            Ok(()) => return Ok(turn),
            Err(TryLockError::WouldBlock) => {}
            Err(TryLockError::Error(error)) => return Err(failed(&error)),
        }
        // Whoever gives up meanwhile leaves this to its end, and nobody of this process goes before.
        let wait = move || turn.0.lock().map(|()| turn);
        let turn = tokio::task::spawn_blocking(wait).await;
        let turn = turn.map_err(|panicked| failed(&panicked))?;
        turn.map_err(|error| failed(&error))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Config, Timeout};

    fn two_processes(longest: Duration) -> (tempfile::TempDir, [Turns; 2]) {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("orders.db");
        let shipped = Path::new(env!("CARGO_MANIFEST_DIR")).join("../config/service/default.toml");
        let mut config = Config::from_files(&[shipped]).unwrap().database;
        config.busy_timeout = Timeout(longest);
        let turns = [(), ()].map(|()| Turns::of(&file, &config).unwrap());
        (dir, turns)
    }

    #[tokio::test]
    async fn one_at_a_time_whichever_its_process() {
        let (_dir, [one, other]) = two_processes(Duration::from_millis(50));
        let turn = one.next().await.unwrap();
        for turns in [&one, &other] {
            let late = turns.next().await.err().unwrap();
            assert!(matches!(late, StorageError::Busy(_)), "{late}");
        }
        drop(turn);
        // Those who gave up are not waited for, in neither process.
        for turns in [&one, &other, &one] {
            while turns.next().await.is_err() {}
        }
    }

    #[tokio::test]
    async fn a_process_without_pause_leaves_others_theirs() {
        const WANTED: u32 = 50;
        let (_dir, [greedy, other]) = two_processes(Duration::from_secs(60));
        let greedy = tokio::spawn(async move {
            for taken in 0u32.. {
                let turn = greedy.next().await.unwrap();
                tokio::time::sleep(Duration::from_millis(2)).await;
                drop(turn);
                if taken > 100 * WANTED {
                    break;
                }
            }
        });
        for _ in 0..WANTED {
            drop(other.next().await.unwrap());
        }
        assert!(!greedy.is_finished(), "all others had to wait for one");
        greedy.abort();
    }
}
