//! Orders are found in PostgreSQL together with whatever other orders are asked for just then: a statement and
//! its round trip cost both sides more than another order in it does.

use std::collections::BTreeMap;
use std::num::NonZeroU32;
use std::sync::Arc;

use sqlx::Postgres;
use uuid::Uuid;

use super::gathered::Gathered;
use super::pools::Pools;
use super::rows;
use crate::domain::orders::{Order, OrderId};
use crate::keyring::Keyring;

/// Finds each on its own or with others, as it is at some moment after it was asked for.
pub(super) fn gathered(
    pools: &Arc<Pools<Postgres>>,
    connections: NonZeroU32,
    keyring: Option<&Keyring>,
) -> Gathered<OrderId, Option<Order>> {
    let (pools, keyring) = (Arc::clone(pools), keyring.cloned().map(Arc::new));
    let waits = pools.waits.clone();
    let select: Arc<str> = rows::select("WHERE id = ANY($1)").into();
    Gathered::new(connections, waits, move |ids: Vec<Arc<OrderId>>| {
        let (pools, keyring, select) = (Arc::clone(&pools), keyring.clone(), Arc::clone(&select));
        async move {
            let each: Vec<Uuid> = ids.iter().map(|id| id.as_uuid()).collect();
            let pool = pools.shared();
            let lines = || sqlx::query_as(&select).bind(&each).fetch_all(&pool);
            let found = rows::orders(pools.retried(lines).await?, keyring.as_deref())?;
            let found: BTreeMap<OrderId, Order> =
                found.into_iter().map(|order| (order.id, order)).collect();
            // More than one may have asked for the same.
            Ok(ids.iter().map(|id| found.get(id).cloned()).collect())
        }
    })
}
