//! Nothing that happened is lost, and nothing is done twice, whoever is killed and whenever.

use std::collections::BTreeSet;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::time::Duration;

use reqwest::Method;
use serde_json::{Value, json};
use service::config::Timeout;
use test_servers::Server;

use crate::broker::Broker;
use crate::database::Database;
use crate::test_app::{Process, TestApp, audited, config_dir, eventually, free_port, order};
use crate::wire::{State, Wire};

async fn totals(app: &TestApp, customer: &str) -> Value {
    let (status, totals) = app.get(&format!("/v1/customers/{customer}/totals")).await;
    assert_eq!(status, 200, "{totals}");
    totals
}

#[tokio::test]
async fn totals_follow_what_is_ordered_and_cancelled() {
    for database in Database::each().await {
        let app = TestApp::start_on(database, |_| {}).await;
        let (_, first) = app.post("/v1/orders", order()).await;
        app.post("/v1/orders", order()).await;
        let two = json!([{ "currency": "EUR", "orders": 2, "total_cents": 4200 }]);
        eventually("two orders", async || totals(&app, "ada").await == two).await;
        let cancel = format!("/v1/orders/{}/cancel", first["id"].as_str().unwrap());
        for _ in 0..2 {
            app.post(&cancel, json!({})).await;
        }
        let one = json!([{ "currency": "EUR", "orders": 1, "total_cents": 2100 }]);
        eventually("one order", async || totals(&app, "ada").await == one).await;
        assert_eq!(totals(&app, "nobody").await, json!([]));
    }
}

#[tokio::test]
async fn a_request_that_is_sent_again_places_one_order() {
    let app = TestApp::start().await;
    let key = |key: &str| [("idempotency-key", key.to_owned())];
    let post = async |key: &[(&str, String)], body: Value| {
        app.send_with(Method::POST, "/v1/orders", Some(body), key)
            .await
    };
    let (status, first) = post(&key("one"), order()).await;
    assert_eq!(status, 201, "{first}");
    // Its answer stays what it was, whatever has become of the order.
    let cancel = format!("/v1/orders/{}/cancel", first["id"].as_str().unwrap());
    app.post(&cancel, json!({})).await;
    assert_eq!(post(&key("one"), order()).await, (201, first));

    let mut other = order();
    other["customer"] = json!("bob");
    let (status, problem) = post(&key("one"), other.clone()).await;
    let kind = &problem["type"];
    assert_eq!((status, kind), (422, &json!("idempotency-key-reused")));
    assert_eq!(post(&key("two"), other).await.0, 201);
    for wrong in [String::new(), "k".repeat(256)] {
        let (status, problem) = post(&key(&wrong), order()).await;
        assert_eq!(
            (status, &problem["errors"][0]["field"]),
            (422, &json!("Idempotency-Key"))
        );
    }
}

/// An event that cannot be acted on is put aside, those after it are acted on, and it is tried again
/// when what was wrong is mended.
#[tokio::test]
async fn a_poisoned_event_is_put_aside() {
    for database in Database::each().await {
        let app = TestApp::start_on(database.clone(), |config| {
            config.events.attempts = 2.try_into().unwrap();
        })
        .await;
        let (_, poisoned) = app.post("/v1/orders", order()).await;
        let one = json!([{ "currency": "EUR", "orders": 1, "total_cents": 2100 }]);
        eventually("an order", async || totals(&app, "ada").await == one).await;
        // Somebody has lost the customer's orders: one fewer than none cannot be.
        app.execute("UPDATE customer_totals SET orders = 0").await;
        let cancel = format!("/v1/orders/{}/cancel", poisoned["id"].as_str().unwrap());
        app.post(&cancel, json!({})).await;
        // And somebody has written what is no event at all.
        app.execute("INSERT INTO outbox (event, created_at) VALUES ('{', 0)")
            .await;
        let mut next = order();
        next["customer"] = json!("bob");
        app.post("/v1/orders", next).await;
        eventually("the next one", async || totals(&app, "bob").await == one).await;

        let url = [
            ("SERVICE__DATABASE__URL", database.url()),
            // A busy machine is not what is asked about.
            ("SERVICE__DATABASE__BUSY_TIMEOUT", "30s"),
        ];
        let (code, said) = crate::commands::run("replay", &url).await;
        assert_eq!(code, 1, "{said}");
        for part in [
            "0 events acted on, 2 left",
            "totals still cannot",
            "relay still cannot",
        ] {
            assert!(said.contains(part), "{part}: {said}");
        }
        app.execute("UPDATE customer_totals SET orders = 1").await;
        let (_, said) = crate::commands::run("replay", &url).await;
        assert!(said.contains("1 events acted on, 1 left"), "{said}");
        let none = json!([{ "currency": "EUR", "orders": 0, "total_cents": 0 }]);
        assert_eq!(totals(&app, "ada").await, none);
    }
}

