//! What is done about events. An event may come twice, and is acted on once; one that cannot be
//! acted on is put aside, and the next ones are not kept waiting.

use std::sync::Arc;
use std::time::Duration;

use opentelemetry::Context;
use opentelemetry::context::FutureExt;
use opentelemetry::trace::{Status, TraceContextExt};
use sha2::{Digest, Sha256};
use tracing::Instrument;
use uuid::Uuid;

use crate::adapters::bus::{self, BusError, Delivery};
use crate::adapters::storage::{Change, DeadLetter, Storage, StorageError};
use crate::app::App;
use crate::domain::events::{Event, Kind};
use crate::metrics::{Consumed, METRICS};
use crate::pause::Pause;
use crate::traces;

/// The first pause after a failure.
const PAUSE: Duration = Duration::from_millis(50);

/// What takes longer is begun anew.
const LONGEST: Duration = Duration::from_secs(10);

/// Events that are acted on in one transaction.
const AT_ONCE: usize = 200;

/// Something that acts on events.
pub struct Consumer {
    pub name: &'static str,
    change: fn(&Event) -> Change,
}

/// All that there are: to add one is to add a line. Whoever takes one out deletes its queue at the broker,
/// where it would grow for ever.
pub const CONSUMERS: [Consumer; 1] = [Consumer {
    name: "totals",
    change: totals,
}];

/// What a customer has ordered and not cancelled.
fn totals(event: &Event) -> Change {
    let order = &event.data;
    let sign = match event.kind {
        Kind::Placed => 1,
        Kind::Cancelled => -1,
    };
    Change::Totals {
        order: order.id,
        customer: order.customer.clone(),
        currency: order.currency.clone(),
        orders: sign,
        total_cents: sign * order.total_cents,
    }
}

/// Consumes until it is cancelled, which it may be at any point.
pub async fn run(app: Arc<App>, consumer: &'static Consumer) {
    let mut pause = Pause::new(PAUSE);
    loop {
        let Err(error) = consume(&app, consumer, &mut pause).await;
        let name = consumer.name;
        tracing::warn!(%error, consumer = name, "consuming events failed");
        pause.wait().await;
    }
}

/// Ends only when the bus does.
async fn consume(
    app: &App,
    consumer: &'static Consumer,
    pause: &mut Pause,
) -> Result<std::convert::Infallible, BusError> {
    let mut subscription = app.bus().subscribe(consumer.name).await?;
    loop {
        let mut deliveries = vec![subscription.next().await?];
        pause.reset();
        deliveries.extend(subscription.ready(AT_ONCE - 1));
        for delivery in together(app, consumer, deliveries).await? {
            handle(app, consumer, delivery).await?;
        }
    }
}

/// Acts on all of them in one transaction. Where that cannot be, none was acted on, and they are
/// returned: one of them may be the reason.
async fn together(
    app: &App,
    consumer: &Consumer,
    deliveries: Vec<Delivery>,
) -> Result<Vec<Delivery>, BusError> {
    let events = deliveries
        .iter()
        .map(|delivery| serde_json::from_str::<Event>(&delivery.event))
        .collect::<Result<Vec<_>, _>>();
    let Some(events) = events.ok().filter(|events| events.len() > 1) else {
        return Ok(deliveries);
    };
    let traces: Vec<_> = events.iter().map(|event| trace(consumer, event)).collect();
    let new = match act(app.storage(), consumer, &events).await {
        Ok(new) => new,
        Err(error) => {
            for trace in &traces {
                mark_failed(trace, &error);
            }
            return Ok(deliveries);
        }
    };
    drop(traces);
    for is_new in new {
        count(consumer, outcome(is_new));
    }
    bus::done(deliveries).await?;
    Ok(Vec::new())
}

fn outcome(is_new: bool) -> &'static str {
    if is_new { "done" } else { "repeated" }
}

fn count(consumer: &Consumer, outcome: &'static str) {
    let consumed = Consumed {
        consumer: consumer.name,
        outcome,
    };
    METRICS.events_consumed.get_or_create(&consumed).inc();
}

