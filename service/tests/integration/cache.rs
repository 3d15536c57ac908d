//! What every cache adapter promises, and that nothing is lost with one.

use std::sync::Arc;
use std::time::Duration;

use reqwest::Method;
use serde_json::json;
use service::adapters::cache::{self, Cache};
use service::config::{CacheKind, Config, ServerUrl, Timeout};
use test_servers::{Lease, Server};

use crate::test_app::{TestApp, eventually, order, shipped_config};
use crate::wire::{State, Wire};

/// A Redis whose keys of ours nobody else has.
async fn redis(config: &mut Config) -> Lease {
    let server = test_servers::lease(Server::Redis).await.unwrap();
    config.cache.kind = CacheKind::Redis;
    config.redis.url = ServerUrl(server.address.clone());
    config.redis.prefix = format!("{}:", uuid::Uuid::now_v7());
    server
}

#[tokio::test]
async fn values_are_kept_replaced_and_forgotten() {
    let mut with_redis = shipped_config();
    let _server = redis(&mut with_redis).await;
    for mut config in [shipped_config(), with_redis] {
        let kind = config.cache.kind;
        config.cache.ttl = Timeout(Duration::from_millis(300));
        let cache: Arc<dyn Cache> = cache::open(&config).unwrap().unwrap();
        let get = async |key: &str| cache.get(key).await.unwrap();
        assert_eq!(get("one").await, None, "{kind:?}");
        cache.fill("one", b"old".to_vec()).await.unwrap();
        assert_eq!(get("one").await.unwrap(), b"old", "{kind:?}");
        // What somebody has read meanwhile does not replace what somebody has written.
        cache.put("one", b"new".to_vec()).await.unwrap();
        cache.fill("one", b"old".to_vec()).await.unwrap();
        assert_eq!(get("one").await.unwrap(), b"new", "{kind:?}");
        assert_eq!(get("two").await, None, "{kind:?}");
        tokio::time::sleep(Duration::from_millis(400)).await;
        assert_eq!(get("one").await, None, "{kind:?}");
    }
}

/// Read from the cache while it is fresh, and as it is now once it was changed.
#[tokio::test]
async fn orders_come_from_the_cache_until_they_change() {
    for in_redis in [false, true] {
        let mut config = shipped_config();
        let server = redis(&mut config).await;
        let (kind, settings) = (config.cache.kind, config.redis.clone());
        let app = TestApp::start_with(move |config| {
            if in_redis {
                config.cache.kind = kind;
                config.redis = settings;
            }
            config.cache.ttl = Timeout(Duration::from_secs(600));
        })
        .await;
        let (_, placed) = app.post("/v1/orders", order()).await;
        let path = format!("/v1/orders/{}", placed["id"].as_str().unwrap());
        assert_eq!(app.get(&path).await.1["customer"], "ada");
        // Behind the service's back: only a copy still says the old.
        app.execute("UPDATE orders SET customer = 'eve'").await;
        assert_eq!(app.get(&path).await.1["customer"], "ada");
        let (status, _) = app
            .send(Method::POST, &format!("{path}/cancel"), None)
            .await;
        assert_eq!(status, 200);
        let (_, now) = app.get(&path).await;
        assert_eq!(
            (&now["status"], &now["customer"]),
            (&json!("cancelled"), &json!("eve"))
        );
        drop(server);
    }
}

/// A cache that is away, or silent, costs nothing but time, and that only for a few requests.
#[tokio::test]
async fn without_the_cache_orders_are_read_all_the_same() {
    let mut config = shipped_config();
    let _server = redis(&mut config).await;
    let host = config
        .redis
        .url
        .0
        .split_once("://")
        .unwrap()
        .1
        .trim_end_matches('/');
    let wire = Wire::to(host).await;
    let mut settings = config.redis.clone();
    settings.url = ServerUrl(format!("redis://{}", wire.address));
    let app = TestApp::start_with(move |config| {
        config.cache.kind = CacheKind::Redis;
        config.redis = settings;
    })
    .await;
    let (_, placed) = app.post("/v1/orders", order()).await;
    let path = format!("/v1/orders/{}", placed["id"].as_str().unwrap());
    assert_eq!(app.get(&path).await.0, 200);

    wire.becomes(State::Cut);
    for _ in 0..20 {
        assert_eq!(app.get(&path).await.0, 200);
    }
    let (status, _) = app.get("/health/ready").await;
    assert_eq!(status, 200, "the service can do without");
    // Other tests of this process have caches, too, and one gauge.
    eventually("nobody waits for it", async || {
        assert_eq!(app.get(&path).await.0, 200);
        let metrics = app.admin_text("/metrics").await;
        metrics.contains("circuit_open{dependency=\"cache\"} 1")
    })
    .await;

    // It is found again when it is back: then a copy is what is read.
    wire.becomes(State::Whole);
    let mut tries = 0;
    loop {
        assert_eq!(app.get(&path).await.0, 200);
        let metrics = app.admin_text("/metrics").await;
        if metrics.contains("circuit_open{dependency=\"cache\"} 0") {
            break;
        }
        tries += 1;
        assert!(tries < 100, "{metrics}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}
