//! Whatever happens between the service and its servers, what clients were told is so, once.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::time::Duration;

use reqwest::Url;
use serde_json::json;
use service::adapters::storage::StorageError;
use service::config::{CacheKind, LockKind, ServerUrl, Timeout};
use sqlx::Connection;
use test_servers::Server;
use tokio::time::timeout;

use crate::broker::Broker;
use crate::database::Database;
use crate::test_app::{TestApp, audited, eventually, order};
use crate::wire::{State, Wire};

/// How long each fault lasts: longer than any time-out but the request's.
const FAULT: Duration = Duration::from_millis(1500);
/// How long servers are away: as where somebody starts them anew.
const OUTAGE: Duration = Duration::from_secs(30);
const CLIENTS: usize = 6;

const FAULTS: [State; 5] = [
    State::Cut,
    State::Silent,
    State::Slow(Duration::from_millis(20)),
    State::HalfClosed,
    State::Lost,
];

/// The host and port of an address.
fn host(url: &str) -> String {
    Url::parse(url)
        .unwrap()
        .authority()
        .rsplit('@')
        .next()
        .unwrap()
        .to_owned()
}

/// The address of a database at the other end of a wire.
fn over(wire: &Wire, database: &Database) -> String {
    let url = database.url();
    url.replace(&host(url), &wire.address.to_string())
}