/// Acts on one event, however long that takes, or puts it aside.
async fn handle(app: &App, consumer: &Consumer, delivery: Delivery) -> Result<(), BusError> {
    let storage = app.storage();
    let attempts = app.config.events.attempts.get();
    let (mut is_told, mut failed, mut pause) = (false, 0, Pause::new(PAUSE));
    let outcome = loop {
        let (error, id) = match serde_json::from_str::<Event>(&delivery.event) {
            Err(error) => {
                failed = attempts;
                let id = id_of(&delivery.event);
                (StorageError::Failed(error.to_string()), id)
            }
            Ok(event) => {
                let (id, trace) = (event.id, trace(consumer, &event));
                let trace_id = trace.span().span_context().trace_id();
                let span = tracing::info_span!(
                    "consume",
                    consumer = consumer.name,
                    %trace_id,
                    event = %id
                );
                let events = [event];
                let acted = act(storage, consumer, &events).with_context(trace.clone());
                let acted = acted.instrument(span).await;
                if let Err(error) = &acted {
                    mark_failed(&trace, error);
                }
                match acted {
                    Ok(new) => break outcome(new.contains(&true)),
                    Err(error) => (error, id),
                }
            }
        };
        // One that comes again must not keep the others waiting again.
        let buried = storage.is_buried(consumer.name, id);
        if let Ok(Ok(true)) = tokio::time::timeout(LONGEST, buried).await {
            break "buried";
        }
        if !std::mem::replace(&mut is_told, true) {
            tracing::warn!(%error, %id, consumer = consumer.name, "an event is tried again until it is acted on");
        }
        count(consumer, "failed");
        // A database that is away comes back; what it refuses it may refuse for ever.
        failed += u32::from(matches!(error, StorageError::Failed(_)));
        if failed >= attempts {
            let why = error.to_string();
            // Others may send anything, and no database's text has a NUL.
            let event = delivery.event.replace('\0', "\u{fffd}");
            let bury = storage.bury(consumer.name, id, &event, &why);
            if let Ok(Ok(())) = tokio::time::timeout(LONGEST, bury).await {
                tracing::error!(%error, %id, consumer = consumer.name, "an event is put aside");
                break "buried";
            }
        }
        pause.wait().await;
    };
    count(consumer, outcome);
    delivery.done().await
}

/// The span of what a consumer does with an event, in the trace that the event was caused in.
fn trace(consumer: &Consumer, event: &Event) -> Context {
    let name = format!("{} {}", consumer.name, event.kind.as_str());
    traces::event(name, event.trace())
}

fn mark_failed(trace: &Context, error: &StorageError) {
    trace.span().set_status(Status::error(error.to_string()));
}

/// The id of something that has none: the same for the same text.
pub fn id_of(unreadable: &str) -> Uuid {
    let digest = Sha256::digest(unreadable);
    let mut id = [0; 16];
    id.copy_from_slice(&digest[..16]);
    Uuid::from_bytes(id)
}

/// Whether each was done now, not before; all or none of them.
async fn act(
    storage: &dyn Storage,
    consumer: &Consumer,
    events: &[Event],
) -> Result<Vec<bool>, StorageError> {
    let changes = events
        .iter()
        .map(|event| (event.id, (consumer.change)(event)));
    let changes: Vec<(Uuid, Change)> = changes.collect();
    let done = storage.consume(consumer.name, &changes);
    match tokio::time::timeout(LONGEST, done).await {
        Ok(done) => done,
        Err(_) => Err(StorageError::Busy(format!("no answer within {LONGEST:?}"))),
    }
}

/// Tries again what was put aside; how many events were acted on, and what still cannot be.
pub async fn replay(storage: &dyn Storage) -> Result<(usize, Vec<DeadLetter>), StorageError> {
    let (mut done, mut left) = (0, Vec::new());
    for letter in storage.buried(u32::MAX).await? {
        let consumer = CONSUMERS
            .iter()
            .find(|consumer| consumer.name == letter.consumer);
        let event = serde_json::from_str::<Event>(&letter.event);
        let (Some(consumer), Ok(event)) = (consumer, event) else {
            left.push(letter);
            continue;
        };
        match act(storage, consumer, &[event]).await {
            Ok(_) => {
                storage.unbury(consumer.name, letter.id).await?;
                done += 1;
            }
            Err(StorageError::Failed(error)) => left.push(DeadLetter { error, ..letter }),
            Err(error) => return Err(error),
        }
    }
    Ok((done, left))
}
