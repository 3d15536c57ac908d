//! The adapter for PostgreSQL.

use std::str::FromStr;

use anyhow::Context;
use async_trait::async_trait;
use jiff::Timestamp;
use sqlx::migrate::Migrator;
use sqlx::postgres::{PgConnectOptions, PgPoolOptions};
use sqlx::{Connection, PgConnection, PgPool};
use uuid::Uuid;

use super::{Change, DeadLetter, Once, Placed, Storage, StorageError, Untold, rows};
use crate::config::Database;
use crate::domain::events::{Event, Kind};
use crate::domain::orders::{Order, OrderId, Total};

/// Milliseconds since the Unix epoch, by the database's clock.
const NOW: &str = "(extract(epoch FROM clock_timestamp()) * 1000)::bigint";

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
    async fn place(
        &self,
        order: &Order,
        event: &Event,
        once: Option<&Once>,
    ) -> Result<Placed, StorageError> {
        let mut tx = self.pool.begin().await?;
        if let Some(once) = once {
            let claim = sqlx::query(rows::CLAIM_KEY)
                .bind(&once.client)
                .bind(&once.key);
            let claim = claim.bind(&once.fingerprint[..]).bind(order.id.as_uuid());
            let claim = claim.bind(order.created_at.as_millisecond());
            if claim.execute(&mut *tx).await?.rows_affected() == 0 {
                let taken = sqlx::query_as(rows::KEY).bind(&once.client).bind(&once.key);
                let (fingerprint, id): (Vec<u8>, Uuid) = taken.fetch_one(&mut *tx).await?;
                drop(tx);
                if fingerprint != once.fingerprint {
                    return Ok(Placed::KeyTaken);
                }
                let before = self.find(OrderId::from(id)).await?;
                let lost = || StorageError::Failed("a key's order is gone".to_owned());
                return before.map(Placed::Before).ok_or_else(lost);
            }
        }
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
        let tell = sqlx::query(rows::TELL).bind(rows::to_text(event)?);
        tell.bind(Timestamp::now().as_millisecond())
            .execute(&mut *tx)
            .await?;
        tx.commit().await?;
        Ok(Placed::New)
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
        let mut tx = self.pool.begin().await?;
        let cancel = sqlx::query(rows::CANCEL)
            .bind(now.as_millisecond())
            .bind(id.as_uuid());
        let is_changed = cancel.execute(&mut *tx).await?.rows_affected() == 1;
        let select = rows::select("WHERE id = $1");
        let lines = sqlx::query_as(&select).bind(id.as_uuid());
        let order = rows::orders(lines.fetch_all(&mut *tx).await?)?.pop();
        if let Some(order) = order.as_ref().filter(|_| is_changed) {
            let event = Event::new(Kind::Cancelled, order);
            let tell = sqlx::query(rows::TELL).bind(rows::to_text(&event)?);
            tell.bind(Timestamp::now().as_millisecond())
                .execute(&mut *tx)
                .await?;
        }
        tx.commit().await?;
        Ok(order)
    }

    async fn totals(&self, customer: &str) -> Result<Vec<Total>, StorageError> {
        let totals = sqlx::query_as(rows::TOTALS).bind(customer);
        Ok(totals.fetch_all(&self.pool).await?)
    }

    async fn lease(&self, name: &str, owner: &str, seconds: i64) -> Result<bool, StorageError> {
        let lease = rows::lease(NOW);
        let lease = sqlx::query(&lease).bind(name).bind(owner);
        let taken = lease.bind(seconds * 1000).execute(&self.pool).await?;
        Ok(taken.rows_affected() == 1)
    }

    async fn give_up(&self, name: &str, owner: &str) -> Result<(), StorageError> {
        let give_up = sqlx::query(rows::GIVE_UP).bind(name).bind(owner);
        give_up.execute(&self.pool).await?;
        Ok(())
    }

    async fn untold(&self, limit: u32) -> Result<Vec<Untold>, StorageError> {
        let untold = sqlx::query_as(rows::UNTOLD).bind(i64::from(limit));
        Ok(untold.fetch_all(&self.pool).await?)
    }

    async fn backlog(&self) -> Result<i64, StorageError> {
        let backlog = sqlx::query_scalar(rows::BACKLOG);
        Ok(backlog.fetch_one(&self.pool).await?)
    }

    async fn forget(&self, days: i64) -> Result<(), StorageError> {
        for old in rows::FORGET {
            let old = sqlx::query(old).bind(rows::days_ago(days));
            old.execute(&self.pool).await?;
        }
        Ok(())
    }

    async fn consume(
        &self,
        consumer: &str,
        event: &Event,
        change: &Change,
    ) -> Result<bool, StorageError> {
        let mut tx = self.pool.begin().await?;
        let done = sqlx::query(rows::DONE).bind(consumer).bind(event.id);
        let done = done.bind(Timestamp::now().as_millisecond());
        if done.execute(&mut *tx).await?.rows_affected() == 0 {
            return Ok(false);
        }
        if let Change::Totals {
            order,
            customer,
            currency,
            orders,
            total_cents,
        } = change
        {
            let count = rows::COUNT[usize::from(*orders < 0)];
            let count = sqlx::query(count).bind(order.as_uuid());
            let is_counted = count.execute(&mut *tx).await?.rows_affected() == 1;
            for add in rows::ADD_TO_TOTALS.iter().filter(|_| is_counted) {
                let add = sqlx::query(add).bind(customer).bind(currency);
                let add = add.bind(orders).bind(total_cents);
                if add.execute(&mut *tx).await?.rows_affected() == 1 {
                    break;
                }
            }
        }
        tx.commit().await?;
        Ok(true)
    }

    async fn bury(
        &self,
        consumer: &str,
        id: Uuid,
        event: &str,
        error: &str,
    ) -> Result<(), StorageError> {
        let bury = sqlx::query(rows::BURY).bind(consumer).bind(id);
        let bury = bury.bind(event).bind(error);
        let bury = bury.bind(Timestamp::now().as_millisecond());
        bury.execute(&self.pool).await?;
        Ok(())
    }

    async fn is_buried(&self, consumer: &str, event: Uuid) -> Result<bool, StorageError> {
        let buried = sqlx::query_scalar::<_, i64>(rows::IS_BURIED);
        let buried = buried.bind(consumer).bind(event);
        Ok(buried.fetch_one(&self.pool).await? > 0)
    }

    async fn buried(&self, limit: u32) -> Result<Vec<DeadLetter>, StorageError> {
        let buried = sqlx::query_as(rows::BURIED).bind(i64::from(limit));
        Ok(buried.fetch_all(&self.pool).await?)
    }

    async fn unbury(&self, consumer: &str, event: Uuid) -> Result<(), StorageError> {
        let unbury = sqlx::query(rows::UNBURY).bind(consumer).bind(event);
        unbury.execute(&self.pool).await?;
        Ok(())
    }

    async fn told(&self, events: &[i64]) -> Result<(), StorageError> {
        let told = sqlx::query("DELETE FROM outbox WHERE seq = ANY($1)").bind(events);
        told.execute(&self.pool).await?;
        Ok(())
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
