//! What the adapters for Redis have in common.

use std::time::Duration;

use anyhow::Context;
use redis::aio::{ConnectionManager, ConnectionManagerConfig};

use crate::config::Redis;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// Whoever calls decides about trying again.
const TRIES: usize = 1;

/// A connection that is made when it is used first, and again when it has broken.
pub fn connect(config: &Redis) -> anyhow::Result<ConnectionManager> {
    let url = || format!("redis.url = {}", config.url);
    let client = redis::Client::open(config.url.0.as_str()).with_context(url)?;
    let settings = ConnectionManagerConfig::new()
        .set_connection_timeout(Some(CONNECT_TIMEOUT))
        .set_number_of_retries(TRIES);
    ConnectionManager::new_lazy_with_config(client, settings).with_context(url)
}
