//! The embedded adapter: one SQLite file, shared by all processes of an environment.

use std::collections::HashSet;
use std::fs::File;
use std::ops::{Deref, DerefMut};
use std::path::Path;
use std::str::FromStr;
use std::time::Duration;

use anyhow::Context;
use async_trait::async_trait;
use jiff::Timestamp;
use sqlx::sqlite::{
    SqliteConnectOptions, SqliteConnection, SqliteJournalMode, SqlitePoolOptions, SqliteSynchronous,
};
use sqlx::{Connection, Transaction};
use uuid::Uuid;

use super::abandoned::watched;
use super::migrations::SQLITE as MIGRATIONS;
use super::pools::{Both, Handed, Pools};
use super::rows::{Placement, TotalOf};
use super::sql::storage_in_sql;
use super::turns::{Turn, Turns};
use super::{
    Backlog, Change, Connections, DeadLetter, Once, Placed, Storage, StorageError, Untold,
    abandoned, contacts, rows,
};
use crate::adapters::lock::Fence;
use crate::audit::{self, Entry};
use crate::config::{CircuitBreaker, Database};
use crate::domain::events::{Cause, Event, Kind};
use crate::domain::orders::{Order, OrderId, Total};
use crate::failpoint;
use crate::hex::hex;
use crate::keyring::Keyring;

/// Milliseconds since the Unix epoch, by the database's clock.
const NOW: &str = "CAST(unixepoch('subsec') * 1000 AS INTEGER)";

pub(super) struct Sqlite {
    pools: Pools<sqlx::Sqlite>,
    /// None where nothing may be written.
    turns: Option<Turns>,
    keyring: Option<Keyring>,
}