/// Each client places one order after another under a key of its own, and repeats it until it is told
/// that it was placed, as a careful client does.
async fn client(url: String, name: usize, placed: Arc<AtomicUsize>, stop: Arc<AtomicBool>) {
    let client = reqwest::Client::builder()
        .timeout(Duration::from_secs(1))
        .build()
        .unwrap();
    for number in 0.. {
        if stop.load(SeqCst) {
            return;
        }
        let key = format!("\"{name}-{number}\"");
        loop {
            let request = client.post(&url).header("idempotency-key", &key);
            match request.json(&order()).send().await {
                Ok(answer) if answer.status() == 201 => break,
                Ok(answer) => assert!(answer.status().is_server_error(), "{answer:?}"),
                // Nobody knows whether it was placed: that is what the key is for.
                Err(_) => {}
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        placed.fetch_add(1, SeqCst);
    }
}

/// Places one order after another, and repeats none; how many it has sent, and how many it was told were
/// placed.
async fn careless_client(url: String, stop: Arc<AtomicBool>) -> (usize, usize) {
    let client = reqwest::Client::new();
    let mut order = order();
    order["customer"] = json!("bob");
    let (mut sent, mut told) = (0, 0);
    while !stop.load(SeqCst) {
        sent += 1;
        match client.post(&url).json(&order).send().await {
            Ok(answer) if answer.status() == 201 => told += 1,
            Ok(answer) => assert!(answer.status().is_server_error(), "{answer:?}"),
            Err(_) => {}
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    (sent, told)
}

#[tokio::test(flavor = "multi_thread")]
async fn every_order_is_there_once_whatever_happens_on_the_wires() {
    let database = Database::postgres().await;
    let broker = Broker::rabbitmq().await;
    let redis = test_servers::lease(Server::Redis).await.unwrap();
    let wires = [
        ("database", Wire::to(&host(database.url())).await),
        ("broker", Wire::to(&broker.address()).await),
        ("cache and lock", Wire::to(&host(&redis.address)).await),
    ];
    let [(_, to_database), (_, to_broker), (_, to_redis)] = &wires;
    let distant = over(to_database, &database);
    let app = TestApp::start_on(database.clone(), |config| {
        broker.at(to_broker.address).use_in(config);
        config.database.url.0 = distant;
        config.cache.kind = CacheKind::Redis;
        config.lock.kind = LockKind::Redis;
        config.redis.url = ServerUrl(format!("redis://{}", to_redis.address));
        config.redis.prefix = uuid::Uuid::now_v7().to_string();
        config.events.lease = Timeout(Duration::from_secs(2));
    })
    .await;
    let (placed, stop) = (
        Arc::new(AtomicUsize::new(0)),
        Arc::new(AtomicBool::new(false)),
    );
    let url = format!("http://{}/v1/orders", app.public);
    let clients: Vec<_> = (0..CLIENTS)
        .map(|name| client(url.clone(), name, Arc::clone(&placed), Arc::clone(&stop)))
        .map(tokio::spawn)
        .collect();
    let careless = tokio::spawn(careless_client(url, Arc::clone(&stop)));
    let through = async |wires: &[(&str, Wire)], fault: State, time: Duration| {
        let names: Vec<&str> = wires.iter().map(|(name, _)| *name).collect();
        let become_all = |state: State| wires.iter().for_each(|(_, wire)| wire.becomes(state));
        let more_orders = async |when: &str| {
            let before = placed.load(SeqCst);
            eventually(
                &format!("orders {when} {names:?} were {fault:?}"),
                async || placed.load(SeqCst) > before + CLIENTS,
            )
            .await;
        };
        become_all(fault);
        tokio::time::sleep(time).await;
        if !names.contains(&"database") {
            // Without the broker, the cache and the lock, orders are placed all the same.
            more_orders("while").await;
        }
        become_all(State::Whole);
        more_orders("after").await;
    };
    for wire in &wires {
        for fault in FAULTS {
            through(std::slice::from_ref(wire), fault, FAULT).await;
        }
    }
    let (database_only, others) = wires.split_at(1);
    through(others, State::Cut, OUTAGE).await;
    through(database_only, State::Cut, OUTAGE).await;
    stop.store(true, SeqCst);
    for client in clients {
        client.await.unwrap();
    }
    let (sent, told) = careless.await.unwrap();

    let placed = placed.load(SeqCst);
    let storage = app.app.storage();
    eventually("all is told", async || {
        storage.untold(1).await.unwrap().is_empty()
    })
    .await;
    let totals = async |customer: &str| {
        let totals = format!("/v1/customers/{customer}/totals");
        app.get(&totals).await.1
    };
    let of = |orders: usize| json!([{ "currency": "EUR", "orders": orders, "total_cents": orders * 2100 }]);
    eventually("all is counted", async || totals("ada").await == of(placed)).await;
    // Of those that nobody sent twice, some answers were lost: none of what was told, and nothing more
    // than was sent. The last may have been at work for a while.
    let mut orders = 0;
    eventually("all that is there is counted", async || {
        orders = app.number_of_orders().await;
        totals("bob").await == of(orders - placed)
    })
    .await;
    let bobs = orders - placed;
    assert!((told..=sent).contains(&bobs), "{told} <= {bobs} <= {sent}");
    audited(&database, orders).await;
}

/// After a few have waited in vain nobody waits: not until somebody has got a connection again.
#[tokio::test]
async fn a_database_that_is_away_is_left_alone_for_a_while() {
    let database = Database::postgres().await;
    for (away, rest) in [
        (State::Silent, Duration::from_secs(600)),
        (State::Cut, Duration::from_secs(600)),
        (State::Silent, Duration::from_millis(100)),
    ] {
        let wire = Wire::to(&host(database.url())).await;
        let distant = over(&wire, &database);
        let app = TestApp::start_on(database.clone(), |config| {
            config.database.url.0 = distant;
            config.database.acquire_timeout = Timeout(Duration::from_millis(300));
            config.server.request_timeout = Timeout(Duration::from_secs(1));
            config.circuit_breaker.failures = 3.try_into().unwrap();
            config.circuit_breaker.rest = Timeout(rest);
        })
        .await;
        // On a busy machine the first connection may take longer than somebody waits here.
        let is_answered = async || app.get("/v1/orders").await.0 == 200;
        eventually("it is answered", is_answered).await;
        wire.becomes(away);
        let storage = app.app.storage();
        eventually("nobody waits any more", async || {
            assert!(
                matches!(app.get("/v1/orders").await.0, 503 | 504),
                "{away:?}"
            );
            // By itself it would wait for a connection that says nothing.
            match timeout(Duration::from_secs(1), storage.list(None, 1)).await {
                Ok(Err(StorageError::Busy(why))) => why.contains("left alone"),
                Ok(other) => panic!("{other:?}"),
                Err(_) => false,
            }
        })
        .await;
        wire.becomes(State::Whole);
        // Also where no request would try for long: what is done in the background gets a connection.
        eventually("it is asked again", is_answered).await;
    }
}

/// The database has placed it, and its answer is lost: it is looked for, and not placed once more.
#[tokio::test]
async fn an_order_whose_answer_was_lost_is_placed_once() {
    let database = Database::postgres().await;
    let wire = Wire::to(&host(database.url())).await;
    let distant = over(&wire, &database);
    let app = TestApp::start_on(database.clone(), |config| {
        config.database.url.0 = distant;
        // It is the same one that knows the statement; and nothing else goes over the wire.
        config.database.max_connections = 1.try_into().unwrap();
        config.lock.kind = LockKind::Redis;
        config.redis.url = ServerUrl("redis://127.0.0.1:1".to_owned());
    })
    .await;
    let orders = async || {
        let mut connection = sqlx::PgConnection::connect(database.url()).await.unwrap();
        let count = sqlx::query_scalar::<_, i64>("SELECT count(*) FROM orders");
        count.fetch_one(&mut connection).await.unwrap()
    };
    for round in 0..5 {
        assert_eq!(app.post("/v1/orders", order()).await.0, 201);
        wire.loses("INSERT 0 1");
        let (status, answer) = app.post("/v1/orders", order()).await;
        assert_eq!(status, 201, "{answer}");
        assert_eq!(orders().await, 2 * round + 2);
        assert!(wire.has_lost_it());
        let untold = app.app.storage().untold(100).await.unwrap();
        assert_eq!(i64::try_from(untold.len()).unwrap(), 2 * round + 2);
    }
}
