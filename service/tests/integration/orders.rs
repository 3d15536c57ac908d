//! Orders over REST.

use reqwest::Method;
use serde_json::{Value, json};

use crate::database::Database;
use crate::test_app::{TestApp, order};

#[tokio::test]
async fn an_order_is_created_read_and_cancelled() {
    let app = TestApp::start().await;
    let (status, created) = app.post("/v1/orders", order()).await;
    assert_eq!(status, 201, "{created}");
    assert_eq!(created["total_cents"], 2100);
    assert_eq!(created["status"], "open");

    let path = format!("/v1/orders/{}", created["id"].as_str().unwrap());
    assert_eq!(app.get(&path).await, (200, created.clone()));

    let cancel = format!("{path}/cancel");
    let (status, cancelled) = app.post(&cancel, json!({})).await;
    assert_eq!((status, &cancelled["status"]), (200, &json!("cancelled")));
    assert_eq!(
        app.post(&cancel, json!({})).await,
        (200, cancelled),
        "cancelling twice is no error"
    );
}

#[tokio::test]
async fn pages_hold_every_order_once_newest_first() {
    let app = TestApp::start().await;
    let mut placed = Vec::new();
    for _ in 0..23 {
        placed.push(app.post("/v1/orders", order()).await.1["id"].clone());
    }
    placed.sort_by(|a, b| b.as_str().cmp(&a.as_str()));

    let mut listed: Vec<Value> = Vec::new();
    let mut path = "/v1/orders?limit=5".to_owned();
    let mut pages = 0;
    loop {
        let (status, page) = app.get(&path).await;
        assert_eq!(status, 200);
        listed.extend(
            page["items"]
                .as_array()
                .unwrap()
                .iter()
                .map(|order| order["id"].clone()),
        );
        pages += 1;
        match page["next"].as_str() {
            Some(next) => path = format!("/v1/orders?limit=5&after={next}"),
            None => break,
        }
    }
    assert_eq!(listed, placed);
    assert_eq!(pages, 5);
}