impl Sqlite {
    pub(super) async fn open(config: &Database, breaker: &CircuitBreaker) -> anyhow::Result<Self> {
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
        let turns = (!config.read_only).then(|| Turns::of(&file, config));
        let turns = turns.transpose()?;
        let probe = shape(config, &Handed::default()).max_connections(1);
        let probe = probe.connect_lazy_with(options.clone());
        let handed = Handed::shared(breaker);
        let connect = shape(config, &handed)
            .max_connections(config.max_connections.get())
            .min_connections(config.min_connections);
        let pool = if config.read_only {
            connect.connect_with(options).await
        } else {
            // Several processes may start at once on one file: turning WAL on and migrating
            // happen under a lock that the kernel frees when the holder dies.
            let _lock = lock(&file).await?;
            let pool = connect.connect_with(options).await;
            if let (Ok(pool), Some(turns), true) = (&pool, &turns, config.migrate) {
                let _turn = turns.next().await?;
                let migrator = MIGRATIONS.migrator().await?;
                let migrated = migrator.run(pool).await;
                migrated.context("migrating the database")?;
            }
            pool
        };
        let pool = pool.with_context(|| format!("connecting to {}", file.display()))?;
        Ok(Self {
            turns,
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
        .idle_timeout(config.idle_timeout.0)
        // A file does not hang up; asking before each use would only cost time.
        .test_before_acquire(false)
        // Where a file cannot be written SQLite rolls back by itself, and the driver believes for ever
        // that it has yet to.
        .before_acquire(move |connection, _| {
            acquired.one();
            Box::pin(async move { Ok(!connection.is_in_transaction()) })
        })
        .after_release(|connection, _| {
            Box::pin(async move {
                // Who is cut off in the middle of a transaction's beginning leaves it to nobody.
                if !abandoned::lately() {
                    return Ok(true);
                }
                connection.ping().await?;
                Ok(!connection.is_in_transaction())
            })
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

/// A transaction of whoever has the turn.
struct Write {
    tx: Transaction<'static, sqlx::Sqlite>,
    _turn: Option<Turn>,
}

impl Write {
    async fn commit(self) -> sqlx::Result<()> {
        self.tx.commit().await
    }
}

impl Deref for Write {
    type Target = SqliteConnection;

    fn deref(&self) -> &SqliteConnection {
        &self.tx
    }
}

impl DerefMut for Write {
    fn deref_mut(&mut self) -> &mut SqliteConnection {
        &mut self.tx
    }
}

impl Sqlite {
    /// With a write lock from the start: a read that becomes a write can fail as busy at once.
    async fn begin(&self) -> Result<Write, StorageError> {
        // Who waits takes no connection from those who read.
        let turn = self.turn().await?;
        let _waiting = self.pools.waits.one();
        Ok(Write {
            tx: self.pools.shared().begin_with("BEGIN IMMEDIATE").await?,
            _turn: turn,
        })
    }

    async fn turn(&self) -> Result<Option<Turn>, StorageError> {
        let _waiting = self.pools.waits.one();
        match &self.turns {
            Some(turns) => turns.next().await.map(Some),
            None => Ok(None),
        }
    }

    fn stuck_for(&self) -> Option<Duration> {
        let turn = self.turns.as_ref().and_then(Turns::stuck_for);
        turn.or_else(|| self.pools.stuck_for())
    }

    async fn insert(tx: &mut SqliteConnection, placement: &Placement) -> Result<(), StorageError> {
        let order = &placement.order;
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
        .bind(&placement.contact)
        .execute(&mut *tx)
        .await?;
        sqlx::query(
            "INSERT INTO order_items (order_id, line, sku, quantity, unit_price_cents)
             SELECT $1, key, value ->> 'sku', value ->> 'quantity', value ->> 'unit_price_cents'
             FROM json_each($2)",
        )
        .bind(order.id.as_uuid())
        .bind(rows::to_text(&order.items)?)
        .execute(&mut *tx)
        .await?;
        let tell = sqlx::query(rows::TELL).bind(&placement.event);
        let tell = tell.bind(order.created_at.as_millisecond());
        tell.execute(&mut *tx).await?;
        Ok(())
    }

    async fn insert_one(&self, placement: Placement) -> Result<(), StorageError> {
        let mut tx = self.begin().await?;
        Self::insert(&mut tx, &placement).await?;
        Ok(tx.commit().await?)
    }

    async fn find_one(&self, id: OrderId) -> Result<Option<Order>, StorageError> {
        let select = rows::select("WHERE id = $1");
        let pool = self.pools.shared();
        let lines = || sqlx::query_as(&select).bind(id.as_uuid()).fetch_all(&pool);
        let lines = self.pools.retried(lines).await?;
        Ok(rows::orders(lines, self.keyring.as_ref())?.pop())
    }

    async fn totals_among(&self, customers: &[String]) -> Result<Vec<TotalOf>, StorageError> {
        let totals = rows::totals_of("SELECT value FROM json_each($1)");
        Ok(sqlx::query_as(&totals)
            .bind(rows::to_text(&customers)?)
            .fetch_all(&self.pools.shared())
            .await?)
    }

    async fn remove(tx: &mut SqliteConnection, events: &[i64]) -> Result<(), StorageError> {
        let told = "DELETE FROM outbox WHERE seq IN (SELECT value FROM json_each($1))";
        let told = sqlx::query(told).bind(rows::to_text(&events)?);
        told.execute(&mut *tx).await?;
        Ok(())
    }

    async fn note_done(
        tx: &mut SqliteConnection,
        consumer: &str,
        events: &[Uuid],
    ) -> Result<HashSet<Uuid>, StorageError> {
        let new = sqlx::query_scalar(
            "INSERT INTO inbox (consumer, event_id, done_at)
             SELECT $1, unhex(value), $3 FROM json_each($2) WHERE true
             ON CONFLICT DO NOTHING RETURNING event_id",
        );
        let new = new.bind(consumer).bind(as_hex(events)?);
        let new = new.bind(Timestamp::now().as_millisecond());
        Ok(new.fetch_all(&mut *tx).await?.into_iter().collect())
    }

    async fn count(
        tx: &mut SqliteConnection,
        orders: &[Uuid],
    ) -> Result<HashSet<Uuid>, StorageError> {
        let orders = as_hex(orders)?;
        let new = sqlx::query_scalar(
            "INSERT INTO counted_orders (order_id) SELECT unhex(value) FROM json_each($1)
             WHERE unhex(value) NOT IN (SELECT order_id FROM cancelled_uncounted)
             ON CONFLICT DO NOTHING RETURNING order_id",
        );
        let new = new.bind(&orders).fetch_all(&mut *tx).await?;
        let both = sqlx::query(
            "DELETE FROM cancelled_uncounted
             WHERE order_id IN (SELECT unhex(value) FROM json_each($1))",
        );
        both.bind(&orders).execute(&mut *tx).await?;
        Ok(new.into_iter().collect())
    }

    async fn count_no_more(
        tx: &mut SqliteConnection,
        orders: &[Uuid],
    ) -> Result<HashSet<Uuid>, StorageError> {
        let gone = sqlx::query_scalar(
            "DELETE FROM counted_orders
             WHERE order_id IN (SELECT unhex(value) FROM json_each($1)) RETURNING order_id",
        );
        let gone = gone.bind(as_hex(orders)?).fetch_all(&mut *tx).await?;
        let gone: HashSet<Uuid> = gone.into_iter().collect();
        let uncounted = orders.iter().filter(|order| !gone.contains(order));
        let uncounted: Vec<Uuid> = uncounted.copied().collect();
        let note = sqlx::query(
            "INSERT INTO cancelled_uncounted (order_id) SELECT unhex(value) FROM json_each($1) WHERE true
             ON CONFLICT DO NOTHING",
        );
        note.bind(as_hex(&uncounted)?).execute(&mut *tx).await?;
        Ok(gone)
    }

    /// How many were not there yet.
    async fn append(tx: &mut SqliteConnection, entries: &[Entry]) -> Result<u64, StorageError> {
        let append = sqlx::query(
            "INSERT INTO audit_log (seq, event, hash)
             SELECT value ->> 0, value ->> 1, unhex(value ->> 2) FROM json_each($1) WHERE true
             ON CONFLICT DO NOTHING",
        );
        let entries: Vec<_> = entries
            .iter()
            .map(|Entry { seq, event, hash }| (seq, event, hex(hash)))
            .collect();
        let append = append.bind(rows::to_text(&entries)?);
        Ok(append.execute(&mut *tx).await?.rows_affected())
    }

    async fn no_longer_wait(tx: &mut SqliteConnection, places: &[i64]) -> Result<(), StorageError> {
        let chained = "DELETE FROM audit_waiting WHERE seq IN (SELECT value FROM json_each($1))";
        let chained = sqlx::query(chained).bind(rows::to_text(&places)?);
        chained.execute(&mut *tx).await?;
        Ok(())
    }
}

/// For `json_each` and `unhex`: the driver binds no lists, and JSON has no bytes.
fn as_hex(ids: &[Uuid]) -> Result<String, StorageError> {
    let ids: Vec<_> = ids.iter().map(|id| hex(id.as_bytes())).collect();
    rows::to_text(&ids)
}

storage_in_sql!(Sqlite, sqlx::Sqlite);
