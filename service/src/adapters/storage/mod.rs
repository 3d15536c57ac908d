//! Where orders are kept: one trait, chosen by the scheme of `database.url`.

mod abandoned;
mod contacts;
mod finding;
mod gathered;
mod migrations;
mod placing;
mod pools;
mod postgres;
mod rows;
mod servers;
mod sql;
mod sqlite;
mod turns;

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use async_trait::async_trait;
use jiff::Timestamp;
use serde::Serialize;
use uuid::Uuid;

use crate::adapters::lock::Fence;
use crate::audit::Entry;
use crate::config::{CircuitBreaker, Database, Scheme};
use crate::domain::events::{Cause, Event};
use crate::domain::orders::{Order, OrderId, Total};

/// Durable orders and what is to be told of them. An `Ok` of a write means that it survives a crash
/// of the process, whole.
#[async_trait]
pub trait Storage: Send + Sync {
    /// Takes a new order, with its event. With a key, the same request again changes nothing.
    async fn place(
        &self,
        order: &Order,
        event: &Event,
        once: Option<&Once>,
    ) -> Result<Placed, StorageError>;
    async fn find(&self, id: OrderId) -> Result<Option<Order>, StorageError>;
    /// At most `limit` orders older than `after`, newest first.
    async fn list(&self, after: Option<OrderId>, limit: u32) -> Result<Vec<Order>, StorageError>;
    /// Cancels an open order, with its event; the order as it is afterwards, or `None` where there
    /// is none.
    async fn cancel(
        &self,
        id: OrderId,
        now: Timestamp,
        cause: Cause,
    ) -> Result<Option<Order>, StorageError>;
    /// Encrypts contacts by the first key, where another has: of the next `limit` orders with an id
    /// above `after`. The last of them and how many were encrypted anew; `None` behind the last.
    async fn encrypt_anew(
        &self,
        after: OrderId,
        limit: u32,
    ) -> Result<Option<(OrderId, usize)>, StorageError>;
    /// What a customer has ordered, by currency.
    async fn totals(&self, customer: &str) -> Result<Vec<Total>, StorageError>;
    /// The same of many customers, in one query, each with its customer.
    async fn totals_of(&self, customers: &[String]) -> Result<Vec<(String, Total)>, StorageError>;

    /// Becomes, or stays, the one who does what `name` says for `time` from now, by the database's
    /// clock, and returns a token as [`Lock::hold`](super::lock::Lock::hold) does.
    async fn lease(
        &self,
        name: &str,
        owner: &str,
        time: Duration,
    ) -> Result<Option<i64>, StorageError>;
    /// Lets somebody else do it at once.
    async fn give_up(&self, name: &str, owner: &str) -> Result<(), StorageError>;
    /// The newest token that was seen of what `name` says.
    async fn newest_token(&self, name: &str) -> Result<i64, StorageError>;
    /// The oldest events that are still to be told, at most `limit`.
    async fn untold(&self, limit: u32) -> Result<Vec<Untold>, StorageError>;
    /// These events have been told.
    async fn told(&self, events: &[i64], fence: Fence) -> Result<(), StorageError>;
    /// How much is still to be done, by anybody.
    async fn backlog(&self) -> Result<Backlog, StorageError>;
    /// Forgets answers to writes, and what consumers have done, that are older than `days`.
    async fn forget(&self, days: i64) -> Result<(), StorageError>;

    /// Does what a consumer does with events, all or none; `false` for those that it had done before.
    async fn consume(
        &self,
        consumer: &str,
        events: &[(Uuid, Change)],
    ) -> Result<Vec<bool>, StorageError>;
    /// Chains what waits for it to the audit log, at most `limit` events; how many that were.
    async fn audit(&self, limit: u32, fence: Fence) -> Result<usize, StorageError>;
    /// The oldest entries of the audit log behind number `after`, at most `limit`.
    async fn audited(&self, after: i64, limit: u32) -> Result<Vec<Entry>, StorageError>;
    /// Puts an event aside that a consumer could do nothing with.
    async fn bury(
        &self,
        consumer: &str,
        id: Uuid,
        event: &str,
        error: &str,
    ) -> Result<(), StorageError>;
    /// Whether an event was put aside.
    async fn is_buried(&self, consumer: &str, event: Uuid) -> Result<bool, StorageError>;
    /// What was put aside, the oldest first.
    async fn buried(&self, limit: u32) -> Result<Vec<DeadLetter>, StorageError>;
    /// An event that was put aside is none any more.
    async fn unbury(&self, consumer: &str, event: Uuid) -> Result<(), StorageError>;

    /// Whether requests can be served: the database answers and its schema is new enough.
    async fn check(&self) -> Result<(), StorageError>;
    /// The newest migration that the database has.
    async fn schema_version(&self) -> Result<i64, StorageError>;
    /// How its connections are used just now.
    fn connections(&self) -> Connections;
    async fn close(&self);
}

