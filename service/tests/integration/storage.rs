//! What every storage adapter promises, on each database there is one for.

use std::sync::Arc;

use jiff::Timestamp;
use service::adapters::storage::{self, Storage, StorageError};
use service::domain::orders::{ItemRequest, Order, OrderId, OrderRequest, Status};

use crate::database::Database;
use crate::test_app::shipped_config;

/// An adapter on an empty database, with the name of its kind.
async fn each() -> Vec<(&'static str, Database, Arc<dyn Storage>)> {
    let mut all = Vec::new();
    for database in Database::each().await {
        let storage = open(&database, false).await;
        all.push((database.kind, database, storage));
    }
    all
}

async fn open(database: &Database, read_only: bool) -> Arc<dyn Storage> {
    let mut config = shipped_config();
    database.use_in(&mut config);
    config.database.read_only = read_only;
    storage::open(&config.database).await.unwrap()
}

fn order(lines: u32) -> Order {
    let item = |line| ItemRequest {
        sku: format!("sku-{line}\u{e9}"),
        quantity: 1 + line,
        unit_price_cents: i64::from(line) * 100,
    };
    let request = OrderRequest {
        customer: "ada".to_owned(),
        currency: "EUR".to_owned(),
        items: (0..lines).map(item).collect(),
    };
    Order::place(request, 50).unwrap()
}

#[tokio::test]
async fn what_went_in_comes_out() {
    for (kind, _database, storage) in each().await {
        let (one, many) = (order(1), order(50));
        storage.insert(&one).await.unwrap();
        storage.insert(&many).await.unwrap();
        assert_eq!(storage.find(one.id).await.unwrap(), Some(one), "{kind}");
        assert_eq!(storage.find(many.id).await.unwrap(), Some(many), "{kind}");
        assert_eq!(storage.find(order(1).id).await.unwrap(), None, "{kind}");
    }
}

#[tokio::test]
async fn pages_go_from_the_newest_to_the_oldest() {
    for (kind, _database, storage) in each().await {
        let mut placed = Vec::new();
        for _ in 0..7 {
            let order = order(3);
            storage.insert(&order).await.unwrap();
            placed.push(order);
        }
        placed.sort_by_key(|order| std::cmp::Reverse(order.id));
        let mut listed = Vec::new();
        let mut after: Option<OrderId> = None;
        loop {
            let page = storage.list(after, 3).await.unwrap();
            assert!(page.len() <= 3, "{kind}");
            match page.last() {
                Some(last) => after = Some(last.id),
                None => break,
            }
            listed.extend(page);
        }
        assert_eq!(listed, placed, "{kind}");
    }
}

#[tokio::test]
async fn an_order_is_cancelled_once() {
    for (kind, _database, storage) in each().await {
        let order = order(2);
        storage.insert(&order).await.unwrap();
        let at = |millis| Timestamp::from_millisecond(millis).unwrap();
        let first = storage.cancel(order.id, at(1_000)).await.unwrap().unwrap();
        assert_eq!(first.status, Status::Cancelled, "{kind}");
        assert_eq!(first.updated_at, at(1_000), "{kind}");
        let again = storage.cancel(order.id, at(2_000)).await.unwrap().unwrap();
        assert_eq!(again, first, "{kind}: the second time changes nothing");
        let nobody = crate::storage::order(1).id;
        assert_eq!(
            storage.cancel(nobody, at(3_000)).await.unwrap(),
            None,
            "{kind}"
        );
    }
}

/// Half an order would be worse than none.
#[tokio::test]
async fn an_order_is_written_whole_or_not_at_all() {
    for (kind, _database, storage) in each().await {
        let order = order(2);
        let mut broken = order.clone();
        // The schema refuses it, after the order's own row and its first line went in.
        broken.items[1].quantity = 0;
        let error = storage.insert(&broken).await.unwrap_err();
        assert!(matches!(error, StorageError::Failed(_)), "{kind}: {error}");
        assert_eq!(storage.find(order.id).await.unwrap(), None, "{kind}");
        storage.insert(&order).await.unwrap();
        let twice = storage.insert(&order).await.unwrap_err();
        assert!(matches!(twice, StorageError::Failed(_)), "{kind}: {twice}");
    }
}

#[tokio::test]
async fn a_read_only_adapter_reads_and_refuses_writes() {
    for (kind, database, storage) in each().await {
        let placed = order(1);
        storage.insert(&placed).await.unwrap();
        let reader = open(&database, true).await;
        assert_eq!(
            reader.find(placed.id).await.unwrap(),
            Some(placed),
            "{kind}"
        );
        let refused = reader.insert(&order(1)).await.unwrap_err();
        assert!(
            matches!(refused, StorageError::ReadOnly),
            "{kind}: {refused}"
        );
        reader.check().await.unwrap();
    }
}

/// Several processes start at once on an empty database.
#[tokio::test]
async fn all_of_many_starts_find_the_schema() {
    for database in Database::each().await {
        let starts = (0..4).map(|_| {
            let database = database.clone();
            tokio::spawn(async move { open(&database, false).await })
        });
        for start in starts.collect::<Vec<_>>() {
            let storage = start.await.unwrap();
            storage.check().await.unwrap();
            storage.insert(&order(1)).await.unwrap();
        }
    }
}

#[tokio::test]
async fn a_schema_that_is_too_old_is_named() {
    for (kind, database, storage) in each().await {
        database.execute("DELETE FROM _sqlx_migrations").await;
        let error = storage.check().await.unwrap_err();
        let named = matches!(error, StorageError::Schema { found: 0, needed } if needed > 0);
        assert!(named, "{kind}: {error}");
    }
}
