//! Where orders are kept: one trait, chosen by the scheme of `database.url`.

mod postgres;
mod rows;
mod sqlite;

use std::sync::Arc;

use async_trait::async_trait;
use jiff::Timestamp;

use crate::config::{Database, Scheme};
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

/// Opens the adapter that the address asks for and, unless told not to, brings its schema up to
/// date.
pub async fn open(config: &Database) -> anyhow::Result<Arc<dyn Storage>> {
    Ok(match config.url.scheme() {
        Scheme::Sqlite => Arc::new(sqlite::Sqlite::open(config).await?),
        Scheme::Postgres => Arc::new(postgres::Postgres::open(config).await?),
    })
}

impl From<sqlx::Error> for StorageError {
    fn from(error: sqlx::Error) -> Self {
        let code = match &error {
            sqlx::Error::Database(database) => database.code(),
            _ => None,
        };
        match (code.as_deref().map(meaning), &error) {
            (Some(Meaning::ReadOnly), _) => Self::ReadOnly,
            (Some(Meaning::Busy), _) | (_, sqlx::Error::PoolTimedOut | sqlx::Error::Io(_)) => {
                Self::Busy(error.to_string())
            }
            _ => Self::Failed(error.to_string()),
        }
    }
}

/// What a database's code says of the next try.
enum Meaning {
    ReadOnly,
    Busy,
    Other,
}

/// SQLSTATEs have five characters (PostgreSQL, appendix A); SQLite's result codes are numbers, the
/// primary one in the low byte (<https://sqlite.org/rescode.html>).
fn meaning(code: &str) -> Meaning {
    match code {
        "25006" => Meaning::ReadOnly,
        // Too many connections, serialization, deadlock, a lock not to be had; shutting down.
        "53300" | "40001" | "40P01" | "55P03" | "57P01" | "57P02" | "57P03" => Meaning::Busy,
        code if code.len() == 5 => Meaning::Other,
        code => match code.parse::<u32>().map(|code| code & 0xff) {
            Ok(5) => Meaning::Busy,
            Ok(8) => Meaning::ReadOnly,
            _ => Meaning::Other,
        },
    }
}
