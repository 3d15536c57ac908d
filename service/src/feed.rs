//! What happens to orders, live, for whoever is connected to this process. Nothing is kept for those
//! who come later or read too slowly: the orders themselves have what they missed.

use std::sync::Arc;
use std::time::Duration;

use futures_util::{Stream, StreamExt};
use tokio::sync::broadcast;
use tokio_stream::wrappers::BroadcastStream;

use crate::app::App;
use crate::domain::events::{Event, Kind};
use crate::pause::Pause;

/// The first pause after a failure.
const PAUSE: Duration = Duration::from_millis(50);

/// Nothing stands for events that this process has missed.
pub struct Feed(broadcast::Sender<Option<Arc<Event>>>);

/// A reader would miss events: it is more than [`Feed`]'s capacity behind, or the process has missed some.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("events were lost, or came faster than they were read")]
pub struct TooSlow;

impl Feed {
    /// `capacity` events may wait for the slowest reader.
    pub fn new(capacity: usize) -> Self {
        Self(broadcast::Sender::new(capacity))
    }

    /// Events from now on: of one customer, or all.
    pub fn events(
        &self,
        customer: Option<String>,
    ) -> impl Stream<Item = Result<Arc<Event>, TooSlow>> + Send + Unpin + use<> {
        let events = BroadcastStream::new(self.0.subscribe());
        events.filter_map(move |event| {
            let wanted = match event {
                Err(_) | Ok(None) => Some(Err(TooSlow)),
                Ok(Some(event)) => {
                    let customer = customer.as_ref();
                    customer
                        .is_none_or(|customer| *customer == event.data.customer)
                        .then_some(Ok(event))
                }
            };
            std::future::ready(wanted)
        })
    }
}

/// Passes on what the bus tells, until it is cancelled.
pub async fn run(app: Arc<App>) {
    let mut pause = Pause::new(PAUSE);
    let mut has_missed = false;
    loop {
        let listen = async {
            let mut subscription = app.bus().listen().await?;
            if has_missed {
                // And for whoever has come since.
                let _ = app.feed.0.send(None);
            }
            loop {
                let delivery = subscription.next().await?;
                pause.reset();
                match serde_json::from_str::<Event>(&delivery.event) {
                    Ok(event) => {
                        let event = Arc::new(event);
                        // Nobody may be connected.
                        let _ = app.feed.0.send(Some(Arc::clone(&event)));
                        if event.kind == Kind::Cancelled {
                            app.changed(event.subject).await;
                        }
                    }
                    Err(error) => tracing::warn!(%error, "an event cannot be read"),
                }
            }
        };
        let Err::<std::convert::Infallible, crate::adapters::bus::BusError>(error) = listen.await;
        tracing::warn!(%error, "listening to events failed");
        let _ = app.feed.0.send(None);
        has_missed = true;
        pause.wait().await;
    }
}
