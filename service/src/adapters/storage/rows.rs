//! What both SQL adapters have in common: the query for orders, and orders from its rows.

use std::collections::{BTreeMap, HashSet};
use std::io::ErrorKind;
use std::sync::LazyLock;
use std::time::Duration;

use jiff::Timestamp;
use sqlx::postgres::PgRow;
use sqlx::sqlite::SqliteRow;
use sqlx::{FromRow, Row};
use tower::retry::budget::{Budget, TpsBudget};
use uuid::Uuid;

use super::abandoned::watched;
use super::migrations::Migrations;
use super::{Backlog, Change, DeadLetter, StorageError, Untold, contacts};
use crate::audit::Entry;
use crate::domain::orders::{Item, Order, OrderId, Status, Total};
use crate::keyring::Keyring;
use crate::metrics::METRICS;
use crate::pause::jittered;

/// Dead connections that are stepped over: more than a pool usually has.
const MOST_DEAD: u64 = 32;

/// Retries that a database which is in trouble is spared: at most a fifth of the tries, beside 300 that
/// are always free, over ten seconds.
/// <https://docs.rs/tower/latest/tower/retry/budget>
static BUDGET: LazyLock<TpsBudget> =
    LazyLock::new(|| TpsBudget::new(Duration::from_secs(10), 30, 0.2));

/// What is written where an order is placed.
pub(super) struct Placement {
    pub order: Order,
    /// Encrypted.
    pub contact: Option<Vec<u8>>,
    /// What is told of it, as JSON.
    pub event: String,
}

/// Tries again each time that the connection it got turns out to be dead, as those are that the pool
/// kept while the database was away. So it is for what changes nothing, or nothing more when it is done
/// again.
pub(super) async fn retried<T, F>(attempt: impl Fn() -> F) -> sqlx::Result<T>
where
    F: Future<Output = sqlx::Result<T>>,
{
    BUDGET.deposit();
    for number in 0..MOST_DEAD {
        match watched(attempt()).await {
            Err(error) if is_dead(&error) => {
                METRICS.database_dead_connections.inc();
                if !BUDGET.withdraw() {
                    METRICS.database_retries_refused.inc();
                    return Err(error);
                }
                // The first few cost nothing; behind many there may be a server that takes none.
                tokio::time::sleep(jittered(Duration::from_millis(number))).await;
            }
            done => return done,
        }
    }
    watched(attempt()).await
}

/// Whether an error says that the connection is no more.
fn is_dead(error: &sqlx::Error) -> bool {
    /// The server has ended it: on command, or with itself (PostgreSQL's appendix A).
    const ENDED: [&str; 3] = ["57P01", "57P02", "25P03"];
    match error {
        sqlx::Error::Io(error) => matches!(
            error.kind(),
            ErrorKind::BrokenPipe
                | ErrorKind::ConnectionAborted
                | ErrorKind::ConnectionReset
                | ErrorKind::TimedOut
                | ErrorKind::UnexpectedEof
        ),
        sqlx::Error::Database(error) => error.code().is_some_and(|code| ENDED.contains(&&*code)),
        _ => false,
    }
}

/// A struct from the columns of the same names, in either database.
macro_rules! from_row {
    ($row:ty, $($column:ident),+) => {
        from_row!(in PgRow, $row, $($column),+);
        from_row!(in SqliteRow, $row, $($column),+);
    };
    (in $columns:ty, $row:ty, $($column:ident),+) => {
        impl FromRow<'_, $columns> for $row {
            fn from_row(row: &$columns) -> sqlx::Result<Self> {
                Ok(Self { $($column: row.try_get(stringify!($column))?),+ })
            }
        }
    };
}

from_row!(Backlog, untold, oldest, unaudited, buried);
from_row!(DeadLetter, consumer, id, event, error);
from_row!(Entry, seq, event, hash);
from_row!(Total, currency, orders, total_cents);
from_row!(Untold, seq, event);
from_row!(
    Line,
    id,
    customer,
    currency,
    status,
    created_at,
    updated_at,
    sku,
    quantity,
    unit_price_cents,
    contact
);

/// One line of an order, with what all lines of the order share.
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
    contact: Option<Vec<u8>>,
}

