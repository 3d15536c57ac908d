//! The adapter for Kafka: one topic, where an order's events are in one partition and so keep their
//! order, and for each consumer a group, whose offsets are committed as far as it is done.
//! <https://kafka.apache.org/documentation/#semantics>

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use krafka::admin::{AdminClient, NewTopic};
use krafka::auth::{AuthConfig, TlsConfig};
use krafka::consumer::{
    AutoOffsetReset, Consumer, ConsumerBuilder, ConsumerRecord, OffsetAndMetadata, TopicPartition,
};
use krafka::error::KrafkaError;
use krafka::producer::{Acks, Producer, ProducerRecord};
use tokio::sync::Mutex;

use super::{Bus, BusError, Delivery, Receipt, Subscription};
use crate::config::{Kafka as Config, Mechanism};
use crate::domain::events::Event;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Then an event counts as not handed over; whoever does so tries again.
const DELIVERY_TIMEOUT: Duration = Duration::from_secs(10);
/// A member of a group that was killed is replaced after this: the least that brokers allow.
const SESSION_TIMEOUT: Duration = Duration::from_secs(6);
const HEARTBEAT: Duration = Duration::from_secs(2);
const POLL: Duration = Duration::from_secs(1);
/// How long what is done may wait until it is committed. What is done and not committed comes again
/// after a crash, and is known by then.
const COMMIT_AFTER: Duration = Duration::from_millis(100);

pub struct Kafka {
    config: Config,
    producer: Mutex<Option<Producer>>,
}

/// A member of a consumer's group, and what it has fetched.
struct Member {
    consumer: Arc<Consumer>,
    fetched: VecDeque<ConsumerRecord>,
    done: Option<Arc<Done>>,
}

/// How far a consumer is done in each partition.
pub struct Done {
    consumer: Arc<Consumer>,
    topic: String,
    state: Mutex<State>,
}

struct State {
    /// The offset of the next event to be done, by partition, where that is not committed yet.
    next: BTreeMap<i32, i64>,
    committed: Instant,
}

/// An event's place.
pub struct Place {
    done: Arc<Done>,
    partition: i32,
    offset: i64,
}

impl Kafka {
    pub fn new(config: &Config) -> Self {
        Self {
            config: config.clone(),
            producer: Mutex::default(),
        }
    }

    async fn connect(&self) -> Result<Producer, BusError> {
        self.make_topic().await?;
        Ok(Producer::builder()
            .bootstrap_servers(&self.config.bootstrap_servers)
            .auth(self.auth()?)
            .client_id(env!("CARGO_PKG_NAME"))
            .acks(Acks::All)
            .idempotent(true)
            .connect_timeout(CONNECT_TIMEOUT)
            .request_timeout(CONNECT_TIMEOUT)
            .delivery_timeout(DELIVERY_TIMEOUT)
            .max_block(DELIVERY_TIMEOUT)
            .linger(Duration::ZERO)
            .build()
            .await?)
    }

    /// Makes the topic, unless it is there.
    async fn make_topic(&self) -> Result<(), BusError> {
        let Config {
            topic, partitions, ..
        } = &self.config;
        let admin = AdminClient::builder()
            .bootstrap_servers(&self.config.bootstrap_servers)
            .auth(self.auth()?)
            .connect_timeout(CONNECT_TIMEOUT)
            .request_timeout(CONNECT_TIMEOUT)
            .build()
            .await?;
        if admin.partition_count(topic).await.ok().flatten().is_none() {
            let partitions = i32::from(partitions.get());
            let replicas = i16::try_from(self.config.replicas.get()).unwrap_or(i16::MAX);
            let new = NewTopic::new(topic, partitions, replicas)?;
            for made in admin
                .create_topics(vec![new], CONNECT_TIMEOUT, false)
                .await?
            {
                // Another process was quicker, or it cannot be made.
                if let Some(error) = made.error
                    && admin.partition_count(topic).await?.is_none()
                {
                    return Err(BusError(format!("making the topic {topic}: {error}")));
                }
            }
        }
        let _ = admin.close().await;
        Ok(())
    }

    fn consumer(&self) -> Result<ConsumerBuilder, BusError> {
        Ok(Consumer::builder()
            .bootstrap_servers(&self.config.bootstrap_servers)
            .auth(self.auth()?)
            .client_id(env!("CARGO_PKG_NAME"))
            .connect_timeout(CONNECT_TIMEOUT)
            .enable_auto_commit(false))
    }

    /// How it shows the brokers who it is, and they it.
    fn auth(&self) -> Result<AuthConfig, BusError> {
        let config = &self.config;
        let auth = match (&config.user, &config.password, config.mechanism) {
            (Some(user), Some(password), Mechanism::Plain) => {
                AuthConfig::sasl_plain(user, password.expose())?
            }
            (Some(user), Some(password), Mechanism::ScramSha256) => {
                AuthConfig::sasl_scram_sha256(user, password.expose())
            }
            (Some(user), Some(password), Mechanism::ScramSha512) => {
                AuthConfig::sasl_scram_sha512(user, password.expose())
            }
            _ => AuthConfig::plaintext(),
        };
        if !config.tls {
            return Ok(auth);
        }
        let tls = TlsConfig::new();
        // Apache Kafka knows no channel binding, and refuses whoever asks for it (KIP-84).
        let auth = auth.with_scram_channel_binding(false);
        Ok(auth.with_tls(match &config.ca {
            Some(ca) => tls.with_ca_cert(ca.to_string_lossy()),
            None => tls,
        }))
    }
}

