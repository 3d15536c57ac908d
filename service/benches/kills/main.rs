//! 100,000 orders come in while processes are killed: each is there once, told, and counted once.
//!
//! `cargo xtask servers run -- cargo bench --package service --bench kills [-- ORDERS]` sends them to two
//! processes on one PostgreSQL, with RabbitMQ and then with Kafka between them and what is done about
//! orders, and kills one of the two with SIGKILL again and again. Clients send an order again, by the
//! same `Idempotency-Key`, until it is acknowledged. Then what is in the database is compared with what
//! was acknowledged; a difference ends it with a panic.
#![expect(clippy::unwrap_used, reason = "what cannot go on fails")]
#![expect(clippy::print_stdout, reason = "its result is what it prints")]

#[expect(dead_code, reason = "some of it is for tests only")]
#[path = "../../tests/integration/broker.rs"]
mod broker;
#[expect(dead_code, reason = "some of it is for tests only")]
#[path = "../../tests/integration/database.rs"]
mod database;
#[expect(dead_code, reason = "some of it is for the other benchmarks only")]
#[path = "../bare/load.rs"]
mod load;

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::time::{Duration, Instant};

use broker::Broker;
use database::Database;
use serde_json::{Value, json};
use sqlx::{Connection, PgConnection};
use tokio::task::JoinSet;
use uuid::Uuid;

const ORDERS: usize = 100_000;
const CLIENTS: usize = 32;
/// Of which each order is one's.
const CUSTOMERS: usize = 100;
const KILLS: usize = 40;
/// What has not come about by then is lost.
const PATIENCE: Duration = Duration::from_secs(120);
const CENTS: i64 = 450;

fn main() {
    let orders = std::env::args().skip(1).find_map(|word| word.parse().ok());
    let orders = orders.unwrap_or(ORDERS);
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        for broker in [Broker::rabbitmq().await, Broker::kafka().await] {
            let database = Database::postgres().await;
            let began = Instant::now();
            let (acknowledged, kills) = place(&database, &broker, orders).await;
            let placed = began.elapsed();
            check(&database, &broker, &acknowledged).await;
            println!(
                "{}: {} orders placed in {placed:.1?} while processes were killed {kills} times; each is \
                 there and counted once, and in the audit log, after {:.1?}",
                broker.kind,
                acknowledged.len(),
                began.elapsed()
            );
        }
    });
}

/// A service that is killed when this goes.
struct Service(Child);

impl Drop for Service {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn command(database: &Database, broker: &Broker) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_service"));
    let config = concat!(env!("CARGO_MANIFEST_DIR"), "/../config/service");
    command
        .env("SERVICE_CONFIG_DIR", config)
        .env("SERVICE__DATABASE__URL", database.url())
        .envs(broker.variables())
        .env("SERVICE__EVENTS__LEASE", "1s")
        .env("SERVICE__LOGGING__LEVEL", "error")
        .env("SERVICE__RATE_LIMIT__BURST", "100000000")
        .env("SERVICE__RATE_LIMIT__PER_SECOND", "100000000")
        .env("SERVICE__SERVER__ADMIN_LISTEN", "127.0.0.1:0")
        .stdin(Stdio::null());
    command
}

fn start(database: &Database, broker: &Broker, address: SocketAddr) -> Service {
    let mut command = command(database, broker);
    let listen = ("SERVICE__SERVER__LISTEN", address.to_string());
    Service(command.envs([listen]).spawn().unwrap())
}

