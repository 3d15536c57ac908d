//! A database server is lost, and its standby takes over.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::time::Duration;

use service::config::Timeout;
use sqlx::{Connection, Executor, PgConnection};
use test_servers::{Role, Standby};

use crate::database::Database;
use crate::test_app::{TestApp, eventually, order};

async fn execute(address: &str, sql: &str) {
    let mut connection = PgConnection::connect(address).await.unwrap();
    connection.execute(sql).await.unwrap();
}

/// The primary falls silent while orders come in, its standby is promoted, and then the old primary is
/// back and believes that nothing has happened. Every order that was acknowledged is with the new one,
/// even if that is silent for a while and the old one would take orders.
#[tokio::test(flavor = "multi_thread")]
async fn no_order_is_lost_when_a_standby_takes_over() {
    let servers = Standby::start().await.unwrap();
    let (primary, standby) = (&servers.primary_address, &servers.standby_address);
    for sql in [
        // What is acknowledged is with the standby, too.
        "ALTER ROLE postgres SET synchronous_commit = on",
        "ALTER SYSTEM SET synchronous_standby_names = '*'",
        "SELECT pg_reload_conf()",
    ] {
        execute(primary, sql).await;
    }
    // The standby comes first, so that only what the servers say leads to the primary.
    let (user, first) = standby.rsplit_once('@').unwrap();
    let (_, then) = primary.rsplit_once('@').unwrap();
    let (first, _) = first.split_once('/').unwrap();
    let database = Database::at(format!("{user}@{first},{then}"));
    let app = TestApp::start_on(database.clone(), |config| {
        config.database.acquire_timeout = Timeout(Duration::from_secs(1));
    })
    .await;

    let (acknowledged, refused) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let stop = Arc::new(AtomicBool::new(false));
    let orders = (0..4).map(|_| {
        let (acknowledged, refused) = (Arc::clone(&acknowledged), Arc::clone(&refused));
        let (url, stop) = (
            format!("http://{}/v1/orders", app.public),
            Arc::clone(&stop),
        );
        tokio::spawn(async move {
            let client = reqwest::Client::new();
            while !stop.load(SeqCst) {
                let answer = client.post(&url).json(&order()).send().await.unwrap();
                match answer.status().as_u16() {
                    201 => drop(acknowledged.fetch_add(1, SeqCst)),
                    503 | 504 => {
                        refused.fetch_add(1, SeqCst);
                        tokio::time::sleep(Duration::from_millis(5)).await;
                    }
                    other => panic!("{other}: {}", answer.text().await.unwrap()),
                }
            }
        })
    });
    let orders: Vec<_> = orders.collect();
    let more = async |what: &str, of: &AtomicUsize, wanted: usize| {
        let wanted = of.load(SeqCst) + wanted;
        eventually(what, async || of.load(SeqCst) >= wanted).await;
    };
    more("orders", &acknowledged, 50).await;
    servers.pause(Role::Primary).await.unwrap();
    let asked = PgConnection::connect(primary);
    let asked = tokio::time::timeout(Duration::from_secs(1), asked).await;
    assert!(asked.is_err(), "it answers");
    execute(standby, "SELECT pg_promote()").await;
    more("orders with the new primary", &acknowledged, 50).await;
    servers.resume(Role::Primary).await.unwrap();
    more("orders, while there are two", &acknowledged, 50).await;

    // From now on the old one would acknowledge what nobody else has.
    for sql in [
        "ALTER SYSTEM RESET synchronous_standby_names",
        "SELECT pg_reload_conf()",
    ] {
        execute(primary, sql).await;
    }
    let replaced = TestApp::start_on(Database::at(primary.clone()), |_| {}).await;
    let before = replaced.number_of_orders().await;
    servers.pause(Role::Standby).await.unwrap();
    more("refusals, while the new one is silent", &refused, 12).await;
    servers.resume(Role::Standby).await.unwrap();
    more("orders with the new one again", &acknowledged, 50).await;
    assert_eq!(
        replaced.number_of_orders().await,
        before,
        "it was used again"
    );

    // Whoever starts now finds two that believe to be it.
    let later = app.beside(|_| {}).await;
    eventually("an order", async || {
        later.post("/v1/orders", order()).await.0 == 201
    })
    .await;
    acknowledged.fetch_add(1, SeqCst);
    stop.store(true, SeqCst);
    for orders in orders {
        orders.await.unwrap();
    }
    assert_eq!(
        replaced.number_of_orders().await,
        before,
        "it was used again"
    );
    let acknowledged = acknowledged.load(SeqCst);
    let alone = TestApp::start_on(Database::at(standby.clone()), |_| {}).await;
    let kept = alone.number_of_orders().await;
    // An order whose answer was lost may be there too.
    assert!(kept >= acknowledged, "{kept} of {acknowledged}");
}
