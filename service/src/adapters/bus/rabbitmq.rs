//! The adapter for RabbitMQ: one topic exchange, and for each consumer a quorum queue that keeps its
//! events until they are done. One process consumes a queue at a time, so that the order stays.
//! <https://www.rabbitmq.com/docs/confirms>, <https://www.rabbitmq.com/docs/consumers#single-active-consumer>

mod network;

use std::collections::HashMap;
use std::fmt::Display;
use std::str::FromStr;
use std::sync::PoisonError;
use std::time::Duration;

use async_trait::async_trait;
use futures_util::{FutureExt, StreamExt};
use lapin::options::{
    BasicAckOptions, BasicConsumeOptions, BasicPublishOptions, BasicQosOptions,
    ConfirmSelectOptions, ExchangeDeclareOptions, QueueBindOptions, QueueDeclareOptions,
};
use lapin::types::{AMQPValue, FieldTable, ShortString};
use lapin::uri::AMQPUri;
use lapin::{
    BasicProperties, Channel, Confirmation, Connection, Consumer, ErrorKind, ExchangeKind,
};
use tokio::sync::Mutex;

use super::{Bus, BusError, Delivery, Receipt, Subscription};
use crate::config::RabbitMq as Config;
use crate::domain::events::Event;

/// For the broker's answers. A connection that breaks in the middle of a call may leave the call without
/// an end.
const TIMEOUT: Duration = Duration::from_secs(5);
/// Seconds, unless the address says otherwise (`?heartbeat=`). A lost consumer is replaced after two or
/// three; the broker would propose 60.
const HEARTBEAT: u16 = 5;
/// AMQP's delivery mode for messages that outlive a restart of the broker.
const PERSISTENT: u8 = 2;
/// How often a message may come back, such as from consumers that crash, before the broker drops it: it is
/// done or put aside in the end. From 4.0 on the default is 20, and -1 is no limit; 3 would drop with -1
/// what comes back once. A policy with a lower limit wins.
/// <https://www.rabbitmq.com/docs/quorum-queues#poison-message-handling>
const DELIVERY_LIMIT: i32 = i32::MAX;
/// AMQP's code for the end of a channel that is not needed any more.
const REPLY_SUCCESS: u16 = 200;
/// AMQP's reply where a queue is there, and was made with other arguments.
const PRECONDITION_FAILED: u16 = 406;
/// Of all orders.
const EVERYTHING: &str = "order.#";

pub struct RabbitMq {
    config: Config,
    /// Who must have a queue before anything is published.
    consumers: Vec<&'static str>,
    /// Whose queues they were found to be.
    queues: std::sync::Mutex<HashMap<ShortString, Made>>,
    /// What events are published on, until it breaks.
    publisher: Mutex<Option<Line>>,
}

/// A queue that is there keeps what it was made with.
#[derive(Clone, Copy)]
enum Made {
    /// As this release makes them.
    Here,
    /// Without the limit, by an older release.
    Before,
}

/// A channel, and the connection that it ends with.
struct Line {
    channel: Channel,
    connection: Connection,
}

struct Queue {
    consumer: Consumer,
    /// Whether what it has delivered must be said to be done.
    kept: bool,
    _line: Line,
}

impl RabbitMq {
    pub fn new(config: &Config, consumers: Vec<&'static str>) -> Self {
        Self {
            config: config.clone(),
            consumers,
            queues: std::sync::Mutex::default(),
            publisher: Mutex::default(),
        }
    }

    async fn connect(&self) -> Result<Line, BusError> {
        let mut uri = AMQPUri::from_str(&self.config.url.0)
            .map_err(|error| BusError(format!("rabbitmq.url = {}: {error}", self.config.url)))?;
        uri.query.heartbeat.get_or_insert(HEARTBEAT);
        let connect = async {
            let connection = network::connect(uri, self.config.ca.as_deref()).await?;
            let channel = connection.create_channel().await?;
            let options = ExchangeDeclareOptions {
                durable: true,
                ..ExchangeDeclareOptions::default()
            };
            let (exchange, kind) = (self.exchange(), ExchangeKind::Topic);
            let none = FieldTable::default();
            channel
                .exchange_declare(exchange, kind, options, none)
                .await?;
            anyhow::Ok(Line {
                channel,
                connection,
            })
        };
        let connecting = |error| BusError(format!("connecting to {}: {error:#}", self.config.url));
        within_time(&self.config.url, async {
            connect.await.map_err(connecting)
        })
        .await
    }

