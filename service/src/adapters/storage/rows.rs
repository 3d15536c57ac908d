//! What both SQL adapters have in common: the query for orders, and orders from its rows.

use jiff::Timestamp;
use sqlx::migrate::Migrator;
use uuid::Uuid;

use super::StorageError;
use crate::domain::orders::{Item, Order, OrderId, Status};

/// One line of an order, with what all lines of the order share.
#[derive(sqlx::FromRow)]
pub(super) struct Line {
    id: Uuid,
    customer: String,
    currency: String,
    status: String,
    created_at: i64,
    updated_at: i64,
    sku: String,
    quantity: i64,
    unit_price_cents: i64,
}

/// One row for each line of the orders that `page` selects, newest orders first.
pub(super) fn select(page: &str) -> String {
    format!(
        "SELECT o.id, customer, currency, status, created_at, updated_at,
                sku, quantity, unit_price_cents
         FROM (SELECT * FROM orders {page}) o JOIN order_items i ON i.order_id = o.id
         ORDER BY o.id DESC, i.line"
    )
}

/// The newest orders, and those older than `$1`.
pub(super) const NEWEST: &str = "ORDER BY id DESC LIMIT $1";
pub(super) const OLDER: &str = "WHERE id < $2 ORDER BY id DESC LIMIT $1";
pub(super) const CANCEL: &str =
    "UPDATE orders SET status = 'cancelled', updated_at = $1 WHERE id = $2 AND status = 'open'";
pub(super) const SCHEMA_VERSION: &str =
    "SELECT coalesce(max(version), 0) FROM _sqlx_migrations WHERE success";

/// The orders that the lines make up; lines of one order stand together.
pub(super) fn orders(lines: Vec<Line>) -> Result<Vec<Order>, StorageError> {
    let chunks = lines.chunk_by(|a, b| a.id == b.id);
    chunks.map(order).collect()
}

fn order(lines: &[Line]) -> Result<Order, StorageError> {
    let corrupt = |column: &str| StorageError::Failed(format!("{column} is corrupt"));
    let time = |millis: i64, column: &str| {
        Timestamp::from_millisecond(millis).map_err(|_| corrupt(column))
    };
    let first = lines.first().ok_or_else(|| corrupt("order_items"))?;
    let items = lines.iter().map(|line| {
        Ok(Item {
            sku: line.sku.clone(),
            quantity: u32::try_from(line.quantity).map_err(|_| corrupt("order_items.quantity"))?,
            unit_price_cents: line.unit_price_cents,
        })
    });
    Ok(Order::assemble(
        OrderId::from(first.id),
        first.customer.clone(),
        first.currency.clone(),
        first
            .status
            .parse::<Status>()
            .map_err(|()| corrupt("orders.status"))?,
        items.collect::<Result<_, StorageError>>()?,
        (
            time(first.created_at, "orders.created_at")?,
            time(first.updated_at, "orders.updated_at")?,
        ),
    ))
}

/// Whether the schema is new enough for this program.
pub(super) fn judge_schema(found: i64, migrations: &Migrator) -> Result<(), StorageError> {
    let needed = migrations.iter().map(|migration| migration.version).max();
    let needed = needed.unwrap_or(0);
    if found < needed {
        return Err(StorageError::Schema { found, needed });
    }
    Ok(())
}
