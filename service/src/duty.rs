//! What one process does at a time, of all on one database: telling events, chaining the audit log.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::adapters::bus::BusError;
use crate::adapters::lock::{Fence, LockError};
use crate::adapters::storage::StorageError;
use crate::app::App;
use crate::metrics::METRICS;
use crate::pause::{Pause, jittered};

/// The first pause after a failure.
const PAUSE: Duration = Duration::from_millis(100);

const GIVE_UP_TIMEOUT: Duration = Duration::from_secs(1);

/// Part of a lease for which the holder does not ask for a longer one: a process with nothing to do
/// writes nothing most of the time.
const UNASKED: u32 = 4;
/// Part of a lease after which the others look whether it is theirs now.
const OTHERS_LOOK: u32 = 10;

/// A lease, and when it was asked for.
#[derive(Clone, Copy)]
struct Held {
    fence: Fence,
    since: Instant,
}

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
    let lease = config.lease.0;
    let mut pause = Pause::new(PAUSE);
    let mut held: Option<Held> = None;
    loop {
        untold.mark_unchanged();
        let age = held.map(|held| held.since.elapsed());
        let age = age.filter(|age| *age < lease / UNASKED);
        let done = async {
            if age.is_none() {
                let since = Instant::now();
                let fence = app.lock().hold(name, &app.name, lease).await?;
                held = fence.map(|fence| Held { fence, since });
            }
            match held {
                Some(held) => step(Arc::clone(&app), held.fence).await.map(Some),
                None => Ok(None),
            }
        };
        // By then it is another process' duty.
        let left = lease - age.unwrap_or_default();
        let done = tokio::time::timeout(left, done).await;
        match done.unwrap_or(Err(Failure::Late(left))) {
            Ok(None) => {
                pause.reset();
                tokio::time::sleep(jittered(lease / OTHERS_LOOK)).await;
            }
            Ok(Some(0)) => {
                pause.reset();
                // Whoever places an order in this process says so; another process' are looked for.
                let _ = tokio::time::timeout(config.poll.0, untold.changed()).await;
            }
            Ok(Some(_)) => pause.reset(),
            Err(error) => {
                held = None;
                // Its token is too old, and would stay so: whoever is next gets a newer one.
                if let Failure::Storage(StorageError::Fenced(_)) = error {
                    let outdone = tokio::time::timeout(GIVE_UP_TIMEOUT, outdo(&app, name)).await;
                    if let Ok(Err(error)) = outdone {
                        tracing::warn!(%error, duty = name, "the next token may be too old, too");
                    }
                    give_up(&app, name).await;
                }
                tracing::warn!(%error, duty = name, "it is tried again");
                METRICS.duty_failures.get_or_create(&[("duty", name)]).inc();
                pause.wait().await;
            }
        }
    }
}

/// The lock may be another than the one whose token storage has seen, and its clock behind that one's.
async fn outdo(app: &App, name: &'static str) -> Result<(), Failure> {
    let newest = app.storage().newest_token(name).await?;
    Ok(app.lock().outdo(name, newest).await?)
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
