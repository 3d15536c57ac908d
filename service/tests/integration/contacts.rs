//! What only the service may read: it is answered to whoever may see the order, and readable nowhere
//! else.

use std::time::Duration;

use futures_util::StreamExt;
use reqwest::Method;
use serde_json::{Value, json};
use service::auth::Caller;
use service::config::{CacheKind, Config};
use sqlx::{Connection, PgConnection, Row};
use test_servers::Server;

use crate::commands::run;
use crate::database::Database;
use crate::test_app::{TestApp, eventually, order};

const OLD: &str = "old:AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=";
const NEW: &str = "new:AQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQE=";
const CONTACT: &str = "ada@example.org";

fn keys(keys: &[&str]) -> impl Fn(&mut Config) {
    let keys = keys.join(",");
    move |config| config.database.encryption_keys = Some(keys.parse().unwrap())
}

fn with_contact() -> Value {
    let mut order = order();
    order["contact"] = json!(CONTACT);
    order
}

/// Whether somebody who has all bytes of the database finds a text in them.
async fn is_readable(database: &Database, text: &str) -> bool {
    let hex: String = text.bytes().map(|byte| format!("{byte:02x}")).collect();
    let finds = |bytes: &str| bytes.contains(text) || bytes.contains(&hex);
    if let Some(path) = database.url().strip_prefix("sqlite://") {
        let files = std::fs::read_dir(std::path::Path::new(path).parent().unwrap()).unwrap();
        let mut files = files.map(|file| std::fs::read(file.unwrap().path()).unwrap());
        return files.any(|bytes| finds(&String::from_utf8_lossy(&bytes)));
    }
    let mut connection = PgConnection::connect(database.url()).await.unwrap();
    let tables = "SELECT tablename FROM pg_tables WHERE schemaname = 'public'";
    for table in sqlx::query(tables)
        .fetch_all(&mut connection)
        .await
        .unwrap()
    {
        let table: String = table.get(0);
        let rows = format!("SELECT row::text FROM {table} row");
        let rows = sqlx::query(&rows);
        for row in rows.fetch_all(&mut connection).await.unwrap() {
            if finds(&row.get::<String, _>(0)) {
                return true;
            }
        }
    }
    false
}

#[tokio::test]
async fn a_contact_is_answered_and_readable_nowhere_else() {
    for database in Database::each().await {
        let kind = database.kind;
        let server = test_servers::lease(Server::Redis).await.unwrap();
        let prefix = format!("{}:", uuid::Uuid::now_v7());
        let app = TestApp::start_on(database.clone(), |config| {
            keys(&[OLD])(config);
            config.cache.kind = CacheKind::Redis;
            config.redis.url = service::config::ServerUrl(server.address.clone());
            config.redis.prefix.clone_from(&prefix);
        })
        .await;
        let post = async |body: Value| {
            let key = [("idempotency-key", "one".to_owned())];
            app.send_with(Method::POST, "/v1/orders", Some(body), &key)
                .await
        };
        let (status, placed) = post(with_contact()).await;
        assert_eq!((status, &placed["contact"]), (201, &json!(CONTACT)));
        let path = format!("/v1/orders/{}", placed["id"].as_str().unwrap());
        // From storage, then from the cache.
        for _ in 0..2 {
            assert_eq!(app.get(&path).await, (200, placed.clone()), "{kind}");
        }
        let (_, page) = app.get("/v1/orders").await;
        assert_eq!(page["items"], json!([placed]), "{kind}");
        let ask = format!("{{ order(id: {}) {{ contact }} }}", placed["id"]);
        let (_, answer) = app.post("/graphql", json!({ "query": ask })).await;
        assert_eq!(answer["data"]["order"]["contact"], CONTACT, "{answer}");

        // The same request again, and one that only differs in it.
        assert_eq!(post(with_contact()).await, (201, placed.clone()), "{kind}");
        let mut other = with_contact();
        other["contact"] = json!("bob@example.org");
        for body in [other, order()] {
            let (status, problem) = post(body).await;
            let reused = json!("idempotency-key-reused");
            assert_eq!((status, &problem["type"]), (422, &reused), "{kind}");
        }

        let client = redis::Client::open(server.address.as_str()).unwrap();
        let mut cache = client.get_multiplexed_async_connection().await.unwrap();
        let name = format!("{prefix}order:{}", placed["id"].as_str().unwrap());
        let copy: Vec<u8> = redis::cmd("GET")
            .arg(&name)
            .query_async(&mut cache)
            .await
            .unwrap();
        assert!(!copy.is_empty(), "{kind}: there is no copy in the cache");
        assert!(!String::from_utf8_lossy(&copy).contains(CONTACT), "{kind}");

        let (status, cancelled) = app.post(&format!("{path}/cancel"), json!({})).await;
        assert_eq!((status, &cancelled["contact"]), (200, &json!(CONTACT)));
        eventually("all is told and in the audit log", async || {
            let storage = app.app.storage();
            storage.untold(1).await.unwrap().is_empty()
                && storage.audited(0, 9).await.unwrap().len() == 2
        })
        .await;
        assert!(!is_readable(&database, CONTACT).await, "{kind}");
        assert!(is_readable(&database, "tea").await, "{kind}");
    }
}