/// One row for each line of the orders that `page` selects, newest orders first.
pub(super) fn select(page: &str) -> String {
    format!(
        "SELECT o.id, customer, currency, status, created_at, updated_at,
                sku, quantity, unit_price_cents, contact
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

pub(super) const TOTALS: &str = "SELECT currency, orders, total_cents FROM customer_totals
     WHERE customer = $1 ORDER BY currency";

/// The totals of the customers that a query selects.
pub(super) fn totals_of(customers: &str) -> String {
    format!(
        "SELECT customer, currency, orders, total_cents FROM customer_totals
         WHERE customer IN ({customers}) ORDER BY customer, currency"
    )
}

/// A customer with one of its totals, as `totals_of` selects them.
pub(super) type TotalOf = (String, String, i64, i64);

pub(super) fn total_of((customer, currency, orders, total_cents): TotalOf) -> (String, Total) {
    let total = Total {
        currency,
        orders,
        total_cents,
    };
    (customer, total)
}

pub(super) const CLAIM_KEY: &str =
    "INSERT INTO idempotency_keys (client, key, fingerprint, order_id, created_at)
     VALUES ($1, $2, $3, $4, $5) ON CONFLICT DO NOTHING";
pub(super) const KEY: &str =
    "SELECT fingerprint, order_id FROM idempotency_keys WHERE client = $1 AND key = $2";

pub(super) const TELL: &str = "INSERT INTO outbox (event, created_at) VALUES ($1, $2)";
pub(super) const UNTOLD: &str = "SELECT seq, event FROM outbox ORDER BY seq LIMIT $1";
/// Counted from the oldest on, so that neither the rows that are gone nor those that pile up are all looked
/// at, every few seconds and by each process. The limit is [`Backlog::MOST`].
pub(super) const BACKLOG: &str = "SELECT
    (SELECT count(*) FROM (SELECT 1 FROM outbox ORDER BY seq LIMIT $1) waiting) AS untold,
    (SELECT created_at FROM outbox ORDER BY seq LIMIT 1) AS oldest,
    (SELECT count(*) FROM (SELECT 1 FROM audit_waiting ORDER BY seq LIMIT $1) waiting) AS unaudited,
    (SELECT count(*) FROM (SELECT 1 FROM dead_letters LIMIT $1) aside) AS buried";

/// What changes come to for each customer and currency, of those orders that are newly counted, or are
/// no longer. In one order, so that nobody waits for another who waits for them.
pub(super) fn sums<'a>(
    changes: impl Iterator<Item = &'a Change>,
    counted: &mut [HashSet<Uuid>; 2],
) -> BTreeMap<(&'a str, &'a str), (i64, i64)> {
    let mut sums = BTreeMap::new();
    for change in changes {
        let Change::Totals {
            order,
            customer,
            currency,
            orders,
            total_cents,
        } = change
        else {
            continue;
        };
        if counted[usize::from(*orders < 0)].remove(&order.as_uuid()) {
            let sum: &mut (i64, i64) = sums
                .entry((customer.as_str(), currency.as_str()))
                .or_default();
            sum.0 += orders;
            sum.1 += total_cents;
        }
    }
    sums
}

/// The orders that changes are about: those that are more, and those that are fewer.
pub(super) fn counted<'a>(changes: impl Iterator<Item = &'a Change>) -> [Vec<Uuid>; 2] {
    let mut counted = [Vec::new(), Vec::new()];
    for change in changes {
        if let Change::Totals { order, orders, .. } = change {
            counted[usize::from(*orders < 0)].push(order.as_uuid());
        }
    }
    counted
}

/// First the one, and where there is nothing to add to, the other. (An upsert would hold a change of
/// fewer against the rule that there are no fewer than none.)
pub(super) const ADD_TO_TOTALS: [&str; 2] = [
    "UPDATE customer_totals SET orders = orders + $3, total_cents = total_cents + $4
     WHERE customer = $1 AND currency = $2",
    "INSERT INTO customer_totals (customer, currency, orders, total_cents)
     VALUES ($1, $2, $3, $4)",
];
pub(super) const WAITING_FOR_AUDIT: &str =
    "SELECT seq, event FROM audit_waiting ORDER BY seq LIMIT $1";
pub(super) const LAST_AUDITED: &str =
    "SELECT seq, event, hash FROM audit_log ORDER BY seq DESC LIMIT 1";
pub(super) const AUDITED: &str =
    "SELECT seq, event, hash FROM audit_log WHERE seq > $1 ORDER BY seq LIMIT $2";
pub(super) const IS_BURIED: &str =
    "SELECT count(*) FROM dead_letters WHERE consumer = $1 AND event_id = $2";
pub(super) const BURY: &str =
    "INSERT INTO dead_letters (consumer, event_id, event, error, failed_at)
     VALUES ($1, $2, $3, $4, $5) ON CONFLICT DO NOTHING";
