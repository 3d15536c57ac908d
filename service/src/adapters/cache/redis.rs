//! The adapter for Redis, whose copies all processes share.

use std::time::Duration;

use async_trait::async_trait;
use redis::aio::ConnectionManager;
use redis::{AsyncCommands, ExistenceCheck, SetExpiry, SetOptions};

use super::{Cache, CacheError};
use crate::adapters::redis::Redis as Connection;
use crate::config::Redis as Config;

pub struct Redis {
    connection: Connection,
    prefix: String,
    ttl: SetExpiry,
}

impl Redis {
    pub fn new(config: &Config, ttl: Duration) -> anyhow::Result<Self> {
        let milliseconds = u64::try_from(ttl.as_millis()).unwrap_or(u64::MAX);
        Ok(Self {
            connection: Connection::new(config)?,
            prefix: config.prefix.clone(),
            ttl: SetExpiry::PX(milliseconds),
        })
    }

    async fn set(&self, key: &str, value: Vec<u8>, options: SetOptions) -> Result<(), CacheError> {
        let options = options.with_expiration(self.ttl);
        let name = self.name(key);
        let set = async |mut connection: ConnectionManager| {
            connection.set_options(name, value, options).await
        };
        // With NX the answer is nil where there is a value already.
        let _: Option<String> = self.connection.call(set).await?;
        Ok(())
    }

    fn name(&self, key: &str) -> String {
        format!("{}{key}", self.prefix)
    }
}

#[async_trait]
impl Cache for Redis {
    async fn get(&self, key: &str) -> Result<Option<Vec<u8>>, CacheError> {
        let name = self.name(key);
        let get = async |mut connection: ConnectionManager| connection.get(name).await;
        Ok(self.connection.call(get).await?)
    }

    async fn fill(&self, key: &str, value: Vec<u8>) -> Result<(), CacheError> {
        let only_new = SetOptions::default().conditional_set(ExistenceCheck::NX);
        self.set(key, value, only_new).await
    }

    async fn put(&self, key: &str, value: Vec<u8>) -> Result<(), CacheError> {
        self.set(key, value, SetOptions::default()).await
    }
}

impl From<redis::RedisError> for CacheError {
    fn from(error: redis::RedisError) -> Self {
        Self(error.to_string())
    }
}
