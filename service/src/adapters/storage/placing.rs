//! Orders go into PostgreSQL with whatever other orders come just then: a statement, its plan's start and
//! its commit cost the server more than another row of it does.

use std::borrow::Borrow;
use std::num::NonZeroU32;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use sqlx::{PgExecutor, Postgres};

use super::gathered::Gathered;
use super::pools::Pools;
use super::rows::Placement;

/// Whether the statement may have been done before, and nobody knows.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Again {
    No,
    /// What is there already stays as it is.
    Perhaps,
}

/// All in one statement, and so in one round trip.
macro_rules! insert {
    ($on_conflict:literal) => {
        concat!(
            "WITH given AS (
                 SELECT * FROM unnest(
                     $1::uuid[], $2::text[], $3::text[], $4::text[], $5::bigint[], $6::bigint[],
                     $7::bytea[], $8::text[]
                 ) AS given (id, customer, currency, status, created_at, updated_at, contact, event)
             ), placed AS (
                 INSERT INTO orders
                        (id, customer, currency, status, created_at, updated_at, contact)
                 SELECT id, customer, currency, status, created_at, updated_at, contact FROM given ",
            $on_conflict,
            " RETURNING id
             ), lines AS (
                 INSERT INTO order_items (order_id, line, sku, quantity, unit_price_cents)
                 SELECT item.*
                 FROM unnest($9::uuid[], $10::bigint[], $11::text[], $12::bigint[], $13::bigint[])
                      AS item (order_id, line, sku, quantity, unit_price_cents)
                 JOIN placed ON placed.id = item.order_id
             )
             INSERT INTO outbox (event, created_at)
             SELECT event, created_at FROM given JOIN placed USING (id)"
        )
    };
}

/// Places each on its own or with others, and tries again on connections that turn out to be dead.
pub(super) fn gathered(
    pools: &Arc<Pools<Postgres>>,
    connections: NonZeroU32,
) -> Gathered<Placement> {
    let (pools, waits) = (Arc::clone(pools), pools.waits.clone());
    let write = move |placements: Vec<Arc<Placement>>| {
        let pools = Arc::clone(&pools);
        async move {
            let (pool, was_tried) = (pools.shared(), AtomicBool::new(false));
            let place = || {
                let again = match was_tried.swap(true, Relaxed) {
                    false => Again::No,
                    true => Again::Perhaps,
                };
                insert(&pool, &placements, again)
            };
            pools.retried(place).await?;
            Ok(vec![(); placements.len()])
        }
    };
    Gathered::new(connections, waits, write)
}

/// Orders, their lines and their events; all or none.
pub(super) async fn insert(
    at: impl PgExecutor<'_>,
    placements: &[impl Borrow<Placement>],
    again: Again,
) -> sqlx::Result<()> {
    let placements = || placements.iter().map(Borrow::borrow);
    let orders = || placements().map(|placement| &placement.order);
    let items = || {
        orders().flat_map(|order| {
            let items = (0i64..).zip(&order.items);
            items.map(|(line, item)| (order.id, line, item))
        })
    };
    let insert = match again {
        Again::No => insert!(""),
        Again::Perhaps => insert!("ON CONFLICT (id) DO NOTHING"),
    };
    sqlx::query(insert)
        .bind(each(orders(), |order| order.id.as_uuid()))
        .bind(each(orders(), |order| order.customer.as_str()))
        .bind(each(orders(), |order| order.currency.as_str()))
        .bind(each(orders(), |order| order.status.as_str()))
        .bind(each(orders(), |order| order.created_at.as_millisecond()))
        .bind(each(orders(), |order| order.updated_at.as_millisecond()))
        .bind(each(placements(), |placement| placement.contact.as_deref()))
        .bind(each(placements(), |placement| placement.event.as_str()))
        .bind(each(items(), |(order, _, _)| order.as_uuid()))
        .bind(each(items(), |(_, line, _)| line))
        .bind(each(items(), |(_, _, item)| item.sku.as_str()))
        .bind(each(items(), |(_, _, item)| i64::from(item.quantity)))
        .bind(each(items(), |(_, _, item)| item.unit_price_cents))
        .execute(at)
        .await?;
    Ok(())
}

/// One column.
fn each<T, U>(of: impl Iterator<Item = T>, value: impl Fn(T) -> U) -> Vec<U> {
    of.map(value).collect()
}
