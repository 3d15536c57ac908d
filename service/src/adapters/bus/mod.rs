//! How events get from those who tell them to those who act on them: one trait, chosen by
//! `events.bus`.

mod in_process;
mod kafka;
mod rabbitmq;

use std::sync::Arc;

use async_trait::async_trait;
use tokio::sync::oneshot;

use crate::config::{BusKind, Config};
use crate::consumers::CONSUMERS;
use crate::domain::events::Event;

/// Every consumer gets every event at least once, and those of one order in their order.
#[async_trait]
pub trait Bus: Send + Sync {
    /// Hands events over. `Ok` means that none of them is lost any more, whoever is killed.
    async fn publish(&self, events: &[Event]) -> Result<(), BusError>;

    /// What a consumer is to do, from the first event that it is not done with; perhaps some that it
    /// was done with a moment ago come again.
    async fn subscribe(&self, consumer: &'static str) -> Result<Box<dyn Subscription>, BusError>;

    /// Every event from now on, for this process alone: none is kept for it, and none is to be done.
    async fn listen(&self) -> Result<Box<dyn Subscription>, BusError>;
}

#[async_trait]
pub trait Subscription: Send {
    /// The next event; it waits for one.
    async fn next(&mut self) -> Result<Delivery, BusError>;

    /// The events after it that are here already, `limit` at most.
    fn ready(&mut self, limit: usize) -> Vec<Delivery>;
}

/// An event that comes again unless it is said to be done.
pub struct Delivery {
    /// As it came: JSON.
    pub event: String,
    receipt: Receipt,
}

enum Receipt {
    /// Nobody waits for it.
    None,
    InProcess(oneshot::Sender<()>),
    RabbitMq(Box<lapin::message::Delivery>),
    Kafka(kafka::Place),
}

/// Why the bus could not do it; it is tried again.
#[derive(Debug, thiserror::Error)]
#[error("the bus: {0}")]
pub struct BusError(String);

/// The adapter that the configuration names; it connects when it is used.
pub fn open(config: &Config) -> Arc<dyn Bus> {
    match config.events.bus {
        BusKind::InProcess => Arc::new(in_process::InProcess::new(CONSUMERS.len())),
        BusKind::Kafka => Arc::new(kafka::Kafka::new(&config.kafka)),
        BusKind::RabbitMq => {
            let consumers = CONSUMERS.iter().map(|consumer| consumer.name);
            Arc::new(rabbitmq::RabbitMq::new(
                &config.rabbitmq,
                consumers.collect(),
            ))
        }
    }
}

impl Delivery {
    /// The consumer is done with it.
    pub async fn done(self) -> Result<(), BusError> {
        match self.receipt {
            Receipt::None => Ok(()),
            Receipt::Kafka(place) => place.done().await,
            Receipt::InProcess(receipt) => receipt
                .send(())
                .map_err(|()| BusError("nobody waits for it any more".to_owned())),
            Receipt::RabbitMq(delivery) => rabbitmq::done(*delivery, false).await,
        }
    }
}

/// The consumer is done with all of these, which came one after another, and with all before them.
pub async fn done(deliveries: Vec<Delivery>) -> Result<(), BusError> {
    let mut last = None;
    for delivery in deliveries {
        match delivery.receipt {
            Receipt::RabbitMq(delivery) => last = Some(delivery),
            _ => delivery.done().await?,
        }
    }
    match last {
        // The broker hears it of the last one, and means the others too.
        Some(last) => rabbitmq::done(*last, true).await,
        None => Ok(()),
    }
}
