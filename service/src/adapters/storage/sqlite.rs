//! The embedded adapter: one SQLite file, shared by all processes of an environment.

use std::collections::HashSet;
use std::fs::File;
use std::path::Path;
use std::str::FromStr;
use std::time::Duration;

use anyhow::Context;
use async_trait::async_trait;
use jiff::Timestamp;
use sqlx::migrate::Migrator;
use sqlx::sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePoolOptions, SqliteSynchronous};
use sqlx::{Connection, Transaction};
use uuid::Uuid;

use super::abandoned::watched;
use super::pools::{Both, Handed, Pools};
use super::rows::TotalOf;
use super::sql::storage_in_sql;
use super::{Change, DeadLetter, Once, Placed, Storage, StorageError, Untold, contacts, rows};
use crate::adapters::lock::Fence;
use crate::audit::{self, Entry};
use crate::config::Database;
use crate::domain::events::{Cause, Event, Kind};
use crate::domain::orders::{Order, OrderId, Total};
use crate::keyring::Keyring;

/// Milliseconds since the Unix epoch, by the database's clock.
const NOW: &str = "CAST(unixepoch('subsec') * 1000 AS INTEGER)";

const DONE: &str = "INSERT INTO inbox (consumer, event_id, done_at) VALUES ($1, $2, $3)
     ON CONFLICT DO NOTHING";
const COUNT: &str = "INSERT INTO counted_orders (order_id) VALUES ($1) ON CONFLICT DO NOTHING";
const COUNT_NO_MORE: &str = "DELETE FROM counted_orders WHERE order_id = $1";
const APPEND: &str =
    "INSERT INTO audit_log (seq, event, hash) VALUES ($1, $2, $3) ON CONFLICT DO NOTHING";

/// The migrations of this program. A database that has newer ones is fine: they only ever add
/// what the release before can live with, and that release must start after a rollback.
fn migrations() -> Migrator {
    let mut migrations = sqlx::migrate!("migrations/sqlite");
    migrations.set_ignore_missing(true);
    migrations
}

pub(super) struct Sqlite {
    pools: Pools<sqlx::Sqlite>,
    keyring: Option<Keyring>,
}

impl Sqlite {
    pub(super) async fn open(config: &Database) -> anyhow::Result<Self> {
        let options = SqliteConnectOptions::from_str(&config.url.0)
            .with_context(|| format!("reading database.url = {}", config.url))?
            .busy_timeout(config.busy_timeout.0)
            .foreign_keys(true);
        let options = if config.read_only {
            options.read_only(true)
        } else {
            options
                .create_if_missing(true)
                .journal_mode(SqliteJournalMode::Wal)
                .synchronous(SqliteSynchronous::Full)
        };
        let file = options.get_filename().to_owned();
        if let Some(dir) = file.parent().filter(|_| !config.read_only) {
            std::fs::create_dir_all(dir).with_context(|| format!("creating {}", dir.display()))?;
        }
        let probe = shape(config, &Handed::default()).max_connections(1);
        let probe = probe.connect_lazy_with(options.clone());
        let handed = Handed::default();
        let connect = shape(config, &handed).max_connections(config.max_connections.get());
        let pool = if config.read_only {
            connect.connect_with(options).await
        } else {
            // Several processes may start at once on one file: turning WAL on and migrating
            // happen under a lock that the kernel frees when the holder dies.
            let _lock = lock(&file).await?;
            let pool = connect.connect_with(options).await;
            if let Some(pool) = pool.as_ref().ok().filter(|_| config.migrate) {
                migrations()
                    .run(pool)
                    .await
                    .context("migrating the database")?;
            }
            pool
        };
        let pool = pool.with_context(|| format!("connecting to {}", file.display()))?;
        Ok(Self {
            pools: Pools::new(
                Both {
                    shared: pool,
                    probe,
                },
                handed,
                config.acquire_timeout.0,
            ),
            keyring: config.encryption_keys.clone(),
        })
    }
}

fn shape(config: &Database, handed: &Handed) -> SqlitePoolOptions {
    let (acquired, connected) = (handed.clone(), handed.clone());
    SqlitePoolOptions::new()
        .acquire_timeout(config.acquire_timeout.0)
        // A file does not hang up; asking before each use would only cost time.
        .test_before_acquire(false)
        // Where a file cannot be written SQLite rolls back by itself, and the driver believes for ever
        // that it has yet to.
        .before_acquire(move |connection, _| {
            acquired.one();
            Box::pin(async move { Ok(!connection.is_in_transaction()) })
        })
        .after_connect(move |_, _| {
            connected.one();
            Box::pin(std::future::ready(Ok(())))
        })
}

