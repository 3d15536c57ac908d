//! Every lock has one holder at a time, and whoever was it is found out.

use std::sync::Arc;
use std::time::Duration;

use service::adapters::lock::{self, Fence, Lock};
use service::adapters::storage::{self, Storage, StorageError};
use service::config::{LockKind, ServerUrl};
use sqlx::{Connection, SqliteConnection};
use test_servers::{Lease, Server};

use crate::database::Database;
use crate::test_app::{TestApp, audited, eventually, order, shipped_config};

const MINUTE: Duration = Duration::from_secs(60);

/// A lock of each kind, each as two processes have it.
struct Case {
    kind: String,
    storage: Arc<dyn Storage>,
    here: Arc<dyn Lock>,
    there: Arc<dyn Lock>,
    _homes: (Database, Lease),
}

async fn each() -> Vec<Case> {
    let mut cases = Vec::new();
    for (kind, database) in [
        (LockKind::InProcess, Database::sqlite()),
        (LockKind::Database, Database::sqlite()),
        (LockKind::Database, Database::postgres().await),
        (LockKind::Redis, Database::sqlite()),
    ] {
        let server = test_servers::lease(Server::Redis).await.unwrap();
        let mut config = shipped_config();
        config.lock.kind = kind;
        config.redis.url = ServerUrl(server.address.clone());
        config.redis.prefix = uuid::Uuid::now_v7().to_string();
        database.use_in(&mut config);
        let storage = storage::open(&config.database, &config.circuit_breaker)
            .await
            .unwrap();
        let here = lock::open(&config, &storage).unwrap();
        // One process has one.
        let there = match kind {
            LockKind::InProcess => Arc::clone(&here),
            _ => lock::open(&config, &storage).unwrap(),
        };
        cases.push(Case {
            kind: format!("{kind:?} beside {}", database.kind),
            storage,
            here,
            there,
            _homes: (database, server),
        });
    }
    cases
}

async fn hold(lock: &Arc<dyn Lock>, owner: &str, time: Duration) -> Option<Fence> {
    lock.hold("relay", owner, time).await.unwrap()
}

#[tokio::test]
async fn a_lock_has_one_holder_at_a_time() {
    for case in each().await {
        let (kind, here, there) = (&case.kind, &case.here, &case.there);
        let first = hold(here, "a", MINUTE).await.unwrap();
        assert_eq!(
            hold(here, "a", MINUTE).await,
            Some(first),
            "{kind}: it may stay"
        );
        assert_eq!(hold(there, "b", MINUTE).await, None, "{kind}");
        there.give_up("relay", "b").await.unwrap();
        assert_eq!(
            hold(there, "b", MINUTE).await,
            None,
            "{kind}: it was not b's"
        );
        let another = there.hold("another", "b", MINUTE).await.unwrap();
        assert!(another.is_some(), "{kind}");

        here.give_up("relay", "a").await.unwrap();
        let second = hold(there, "b", MINUTE).await.unwrap();
        assert!(second.token > first.token, "{kind}: {second:?} {first:?}");
        assert_eq!(hold(here, "a", MINUTE).await, None, "{kind}");
    }
}

/// Somebody has put the clock back, or chosen another kind of lock: what storage has seen is outdone.
#[tokio::test]
async fn tokens_outdo_those_of_a_clock_that_was_ahead() {
    for case in each().await {
        let (kind, lock, storage) = (&case.kind, &case.here, &case.storage);
        let first = hold(lock, "a", MINUTE).await.unwrap();
        let ahead = Fence {
            token: first.token + 3_600_000,
            ..first
        };
        storage.told(&[], ahead).await.unwrap();
        let refused = storage.told(&[], first).await.unwrap_err();
        assert!(matches!(refused, StorageError::Fenced("relay")), "{kind}");
        let newest = storage.newest_token("relay").await.unwrap();
        assert_eq!(newest, ahead.token, "{kind}");
        lock.outdo("relay", newest).await.unwrap();
        lock.give_up("relay", "a").await.unwrap();
        let second = hold(lock, "a", MINUTE).await.unwrap();
        storage.told(&[], second).await.unwrap();
    }
}

#[tokio::test]
async fn whoever_does_not_come_back_is_replaced() {
    for case in each().await {
        let (kind, here, there) = (&case.kind, &case.here, &case.there);
        let first = hold(here, "a", Duration::from_millis(300)).await.unwrap();
        let mut second = None;
        eventually(kind, async || {
            second = hold(there, "b", MINUTE).await;
            second.is_some()
        })
        .await;
        assert!(second.unwrap().token > first.token, "{kind}");
    }
}

/// The holder of a duty looks what there is to do far more often than it asks for a longer lease: a
/// database at rest is hardly written to.
#[tokio::test]
async fn a_duty_that_is_held_is_not_asked_for_at_each_look() {
    let database = Database::sqlite();
    let app = TestApp::start_on(database.clone(), |config| {
        config.lock.kind = LockKind::Database;
        config.events.lease.0 = 60 * MINUTE;
    })
    .await;
    let mut connection = SqliteConnection::connect(database.url()).await.unwrap();
    let mut leases = async || {
        sqlx::query_as::<_, (String, i64)>("SELECT name, expires_at FROM leases ORDER BY name")
            .fetch_all(&mut connection)
            .await
            .unwrap()
    };
    eventually("both duties are held", async || leases().await.len() == 2).await;
    let held = leases().await;
    // Both look after each.
    for number in 1..=5 {
        assert_eq!(app.post("/v1/orders", order()).await.0, 201);
        audited(&database, number).await;
        eventually("it is told", async || {
            app.app.storage().untold(1).await.unwrap().is_empty()
        })
        .await;
    }
    assert_eq!(leases().await, held);
}

