//! The adapter for PostgreSQL.

use std::str::FromStr;

use anyhow::Context;
use async_trait::async_trait;
use jiff::Timestamp;
use sqlx::migrate::Migrator;
use sqlx::postgres::{PgConnectOptions, PgPoolOptions};
use sqlx::{Connection, PgConnection, PgPool};

use super::{Storage, StorageError, rows};
use crate::config::Database;
use crate::domain::orders::{Order, OrderId};

/// The migrations of this program. A database that has newer ones is fine: they only ever add
/// what the release before can live with, and that release must start after a rollback.
fn migrations() -> Migrator {
    let mut migrations = sqlx::migrate!("migrations/postgres");
    migrations.set_ignore_missing(true);
    migrations
}

pub(super) struct Postgres {
    pool: PgPool,
}

impl Postgres {
    pub(super) async fn open(config: &Database) -> anyhow::Result<Self> {
        let options = PgConnectOptions::from_str(&config.url.0)
            .with_context(|| format!("reading database.url = {}", config.url))?
            .application_name(env!("CARGO_PKG_NAME"));
        let options = if config.read_only {
            options.options([("default_transaction_read_only", "on")])
        } else {
            options
        };
        // A pool would try again until its time is up and then say only that; this says why.
        let first = tokio::time::timeout(
            config.acquire_timeout.0,
            PgConnection::connect_with(&options),
        );
        let reach = || {
            format!(
                "connecting to {}; is it running, and reachable?",
                config.url
            )
        };
        let first = first.await.with_context(reach)?.with_context(reach)?;
        // It has served its purpose, however its end goes.
        let _ = first.close().await;
        let pool = PgPoolOptions::new()
            .max_connections(config.max_connections.get())
            .acquire_timeout(config.acquire_timeout.0)
            .connect_with(options)
            .await
            .with_context(|| format!("connecting to {}", config.url))?;
        if config.migrate && !config.read_only {
            // Several processes may start at once; sqlx holds an advisory lock meanwhile.
            migrations()
                .run(&pool)
                .await
                .context("migrating the database")?;
        }
        Ok(Self { pool })
    }
}

#[async_trait]
impl Storage for Postgres {
    async fn insert(&self, order: &Order) -> Result<(), StorageError> {
        let mut tx = self.pool.begin().await?;
        sqlx::query(
            "INSERT INTO orders (id, customer, currency, status, created_at, updated_at)
             VALUES ($1, $2, $3, $4, $5, $6)",
        )
        .bind(order.id.as_uuid())
        .bind(&order.customer)
        .bind(&order.currency)
        .bind(order.status.as_str())
        .bind(order.created_at.as_millisecond())
        .bind(order.updated_at.as_millisecond())
        .execute(&mut *tx)
        .await?;
        // All lines in one statement, and so in one round trip.
        let items = &order.items;
        let skus: Vec<&str> = items.iter().map(|item| item.sku.as_str()).collect();
        let quantities: Vec<i64> = items.iter().map(|item| item.quantity.into()).collect();
        let prices: Vec<i64> = items.iter().map(|item| item.unit_price_cents).collect();
        sqlx::query(
            "INSERT INTO order_items (order_id, line, sku, quantity, unit_price_cents)
             SELECT $1, line - 1, sku, quantity, price
             FROM unnest($2::text[], $3::bigint[], $4::bigint[])
                  WITH ORDINALITY AS item (sku, quantity, price, line)",
        )
        .bind(order.id.as_uuid())
        .bind(skus)
        .bind(quantities)
        .bind(prices)
        .execute(&mut *tx)
        .await?;
        tx.commit().await?;
        Ok(())
    }

    async fn find(&self, id: OrderId) -> Result<Option<Order>, StorageError> {
        let lines = sqlx::query_as(&rows::select("WHERE id = $1"))
            .bind(id.as_uuid())
            .fetch_all(&self.pool)
            .await?;
        Ok(rows::orders(lines)?.pop())
    }

    async fn list(&self, after: Option<OrderId>, limit: u32) -> Result<Vec<Order>, StorageError> {
        let select = rows::select(if after.is_some() {
            rows::OLDER
        } else {
            rows::NEWEST
        });
        let query = sqlx::query_as(&select).bind(i64::from(limit));
        let query = match after {
            Some(after) => query.bind(after.as_uuid()),
            None => query,
        };
        rows::orders(query.fetch_all(&self.pool).await?)
    }

    async fn cancel(&self, id: OrderId, now: Timestamp) -> Result<Option<Order>, StorageError> {
        sqlx::query(rows::CANCEL)
            .bind(now.as_millisecond())
            .bind(id.as_uuid())
            .execute(&self.pool)
            .await?;
        self.find(id).await
    }

    async fn check(&self) -> Result<(), StorageError> {
        rows::judge_schema(self.schema_version().await?, &migrations())
    }

    async fn schema_version(&self) -> Result<i64, StorageError> {
        Ok(sqlx::query_scalar(rows::SCHEMA_VERSION)
            .fetch_one(&self.pool)
            .await?)
    }

    async fn close(&self) {
        self.pool.close().await;
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    /// A release has one schema version, whichever database it finds.
    #[test]
    fn both_databases_have_the_same_versions() {
        let versions = |migrations: &Migrator| -> BTreeSet<i64> {
            migrations
                .iter()
                .map(|migration| migration.version)
                .collect()
        };
        assert_eq!(
            versions(&migrations()),
            versions(&sqlx::migrate!("migrations/sqlite"))
        );
    }
}