pub(super) const BURIED: &str = "SELECT consumer, event_id AS id, event, error FROM dead_letters ORDER BY failed_at, event_id LIMIT $1";
pub(super) const UNBURY: &str = "DELETE FROM dead_letters WHERE consumer = $1 AND event_id = $2";

/// So many rows are forgotten at a time: others want to write meanwhile.
pub(super) const FORGOTTEN_AT_ONCE: i64 = 1000;
/// Some of what is older than `$1`, at most `$2` rows, and was kept only for clients and brokers that repeat
/// themselves.
pub(super) const FORGET: [&str; 2] = [
    "DELETE FROM idempotency_keys WHERE (client, key) IN
         (SELECT client, key FROM idempotency_keys WHERE created_at < $1 LIMIT $2)",
    "DELETE FROM inbox WHERE (consumer, event_id) IN
         (SELECT consumer, event_id FROM inbox WHERE done_at < $1 LIMIT $2)",
];

/// Takes a lease, or keeps it, where `now` is the database's clock in milliseconds; its token. One
/// that lasts for longer than twice what is asked for is nobody's: it was made before that clock was put
/// back, or by a process whose `events.lease` is that much longer.
pub(super) fn lease(now: &str) -> String {
    format!(
        "INSERT INTO leases (name, owner, expires_at, token) VALUES ($1, $2, {now} + $3, {now})
         ON CONFLICT (name) DO UPDATE
         SET owner = excluded.owner, expires_at = excluded.expires_at,
             token = CASE WHEN leases.owner = excluded.owner THEN leases.token
                          ELSE (SELECT max(token) FROM (
                              SELECT excluded.token AS token
                              UNION ALL SELECT leases.token + 1
                              UNION ALL SELECT fences.token + 1 FROM fences
                                        WHERE fences.name = leases.name) newer) END
         WHERE leases.owner = excluded.owner OR leases.expires_at < {now}
               OR leases.expires_at > {now} + 2 * $3
         RETURNING token"
    )
}

/// Changes nothing where a newer token was seen.
pub(super) const FENCE: &str = "INSERT INTO fences (name, token) VALUES ($1, $2)
     ON CONFLICT (name) DO UPDATE SET token = excluded.token WHERE fences.token <= excluded.token";

pub(super) const NEWEST_TOKEN: &str = "SELECT coalesce(max(token), 0) FROM fences WHERE name = $1";
pub(super) const GIVE_UP: &str =
    "UPDATE leases SET owner = '', expires_at = 0 WHERE name = $1 AND owner = $2";

/// Milliseconds of so many days ago.
pub(super) fn days_ago(days: i64) -> i64 {
    Timestamp::now().as_millisecond() - days * 86_400_000
}

pub(super) fn to_text(value: &impl serde::Serialize) -> Result<String, StorageError> {
    serde_json::to_string(value).map_err(|error| StorageError::Failed(error.to_string()))
}

/// The orders that the lines make up; lines of one order stand together.
pub(super) fn orders(
    lines: Vec<Line>,
    keyring: Option<&Keyring>,
) -> Result<Vec<Order>, StorageError> {
    let chunks = lines.chunk_by(|a, b| a.id == b.id);
    chunks.map(|lines| order(lines, keyring)).collect()
}

fn order(lines: &[Line], keyring: Option<&Keyring>) -> Result<Order, StorageError> {
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
    let contact = first.contact.as_ref();
    let contact = contact.map(|encrypted| contacts::decrypted(keyring, first.id, encrypted));
    let contact = contact.transpose()?;
    let order = Order::assemble(
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
    );
    Ok(Order { contact, ..order })
}

/// Whether the schema is new enough for this program.
pub(super) fn judge_schema(found: i64, migrations: Migrations) -> Result<(), StorageError> {
    let needed = migrations.newest();
    if found < needed {
        return Err(StorageError::Schema { found, needed });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    /// A database that ends each connection is not asked 32 times by everybody who wants something of it.
    #[tokio::test(start_paused = true)]
    async fn a_database_in_trouble_is_spared_most_retries() {
        const CALLS: usize = 50;
        let tries = Cell::new(0);
        let broken = || {
            tries.set(tries.get() + 1);
            std::future::ready(Err::<(), _>(sqlx::Error::Io(ErrorKind::BrokenPipe.into())))
        };
        let calls = (0..CALLS).map(|_| retried(broken));
        let answers = futures_util::future::join_all(calls).await;
        assert!(answers.iter().all(Result::is_err));
        // Those that are free, and a fifth of the tries.
        let most = CALLS + 300 + CALLS / 5;
        assert!((CALLS + 1..=most).contains(&tries.get()), "{tries:?}");
    }
}
