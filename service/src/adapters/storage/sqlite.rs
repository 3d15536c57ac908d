//! The embedded adapter: one SQLite file, shared by all processes of an environment.

use std::fs::File;
use std::path::Path;
use std::str::FromStr;

use anyhow::Context;
use async_trait::async_trait;
use jiff::Timestamp;
use sqlx::Row;
use sqlx::migrate::Migrator;
use sqlx::sqlite::{
    SqliteConnectOptions, SqliteJournalMode, SqlitePoolOptions, SqliteRow, SqliteSynchronous,
};

use super::{Storage, StorageError};
use crate::config::Database;
use crate::domain::orders::{Item, Order, OrderId, Status};

/// The migrations of this program. A database that has newer ones is fine: they only ever add
/// what the release before can live with, and that release must start after a rollback.
fn migrations() -> Migrator {
    let mut migrations = sqlx::migrate!();
    migrations.set_ignore_missing(true);
    migrations
}

pub(super) struct Sqlite {
    pool: sqlx::SqlitePool,
}

impl Sqlite {
    pub(super) async fn open(config: &Database) -> anyhow::Result<Self> {
        let options = SqliteConnectOptions::from_str(&config.url.0)
            .with_context(|| format!("reading database.url = {:?}", config.url.0))?
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
        let connect = SqlitePoolOptions::new()
            .max_connections(config.max_connections.get())
            .acquire_timeout(config.acquire_timeout.0)
            // A file does not hang up; asking before each use would only cost time.
            .test_before_acquire(false);
        let pool = if config.read_only {
            connect.connect_with(options).await
        } else {
            // Several processes may start at once on one file: turning WAL on and migrating
            // happen under a lock that the kernel frees when the holder dies.
            let _lock = lock(&file)?;
            let pool = connect.connect_with(options).await;
            if let Ok(pool) = &pool {
                migrations()
                    .run(pool)
                    .await
                    .context("migrating the database")?;
            }
            pool
        };
        let pool = pool.with_context(|| format!("connecting to {}", file.display()))?;
        Ok(Self { pool })
    }
}

fn lock(database: &Path) -> anyhow::Result<File> {
    let path = database.with_extension("migrate.lock");
    let file = File::create(&path).with_context(|| format!("creating {}", path.display()))?;
    file.lock()
        .with_context(|| format!("locking {}", path.display()))?;
    Ok(file)
}

#[async_trait]
impl Storage for Sqlite {
    async fn insert(&self, order: &Order) -> Result<(), StorageError> {
        // A write lock from the start: a read that becomes a write can fail as busy at once.
        let mut tx = self.pool.begin_with("BEGIN IMMEDIATE").await?;
        sqlx::query(
            "INSERT INTO orders (id, customer, currency, status, created_at, updated_at)
             VALUES (?, ?, ?, ?, ?, ?)",
        )
        .bind(order.id.as_bytes())
        .bind(&order.customer)
        .bind(&order.currency)
        .bind(order.status.as_str())
        .bind(order.created_at.as_millisecond())
        .bind(order.updated_at.as_millisecond())
        .execute(&mut *tx)
        .await?;
        for (line, item) in (0i64..).zip(&order.items) {
            sqlx::query(
                "INSERT INTO order_items (order_id, line, sku, quantity, unit_price_cents)
                 VALUES (?, ?, ?, ?, ?)",
            )
            .bind(order.id.as_bytes())
            .bind(line)
            .bind(&item.sku)
            .bind(item.quantity)
            .bind(item.unit_price_cents)
            .execute(&mut *tx)
            .await?;
        }
        tx.commit().await?;
        Ok(())
    }

    async fn find(&self, id: OrderId) -> Result<Option<Order>, StorageError> {
        let rows = sqlx::query(&select("WHERE id = ?1"))
            .bind(id.as_bytes())
            .fetch_all(&self.pool)
            .await?;
        Ok(orders(&rows)?.pop())
    }