    fn exchange(&self) -> ShortString {
        self.config.exchange.as_str().into()
    }

    /// Publishes all, then waits until the broker has taken all.
    async fn send(&self, channel: &Channel, events: &[Event]) -> Result<(), BusError> {
        let mut confirmations = Vec::new();
        for event in events {
            let body = serde_json::to_vec(event).map_err(|error| BusError(error.to_string()))?;
            let options = BasicPublishOptions {
                // What no queue takes comes back: no consumer has been there yet.
                mandatory: true,
                ..BasicPublishOptions::default()
            };
            let properties = BasicProperties::default()
                .with_delivery_mode(PERSISTENT)
                .with_content_type("application/cloudevents+json".into())
                .with_message_id(event.id.to_string().into());
            let key = event.kind.as_str().into();
            let sent = channel.basic_publish(self.exchange(), key, options, &body, properties);
            confirmations.push(sent.await?);
        }
        for confirmation in confirmations {
            match confirmation.await? {
                Confirmation::Ack(None) => {}
                Confirmation::Ack(Some(_)) => {
                    return Err(BusError("no consumer has a queue yet".to_owned()));
                }
                refused => return Err(BusError(format!("an event was refused: {refused:?}"))),
            }
        }
        Ok(())
    }
}

#[async_trait]
impl Bus for RabbitMq {
    async fn publish(&self, events: &[Event]) -> Result<(), BusError> {
        if events.is_empty() {
            return Ok(());
        }
        let mut publisher = self.publisher.lock().await;
        // Whoever is cancelled in the middle leaves a line behind that nobody knows the state of.
        let line = match publisher.take() {
            Some(line) if line.channel.status().connected() => line,
            _ => {
                let line = self.connect().await?;
                let confirm = ConfirmSelectOptions::default();
                line.channel.confirm_select(confirm).await?;
                line
            }
        };
        // An event that anybody has a queue for does not come back, so each must have one, even where
        // somebody has tidied up meanwhile.
        for consumer in &self.consumers {
            self.make_queue(&line, consumer).await?;
        }
        self.send(&line.channel, events).await?;
        *publisher = Some(line);
        Ok(())
    }

    async fn subscribe(&self, consumer: &'static str) -> Result<Box<dyn Subscription>, BusError> {
        within_time(&self.config.url, self.open_queue(consumer)).await
    }

    async fn listen(&self) -> Result<Box<dyn Subscription>, BusError> {
        within_time(&self.config.url, self.open_own_queue()).await
    }
}

impl RabbitMq {
    /// Makes a consumer's queue, unless it is there; its name.
    async fn make_queue(&self, line: &Line, consumer: &str) -> Result<ShortString, BusError> {
        let queue = ShortString::from(format!("{}.{consumer}", self.config.exchange));
        let options = QueueDeclareOptions {
            // Where an older one is gone by now, none is made like it.
            passive: matches!(self.made(&line.connection, &queue).await?, Made::Before),
            ..QueueDeclareOptions::durable()
        };
        let channel = &line.channel;
        let declared = channel.queue_declare(queue.clone(), options, arguments());
        if let Err(error) = declared.await {
            // It may be another one than it was, which the next attempt finds out.
            self.queues().remove(&queue);
            return Err(error.into());
        }
        let none = FieldTable::default();
        let bind = QueueBindOptions::default();
        let (exchange, key) = (self.exchange(), EVERYTHING.into());
        channel
            .queue_bind(queue.clone(), exchange, key, bind, none)
            .await?;
        Ok(queue)
    }

    /// Finds out whose queue it is, and makes one where none is: on channels of its own, as the broker closes
    /// those on which it refuses.
    async fn made(&self, connection: &Connection, queue: &ShortString) -> Result<Made, BusError> {
        if let Some(made) = self.queues().get(queue) {
            return Ok(*made);
        }
        let mut made = Made::Here;
        if let Err(refused) = declare(connection, queue, arguments()).await {
            let is_other = matches!(
                refused.kind(),
                ErrorKind::ProtocolError(reply) if reply.get_id() == PRECONDITION_FAILED
            );
            if !is_other || declare(connection, queue, older_arguments()).await.is_err() {
                return Err(refused.into());
            }
            tracing::warn!(
                %queue,
                "the queue was made without a delivery-limit: from RabbitMQ 4.0 on it drops what comes \
                 back 20 times, unless a policy sets a higher one"
            );
            made = Made::Before;
        }
        self.queues().insert(queue.clone(), made);
        Ok(made)
    }

