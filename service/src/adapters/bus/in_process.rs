//! The embedded adapter: consumers of the same process. It keeps nothing itself: an event counts as
//! handed over when all consumers are done with it, and until then it stays where it came from.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use async_trait::async_trait;
use tokio::sync::{broadcast, mpsc, oneshot};

use super::{Bus, BusError, Delivery, Receipt, Subscription};
use crate::domain::events::Event;

/// How many events may wait for a consumer.
const WAITING: usize = 256;

pub struct InProcess {
    /// So many consumers there are; before all have subscribed, nothing is handed over.
    expected: usize,
    consumers: Mutex<BTreeMap<&'static str, mpsc::Sender<Delivery>>>,
    listeners: broadcast::Sender<String>,
}

impl InProcess {
    pub fn new(expected: usize) -> Self {
        Self {
            expected,
            consumers: Mutex::default(),
            listeners: broadcast::Sender::new(WAITING),
        }
    }
}

struct Waiting(mpsc::Receiver<Delivery>);

struct Listening(broadcast::Receiver<String>);

#[async_trait]
impl Bus for InProcess {
    async fn publish(&self, events: &[Event]) -> Result<(), BusError> {
        let consumers: Vec<(&str, mpsc::Sender<Delivery>)> = {
            let consumers = self.consumers.lock();
            let consumers = consumers.unwrap_or_else(PoisonError::into_inner);
            consumers
                .iter()
                .map(|(name, sender)| (*name, sender.clone()))
                .collect()
        };
        if consumers.len() < self.expected {
            return Err(BusError("not every consumer has subscribed yet".to_owned()));
        }
        let (mut receipts, mut texts) = (Vec::new(), Vec::new());
        for event in events {
            let text = serde_json::to_string(event).map_err(|error| BusError(error.to_string()))?;
            for (name, consumer) in &consumers {
                let (receipt, done) = oneshot::channel();
                let delivery = Delivery {
                    event: text.clone(),
                    receipt: Receipt::InProcess(receipt),
                };
                let sent = consumer.send(delivery).await;
                sent.map_err(|_| BusError(format!("the consumer {name} has stopped")))?;
                receipts.push((*name, done));
            }
            texts.push(text);
        }
        for (name, done) in receipts {
            let gave_up = |_| BusError(format!("the consumer {name} has not done with it"));
            done.await.map_err(gave_up)?;
        }
        for text in texts {
            // Nobody has to listen.
            let _ = self.listeners.send(text);
        }
        Ok(())
    }

    async fn listen(&self) -> Result<Box<dyn Subscription>, BusError> {
        Ok(Box::new(Listening(self.listeners.subscribe())))
    }

    async fn subscribe(&self, consumer: &'static str) -> Result<Box<dyn Subscription>, BusError> {
        let (sender, receiver) = mpsc::channel(WAITING);
        let mut consumers = self
            .consumers
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        consumers.insert(consumer, sender);
        Ok(Box::new(Waiting(receiver)))
    }
}

#[async_trait]
impl Subscription for Waiting {
    async fn next(&mut self) -> Result<Delivery, BusError> {
        let next = self.0.recv().await;
        next.ok_or_else(|| BusError("another one consumes in this one's place".to_owned()))
    }

    fn ready(&mut self, limit: usize) -> Vec<Delivery> {
        std::iter::from_fn(|| self.0.try_recv().ok())
            .take(limit)
            .collect()
    }
}

#[async_trait]
impl Subscription for Listening {
    async fn next(&mut self) -> Result<Delivery, BusError> {
        let event = self.0.recv().await;
        Ok(Delivery {
            event: event.map_err(|error| BusError(error.to_string()))?,
            receipt: Receipt::None,
        })
    }

    fn ready(&mut self, _: usize) -> Vec<Delivery> {
        Vec::new()
    }
}