async fn lock(database: &Path) -> anyhow::Result<File> {
    let path = database.with_extension("migrate.lock");
    // Waiting for another process must not keep this runtime's other tasks from theirs.
    tokio::task::spawn_blocking(move || {
        let file = File::create(&path).with_context(|| format!("creating {}", path.display()))?;
        file.lock()
            .with_context(|| format!("locking {}", path.display()))?;
        Ok(file)
    })
    .await
    .context("waiting for the lock")?
}

impl Sqlite {
    /// With a write lock from the start: a read that becomes a write can fail as busy at once.
    async fn begin(&self) -> Result<Transaction<'_, sqlx::Sqlite>, StorageError> {
        Ok(self.pools.shared().begin_with("BEGIN IMMEDIATE").await?)
    }

    async fn insert(
        tx: &mut Transaction<'_, sqlx::Sqlite>,
        order: &Order,
        contact: Option<Vec<u8>>,
    ) -> Result<(), StorageError> {
        sqlx::query(
            "INSERT INTO orders (id, customer, currency, status, created_at, updated_at, contact)
             VALUES (?, ?, ?, ?, ?, ?, ?)",
        )
        .bind(order.id.as_uuid())
        .bind(&order.customer)
        .bind(&order.currency)
        .bind(order.status.as_str())
        .bind(order.created_at.as_millisecond())
        .bind(order.updated_at.as_millisecond())
        .bind(contact)
        .execute(&mut **tx)
        .await?;
        for (line, item) in (0i64..).zip(&order.items) {
            sqlx::query(
                "INSERT INTO order_items (order_id, line, sku, quantity, unit_price_cents)
                 VALUES (?, ?, ?, ?, ?)",
            )
            .bind(order.id.as_uuid())
            .bind(line)
            .bind(&item.sku)
            .bind(item.quantity)
            .bind(item.unit_price_cents)
            .execute(&mut **tx)
            .await?;
        }
        Ok(())
    }

    async fn totals_among(&self, customers: &[String]) -> Result<Vec<TotalOf>, StorageError> {
        let totals = rows::totals_of("SELECT value FROM json_each($1)");
        Ok(sqlx::query_as(&totals)
            .bind(rows::to_text(&customers)?)
            .fetch_all(&self.pools.shared())
            .await?)
    }

    async fn remove(
        tx: &mut Transaction<'_, sqlx::Sqlite>,
        events: &[i64],
    ) -> Result<(), StorageError> {
        for seq in events {
            let told = sqlx::query("DELETE FROM outbox WHERE seq = $1").bind(seq);
            told.execute(&mut **tx).await?;
        }
        Ok(())
    }

    async fn note_done(
        tx: &mut Transaction<'_, sqlx::Sqlite>,
        consumer: &str,
        events: &[Uuid],
    ) -> Result<HashSet<Uuid>, StorageError> {
        let now = Timestamp::now().as_millisecond();
        let mut new = HashSet::new();
        for event in events {
            let done = sqlx::query(DONE).bind(consumer).bind(event).bind(now);
            if done.execute(&mut **tx).await?.rows_affected() == 1 {
                new.insert(*event);
            }
        }
        Ok(new)
    }

    async fn count(
        tx: &mut Transaction<'_, sqlx::Sqlite>,
        orders: &[Uuid],
    ) -> Result<HashSet<Uuid>, StorageError> {
        Self::affected(tx, COUNT, orders).await
    }

    async fn count_no_more(
        tx: &mut Transaction<'_, sqlx::Sqlite>,
        orders: &[Uuid],
    ) -> Result<HashSet<Uuid>, StorageError> {
        Self::affected(tx, COUNT_NO_MORE, orders).await
    }

    /// Those orders for which the statement changes anything.
    async fn affected(
        tx: &mut Transaction<'_, sqlx::Sqlite>,
        statement: &'static str,
        orders: &[Uuid],
    ) -> Result<HashSet<Uuid>, StorageError> {
        let mut affected = HashSet::new();
        for order in orders {
            let statement = sqlx::query(statement).bind(order);
            if statement.execute(&mut **tx).await?.rows_affected() == 1 {
                affected.insert(*order);
            }
        }
        Ok(affected)
    }

    /// How many were not there yet.
    async fn append(
        tx: &mut Transaction<'_, sqlx::Sqlite>,
        entries: &[Entry],
    ) -> Result<u64, StorageError> {
        let mut new = 0;
        for Entry { seq, event, hash } in entries {
            let append = sqlx::query(APPEND).bind(seq).bind(event).bind(hash);
            new += append.execute(&mut **tx).await?.rows_affected();
        }
        Ok(new)
    }

    async fn no_longer_wait(
        tx: &mut Transaction<'_, sqlx::Sqlite>,
        places: &[i64],
    ) -> Result<(), StorageError> {
        for place in places {
            let chained = sqlx::query("DELETE FROM audit_waiting WHERE seq = $1").bind(place);
            chained.execute(&mut **tx).await?;
        }
        Ok(())
    }
}

storage_in_sql!(Sqlite, sqlx::Sqlite);