    fn queues(&self) -> std::sync::MutexGuard<'_, HashMap<ShortString, Made>> {
        self.queues.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn open_queue(&self, consumer: &str) -> Result<Box<dyn Subscription>, BusError> {
        let line = self.connect().await?;
        let channel = &line.channel;
        let queue = self.make_queue(&line, consumer).await?;
        let prefetch = BasicQosOptions::default();
        channel
            .basic_qos(self.config.prefetch.get(), prefetch)
            .await?;
        let options = BasicConsumeOptions::default();
        // The broker gives the consumer a tag of its own.
        let consumer = channel
            .basic_consume(queue, "".into(), options, FieldTable::default())
            .await?;
        Ok(Box::new(Queue {
            consumer,
            kept: true,
            _line: line,
        }))
    }

    async fn open_own_queue(&self) -> Result<Box<dyn Subscription>, BusError> {
        let line = self.connect().await?;
        let channel = &line.channel;
        // Nobody else's, and gone with the connection.
        let own = QueueDeclareOptions {
            exclusive: true,
            auto_delete: true,
            ..QueueDeclareOptions::default()
        };
        let none = FieldTable::default;
        let queue = channel.queue_declare("".into(), own, none()).await?;
        let (exchange, key, bind) = (
            self.exchange(),
            EVERYTHING.into(),
            QueueBindOptions::default(),
        );
        channel
            .queue_bind(queue.name().clone(), exchange, key, bind, none())
            .await?;
        let options = BasicConsumeOptions {
            no_ack: true,
            ..BasicConsumeOptions::default()
        };
        let consumer = channel
            .basic_consume(queue.name().clone(), "".into(), options, none())
            .await?;
        Ok(Box::new(Queue {
            consumer,
            kept: false,
            _line: line,
        }))
    }
}

fn arguments() -> FieldTable {
    let mut arguments = older_arguments();
    let limit = AMQPValue::LongInt(DELIVERY_LIMIT);
    arguments.insert("x-delivery-limit".into(), limit);
    arguments
}

fn older_arguments() -> FieldTable {
    let mut arguments = FieldTable::default();
    let quorum = AMQPValue::LongString("quorum".into());
    arguments.insert("x-queue-type".into(), quorum);
    arguments.insert("x-single-active-consumer".into(), AMQPValue::Boolean(true));
    arguments
}

async fn declare(
    connection: &Connection,
    queue: &ShortString,
    arguments: FieldTable,
) -> Result<(), lapin::Error> {
    let channel = connection.create_channel().await?;
    let durable = QueueDeclareOptions::durable();
    channel
        .queue_declare(queue.clone(), durable, arguments)
        .await?;
    channel.close(REPLY_SUCCESS, "".into()).await
}

/// The consumer is done with what was delivered, and perhaps with all that was before it.
pub(super) async fn done(
    delivery: lapin::message::Delivery,
    multiple: bool,
) -> Result<(), BusError> {
    let ack = delivery.ack(BasicAckOptions { multiple });
    within_time("RabbitMQ", async { Ok(ack.await.map(drop)?) }).await
}

async fn within_time<T>(
    broker: impl Display,
    call: impl Future<Output = Result<T, BusError>>,
) -> Result<T, BusError> {
    let answer = tokio::time::timeout(TIMEOUT, call).await;
    answer.unwrap_or_else(|_| {
        Err(BusError(format!(
            "{broker} did not answer within {TIMEOUT:?}"
        )))
    })
}

impl Queue {
    fn delivery(&self, delivery: lapin::message::Delivery) -> Delivery {
        Delivery {
            event: String::from_utf8_lossy(&delivery.data).into_owned(),
            receipt: match self.kept {
                true => Receipt::RabbitMq(Box::new(delivery)),
                false => Receipt::None,
            },
        }
    }
}

#[async_trait]
impl Subscription for Queue {
    async fn next(&mut self) -> Result<Delivery, BusError> {
        let closed = || BusError("the queue was closed".to_owned());
        let delivery = self.consumer.next().await.ok_or_else(closed)??;
        Ok(self.delivery(delivery))
    }

    fn ready(&mut self, limit: usize) -> Vec<Delivery> {
        let mut ready = Vec::new();
        while ready.len() < limit
            // An error is found again when the next one is waited for.
            && let Some(Some(Ok(delivery))) = self.consumer.next().now_or_never()
        {
            ready.push(self.delivery(delivery));
        }
        ready
    }
}

impl From<lapin::Error> for BusError {
    fn from(error: lapin::Error) -> Self {
        Self(error.to_string())
    }
}
