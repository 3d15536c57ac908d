//! What one process does at a time, of all on one database: telling events, chaining the audit log.

use std::sync::Arc;
use std::time::Duration;

use crate::adapters::bus::BusError;
use crate::adapters::lock::{Fence, LockError};
use crate::adapters::storage::StorageError;
use crate::app::App;
use crate::metrics::METRICS;
use crate::pause::Pause;

/// The first pause after a failure.
const PAUSE: Duration = Duration::from_millis(100);

const GIVE_UP_TIMEOUT: Duration = Duration::from_secs(1);

/// Why a step came to nothing; it is tried again.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    #[error(transparent)]
    Lock(#[from] LockError),
    #[error(transparent)]
    Storage(#[from] StorageError),
    #[error(transparent)]
    Bus(#[from] BusError),
    #[error("it was not done within {0:?}")]
    Late(Duration),
}

/// Takes one step after another for as long as this process is the one, until it is cancelled, which it
/// may be at any point. A step says how much there was to do.
pub async fn run<F>(app: Arc<App>, name: &'static str, step: impl Fn(Arc<App>, Fence) -> F)
where
    F: Future<Output = Result<usize, Failure>>,
{
    let config = &app.config.events;
    let mut untold = app.untold.subscribe();
    let mut pause = Pause::new(PAUSE);
    loop {
        untold.mark_unchanged();
        let done = async {
            match app.lock().hold(name, &app.name, config.lease.0).await? {
                Some(fence) => step(Arc::clone(&app), fence).await,
                None => Ok(0),
            }
        };
        // By then it is another process' duty.
        let done = tokio::time::timeout(config.lease.0, done).await;
        match done.unwrap_or(Err(Failure::Late(config.lease.0))) {
            Ok(0) => {
                pause.reset();
                // Whoever places an order in this process says so; another process' are looked for.
                let _ = tokio::time::timeout(config.poll.0, untold.changed()).await;
            }
            Ok(_) => pause.reset(),
            Err(error) => {
                // Its token is too old, and would stay so: whoever is next gets a newer one.
                if let Failure::Storage(StorageError::Fenced(_)) = error {
                    give_up(&app, name).await;
                }
                tracing::warn!(%error, duty = name, "it is tried again");
                METRICS.duty_failures.get_or_create(&[("duty", name)]).inc();
                pause.wait().await;
            }
        }
    }
}

/// Lets another process do it from now on.
pub async fn give_up(app: &App, name: &'static str) {
    let given_up = app.lock().give_up(name, &app.name);
    let error = match tokio::time::timeout(GIVE_UP_TIMEOUT, given_up).await {
        Ok(Ok(())) => return,
        Ok(Err(error)) => error.to_string(),
        Err(late) => late.to_string(),
    };
    tracing::warn!(
        error,
        duty = name,
        "another process does it only when the lease has ended"
    );
}