/// What comes by the broker and cannot be read is put aside, too, and read again in vain.
#[tokio::test]
async fn what_somebody_else_puts_there_is_put_aside() {
    let [_, rabbitmq, kafka] = Broker::each().await;
    let [sqlite, postgres] = Database::each().await;
    // PostgreSQL's texts have no NUL.
    for (broker, database) in [(rabbitmq, sqlite), (kafka, postgres)] {
        let app = TestApp::start_on(database.clone(), |config| broker.use_in(config)).await;
        let all = async |orders: usize| {
            let all =
                [json!({ "currency": "EUR", "orders": orders, "total_cents": orders * 2100 })];
            totals(&app, "ada").await == json!(all)
        };
        app.post("/v1/orders", order()).await;
        eventually("an order", async || all(1).await).await;
        for junk in [&b"{\"specversion\":"[..], b"\xff\x00", b""] {
            broker.put(junk).await;
        }
        app.post("/v1/orders", order()).await;
        eventually(broker.kind, async || all(2).await).await;
        // Those of another partition may come later.
        eventually("the others", async || {
            app.app.storage().buried(9).await.unwrap().len() == 3
        })
        .await;
        let url = [("SERVICE__DATABASE__URL", database.url())];
        let (code, said) = crate::commands::run("replay", &url).await;
        let left = said.contains("0 events acted on, 3 left");
        assert_eq!((code, left), (1, true), "{}: {said}", broker.kind);
    }
}

/// However many there are, and however long each takes: the ones after them are acted on.
#[tokio::test]
async fn many_poisoned_events_keep_nobody_waiting_for_ever() {
    let app = TestApp::start_on(Database::sqlite(), |config| {
        config.events.attempts = 3.try_into().unwrap();
        // A batch must be over within half of it.
        config.events.lease = Timeout(Duration::from_secs(1));
    })
    .await;
    let mut cancels = Vec::new();
    for _ in 0..12 {
        let (_, placed) = app.post("/v1/orders", order()).await;
        cancels.push(format!(
            "/v1/orders/{}/cancel",
            placed["id"].as_str().unwrap()
        ));
    }
    let all = json!([{ "currency": "EUR", "orders": 12, "total_cents": 12 * 2100 }]);
    eventually("the orders", async || totals(&app, "ada").await == all).await;
    app.execute("UPDATE customer_totals SET orders = 0").await;
    for cancel in cancels {
        app.post(&cancel, json!({})).await;
    }
    let mut next = order();
    next["customer"] = json!("bob");
    app.post("/v1/orders", next).await;
    let one = json!([{ "currency": "EUR", "orders": 1, "total_cents": 2100 }]);
    eventually("the next one", async || totals(&app, "bob").await == one).await;
    assert_eq!(app.app.storage().buried(100).await.unwrap().len(), 12);
}

