//! What every storage adapter promises, on each database there is one for.

use std::sync::Arc;
use std::time::Duration;

use futures_util::future::join_all;
use jiff::Timestamp;
use service::adapters::lock::Fence;
use service::adapters::storage::{self, Backlog, Change, Once, Placed, Storage, StorageError};
use service::config::Timeout;
use service::domain::events::{Cause, Event, Kind};
use service::domain::orders::{ItemRequest, Order, OrderId, OrderRequest, Status};
use sqlx::{Connection, Executor, SqliteConnection};

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
    storage::open(&config.database, &config.circuit_breaker)
        .await
        .unwrap()
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
        contact: None,
    };
    Order::place(request, 50).unwrap()
}

async fn place(storage: &dyn Storage, order: &Order) -> Result<Placed, StorageError> {
    let event = Event::new(Kind::Placed, order);
    storage.place(order, &event, None).await
}

#[tokio::test]
async fn what_went_in_comes_out() {
    for (kind, _database, storage) in each().await {
        let (one, many) = (order(1), order(50));
        place(&*storage, &one).await.unwrap();
        place(&*storage, &many).await.unwrap();
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
            place(&*storage, &order).await.unwrap();
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
        place(&*storage, &order).await.unwrap();
        let at = |millis| Timestamp::from_millisecond(millis).unwrap();
        let first = storage
            .cancel(order.id, at(1_000), Cause::default())
            .await
            .unwrap()
            .unwrap();
        assert_eq!(first.status, Status::Cancelled, "{kind}");
        assert_eq!(first.updated_at, at(1_000), "{kind}");
        let again = storage
            .cancel(order.id, at(2_000), Cause::default())
            .await
            .unwrap()
            .unwrap();
        assert_eq!(again, first, "{kind}: the second time changes nothing");
        let nobody = crate::storage::order(1).id;
        assert_eq!(
            storage
                .cancel(nobody, at(3_000), Cause::default())
                .await
                .unwrap(),
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
        let error = place(&*storage, &broken).await.unwrap_err();
        assert!(matches!(error, StorageError::Failed(_)), "{kind}: {error}");
        assert_eq!(storage.find(order.id).await.unwrap(), None, "{kind}");
        place(&*storage, &order).await.unwrap();
        let twice = place(&*storage, &order).await.unwrap_err();
        assert!(matches!(twice, StorageError::Failed(_)), "{kind}: {twice}");
    }
}

/// Orders that come together may be written together; the one that cannot be is no other's concern.
#[tokio::test]
async fn of_many_orders_at_once_each_has_its_own_outcome() {
    for (kind, _database, storage) in each().await {
        let orders: Vec<Order> = (0..40)
            .map(|number| {
                let mut order = order(1 + number % 3);
                if number % 10 == 7 {
                    order.items[0].quantity = 0;
                }
                order
            })
            .collect();
        let outcomes = join_all(orders.iter().map(|order| place(&*storage, order))).await;
        for (order, outcome) in orders.iter().zip(outcomes) {
            let is_good = order.items[0].quantity > 0;
            assert_eq!(outcome.is_ok(), is_good, "{kind}: {outcome:?}");
            let expected = is_good.then_some(order);
            let found = storage.find(order.id).await.unwrap();
            assert_eq!(found.as_ref(), expected, "{kind}");
        }
        assert_eq!(storage.untold(100).await.unwrap().len(), 36, "{kind}");
    }
}

/// Orders that are looked for together may be found together; one that cannot be read is no other's concern.
#[tokio::test]
async fn of_many_looked_for_at_once_each_is_found() {
    for (kind, database, storage) in each().await {
        let mut orders: Vec<Order> = (0..40).map(|number| order(1 + number % 3)).collect();
        orders[17].customer = "nobody can read it".to_owned();
        for order in &orders {
            place(&*storage, order).await.unwrap();
        }
        let spoil = format!(
            "UPDATE orders SET updated_at = {} WHERE customer = '{}'",
            i64::MAX,
            orders[17].customer
        );
        database.execute(&spoil).await;
        orders.push(order(1));
        let twice = || orders.iter().chain(orders.iter().rev());
        let found = join_all(twice().map(|order| storage.find(order.id))).await;
        for (order, found) in twice().zip(found) {
            let is_there = order.id != orders[40].id;
            match found {
                Ok(found) => assert_eq!(found.as_ref(), is_there.then_some(order), "{kind}"),
                Err(error) => assert_eq!(order.id, orders[17].id, "{kind}: {error}"),
            }
        }
        storage.find(orders[17].id).await.unwrap_err();
    }
}

#[tokio::test]
async fn a_read_only_adapter_reads_and_refuses_writes() {
    for (kind, database, storage) in each().await {
        let placed = order(1);
        place(&*storage, &placed).await.unwrap();
        let reader = open(&database, true).await;
        assert_eq!(
            reader.find(placed.id).await.unwrap(),
            Some(placed),
            "{kind}"
        );
        let refused = place(&*reader, &order(1)).await.unwrap_err();
        assert!(
            matches!(refused, StorageError::ReadOnly),
            "{kind}: {refused}"
        );
        reader.check().await.unwrap();
    }
}

/// SQLite takes one write at a time; reads are not behind those that wait for it.
#[tokio::test]
async fn reads_do_not_wait_for_writes() {
    let database = Database::sqlite();
    let mut config = shipped_config();
    database.use_in(&mut config);
    config.database.busy_timeout = Timeout(Duration::from_secs(60));
    let storage = storage::open(&config.database, &config.circuit_breaker)
        .await
        .unwrap();
    let placed = order(1);
    place(&*storage, &placed).await.unwrap();
    let mut outsider = SqliteConnection::connect(database.url()).await.unwrap();
    let writing = outsider.begin_with("BEGIN IMMEDIATE").await.unwrap();
    let late: Vec<_> = (0..50)
        .map(|_| {
            let storage = Arc::clone(&storage);
            tokio::spawn(async move { place(&*storage, &order(1)).await })
        })
        .collect();
    // All of them wait by now, more than there are connections.
    for _ in 0..100 {
        assert_eq!(
            storage.find(placed.id).await.unwrap().as_ref(),
            Some(&placed)
        );
    }
    assert!(late.iter().all(|late| !late.is_finished()));
    assert_eq!(storage.connections().waiting, 50);
    writing.rollback().await.unwrap();
    for late in late {
        late.await.unwrap().unwrap();
    }
    assert_eq!(storage.connections().waiting, 0);
}

/// As a release does that knows of no turns, and is replaced by this one.
#[tokio::test]
async fn a_database_is_migrated_beside_others_writes() {
    let database = Database::sqlite();
    let new = format!("{}?mode=rwc", database.url());
    let mut outsider = SqliteConnection::connect(&new).await.unwrap();
    let wal = "PRAGMA journal_mode = WAL; CREATE TABLE other (number INTEGER)";
    outsider.execute(wal).await.unwrap();
    let writing = tokio::spawn(async move {
        loop {
            let mut tx = outsider.begin_with("BEGIN IMMEDIATE").await.unwrap();
            tx.execute("INSERT INTO other VALUES (1)").await.unwrap();
            tokio::time::sleep(Duration::from_millis(2)).await;
            tx.commit().await.unwrap();
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    });
    let mut config = shipped_config();
    database.use_in(&mut config);
    config.database.busy_timeout = Timeout(Duration::from_secs(60));
    let storage = storage::open(&config.database, &config.circuit_breaker)
        .await
        .unwrap();
    storage.check().await.unwrap();
    assert!(!writing.is_finished());
    writing.abort();
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
            place(&*storage, &order(1)).await.unwrap();
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

/// What happened and what is told of it are one.
#[tokio::test]
async fn each_change_leaves_one_event_in_order() {
    for (kind, _database, storage) in each().await {
        let (first, second) = (order(1), order(2));
        place(&*storage, &first).await.unwrap();
        place(&*storage, &second).await.unwrap();
        let at = Timestamp::from_millisecond(1_000).unwrap();
        for _ in 0..2 {
            storage
                .cancel(first.id, at, Cause::default())
                .await
                .unwrap();
        }
        // One that was not written is not told of.
        let mut broken = order(2);
        broken.items[1].quantity = 0;
        place(&*storage, &broken).await.unwrap_err();

        let untold = storage.untold(10).await.unwrap();
        let events: Vec<Event> = untold
            .iter()
            .map(|untold| serde_json::from_str(&untold.event).unwrap())
            .collect();
        let told: Vec<_> = events
            .iter()
            .map(|event| (event.kind, event.subject))
            .collect();
        let wanted = [
            (Kind::Placed, first.id),
            (Kind::Placed, second.id),
            (Kind::Cancelled, first.id),
        ];
        assert_eq!(told, wanted, "{kind}");
        let waiting = Backlog {
            untold: 3,
            oldest: Some(first.created_at.as_millisecond()),
            unaudited: 3,
            buried: 0,
        };
        assert_eq!(storage.backlog().await.unwrap(), waiting, "{kind}");
        assert_eq!(events[2].data.status, Status::Cancelled, "{kind}");

        let fence = Fence {
            name: "relay",
            token: 1,
        };
        storage
            .told(&[untold[0].seq, untold[2].seq], fence)
            .await
            .unwrap();
        let left = storage.untold(10).await.unwrap();
        assert_eq!(left, untold[1..2], "{kind}");
        assert_eq!(storage.untold(100).await.unwrap().len(), 1, "{kind}");
    }
}

#[tokio::test]
async fn a_key_belongs_to_one_request() {
    for (kind, _database, storage) in each().await {
        let once = |fingerprint: u8, client: &str| Once {
            client: client.to_owned(),
            key: "k".to_owned(),
            fingerprint: [fingerprint; 32],
        };
        // Sixteen at a time: one of them places an order, and all learn of it.
        let storage: Arc<dyn Storage> = storage;
        let attempts = (0..16).map(|_| {
            let (storage, once) = (Arc::clone(&storage), once(1, "ada"));
            tokio::spawn(async move {
                let order = order(1);
                let event = Event::new(Kind::Placed, &order);
                let placed = storage.place(&order, &event, Some(&once)).await.unwrap();
                match placed {
                    Placed::New => (order.id, true),
                    Placed::Before(before) => (before.id, false),
                    Placed::KeyTaken => panic!("the same request"),
                }
            })
        });
        let mut placed = Vec::new();
        for attempt in attempts.collect::<Vec<_>>() {
            placed.push(attempt.await.unwrap());
        }
        assert_eq!(
            placed.iter().filter(|(_, is_new)| *is_new).count(),
            1,
            "{kind}"
        );
        assert!(placed.iter().all(|(id, _)| *id == placed[0].0), "{kind}");
        assert_eq!(storage.untold(100).await.unwrap().len(), 1, "{kind}");

        let other = order(1);
        let event = Event::new(Kind::Placed, &other);
        let place = async |once: Once| storage.place(&other, &event, Some(&once)).await.unwrap();
        assert_eq!(place(once(2, "ada")).await, Placed::KeyTaken, "{kind}");
        assert_eq!(
            place(once(2, "bob")).await,
            Placed::New,
            "{kind}: another client's key"
        );
        // Forgotten, it is a new one; and so is what was done, however much that was.
        let done: Vec<_> = (0..2500)
            .map(|_| (uuid::Uuid::now_v7(), Change::Nothing))
            .collect();
        let consumed = async || storage.consume("other", &done).await.unwrap();
        assert_eq!(consumed().await, [true; 2500], "{kind}");
        assert_eq!(consumed().await, [false; 2500], "{kind}");
        storage.forget(-1).await.unwrap();
        assert_eq!(consumed().await, [true; 2500], "{kind}");
        let third = order(1);
        let event = Event::new(Kind::Placed, &third);
        let placed = storage.place(&third, &event, Some(&once(3, "ada"))).await;
        assert_eq!(placed.unwrap(), Placed::New, "{kind}");
    }
}

#[tokio::test]
async fn a_lease_has_one_owner_at_a_time() {
    for (kind, database, storage) in each().await {
        let minute = Duration::from_secs(60);
        let lease = async |owner: &str| {
            let token = storage.lease("relay", owner, minute).await.unwrap();
            token.is_some()
        };
        assert!(lease("a").await, "{kind}");
        assert!(lease("a").await, "{kind}: it may stay");
        assert!(!lease("b").await, "{kind}");
        storage.give_up("relay", "b").await.unwrap();
        assert!(!lease("b").await, "{kind}: it was not b's");
        let another = storage.lease("another", "b", minute).await.unwrap();
        assert!(another.is_some(), "{kind}");
        // However the owner's own clock goes: the database's says that its time is over.
        database
            .execute("UPDATE leases SET expires_at = 1 WHERE name = 'relay'")
            .await;
        assert!(lease("b").await, "{kind}");
        assert!(!lease("a").await, "{kind}");
        storage.give_up("relay", "b").await.unwrap();
        assert!(lease("a").await, "{kind}");
    }
}

#[tokio::test]
async fn an_event_is_acted_on_once_and_by_each_consumer() {
    for (kind, _database, storage) in each().await {
        let order = order(1);
        let event = Event::new(Kind::Placed, &order);
        let change = |orders| Change::Totals {
            order: order.id,
            customer: "ada".to_owned(),
            currency: "EUR".to_owned(),
            orders,
            total_cents: orders * 5,
        };
        let consume = async |consumer: &str, event: &Event, orders: i64| {
            let consumed = storage
                .consume(consumer, &[(event.id, change(orders))])
                .await;
            consumed.map(|new| new == [true])
        };
        assert!(consume("totals", &event, 1).await.unwrap(), "{kind}");
        assert!(!consume("totals", &event, 1).await.unwrap(), "{kind}");
        let nothing = [(event.id, Change::Nothing)];
        let other = storage.consume("other", &nothing).await.unwrap();
        assert_eq!(other, [true], "{kind}");
        let totals = storage.totals("ada").await.unwrap();
        let total = (
            totals[0].currency.as_str(),
            totals[0].orders,
            totals[0].total_cents,
        );
        assert_eq!((totals.len(), total), (1, ("EUR", 1, 5)), "{kind}");

        // What the schema refuses is not half done, and can be put aside and tried again.
        let another = Event::new(Kind::Cancelled, &order);
        let error = consume("totals", &another, -7).await.unwrap_err();
        assert!(matches!(error, StorageError::Failed(_)), "{kind}: {error}");
        storage
            .bury("totals", another.id, "{}", "why")
            .await
            .unwrap();
        storage
            .bury("totals", another.id, "{}", "why")
            .await
            .unwrap();
        assert_eq!(storage.backlog().await.unwrap().buried, 1, "{kind}");
        let buried = storage.buried(10).await.unwrap();
        let letter = (buried[0].id, buried[0].error.as_str());
        assert_eq!((buried.len(), letter), (1, (another.id, "why")), "{kind}");
        assert!(consume("totals", &another, -1).await.unwrap(), "{kind}");
        storage.unbury("totals", another.id).await.unwrap();
        assert!(storage.buried(10).await.unwrap().is_empty(), "{kind}");
        assert_eq!(storage.totals("ada").await.unwrap()[0].orders, 0, "{kind}");
    }
}

/// Many events at once come to what they come to one after another; one that is refused undoes all.
#[tokio::test]
async fn many_events_are_acted_on_together_or_none() {
    for (kind, _database, storage) in each().await {
        let orders: Vec<Order> = (0..5).map(|_| order(1)).collect();
        let change = |order: &Order, customer: &str, orders: i64| Change::Totals {
            order: order.id,
            customer: customer.to_owned(),
            currency: "EUR".to_owned(),
            orders,
            total_cents: orders * 5,
        };
        let placed = |order: &Order, customer: &str| {
            let event = Event::new(Kind::Placed, order);
            (event.id, change(order, customer, 1))
        };
        let cancelled = |order: &Order, customer: &str| {
            let event = Event::new(Kind::Cancelled, order);
            (event.id, change(order, customer, -1))
        };
        let before = placed(&orders[0], "ada");
        let consume =
            async |events: &[(uuid::Uuid, Change)]| storage.consume("totals", events).await;
        assert_eq!(
            consume(std::slice::from_ref(&before)).await.unwrap(),
            [true],
            "{kind}"
        );
        let twice = placed(&orders[1], "ada");
        let batch = [
            before,
            twice.clone(),
            placed(&orders[2], "bob"),
            twice,
            cancelled(&orders[1], "ada"),
            placed(&orders[3], "ada"),
            // Nobody was told of it so far.
            cancelled(&orders[4], "bob"),
        ];
        let new = consume(&batch).await.unwrap();
        assert_eq!(new, [false, true, true, false, true, true, true], "{kind}");
        let total = async |customer: &str| {
            let totals = storage.totals(customer).await.unwrap();
            (totals[0].orders, totals[0].total_cents)
        };
        assert_eq!(total("ada").await, (2, 10), "{kind}");
        assert_eq!(total("bob").await, (1, 5), "{kind}");
        let several = ["bob", "nobody", "ada"].map(str::to_owned);
        let mut together = storage.totals_of(&several).await.unwrap();
        together.sort_by(|(one, _), (other, _)| one.cmp(other));
        let together: Vec<_> = together
            .iter()
            .map(|(customer, total)| (customer.as_str(), total.orders, total.total_cents))
            .collect();
        assert_eq!(together, [("ada", 2, 10), ("bob", 1, 5)], "{kind}");
        assert_eq!(consume(&batch).await.unwrap(), [false; 7], "{kind}");

        // There is no fourth order of bob's to take away three times.
        let event = Event::new(Kind::Cancelled, &orders[2]).id;
        let refused = [
            placed(&orders[4], "ada"),
            (event, change(&orders[2], "bob", -3)),
        ];
        let error = consume(&refused).await.unwrap_err();
        assert!(matches!(error, StorageError::Failed(_)), "{kind}: {error}");
        assert_eq!(total("ada").await, (2, 10), "{kind}");
        // That it was cancelled was heard first: put aside and tried again, it counts for nothing.
        assert_eq!(consume(&refused[..1]).await.unwrap(), [true], "{kind}");
        assert_eq!(total("ada").await, (2, 10), "{kind}");
        assert_eq!(
            consume(&[placed(&order(1), "ada")]).await.unwrap(),
            [true],
            "{kind}"
        );
        assert_eq!(total("ada").await, (3, 15), "{kind}");
    }
}
