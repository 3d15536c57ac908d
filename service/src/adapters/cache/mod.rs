//! Copies of orders that are read again and again: one trait, chosen by `cache.kind`. Whatever goes
//! wrong with it, orders are still read from storage.

mod in_process;
mod redis;

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;

use crate::breaker::Breaker;
use crate::config::{CacheKind, Config};
use crate::domain::orders::{Order, OrderId};
use crate::keyring::Keyring;
use crate::metrics::METRICS;

/// Values that are forgotten after a time, or sooner.
#[async_trait]
pub trait Cache: Send + Sync {
    async fn get(&self, key: &str) -> Result<Option<Vec<u8>>, CacheError>;
    /// Keeps a value where there is none.
    async fn fill(&self, key: &str, value: Vec<u8>) -> Result<(), CacheError>;
    /// Keeps a value in the place of any other.
    async fn put(&self, key: &str, value: Vec<u8>) -> Result<(), CacheError>;
    /// How many values it has, where that is this process' own business.
    fn entries(&self) -> Option<u64> {
        None
    }
}

#[derive(Debug, thiserror::Error)]
#[error("the cache: {0}")]
pub struct CacheError(String);

/// The adapter that the configuration names; it connects when it is used.
pub fn open(config: &Config) -> anyhow::Result<Option<Arc<dyn Cache>>> {
    let (cache, ttl) = (&config.cache, config.cache.ttl.0);
    Ok(match cache.kind {
        CacheKind::Off => None,
        CacheKind::InProcess => {
            let capacity = u64::from(cache.capacity.get());
            Some(Arc::new(in_process::InProcess::new(capacity, ttl)))
        }
        CacheKind::Redis => Some(Arc::new(redis::Redis::new(&config.redis, ttl)?)),
    })
}

/// Orders by their ids.
pub struct Orders {
    cache: Option<Arc<dyn Cache>>,
    breaker: Breaker,
    limit: Duration,
    /// For copies that leave the process.
    keyring: Option<Keyring>,
}

impl Orders {
    pub fn open(config: &Config) -> anyhow::Result<Self> {
        Ok(Self {
            cache: open(config)?,
            breaker: Breaker::new("cache", &config.circuit_breaker),
            limit: config.cache.timeout.0,
            keyring: match config.cache.kind {
                CacheKind::Redis => config.database.encryption_keys.clone(),
                CacheKind::InProcess | CacheKind::Off => None,
            },
        })
    }

    /// See [`Cache::entries`].
    pub fn entries(&self) -> Option<u64> {
        self.cache.as_ref()?.entries()
    }

    pub async fn get(&self, id: OrderId) -> Option<Order> {
        let cache = self.cache.as_ref()?;
        let key = key(id);
        let found = self.ask(cache.get(&key)).await?;
        // What another version has written may have another shape.
        let order = found.and_then(|bytes| self.order(&key, bytes));
        count(if order.is_some() { "hit" } else { "miss" });
        order
    }

    /// An order as storage had it; perhaps somebody has changed it since.
    pub async fn fill(&self, order: &Order) {
        let key = key(order.id);
        if let (Some(cache), Some(bytes)) = (&self.cache, self.bytes(&key, order)) {
            self.ask(cache.fill(&key, bytes)).await;
        }
    }

    /// An order as it is now that it was changed.
    pub async fn put(&self, order: &Order) {
        let key = key(order.id);
        if let (Some(cache), Some(bytes)) = (&self.cache, self.bytes(&key, order)) {
            self.ask(cache.put(&key, bytes)).await;
        }
    }

    fn bytes(&self, key: &str, order: &Order) -> Option<Vec<u8>> {
        let bytes = serde_json::to_vec(order).ok()?;
        match &self.keyring {
            None => Some(bytes),
            Some(keyring) => keyring.encrypt(key, &bytes).ok(),
        }
    }

    fn order(&self, key: &str, bytes: Vec<u8>) -> Option<Order> {
        let bytes = match &self.keyring {
            None => bytes,
            Some(keyring) => keyring.decrypt(key, &bytes).ok()?,
        };
        serde_json::from_slice(&bytes).ok()
    }

    async fn ask<T>(&self, work: impl Future<Output = Result<T, CacheError>>) -> Option<T> {
        match self.breaker.call(self.limit, work).await {
            Ok(answer) => Some(answer),
            Err(error) => {
                tracing::debug!(%error, "the cache was of no use");
                count("error");
                None
            }
        }
    }
}

fn count(outcome: &'static str) {
    METRICS
        .cache_requests
        .get_or_create(&[("outcome", outcome)])
        .inc();
}

fn key(id: OrderId) -> String {
    format!("order:{id}")
}