/// What each wrong request is told: the status, the problem's type and the fields it names.
#[tokio::test]
async fn wrong_requests_are_explained_in_one_shape() {
    let app =
        TestApp::start_with(|config| config.server.body_limit = 2048.try_into().unwrap()).await;
    let with = |pointer: &str, value: Value| {
        let mut body = order();
        *body.pointer_mut(pointer).unwrap() = value;
        Some(body)
    };
    let nobody = "/v1/orders/0190163d-8694-739b-aea5-966c26f8ad90";
    let mut unknown_field = order();
    unknown_field["colour"] = json!("red");
    type Case<'a> = (Method, &'a str, Option<Value>, u16, &'a str, &'a [&'a str]);
    let cases: [Case<'_>; 13] = [
        (
            Method::POST,
            "/v1/orders",
            with("/customer", json!(" ")),
            422,
            "invalid-request",
            &["/customer"],
        ),
        (
            Method::POST,
            "/v1/orders",
            with("/currency", json!("eur")),
            422,
            "invalid-request",
            &["/currency"],
        ),
        (
            Method::POST,
            "/v1/orders",
            with("/items", json!([])),
            422,
            "invalid-request",
            &["/items"],
        ),
        (
            Method::POST,
            "/v1/orders",
            with("/items/1/quantity", json!(0)),
            422,
            "invalid-request",
            &["/items/1/quantity"],
        ),
        (
            Method::POST,
            "/v1/orders",
            with("/items/0/quantity", json!(-1)),
            422,
            "invalid-request",
            &[],
        ),
        (
            Method::POST,
            "/v1/orders",
            Some(unknown_field),
            422,
            "invalid-request",
            &[],
        ),
        (
            Method::POST,
            "/v1/orders",
            with("/customer", json!("x".repeat(4096))),
            413,
            "too-large",
            &[],
        ),
        (
            Method::GET,
            "/v1/orders/7",
            None,
            422,
            "invalid-request",
            &["/id"],
        ),
        (
            Method::GET,
            "/v1/orders?limit=0",
            None,
            422,
            "invalid-request",
            &["/limit"],
        ),
        (
            Method::GET,
            "/v1/orders?after=x",
            None,
            422,
            "invalid-request",
            &["/after"],
        ),
        (Method::GET, nobody, None, 404, "not-found", &[]),
        (Method::GET, "/nothing", None, 404, "not-found", &[]),
        (
            Method::DELETE,
            "/v1/orders",
            None,
            405,
            "method-not-allowed",
            &[],
        ),
    ];
    for (method, path, body, status, kind, fields) in cases {
        let label = format!("{method} {path} {body:?}");
        let (got, problem) = app.send(method, path, body).await;
        assert_eq!(got, status, "{label}: {problem}");
        assert_eq!(problem["type"], kind, "{label}");
        assert_eq!(problem["status"], status, "{label}");
        let named: Vec<&str> = problem["errors"]
            .as_array()
            .map(|errors| {
                errors
                    .iter()
                    .filter_map(|error| error["field"].as_str())
                    .collect()
            })
            .unwrap_or_default();
        assert_eq!(named, fields, "{label}: {problem}");
    }
}

#[tokio::test]
async fn processes_share_a_database_and_a_read_only_one_refuses_writes() {
    for database in Database::each().await {
        processes_share(database).await;
    }
}

async fn processes_share(database: Database) {
    let writer = TestApp::start_on(database, |_| {}).await;
    let other = writer.beside(|_| {}).await;
    let reader = writer
        .beside(|config| config.database.read_only = true)
        .await;

    let (writes, more) = tokio::join!(
        async {
            let mut ids = Vec::new();
            for _ in 0..20 {
                ids.push(writer.post("/v1/orders", order()).await);
            }
            ids
        },
        async {
            let mut ids = Vec::new();
            for _ in 0..20 {
                ids.push(other.post("/v1/orders", order()).await);
            }
            ids
        },
    );
    for (status, created) in writes.iter().chain(&more) {
        assert_eq!(*status, 201, "{created}");
        let path = format!("/v1/orders/{}", created["id"].as_str().unwrap());
        assert_eq!(reader.get(&path).await.0, 200);
    }
    let (status, problem) = reader.post("/v1/orders", order()).await;
    assert_eq!((status, &problem["type"]), (503, &json!("read-only")));
}

/// A name that no order can have is no failure: not even one that PostgreSQL takes for no text.
#[tokio::test]
async fn nobody_has_no_totals() {
    for database in Database::each().await {
        let app = TestApp::start_on(database, |_| {}).await;
        for nobody in ["bob", "%00", "a%00b", "%20", &"x".repeat(5000)] {
            let answer = app.get(&format!("/v1/customers/{nobody}/totals")).await;
            assert_eq!(answer, (200, json!([])), "{nobody}");
        }
    }
}

/// After a rollback an older program finds a newer schema, and must start on it.
#[tokio::test]
async fn a_newer_schema_is_fine() {
    for database in Database::each().await {
        newer_schema(database).await;
    }
}

async fn newer_schema(database: Database) {
    let blob = if database.kind == "SQLite" {
        "x'00'"
    } else {
        "'\\x00'"
    };
    let app = TestApp::start_on(database, |_| {}).await;
    let (status, created) = app.post("/v1/orders", order()).await;
    assert_eq!(status, 201);
    app.execute(&format!(
        "INSERT INTO _sqlx_migrations (version, description, success, checksum, execution_time)
         VALUES (9999, 'from the future', TRUE, {blob}, 0)"
    ))
    .await;
    let older = app.beside(|_| {}).await;
    assert_eq!(older.get("/health/ready").await.0, 200);
    assert_eq!(older.get("/info").await.1["schema_version"], 9999);
    let path = format!("/v1/orders/{}", created["id"].as_str().unwrap());
    assert_eq!(older.get(&path).await.0, 200);
}
