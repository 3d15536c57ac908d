//! From the outbox to the bus: what was written with an order is told, at least once and in order.
//! Of all processes on one database one does it at a time.

use std::sync::Arc;
use std::time::Duration;

use crate::adapters::storage::{Storage, StorageError, Untold};
use crate::app::App;
use crate::consumers::id_of;
use crate::domain::events::Event;
use crate::pause::Pause;

/// The lease's name, and the consumer under which unreadable events are put aside.
const RELAY: &str = "relay";
/// The first pause after a failure.
const PAUSE: Duration = Duration::from_millis(100);

/// Relays until it is cancelled, which it may be at any point.
pub async fn run(app: Arc<App>) {
    let owner = app.name.as_str();
    let config = &app.config.events;
    let mut pause = Pause::new(PAUSE);
    loop {
        match step(&app, owner).await {
            Ok(0) => {
                pause.reset();
                // Whoever places an order in this process says so; another process' are looked for.
                let _ = tokio::time::timeout(config.poll.0, app.untold.notified()).await;
            }
            Ok(_) => pause.reset(),
            Err(error) => {
                tracing::warn!(%error, "relaying events failed");
                metrics::counter!("relay_failures_total").increment(1);
                pause.wait().await;
            }
        }
    }
}

/// Lets another process do it from now on.
pub async fn give_up(app: &App) {
    if let Err(error) = app.storage().give_up(RELAY, &app.name).await {
        tracing::warn!(%error, "another process relays events only when the lease has ended");
    }
}

#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error(transparent)]
    Storage(#[from] StorageError),
    #[error(transparent)]
    Bus(#[from] crate::adapters::bus::BusError),
    #[error("the bus did not answer within {0:?}")]
    Late(Duration),
}

/// Tells what waits, at most one batch; the number of events that it was.
async fn step(app: &App, owner: &str) -> Result<usize, Failure> {
    let (storage, config) = (app.storage(), &app.config.events);
    let seconds = i64::try_from(config.lease.0.as_secs())
        .unwrap_or(i64::MAX)
        .max(1);
    if !storage.lease(RELAY, owner, seconds).await? {
        return Ok(0);
    }
    let untold = storage.untold(config.batch.get()).await?;
    metrics::gauge!("outbox_waiting").set(untold.len() as f64);
    let seqs: Vec<i64> = untold.iter().map(|untold| untold.seq).collect();
    let events = readable(storage, untold).await?;
    // Somebody else may take over when the lease ends: by then this must be over.
    let limit = config.lease.0 / 2;
    match tokio::time::timeout(limit, app.bus().publish(&events)).await {
        Ok(published) => published?,
        Err(_) => return Err(Failure::Late(limit)),
    }
    if !seqs.is_empty() {
        storage.told(&seqs).await?;
        metrics::counter!("events_told_total").increment(events.len() as u64);
    }
    Ok(seqs.len())
}

/// The events, without what nobody can read: that is put aside, or it would be in the way for ever.
async fn readable(storage: &dyn Storage, untold: Vec<Untold>) -> Result<Vec<Event>, StorageError> {
    let mut events = Vec::new();
    for Untold { event, .. } in untold {
        match serde_json::from_str(&event) {
            Ok(event) => events.push(event),
            Err(error) => {
                tracing::error!(%error, event, "an event cannot be read");
                let error = error.to_string();
                storage.bury(RELAY, id_of(&event), &event, &error).await?;
            }
        }
    }
    Ok(events)
}