/// What is told of a change has no contact; what is answered after it has.
#[tokio::test]
async fn an_order_keeps_its_contact_when_it_changes() {
    let app = TestApp::start_with(|config| {
        keys(&[OLD])(config);
        config.cache.ttl = service::config::Timeout(Duration::from_secs(600));
    })
    .await;
    let events = app.app.watch(&Caller::anybody(), None).unwrap();
    let mut events = std::pin::pin!(events);
    let (_, placed) = app.post("/v1/orders", with_contact()).await;
    let path = format!("/v1/orders/{}", placed["id"].as_str().unwrap());
    assert_eq!(app.get(&path).await.0, 200);
    app.post(&format!("{path}/cancel"), json!({})).await;
    for _ in ["placed", "cancelled"] {
        let event = events.next().await.unwrap().unwrap();
        assert_eq!(event.data.contact, None, "{event:?}");
    }
    // The copy is renewed a moment after the event was passed on.
    for _ in 0..20 {
        let (status, order) = app.get(&path).await;
        assert_eq!(
            (status, &order["status"], &order["contact"]),
            (200, &json!("cancelled"), &json!(CONTACT))
        );
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test]
async fn keys_are_replaced_while_the_service_runs() {
    for database in Database::each().await {
        let kind = database.kind;
        let old = TestApp::start_on(database.clone(), keys(&[OLD])).await;
        let mut paths = Vec::new();
        for app in [&old, &old, &old] {
            let (status, placed) = app.post("/v1/orders", with_contact()).await;
            assert_eq!(status, 201, "{placed}");
            paths.push(format!("/v1/orders/{}", placed["id"].as_str().unwrap()));
        }
        old.post("/v1/orders", order()).await;

        let first = TestApp::start_on(database.clone(), keys(&[OLD, NEW])).await;
        let both = TestApp::start_on(database.clone(), keys(&[NEW, OLD])).await;
        let (_, placed) = both.post("/v1/orders", with_contact()).await;
        paths.push(format!("/v1/orders/{}", placed["id"].as_str().unwrap()));
        let all_read = async |app: &TestApp| {
            for path in &paths {
                assert_eq!(app.get(path).await.1["contact"], CONTACT, "{kind}");
            }
        };
        all_read(&both).await;
        all_read(&first).await;

        let both_keys = format!("{NEW},{OLD}");
        let variables = [
            ("SERVICE__DATABASE__URL", database.url()),
            ("SERVICE__DATABASE__ENCRYPTION_KEYS", both_keys.as_str()),
        ];
        for wanted in ["3 contacts", "0 contacts"] {
            let (code, said) = run("rotate-keys", &variables).await;
            assert_eq!((code, said.contains(wanted)), (0, true), "{kind}: {said}");
        }
        let new = TestApp::start_on(database.clone(), keys(&[NEW])).await;
        all_read(&new).await;

        // Without its key it is no secret that there is one, and it is not left out in silence.
        for app in [
            TestApp::start_on(database.clone(), keys(&[OLD])).await,
            TestApp::start_on(database.clone(), |_| {}).await,
        ] {
            let (status, problem) = app.get(&paths[0]).await;
            assert_eq!((status, &problem["type"]), (500, &json!("internal")));
            assert!(!problem.to_string().contains("key"), "{problem}");
        }
        let (code, said) = run("rotate-keys", &variables[..1]).await;
        let wanted = "database.encryption_keys is not set";
        assert_eq!((code, said.contains(wanted)), (1, true), "{said}");
    }
}

/// Somebody who may write to the database cannot give one order the contact of another.
#[tokio::test]
async fn a_contact_belongs_to_its_order() {
    for database in Database::each().await {
        let app = TestApp::start_on(database.clone(), keys(&[OLD])).await;
        let mut other = with_contact();
        other["contact"] = json!("bob@example.org");
        app.post("/v1/orders", with_contact()).await;
        let (_, placed) = app.post("/v1/orders", other).await;
        database
            .execute(
                "UPDATE orders SET contact = (SELECT contact FROM orders ORDER BY id LIMIT 1)
                 WHERE id = (SELECT id FROM orders ORDER BY id DESC LIMIT 1)",
            )
            .await;
        let path = format!("/v1/orders/{}", placed["id"].as_str().unwrap());
        assert_eq!(app.get(&path).await.0, 500, "{}", database.kind);
    }
}

#[tokio::test]
async fn contacts_that_could_not_be_kept_are_refused() {
    let app = TestApp::start().await;
    let (status, problem) = app.post("/v1/orders", with_contact()).await;
    let field = &problem["errors"][0]["field"];
    assert_eq!((status, field), (422, &json!("/contact")), "{problem}");

    let app = TestApp::start_with(keys(&[OLD])).await;
    for wrong in [String::new(), "a\nb".to_owned(), "a".repeat(255)] {
        let mut order = order();
        order["contact"] = json!(wrong);
        let (status, problem) = app.post("/v1/orders", order).await;
        let field = &problem["errors"][0]["field"];
        assert_eq!((status, field), (422, &json!("/contact")), "{problem}");
    }
}

#[tokio::test]
async fn keys_come_from_the_environment_and_are_never_shown() {
    let keys = ("SERVICE__DATABASE__ENCRYPTION_KEYS", "old:c2VjcmV0");
    let (code, said) = run("check-config", &[keys]).await;
    assert_eq!((code, said.contains("the key old")), (78, true), "{said}");
    assert!(!said.contains("c2VjcmV0"), "{said}");
}