/// The connections of a pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Connections {
    pub used: u32,
    pub idle: u32,
    /// As many as there may be.
    pub most: u32,
    /// Who waits to write, or to place or find an order.
    pub waiting: u32,
}

/// Events by what they wait for, at most [`Self::MOST`] of each.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Backlog {
    /// To be told.
    pub untold: i64,
    /// When the first of them was written, in milliseconds since the Unix epoch.
    pub oldest: Option<i64>,
    /// To be chained to the audit log.
    pub unaudited: i64,
    /// Put aside, for a person.
    pub buried: i64,
}

impl Backlog {
    /// More are not counted.
    pub const MOST: i64 = 10_000;

    /// For how long events wait already.
    pub fn age(&self) -> Duration {
        let since = self
            .oldest
            .map(|oldest| Timestamp::now().as_millisecond() - oldest);
        Duration::from_millis(since.unwrap_or_default().try_into().unwrap_or_default())
    }
}

/// A write that a client may send again: by the same client and key only the same request.
#[derive(Debug, Clone)]
pub struct Once {
    pub client: String,
    pub key: String,
    /// SHA-256 of the request.
    pub fingerprint: [u8; 32],
}

/// What became of an order that was to be placed.
#[derive(Debug, PartialEq)]
pub enum Placed {
    New,
    /// It had been placed before: this is it, as it is now.
    Before(Order),
    /// The key belongs to another request.
    KeyTaken,
}

/// An event of the outbox as JSON, and its place there.
#[derive(Debug, PartialEq)]
pub struct Untold {
    pub seq: i64,
    pub event: String,
}

/// What a consumer's event changes.
#[derive(Debug, Clone, PartialEq)]
pub enum Change {
    Nothing,
    /// One order of a customer more, or one fewer of those that were counted.
    Totals {
        order: OrderId,
        customer: String,
        currency: String,
        orders: i64,
        total_cents: i64,
    },
}

/// An event, as it came, that a consumer could do nothing with.
#[derive(Debug, PartialEq, Serialize)]
pub struct DeadLetter {
    pub consumer: String,
    pub id: Uuid,
    pub event: String,
    pub error: String,
}

/// Why storage could not do it. The text is for logs and operators, never for clients.
#[derive(Debug, Clone, thiserror::Error)]
pub enum StorageError {
    #[error("the database refuses writes: it was opened read-only")]
    ReadOnly,
    #[error("the database cannot do it now: {0}")]
    Busy(String),
    #[error("the database's schema is version {found}, this program needs {needed}")]
    Schema { found: i64, needed: i64 },
    #[error("somebody else does what {0} does by now")]
    Fenced(&'static str),
    #[error("the database failed: {0}")]
    Failed(String),
}

/// Opens the adapter that the address asks for and, unless told not to, brings its schema up to
/// date.
pub async fn open(config: &Database, breaker: &CircuitBreaker) -> anyhow::Result<Arc<dyn Storage>> {
    let opened: anyhow::Result<Arc<dyn Storage>> = match config.url.scheme() {
        Scheme::Sqlite => sqlite::Sqlite::open(config, breaker)
            .await
            .map(|s| Arc::new(s) as _),
        Scheme::Postgres => postgres::Postgres::open(config, breaker)
            .await
            .map(|s| Arc::new(s) as _),
    };
    opened.context("opening the database")
}

impl From<sqlx::Error> for StorageError {
    fn from(error: sqlx::Error) -> Self {
        let code = match &error {
            sqlx::Error::Database(database) => database.code(),
            _ => None,
        };
        match (code.as_deref().map(meaning), &error) {
            (Some(Meaning::ReadOnly), _) => Self::ReadOnly,
            (Some(Meaning::Busy), _) | (_, sqlx::Error::PoolClosed) => {
                Self::Busy(error.to_string())
            }
            _ if has_no_connection(&error) => Self::Busy(error.to_string()),
            _ => Self::Failed(error.to_string()),
        }
    }
}

/// Whether none was to be had, or the one there was is no more. `Protocol` is what sqlx says where the server
/// hangs up while TLS is being agreed on.
fn has_no_connection(error: &sqlx::Error) -> bool {
    use sqlx::Error::{Io, PoolTimedOut, Protocol};
    matches!(error, PoolTimedOut | Io(_) | Protocol(_))
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
        // No room on the disk, too many connections, serialization, deadlock, a lock not to be had; a
        // statement that took too long; shutting down; a transaction that was silent for too long.
        "53100" | "53300" | "40001" | "40P01" | "55P03" | "57014" | "57P01" | "57P02" | "57P03"
        | "25P03" => Meaning::Busy,
        code if code.len() == 5 => Meaning::Other,
        code => match code.parse::<u32>().map(|code| code & 0xff) {
            // A lock not to be had, a file that cannot be written, no room on the disk.
            Ok(5 | 10 | 13) => Meaning::Busy,
            Ok(8) => Meaning::ReadOnly,
            _ => Meaning::Other,
        },
    }
}