/// Orders that were placed before anything was told of them, or by a release that told nothing.
#[tokio::test]
async fn totals_begin_with_what_is_there() {
    for database in Database::each().await {
        let kind = database.kind;
        let mut app = TestApp::start_on(database.clone(), |_| {}).await;
        let (_, first) = app.post("/v1/orders", order()).await;
        app.post("/v1/orders", order()).await;
        // As it was before; nobody is about to act on what was told.
        app.begin_stop();
        app.stopped().await.unwrap();
        for table in [
            "counted_orders",
            "customer_totals",
            "idempotency_keys",
            "dead_letters",
            "fences",
            "inbox",
            "leases",
            "outbox",
        ] {
            database.execute(&format!("DROP TABLE {table}")).await;
        }
        database
            .execute("DELETE FROM _sqlx_migrations WHERE version IN (2, 4)")
            .await;
        let upgraded = TestApp::start_on(database.clone(), |_| {}).await;
        let two = json!([{ "currency": "EUR", "orders": 2, "total_cents": 4200 }]);
        assert_eq!(totals(&upgraded, "ada").await, two, "{kind}");
        let cancel = format!("/v1/orders/{}/cancel", first["id"].as_str().unwrap());
        upgraded.post(&cancel, json!({})).await;
        let one = json!([{ "currency": "EUR", "orders": 1, "total_cents": 2100 }]);
        eventually("one order", async || totals(&upgraded, "ada").await == one).await;

        // One that nobody was told of is not taken out either.
        let (_, untold) = upgraded.post("/v1/orders", order()).await;
        eventually("two orders", async || totals(&upgraded, "ada").await == two).await;
        let id = untold["id"].as_str().unwrap();
        let hex = id.replace('-', "");
        let id = if kind == "SQLite" {
            format!("x'{hex}'")
        } else {
            format!("'{id}'")
        };
        upgraded
            .execute(&format!("DELETE FROM counted_orders WHERE order_id = {id}"))
            .await;
        let cancel = format!("/v1/orders/{}/cancel", untold["id"].as_str().unwrap());
        upgraded.post(&cancel, json!({})).await;
        eventually("it is told", async || {
            upgraded.app.storage().untold(1).await.unwrap().is_empty()
        })
        .await;
        assert_eq!(totals(&upgraded, "ada").await, two, "{kind}");
    }
}

/// A service as a process of its own, which can be killed.
fn service(database: &Database, broker: &Broker, port: u16, admin: u16) -> Process {
    dying_service(database, broker, port, admin, "")
}

/// One that ends at a failpoint as if it were killed.
fn dying_service(
    database: &Database,
    broker: &Broker,
    port: u16,
    admin: u16,
    failpoint: &str,
) -> Process {
    let child = Command::new(env!("CARGO_BIN_EXE_service"))
        .env("SERVICE_FAILPOINT", failpoint)
        .env("SERVICE_CONFIG_DIR", config_dir())
        .env("SERVICE__DATABASE__URL", database.url())
        .envs(broker.variables())
        .env("SERVICE__SERVER__LISTEN", format!("127.0.0.1:{port}"))
        .env(
            "SERVICE__SERVER__ADMIN_LISTEN",
            format!("127.0.0.1:{admin}"),
        )
        .env("SERVICE__EVENTS__LEASE", "1s")
        .env("SERVICE__LOGGING__LEVEL", "error")
        .stdin(Stdio::null())
        .spawn()
        .unwrap();
    Process(child)
}

/// Two processes on one database tell events and act on them, and are killed again and again while
/// orders come in: afterwards the totals are those of the orders that are there, each counted once.
#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_lost_or_doubled_when_processes_are_killed() {
    let [in_process, rabbitmq, kafka] = Broker::each().await;
    killed_again_and_again(Database::sqlite(), in_process).await;
    killed_again_and_again(Database::postgres().await, rabbitmq).await;
    killed_again_and_again(Database::postgres().await, kafka).await;
}

async fn killed_again_and_again(database: Database, broker: Broker) {
    let kind = broker.kind;
    let ports = [free_port(), free_port(), free_port(), free_port()];
    let start = |i: usize| service(&database, &broker, ports[2 * i], ports[2 * i + 1]);
    let mut processes = [Some(start(0)), Some(start(1))];
    let client = reqwest::Client::new();
    let mut acknowledged = 0;
    for round in 0..12 {
        let placed = Arc::new(AtomicUsize::new(0));
        let stop = Arc::new(AtomicBool::new(false));
        let posts = (0..4).map(|i| {
            let (client, placed, stop) = (client.clone(), Arc::clone(&placed), Arc::clone(&stop));
            let url = format!("http://127.0.0.1:{}/v1/orders", ports[2 * (i % 2)]);
            tokio::spawn(async move {
                while !stop.load(SeqCst) {
                    match client.post(&url).json(&order()).send().await {
                        Ok(answer) if answer.status() == 201 => {
                            placed.fetch_add(1, SeqCst);
                        }
                        // One that has just been started.
                        _ => tokio::time::sleep(Duration::from_millis(5)).await,
                    }
                }
            })
        });
        let posts: Vec<_> = posts.collect();
        eventually("orders", async || placed.load(SeqCst) >= 20).await;
        // Each kill meets them at another point of their work.
        tokio::time::sleep(Duration::from_millis(40 * (round % 5))).await;
        let victim = usize::try_from(round % 2).unwrap();
        processes[victim] = None;
        stop.store(true, SeqCst);
        for post in posts {
            post.await.unwrap();
        }
        acknowledged += placed.load(SeqCst);
        processes[victim] = Some(start(victim));
    }
    drop(processes);
    let last = TestApp::start_on(database.clone(), |config| broker.use_in(config)).await;
    eventually(&format!("{kind}: all is told"), async || {
        last.app.storage().untold(1).await.unwrap().is_empty()
    })
    .await;
    let orders = last.number_of_orders().await;
    // An order whose answer was lost may be there too.
    assert!(orders >= acknowledged, "{kind}: {orders} of {acknowledged}");
    let wanted = json!([{ "currency": "EUR", "orders": orders, "total_cents": orders * 2100 }]);
    eventually(&format!("{kind}: all is counted"), async || {
        totals(&last, "ada").await == wanted
    })
    .await;
    // Nothing comes that would be counted once more.
    assert_eq!(totals(&last, "ada").await, wanted, "{kind}");
}

