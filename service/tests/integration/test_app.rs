//! A running service on free ports, with its own database.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Child;
use std::sync::Arc;
use std::time::{Duration, Instant};

use reqwest::Method;
use serde_json::{Value, json};
use service::app::App;
use service::audit::Verdict;
use service::config::Config;
use service::domain::orders::OrderId;
use service::server::{self, Sockets};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use crate::database::Database;

pub struct TestApp {
    pub app: Arc<App>,
    pub public: SocketAddr,
    pub admin: SocketAddr,
    client: reqwest::Client,
    stop: Option<oneshot::Sender<()>>,
    server: JoinHandle<anyhow::Result<()>>,
    database: Database,
}

/// Where the configuration is that ships.
pub fn config_dir() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../config/service")
}

/// The configuration that ships.
pub fn shipped_config() -> Config {
    Config::from_files(&[config_dir().join("default.toml")]).unwrap()
}

/// For a process that cannot say which one it got.
pub fn free_port() -> u16 {
    let socket = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    socket.local_addr().unwrap().port()
}

impl TestApp {
    pub async fn start() -> Self {
        Self::start_with(|_| {}).await
    }

    pub async fn start_with(change: impl FnOnce(&mut Config)) -> Self {
        Self::start_on(Database::sqlite(), change).await
    }

    /// A second process on the same database.
    pub async fn beside(&self, change: impl FnOnce(&mut Config)) -> Self {
        Self::start_on(self.database.clone(), change).await
    }

    pub async fn start_on(database: Database, change: impl FnOnce(&mut Config)) -> Self {
        let mut config = shipped_config();
        config.server.listen = "127.0.0.1:0".parse().unwrap();
        config.server.admin_listen = "127.0.0.1:0".parse().unwrap();
        database.use_in(&mut config);
        change(&mut config);
        let app = App::open(config).await.unwrap();
        let sockets = Sockets::bind(&app.config).unwrap();
        let (public, admin) = sockets.addresses().unwrap();
        let (stop, stopped) = oneshot::channel::<()>();
        let server = tokio::spawn(server::serve(Arc::clone(&app), sockets, async {
            let _ = stopped.await;
            Ok(())
        }));
        let client = reqwest::Client::new();
        Self {
            app,
            public,
            admin,
            client,
            stop: Some(stop),
            server,
            database,
        }
    }

    pub async fn send(&self, method: Method, path: &str, body: Option<Value>) -> (u16, Value) {
        self.send_with(method, path, body, &[]).await
    }

    pub async fn send_with(
        &self,
        method: Method,
        path: &str,
        body: Option<Value>,
        headers: &[(&str, String)],
    ) -> (u16, Value) {
        let request = self
            .client
            .request(method, format!("http://{}{path}", self.public));
        let request = match body {
            Some(body) => request.json(&body),
            None => request,
        };
        let request = headers.iter().fold(request, |request, (name, value)| {
            request.header(*name, value)
        });
        let response = request.send().await.unwrap();
        (response.status().as_u16(), response.json().await.unwrap())
    }

    pub async fn get(&self, path: &str) -> (u16, Value) {
        self.send(Method::GET, path, None).await
    }

    pub async fn post(&self, path: &str, body: Value) -> (u16, Value) {
        self.send(Method::POST, path, Some(body)).await
    }

    /// How the page of the API's description has its readers log in.
    pub async fn page_login(&self) -> Value {
        let file = format!("http://{}/docs/swagger-initializer.js", self.public);
        let answer = self.client.get(file).send().await.unwrap();
        let setup = answer.text().await.unwrap();
        let (_, login) = setup.split_once("initOAuth(").unwrap();
        let (login, _) = login.split_once(");").unwrap();
        serde_json::from_str(login).unwrap()
    }

    pub async fn admin_text(&self, path: &str) -> String {
        let url = format!("http://{}{path}", self.admin);
        self.client
            .get(url)
            .send()
            .await
            .unwrap()
            .text()
            .await
            .unwrap()
    }

    /// Of all that there are.
    pub async fn number_of_orders(&self) -> usize {
        self.orders().await.len()
    }

    /// All that there are, newest first.
    pub async fn orders(&self) -> Vec<OrderId> {
        let mut orders: Vec<OrderId> = Vec::new();
        loop {
            let after = orders.last().copied();
            let page = self.app.storage().list(after, 500).await.unwrap();
            if page.is_empty() {
                return orders;
            }
            orders.extend(page.iter().map(|order| order.id));
        }
    }

    /// Changes the database behind the service's back.
    pub async fn execute(&self, sql: &str) {
        self.database.execute(sql).await;
    }

    pub fn begin_stop(&mut self) {
        self.stop.take().unwrap().send(()).unwrap();
    }

    pub async fn stopped(self) -> anyhow::Result<()> {
        self.server.await.unwrap()
    }
}

/// A process that is killed with SIGKILL when this goes, wherever it is then.
pub struct Process(pub Child);

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Waits until the audit log has so many entries; it must be whole.
pub async fn audited(database: &Database, wanted: usize) {
    let mut config = shipped_config();
    database.use_in(&mut config);
    eventually(
        "all is in the audit log",
        async || match App::verify_audit(config.clone(), None).await.unwrap() {
            Verdict::Whole { entries, .. } => entries == i64::try_from(wanted).unwrap(),
            broken @ Verdict::Broken { .. } => panic!("{broken:?}"),
        },
    )
    .await;
}

/// Waits until `condition` holds.
pub async fn eventually(what: &str, mut condition: impl AsyncFnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !condition().await {
        assert!(Instant::now() < deadline, "{what} did not come about");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Whoever asks may ask as often as they like.
pub fn without_limit(config: &mut Config) {
    config.rate_limit.per_second = 100_000.try_into().unwrap();
    config.rate_limit.burst = 100_000.try_into().unwrap();
}

pub fn order() -> Value {
    json!({
        "customer": "ada",
        "currency": "EUR",
        "items": [
            { "sku": "tea", "quantity": 2, "unit_price_cents": 450 },
            { "sku": "cup", "quantity": 1, "unit_price_cents": 1200 },
        ],
    })
}
