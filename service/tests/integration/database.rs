//! A database of a test's own, in each of the kinds that there is an adapter for.

use std::any::Any;
use std::sync::Arc;

use service::config::Config;
use sqlx::{Connection, Executor, PgConnection, SqliteConnection};
use tempfile::TempDir;
use test_servers::{Lease, Server};

/// An empty database; several services may open it.
#[derive(Clone)]
pub struct Database {
    pub kind: &'static str,
    url: String,
    /// What it lives in, for as long as anybody uses it.
    _home: Arc<Home>,
}

enum Home {
    Directory(#[expect(dead_code, reason = "dropped at the end")] TempDir),
    Elsewhere,
    Server(#[expect(dead_code, reason = "dropped at the end")] Lease),
}

impl Database {
    pub fn sqlite() -> Self {
        let dir = TempDir::new().unwrap();
        Self {
            kind: "SQLite",
            url: format!("sqlite://{}", dir.path().join("orders.db").display()),
            _home: Arc::new(Home::Directory(dir)),
        }
    }

    /// A database of a name that no other test has, on the server that tests share.
    pub async fn postgres() -> Self {
        let server = test_servers::lease(Server::Postgres).await.unwrap();
        let name = format!("orders_{}", uuid::Uuid::now_v7().simple());
        let mut admin = PgConnection::connect(&server.address).await.unwrap();
        admin
            .execute(format!("CREATE DATABASE {name}").as_str())
            .await
            .unwrap();
        let (place, _) = server.address.rsplit_once('/').unwrap();
        Self {
            kind: "PostgreSQL",
            url: format!("{place}/{name}"),
            _home: Arc::new(Home::Server(server)),
        }
    }

    /// One in PostgreSQL that somebody else keeps.
    pub fn at(url: String) -> Self {
        Self {
            kind: "PostgreSQL",
            url,
            _home: Arc::new(Home::Elsewhere),
        }
    }

    /// One of each kind.
    pub async fn each() -> [Self; 2] {
        [Self::sqlite(), Self::postgres().await]
    }

    pub fn url(&self) -> &str {
        &self.url
    }

    pub fn use_in(&self, config: &mut Config) {
        config.database.url.0.clone_from(&self.url);
    }

    /// Keeps everybody from writing, until what is returned goes.
    pub async fn hold(&self) -> Box<dyn Any> {
        match self.kind {
            "SQLite" => {
                let mut connection = SqliteConnection::connect(&self.url).await.unwrap();
                connection.execute("BEGIN IMMEDIATE").await.unwrap();
                Box::new(connection)
            }
            _ => {
                let mut connection = PgConnection::connect(&self.url).await.unwrap();
                let lock = "BEGIN; LOCK TABLE orders";
                connection.execute(lock).await.unwrap();
                Box::new(connection)
            }
        }
    }

    /// Changes the database behind the service's back.
    pub async fn execute(&self, sql: &str) {
        self.try_execute(sql).await.unwrap();
    }

    /// The same, or what the database says against it.
    pub async fn try_execute(&self, sql: &str) -> Result<(), String> {
        let executed = match self.kind {
            "SQLite" => {
                let mut connection = SqliteConnection::connect(&self.url).await.unwrap();
                connection.execute(sql).await.map(drop)
            }
            _ => {
                let mut connection = PgConnection::connect(&self.url).await.unwrap();
                connection.execute(sql).await.map(drop)
            }
        };
        executed.map_err(|error| error.to_string())
    }
}
