//! The embedded adapter, for one process on a database.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use async_trait::async_trait;

use super::{Fence, Lock, LockError};

#[derive(Default)]
pub struct InProcess(Mutex<HashMap<&'static str, Holder>>);

struct Holder {
    owner: String,
    until: Instant,
    token: i64,
}

#[async_trait]
impl Lock for InProcess {
    async fn hold(
        &self,
        name: &'static str,
        owner: &str,
        time: Duration,
    ) -> Result<Option<Fence>, LockError> {
        let mut holders = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        let before = holders.get(name);
        let token = match before {
            Some(holder) if holder.owner == owner => holder.token,
            Some(holder) if holder.until > now => return Ok(None),
            before => {
                let last = before.map_or(0, |holder| holder.token);
                jiff::Timestamp::now().as_millisecond().max(last + 1)
            }
        };
        let holder = Holder {
            owner: owner.to_owned(),
            until: now + time,
            token,
        };
        holders.insert(name, holder);
        Ok(Some(Fence { name, token }))
    }

    async fn give_up(&self, name: &'static str, owner: &str) -> Result<(), LockError> {
        let mut holders = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(holder) = holders.get_mut(name).filter(|holder| holder.owner == owner) {
            holder.owner.clear();
            holder.until = Instant::now();
        }
        Ok(())
    }

    async fn outdo(&self, name: &'static str, token: i64) -> Result<(), LockError> {
        let mut holders = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(holder) = holders.get_mut(name) {
            holder.token = holder.token.max(token);
        }
        Ok(())
    }
}
