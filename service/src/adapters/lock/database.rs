//! The adapter for whatever database the orders are in, by its clock.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;

use super::{Fence, Lock, LockError};
use crate::adapters::storage::Storage;

pub struct Database(pub Arc<dyn Storage>);

#[async_trait]
impl Lock for Database {
    async fn hold(
        &self,
        name: &'static str,
        owner: &str,
        time: Duration,
    ) -> Result<Option<Fence>, LockError> {
        let token = self.0.lease(name, owner, time).await?;
        Ok(token.map(|token| Fence { name, token }))
    }

    async fn give_up(&self, name: &'static str, owner: &str) -> Result<(), LockError> {
        Ok(self.0.give_up(name, owner).await?)
    }

    /// It looks by itself at what storage has seen.
    async fn outdo(&self, _name: &'static str, _token: i64) -> Result<(), LockError> {
        Ok(())
    }
}
