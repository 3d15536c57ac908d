//! What the adapters for Redis have in common.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Context;
use redis::aio::{ConnectionManager, ConnectionManagerConfig};
use redis::{Client, RedisResult, TlsCertificates};

use crate::config::Redis as Config;

/// Whoever calls decides about trying again.
const TRIES: usize = 1;
/// Who waits no more after less has another reason.
const SILENT_AFTER: Duration = Duration::from_millis(10);

/// A connection that is made when it is used first, and again when it has broken or says nothing any
/// more.
pub struct Redis {
    client: Client,
    connection_timeout: Duration,
    /// And when it was made.
    current: Mutex<(ConnectionManager, Instant)>,
}

impl Redis {
    pub fn new(config: &Config) -> anyhow::Result<Self> {
        let url = || format!("redis.url = {}", config.url);
        let address = config.url.0.as_str();
        let client = match &config.ca {
            None => Client::open(address),
            Some(file) => {
                let ca = std::fs::read(file);
                let ca = ca.with_context(|| format!("redis.ca = {}", file.display()))?;
                let certificates = TlsCertificates {
                    client_tls: None,
                    root_cert: Some(ca),
                };
                Client::build_with_tls(address, certificates)
            }
        };
        let client = client.with_context(url)?;
        let connection_timeout = config.connection_timeout.0;
        let current = connect(&client, connection_timeout).with_context(url)?;
        Ok(Self {
            client,
            connection_timeout,
            current: Mutex::new((current, Instant::now())),
        })
    }

    /// What the server says to a call.
    pub async fn call<T, F>(&self, call: impl FnOnce(ConnectionManager) -> F) -> RedisResult<T>
    where
        F: Future<Output = RedisResult<T>>,
    {
        let mut asked = Asked {
            redis: self,
            at: Instant::now(),
            is_answered: false,
        };
        let answer = call(self.current()).await;
        asked.is_answered = !matches!(&answer, Err(error) if error.is_timeout());
        answer
    }

    fn current(&self) -> ConnectionManager {
        let current = self.current.lock();
        current.unwrap_or_else(PoisonError::into_inner).0.clone()
    }
}

/// A call, until it is answered, or whoever calls waits no more. A manager connects again where a
/// connection is broken, and waits on one that is only silent: then the next call gets another one.
struct Asked<'redis> {
    redis: &'redis Redis,
    at: Instant,
    is_answered: bool,
}

impl Drop for Asked<'_> {
    fn drop(&mut self) {
        if self.is_answered || self.at.elapsed() < SILENT_AFTER {
            return;
        }
        let current = self.redis.current.lock();
        let mut current = current.unwrap_or_else(PoisonError::into_inner);
        // A younger one may still be connecting.
        let limit = self.redis.connection_timeout;
        if current.1.elapsed() > limit
            && let Ok(new) = connect(&self.redis.client, limit)
        {
            *current = (new.clone(), Instant::now());
            // It only connects while somebody waits for it, and calls may be short and rare.
            if let Ok(runtime) = tokio::runtime::Handle::try_current() {
                runtime.spawn(async move {
                    let mut new = new;
                    redis::cmd("PING").exec_async(&mut new).await
                });
            }
        }
    }
}

fn connect(client: &Client, timeout: Duration) -> RedisResult<ConnectionManager> {
    let settings = ConnectionManagerConfig::new()
        .set_connection_timeout(Some(timeout))
        .set_number_of_retries(TRIES);
    ConnectionManager::new_lazy_with_config(client.clone(), settings)
}
