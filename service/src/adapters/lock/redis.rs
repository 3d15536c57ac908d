//! The adapter for Redis, by its clock. It is one server's lock: where a replica takes over, there may
//! be two holders for a while, and fences tell them apart.

use std::time::Duration;

use async_trait::async_trait;
use redis::Script;

use super::{Fence, Lock, LockError};
use crate::adapters::redis::Redis as Connection;
use crate::config::Redis as Config;

/// The token, or nil: KEYS holder, last token; ARGV owner, milliseconds. Both keys have one hash slot.
const HOLD: &str = r"
local holder = redis.call('GET', KEYS[1])
local kept = redis.call('GET', KEYS[2])
if holder == ARGV[1] and kept then
    redis.call('PEXPIRE', KEYS[1], ARGV[2])
    return kept
elseif holder and holder ~= ARGV[1] then
    return false
end
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local last = tonumber(kept or '0')
local token = string.format('%.0f', math.max(last + 1, now))
redis.call('SET', KEYS[2], token)
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return token
";

/// KEYS holder; ARGV owner.
const GIVE_UP: &str = r"
if redis.call('GET', KEYS[1]) == ARGV[1] then
    redis.call('DEL', KEYS[1])
end
";

/// KEYS last token; ARGV another.
const OUTDO: &str = r"
local last = tonumber(redis.call('GET', KEYS[1]) or '0')
redis.call('SET', KEYS[1], string.format('%.0f', math.max(last, tonumber(ARGV[1]))))
";

pub struct Redis {
    connection: Connection,
    prefix: String,
}

impl Redis {
    pub fn new(config: &Config) -> anyhow::Result<Self> {
        Ok(Self {
            connection: Connection::new(config)?,
            prefix: config.prefix.clone(),
        })
    }

    fn key(&self, name: &str, what: &str) -> String {
        format!("{}{{lock:{name}}}:{what}", self.prefix)
    }
}

#[async_trait]
impl Lock for Redis {
    async fn hold(
        &self,
        name: &'static str,
        owner: &str,
        time: Duration,
    ) -> Result<Option<Fence>, LockError> {
        let milliseconds = u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        let script = Script::new(HOLD);
        let mut hold = script.key(self.key(name, "holder"));
        let hold = hold
            .key(self.key(name, "token"))
            .arg(owner)
            .arg(milliseconds);
        let hold = async |mut connection| hold.invoke_async(&mut connection).await;
        let token: Option<i64> = self.connection.call(hold).await?;
        Ok(token.map(|token| Fence { name, token }))
    }

    async fn give_up(&self, name: &'static str, owner: &str) -> Result<(), LockError> {
        let script = Script::new(GIVE_UP);
        let mut call = script.key(self.key(name, "holder"));
        let call = call.arg(owner);
        let call = async |mut connection| call.invoke_async(&mut connection).await;
        Ok(self.connection.call(call).await?)
    }

    async fn outdo(&self, name: &'static str, token: i64) -> Result<(), LockError> {
        let script = Script::new(OUTDO);
        let mut call = script.key(self.key(name, "token"));
        let call = call.arg(token);
        let call = async |mut connection| call.invoke_async(&mut connection).await;
        Ok(self.connection.call(call).await?)
    }
}