    async fn list(&self, after: Option<OrderId>, limit: u32) -> Result<Vec<Order>, StorageError> {
        let page = match after {
            Some(_) => "WHERE id < ?1 ORDER BY id DESC LIMIT ?2",
            None => "ORDER BY id DESC LIMIT ?2",
        };
        let rows = sqlx::query(&select(page))
            .bind(after.as_ref().map(OrderId::as_bytes))
            .bind(limit)
            .fetch_all(&self.pool)
            .await?;
        orders(&rows)
    }

    async fn cancel(&self, id: OrderId, now: Timestamp) -> Result<Option<Order>, StorageError> {
        sqlx::query("UPDATE orders SET status = 'cancelled', updated_at = ? WHERE id = ? AND status = 'open'")
            .bind(now.as_millisecond())
            .bind(id.as_bytes())
            .execute(&self.pool)
            .await?;
        self.find(id).await
    }

    async fn check(&self) -> Result<(), StorageError> {
        let found = self.schema_version().await?;
        let needed = migrations()
            .iter()
            .map(|migration| migration.version)
            .max()
            .unwrap_or(0);
        if found < needed {
            Err(StorageError::Schema { found, needed })
        } else {
            Ok(())
        }
    }

    async fn schema_version(&self) -> Result<i64, StorageError> {
        let row =
            sqlx::query("SELECT coalesce(max(version), 0) FROM _sqlx_migrations WHERE success")
                .fetch_one(&self.pool)
                .await?;
        Ok(row.try_get(0)?)
    }

    async fn close(&self) {
        self.pool.close().await;
    }
}

/// One row for each line of the orders that `page` selects, in the page's order.
fn select(page: &str) -> String {
    format!(
        "SELECT o.id, customer, currency, status, created_at, updated_at,
                sku, quantity, unit_price_cents
         FROM (SELECT * FROM orders {page}) o JOIN order_items i ON i.order_id = o.id
         ORDER BY o.id DESC, i.line"
    )
}

fn orders(rows: &[SqliteRow]) -> Result<Vec<Order>, StorageError> {
    let mut orders = Vec::new();
    for rows in rows.chunk_by(|a, b| a.get_unchecked_id() == b.get_unchecked_id()) {
        let items = rows
            .iter()
            .map(|row| {
                Ok(Item {
                    sku: row.try_get("sku")?,
                    quantity: row.try_get("quantity")?,
                    unit_price_cents: row.try_get("unit_price_cents")?,
                })
            })
            .collect::<Result<_, sqlx::Error>>()?;
        let row = &rows[0];
        let corrupt = |column: &str| StorageError::Failed(format!("orders.{column} is corrupt"));
        let time = |column: &str| -> Result<Timestamp, StorageError> {
            Timestamp::from_millisecond(row.try_get(column)?).map_err(|_| corrupt(column))
        };
        orders.push(Order::assemble(
            OrderId::from_slice(row.try_get("id")?).ok_or_else(|| corrupt("id"))?,
            row.try_get("customer")?,
            row.try_get("currency")?,
            row.try_get::<&str, _>("status")?
                .parse::<Status>()
                .map_err(|()| corrupt("status"))?,
            items,
            (time("created_at")?, time("updated_at")?),
        ));
    }
    Ok(orders)
}

/// The id that rows of one order share.
trait RowId {
    fn get_unchecked_id(&self) -> Option<&[u8]>;
}

impl RowId for SqliteRow {
    fn get_unchecked_id(&self) -> Option<&[u8]> {
        self.try_get("id").ok()
    }
}

impl From<sqlx::Error> for StorageError {
    fn from(error: sqlx::Error) -> Self {
        // Primary result codes are the low byte: https://sqlite.org/rescode.html
        const BUSY: u32 = 5;
        const READ_ONLY: u32 = 8;
        let code = match &error {
            sqlx::Error::Database(database) => database
                .code()
                .and_then(|code| code.parse::<u32>().ok())
                .map(|code| code & 0xff),
            _ => None,
        };
        match (code, &error) {
            (Some(READ_ONLY), _) => Self::ReadOnly,
            (Some(BUSY), _) | (_, sqlx::Error::PoolTimedOut) => Self::Busy(error.to_string()),
            _ => Self::Failed(error.to_string()),
        }
    }
}
