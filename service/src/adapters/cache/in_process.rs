//! The embedded adapter: this process' own memory, with TinyLFU admission.

use std::time::Duration;

use async_trait::async_trait;
use moka::future::Cache as Entries;

use super::{Cache, CacheError};

pub struct InProcess(Entries<String, Vec<u8>>);

impl InProcess {
    pub fn new(capacity: u64, ttl: Duration) -> Self {
        let entries = Entries::builder().max_capacity(capacity);
        Self(entries.time_to_live(ttl).build())
    }
}

#[async_trait]
impl Cache for InProcess {
    async fn get(&self, key: &str) -> Result<Option<Vec<u8>>, CacheError> {
        Ok(self.0.get(key).await)
    }

    async fn fill(&self, key: &str, value: Vec<u8>) -> Result<(), CacheError> {
        self.0.entry_by_ref(key).or_insert(value).await;
        Ok(())
    }

    async fn put(&self, key: &str, value: Vec<u8>) -> Result<(), CacheError> {
        self.0.insert(key.to_owned(), value).await;
        Ok(())
    }

    fn entries(&self) -> Option<u64> {
        Some(self.0.entry_count())
    }
}