#[async_trait]
impl Bus for Kafka {
    async fn publish(&self, events: &[Event]) -> Result<(), BusError> {
        if events.is_empty() {
            return Ok(());
        }
        let mut slot = self.producer.lock().await;
        // One that has failed, or was left in the middle, is not used again.
        let producer = match slot.take() {
            Some(producer) => producer,
            None => self.connect().await?,
        };
        let mut handles = Vec::new();
        for event in events {
            let value = serde_json::to_vec(event).map_err(|error| BusError(error.to_string()))?;
            let mut record = ProducerRecord::new(&self.config.topic, value);
            record.key = Some(event.subject.to_string().into_bytes().into());
            handles.push(producer.enqueue(record).await?);
        }
        for handle in handles {
            let _placed = handle.await?;
        }
        *slot = Some(producer);
        Ok(())
    }

    async fn subscribe(&self, consumer: &'static str) -> Result<Box<dyn Subscription>, BusError> {
        self.make_topic().await?;
        let topic = &self.config.topic;
        let member = self
            .consumer()?
            .group_id(format!("{topic}.{consumer}"))
            .auto_offset_reset(AutoOffsetReset::Earliest)
            .session_timeout(SESSION_TIMEOUT)
            .heartbeat_interval(HEARTBEAT)
            .build()
            .await?;
        member.subscribe(&[topic]).await?;
        let member = Arc::new(member);
        let done = Done {
            consumer: Arc::clone(&member),
            topic: topic.clone(),
            state: Mutex::new(State {
                next: BTreeMap::new(),
                committed: Instant::now(),
            }),
        };
        Ok(Box::new(Member {
            consumer: member,
            fetched: VecDeque::new(),
            done: Some(Arc::new(done)),
        }))
    }

    async fn listen(&self) -> Result<Box<dyn Subscription>, BusError> {
        self.make_topic().await?;
        let topic = &self.config.topic;
        // In no group: it has all partitions, and keeps nothing.
        let consumer = self
            .consumer()?
            .auto_offset_reset(AutoOffsetReset::Latest)
            .build()
            .await?;
        let found = consumer.fetch_metadata(Some(topic)).await?.topics;
        let partitions: Vec<i32> = found
            .iter()
            .flat_map(|topic| topic.partitions.keys().copied())
            .collect();
        consumer.assign(topic, partitions.clone()).await?;
        for partition in partitions {
            consumer.seek_to_end(topic, partition).await?;
        }
        Ok(Box::new(Member {
            consumer: Arc::new(consumer),
            fetched: VecDeque::new(),
            done: None,
        }))
    }
}

impl Member {
    fn fetched(&mut self) -> Option<Delivery> {
        let record = self.fetched.pop_front()?;
        let receipt = self.done.as_ref().map(|done| {
            Receipt::Kafka(Place {
                done: Arc::clone(done),
                partition: record.partition,
                offset: record.offset,
            })
        });
        Some(Delivery {
            event: String::from_utf8_lossy(&record.value.unwrap_or_default()).into_owned(),
            receipt: receipt.unwrap_or(Receipt::None),
        })
    }
}

#[async_trait]
impl Subscription for Member {
    async fn next(&mut self) -> Result<Delivery, BusError> {
        loop {
            if let Some(delivery) = self.fetched() {
                return Ok(delivery);
            }
            // Before it waits, perhaps for long.
            if let Some(done) = &self.done {
                done.commit().await?;
            }
            self.fetched = self.consumer.poll(POLL).await?.into();
        }
    }

    fn ready(&mut self, limit: usize) -> Vec<Delivery> {
        std::iter::from_fn(|| self.fetched()).take(limit).collect()
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        // Others take its partitions at once when it says that it leaves.
        let consumer = Arc::clone(&self.consumer);
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            runtime.spawn(async move { consumer.close().await });
        }
    }
}

impl Done {
    async fn commit(&self) -> Result<(), BusError> {
        let mut state = self.state.lock().await;
        self.commit_locked(&mut state).await
    }

    async fn commit_locked(&self, state: &mut State) -> Result<(), BusError> {
        if !state.next.is_empty() {
            let offsets = state.next.iter().map(|(partition, offset)| {
                let place = TopicPartition::new(&self.topic, *partition);
                (place, OffsetAndMetadata::new(*offset))
            });
            self.consumer
                .commit_with_metadata(offsets.collect())
                .await?;
            state.next.clear();
        }
        state.committed = Instant::now();
        Ok(())
    }
}

impl Place {
    pub async fn done(self) -> Result<(), BusError> {
        let mut state = self.done.state.lock().await;
        state.next.insert(self.partition, self.offset + 1);
        match state.committed.elapsed() > COMMIT_AFTER {
            true => self.done.commit_locked(&mut state).await,
            false => Ok(()),
        }
    }
}

impl From<KrafkaError> for BusError {
    fn from(error: KrafkaError) -> Self {
        Self(error.to_string())
    }
}
