//! Where orders are kept: one trait, chosen by the scheme of `database.url`.

mod sqlite;

use std::sync::Arc;

use async_trait::async_trait;
use jiff::Timestamp;

use crate::config::Database;
use crate::domain::orders::{Order, OrderId};

/// Durable orders. An `Ok` of a write means that it survives a crash of the process.
#[async_trait]
pub trait Storage: Send + Sync {
    async fn insert(&self, order: &Order) -> Result<(), StorageError>;
    async fn find(&self, id: OrderId) -> Result<Option<Order>, StorageError>;
    /// At most `limit` orders older than `after`, newest first.
    async fn list(&self, after: Option<OrderId>, limit: u32) -> Result<Vec<Order>, StorageError>;
    /// Cancels an open order; the order as it is afterwards, or `None` where there is none.
    async fn cancel(&self, id: OrderId, now: Timestamp) -> Result<Option<Order>, StorageError>;
    /// Whether requests can be served: the database answers and its schema is new enough.
    async fn check(&self) -> Result<(), StorageError>;
    /// The newest migration that the database has.
    async fn schema_version(&self) -> Result<i64, StorageError>;
    async fn close(&self);
}

/// Why storage could not do it. The text is for logs and operators, never for clients.
#[derive(Debug, thiserror::Error)]
pub enum StorageError {
    #[error("the database refuses writes: it was opened read-only")]
    ReadOnly,
    #[error("the database is busy: {0}")]
    Busy(String),
    #[error("the database's schema is version {found}, this program needs {needed}")]
    Schema { found: i64, needed: i64 },
    #[error("the database failed: {0}")]
    Failed(String),
}

/// Opens the adapter that the address asks for and brings its schema up to date.
pub async fn open(config: &Database) -> anyhow::Result<Arc<dyn Storage>> {
    Ok(Arc::new(sqlite::Sqlite::open(config).await?))
}