/// Between every two steps that could be torn apart.
const FAILPOINTS: [&str; 7] = [
    "place-before-commit",
    "place-after-commit",
    "relay-after-publish",
    "relay-after-told",
    "consume-before-commit",
    "consume-after-commit",
    "audit-before-commit",
];

/// A process dies in each of them, some work after its start; another goes on.
#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_lost_or_doubled_wherever_a_process_dies() {
    let [in_process, rabbitmq, kafka] = Broker::each().await;
    dies_everywhere(Database::sqlite(), in_process).await;
    dies_everywhere(Database::postgres().await, rabbitmq).await;
    dies_everywhere(Database::postgres().await, kafka).await;
}

async fn dies_everywhere(database: Database, broker: Broker) {
    let kind = broker.kind;
    let (port, admin) = (free_port(), free_port());
    let url = format!("http://127.0.0.1:{port}/v1/orders");
    let stop = Arc::new(AtomicBool::new(false));
    let clients: Vec<_> = (0..4)
        .map(|name| tokio::spawn(careful_client(url.clone(), name, Arc::clone(&stop))))
        .collect();
    for failpoint in FAILPOINTS {
        let failpoint = format!("{failpoint}:3");
        let mut process = dying_service(&database, &broker, port, admin, &failpoint);
        eventually(&format!("{kind}: its end at {failpoint}"), async || {
            process.0.try_wait().unwrap().is_some()
        })
        .await;
        let killed = process.0.try_wait().unwrap().unwrap().signal();
        assert_eq!(killed, Some(9), "{kind}: {failpoint}");
    }
    let last = service(&database, &broker, port, admin);
    stop.store(true, SeqCst);
    let mut placed = BTreeSet::new();
    for client in clients {
        placed.extend(client.await.unwrap());
    }
    drop(last);
    let last = TestApp::start_on(database.clone(), |config| broker.use_in(config)).await;
    let orders = last.orders().await;
    assert_eq!(
        BTreeSet::from_iter(orders.iter().map(ToString::to_string)),
        placed
    );
    assert_eq!(orders.len(), placed.len(), "{kind}");
    let orders = orders.len();
    let wanted = json!([{ "currency": "EUR", "orders": orders, "total_cents": orders * 2100 }]);
    eventually(&format!("{kind}: all is counted"), async || {
        totals(&last, "ada").await == wanted
    })
    .await;
    eventually(&format!("{kind}: all is told"), async || {
        last.app.storage().untold(1).await.unwrap().is_empty()
    })
    .await;
    audited(&database, orders).await;
    assert_eq!(totals(&last, "ada").await, wanted, "{kind}");
}