/// Places them; their ids as they were acknowledged, and how often a process was killed meanwhile.
async fn place(database: &Database, broker: &Broker, orders: usize) -> (BTreeSet<Uuid>, usize) {
    let addresses = [(); 2].map(|()| load::free_address());
    let mut services = addresses.map(|address| Some(start(database, broker, address)));
    let (next, done) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let http = reqwest::Client::new();
    let mut clients = JoinSet::new();
    let mut handles = Vec::new();
    for client in 0..CLIENTS {
        let (http, next, done) = (http.clone(), Arc::clone(&next), Arc::clone(&done));
        let handle = clients.spawn(async move {
            let mut ids = Vec::new();
            loop {
                let number = next.fetch_add(1, SeqCst);
                if number >= orders {
                    return ids;
                }
                ids.push(order(&http, &addresses, client, number).await);
                done.fetch_add(1, SeqCst);
            }
        });
        handles.push(handle);
    }
    let mut kills = 0;
    while kills < KILLS && handles.iter().any(|client| !client.is_finished()) {
        // Each kill meets them at another point of their work.
        let due = (kills + 1) * orders / (KILLS + 1);
        if done.load(SeqCst) < due {
            tokio::time::sleep(Duration::from_millis(3)).await;
            continue;
        }
        let victim = kills % 2;
        services[victim] = None;
        services[victim] = Some(start(database, broker, addresses[victim]));
        kills += 1;
    }
    let ids = clients.join_all().await.into_iter().flatten();
    let ids: BTreeSet<Uuid> = ids.collect();
    assert_eq!(ids.len(), orders, "one order was taken for another");
    (ids, kills)
}

/// One order, sent again until somebody has it.
async fn order(
    http: &reqwest::Client,
    addresses: &[SocketAddr; 2],
    client: usize,
    number: usize,
) -> Uuid {
    let body = json!({
        "customer": format!("customer-{}", number % CUSTOMERS),
        "currency": "EUR",
        "items": [{ "sku": "tea", "quantity": 1, "unit_price_cents": CENTS }],
    });
    let began = Instant::now();
    for attempt in client.. {
        assert!(began.elapsed() < PATIENCE, "order {number} was not taken");
        let address = addresses[attempt % 2];
        let request = http.post(format!("http://{address}/v1/orders"));
        let request = request.header("idempotency-key", format!("order-{number}"));
        let answer = request.json(&body).send().await;
        if let Ok(answer) = answer
            && answer.status() == 201
            && let Ok(order) = answer.json::<Value>().await
        {
            return order["id"].as_str().unwrap().parse().unwrap();
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    unreachable!("an attempt without a number")
}

/// What is there, once nothing waits any more, is what was acknowledged.
async fn check(database: &Database, broker: &Broker, acknowledged: &BTreeSet<Uuid>) {
    let _last = start(database, broker, load::free_address());
    let mut connection = PgConnection::connect(database.url()).await.unwrap();
    let began = Instant::now();
    let wanted = i64::try_from(acknowledged.len()).unwrap();
    let mut left = async || -> (i64, i64, i64) {
        let left = "SELECT (SELECT count(*) FROM outbox), (SELECT count(*) FROM audit_waiting),
                           (SELECT count(*) FROM counted_orders)";
        sqlx::query_as(left)
            .fetch_one(&mut connection)
            .await
            .unwrap()
    };
    loop {
        let seen = left().await;
        if seen == (0, 0, wanted) {
            break;
        }
        assert!(
            began.elapsed() < PATIENCE,
            "{seen:?} untold, not chained, and counted of {wanted}"
        );
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    for ids in [
        "SELECT id FROM orders",
        "SELECT order_id FROM counted_orders",
    ] {
        let ids: Vec<Uuid> = sqlx::query_scalar(ids)
            .fetch_all(&mut connection)
            .await
            .unwrap();
        assert_eq!(ids.len(), acknowledged.len());
        assert_eq!(&ids.into_iter().collect::<BTreeSet<_>>(), acknowledged);
    }
    let sums = "SELECT sum(orders)::bigint, sum(total_cents)::bigint,
                       (SELECT count(*) FROM dead_letters)
                FROM customer_totals";
    let sums: (i64, i64, i64) = sqlx::query_as(sums)
        .fetch_one(&mut connection)
        .await
        .unwrap();
    assert_eq!(sums, (wanted, wanted * CENTS, 0));
    let audit = command(database, broker).args(["audit", "verify"]).output();
    let audit = String::from_utf8(audit.unwrap().stderr).unwrap();
    let whole = format!("the audit log is whole: {wanted} entries");
    assert!(audit.contains(&whole), "{audit}");
}