/// Takes orders, of which there is one, and does nothing about them.
async fn with_an_untold_order(database: &Database) -> TestApp {
    let app = TestApp::start_on(database.clone(), |config| {
        config.lock.kind = LockKind::Redis;
        config.redis.url = ServerUrl("redis://127.0.0.1:1".to_owned());
    })
    .await;
    assert_eq!(app.post("/v1/orders", order()).await.0, 201);
    app
}

fn relay(token: i64) -> Fence {
    Fence {
        name: "relay",
        token,
    }
}

/// Processes' clocks say nothing about leases, but the database's may be put forward or back.
#[tokio::test]
async fn a_clock_that_is_put_forward_or_back_keeps_no_lock_for_ever() {
    for database in Database::each().await {
        let app = with_an_untold_order(&database).await;
        let storage = app.app.storage();
        let untold = storage.untold(1).await.unwrap();
        let mut token = 0;
        for (from, to, hour) in [("a", "b", "-"), ("b", "c", "+")] {
            let hold = async |owner| storage.lease("relay", owner, MINUTE).await.unwrap();
            let held = hold(from).await.unwrap();
            assert_eq!(hold(to).await, None);
            let moved = format!("UPDATE leases SET expires_at = expires_at {hour} 3600000");
            app.execute(&moved).await;
            let (before, taken) = (token, hold(to).await.unwrap());
            assert!(before <= held && held < taken, "{}", database.kind);
            token = taken;
            // Its former holder believes that it still has it.
            storage.told(&[], relay(taken)).await.unwrap();
            let refused = storage.told(&[untold[0].seq], relay(held)).await;
            let is_fenced = matches!(refused, Err(StorageError::Fenced("relay")));
            assert!(is_fenced, "{refused:?}");
            app.execute("UPDATE leases SET expires_at = 0").await;
        }
    }
}

/// Many want it at once: one gets it, and so on, with a larger token each time.
#[tokio::test(flavor = "multi_thread")]
async fn of_many_one_gets_it() {
    for case in each().await {
        let mut last = 0;
        for round in 0..5 {
            let tries = (0..20).map(|i| {
                let lock = Arc::clone(if i % 2 == 0 { &case.here } else { &case.there });
                tokio::spawn(async move {
                    let owner = format!("{round}-{i}");
                    let fence = hold(&lock, &owner, MINUTE).await?;
                    lock.give_up("relay", "nobody").await.unwrap();
                    Some((owner, fence))
                })
            });
            let mut holders = Vec::new();
            for attempt in tries.collect::<Vec<_>>() {
                holders.extend(attempt.await.unwrap());
            }
            assert_eq!(holders.len(), 1, "{}: {holders:?}", case.kind);
            let (owner, fence) = &holders[0];
            assert!(fence.token > last, "{}", case.kind);
            last = fence.token;
            case.here.give_up("relay", owner).await.unwrap();
        }
    }
}

/// A process that was paused for longer than its lock was its own does not know it. What it then wants
/// to have told, or chained, is refused, and nothing is changed.
#[tokio::test]
async fn whoever_was_the_holder_writes_nothing_more() {
    for database in Database::each().await {
        let app = with_an_untold_order(&database).await;
        let storage = app.app.storage();
        let (paused, next) = (relay(7), relay(8));
        let untold = storage.untold(10).await.unwrap();
        assert_eq!(untold.len(), 1);
        storage.told(&[], next).await.unwrap();
        let refused = storage.told(&[untold[0].seq], paused).await;
        assert!(
            matches!(refused, Err(StorageError::Fenced("relay"))),
            "{refused:?}"
        );
        assert_eq!(
            storage.untold(10).await.unwrap(),
            untold,
            "{}",
            database.kind
        );
        let audit = |token| Fence {
            name: "audit",
            token,
        };
        assert_eq!(storage.audit(10, audit(2)).await.unwrap(), 1);
        assert_eq!(app.post("/v1/orders", order()).await.0, 201);
        let refused = storage.audit(10, audit(1)).await;
        assert!(
            matches!(refused, Err(StorageError::Fenced("audit"))),
            "{refused:?}"
        );
        assert_eq!(storage.audited(0, 10).await.unwrap().len(), 1);
        storage.told(&[untold[0].seq], next).await.unwrap();
        assert_eq!(storage.untold(10).await.unwrap().len(), 1);
    }
}

/// A lock of another kind had larger tokens, as where its settings are changed back. Whoever has this one
/// gets a newer token, and nothing stands still.
#[tokio::test]
async fn a_holder_whose_token_is_too_old_gets_another() {
    for database in Database::each().await {
        let app = TestApp::start_on(database.clone(), |_| {}).await;
        assert_eq!(app.post("/v1/orders", order()).await.0, 201);
        let storage = app.app.storage();
        let all_told = async || storage.untold(1).await.unwrap().is_empty();
        eventually("it is told", all_told).await;
        for name in ["relay", "audit"] {
            let token = jiff::Timestamp::now().as_millisecond() + 1_000_000;
            let other = Fence { name, token };
            storage.told(&[], other).await.unwrap();
        }
        assert_eq!(app.post("/v1/orders", order()).await.0, 201);
        eventually("it is told again", all_told).await;
        eventually("it is in the audit log", async || {
            storage.audited(0, 10).await.unwrap().len() == 2
        })
        .await;
    }
}
