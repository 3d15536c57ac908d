//! From the outbox to the bus: what was written with an order is told, at least once and in order.
//! Of all processes on one database one does it at a time.

use std::sync::Arc;

use crate::adapters::lock::Fence;
use crate::adapters::storage::{Storage, StorageError, Untold};
use crate::app::App;
use crate::consumers::id_of;
use crate::domain::events::Event;
use crate::duty::{self, Failure};
use crate::failpoint;
use crate::metrics::METRICS;

/// The lock's name, and the consumer under which unreadable events are put aside.
pub const RELAY: &str = "relay";
/// Relays until it is cancelled, which it may be at any point.
pub async fn run(app: Arc<App>) {
    duty::run(app, RELAY, step).await;
}

/// Tells what waits, at most one batch; the number of events that it was.
async fn step(app: Arc<App>, fence: Fence) -> Result<usize, Failure> {
    let (storage, config) = (app.storage(), &app.config.events);
    let untold = storage.untold(config.batch.get()).await?;
    let seqs: Vec<i64> = untold.iter().map(|untold| untold.seq).collect();
    let events = readable(storage, untold).await?;
    // Somebody else may take over when the lease ends: by then this must be over.
    let limit = config.lease.0 / 2;
    match tokio::time::timeout(limit, app.bus().publish(&events)).await {
        Ok(published) => published?,
        Err(_) => return Err(Failure::Late(limit)),
    }
    if !seqs.is_empty() {
        failpoint::reached("relay-after-publish");
        storage.told(&seqs, fence).await?;
        failpoint::reached("relay-after-told");
        METRICS.events_told.inc_by(events.len() as u64);
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