/// A process that stands still for longer than its lease does not know that another has gone on. What it
/// was about to tell and to count when it stopped, and does when it goes on, counts once.
#[tokio::test(flavor = "multi_thread")]
async fn a_process_that_stands_still_is_replaced_and_nothing_is_doubled() {
    let database = Database::postgres().await;
    let broker = Broker::kafka().await;
    let ports = [free_port(), free_port()];
    let start = |port: u16| service(&database, &broker, port, free_port());
    let processes = ports.map(start);
    let client = reqwest::Client::new();
    let place = async |port: u16| {
        let url = format!("http://127.0.0.1:{port}/v1/orders");
        eventually("it is placed", async || {
            let placed = client.post(&url).json(&order()).send().await;
            placed.is_ok_and(|placed| placed.status() == 201)
        })
        .await;
    };
    let mut orders = 0;
    for round in 0..4 {
        let (still, other) = (round % 2, 1 - round % 2);
        for port in ports {
            place(port).await;
        }
        let pid = i32::try_from(processes[still].0.id()).unwrap();
        let pid = rustix::process::Pid::from_raw(pid).unwrap();
        rustix::process::kill_process(pid, rustix::process::Signal::STOP).unwrap();
        for _ in 0..10 {
            place(ports[other]).await;
        }
        orders += 12;
        let url = format!("http://127.0.0.1:{}/v1/customers/ada/totals", ports[other]);
        let wanted = json!([{ "currency": "EUR", "orders": orders, "total_cents": orders * 2100 }]);
        let counted = async || {
            let totals = client.get(&url).send().await.unwrap();
            totals.json::<Value>().await.unwrap() == wanted
        };
        eventually("the other counts all", counted).await;
        rustix::process::kill_process(pid, rustix::process::Signal::CONT).unwrap();
    }
    drop(processes);
    let last = TestApp::start_on(database.clone(), |config| broker.use_in(config)).await;
    assert_eq!(last.number_of_orders().await, orders);
    audited(&database, orders).await;
    let wanted = json!([{ "currency": "EUR", "orders": orders, "total_cents": orders * 2100 }]);
    assert_eq!(totals(&last, "ada").await, wanted);
}

/// Places one order after another, each under a key of its own until it is told that it is placed; the
/// ids of all of them.
async fn careful_client(url: String, name: usize, stop: Arc<AtomicBool>) -> Vec<String> {
    let client = reqwest::Client::new();
    let mut placed = Vec::new();
    while !stop.load(SeqCst) {
        let key = format!("\"{name}-{}\"", placed.len());
        loop {
            let request = client.post(&url).header("idempotency-key", &key);
            if let Ok(answer) = request.json(&order()).send().await
                && answer.status() == 201
                && let Ok(order) = answer.json::<Value>().await
            {
                placed.push(order["id"].as_str().unwrap().to_owned());
                break;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
    placed
}

/// Writes go on while the broker is away, and nothing of them is lost.
#[tokio::test]
async fn a_broker_that_goes_away_keeps_nobody_waiting() {
    let broker = Broker::rabbitmq().await;
    let wire = Wire::to(&broker.address()).await;
    wire.becomes(State::Cut);
    let app = TestApp::start_on(Database::sqlite(), |config| {
        broker.at(wire.address).use_in(config);
    })
    .await;
    let mut placed = 0;
    for _ in 0..3 {
        placed += place_without_a_broker(&app).await;
        wire.becomes(State::Whole);
        counts(&app, placed).await;
        wire.becomes(State::Cut);
    }
}

/// The same of Kafka, which stands still: connections are not even closed.
#[tokio::test]
async fn a_kafka_that_stands_still_keeps_nobody_waiting() {
    let kafka = test_servers::own(Server::Kafka).await.unwrap();
    let app = TestApp::start_on(Database::sqlite(), |config| {
        Broker::kafka_at(&kafka.address).use_in(config);
    })
    .await;
    assert_eq!(app.post("/v1/orders", order()).await.0, 201);
    let mut placed = 1;
    counts(&app, placed).await;
    for _ in 0..2 {
        kafka.pause().await.unwrap();
        placed += place_without_a_broker(&app).await;
        kafka.resume().await.unwrap();
        counts(&app, placed).await;
    }
}

/// How many orders were placed.
async fn place_without_a_broker(app: &TestApp) -> i64 {
    let placed = 20;
    for _ in 0..placed {
        assert_eq!(app.post("/v1/orders", order()).await.0, 201);
    }
    assert_eq!(app.get("/health/ready").await.0, 200);
    assert!(!app.app.storage().untold(1).await.unwrap().is_empty());
    placed
}

/// Waits until each of so many orders has been told of, once.
async fn counts(app: &TestApp, placed: i64) {
    let wanted = json!([{ "currency": "EUR", "orders": placed, "total_cents": placed * 2100 }]);
    eventually("all is counted", async || {
        totals(app, "ada").await == wanted
    })
    .await;
}
