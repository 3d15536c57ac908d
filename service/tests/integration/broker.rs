//! A bus of a test's own, of each kind that there is an adapter for.

use std::net::SocketAddr;
use std::sync::Arc;

use service::config::{BusKind, Config, ServerUrl};
use test_servers::{Lease, Server};

#[derive(Clone)]
pub struct Broker {
    pub kind: &'static str,
    url: String,
    /// No other test has an exchange of this name.
    exchange: String,
    _server: Option<Arc<Lease>>,
}

impl Broker {
    pub fn in_process() -> Self {
        Self {
            kind: "in-process",
            url: String::new(),
            exchange: String::new(),
            _server: None,
        }
    }

    pub async fn rabbitmq() -> Self {
        let server = test_servers::lease(Server::RabbitMq).await.unwrap();
        // The query tells tests where the management is.
        let (url, _) = server.address.split_once('?').unwrap();
        Self {
            kind: "rabbitmq",
            url: url.trim_end_matches('/').to_owned(),
            exchange: format!("orders-{}", uuid::Uuid::now_v7().simple()),
            _server: Some(Arc::new(server)),
        }
    }

    pub async fn kafka() -> Self {
        let server = test_servers::lease(Server::Kafka).await.unwrap();
        Self {
            kind: "kafka",
            url: server.address.clone(),
            exchange: format!("orders-{}", uuid::Uuid::now_v7().simple()),
            _server: Some(Arc::new(server)),
        }
    }

    /// One of each kind.
    pub async fn each() -> [Self; 3] {
        [
            Self::in_process(),
            Self::rabbitmq().await,
            Self::kafka().await,
        ]
    }

    /// Reached at another address.
    pub fn at(&self, address: SocketAddr) -> Self {
        let (user, _) = self.url.rsplit_once('@').unwrap();
        Self {
            url: format!("{user}@{address}"),
            ..self.clone()
        }
    }

    pub fn address(&self) -> String {
        self.url.rsplit_once('@').unwrap().1.to_owned()
    }

    pub fn use_in(&self, config: &mut Config) {
        match self.kind {
            "rabbitmq" => {
                config.events.bus = BusKind::RabbitMq;
                config.rabbitmq.url = ServerUrl(self.url.clone());
                config.rabbitmq.exchange.clone_from(&self.exchange);
            }
            "kafka" => {
                config.events.bus = BusKind::Kafka;
                config.kafka.bootstrap_servers.clone_from(&self.url);
                config.kafka.topic.clone_from(&self.exchange);
            }
            _ => {}
        }
    }

    /// The same for a process of its own.
    pub fn variables(&self) -> Vec<(&'static str, String)> {
        match self.kind {
            "rabbitmq" => vec![
                ("SERVICE__EVENTS__BUS", "rabbitmq".to_owned()),
                ("SERVICE__RABBITMQ__URL", self.url.clone()),
                ("SERVICE__RABBITMQ__EXCHANGE", self.exchange.clone()),
            ],
            "kafka" => vec![
                ("SERVICE__EVENTS__BUS", "kafka".to_owned()),
                ("SERVICE__KAFKA__BOOTSTRAP_SERVERS", self.url.clone()),
                ("SERVICE__KAFKA__TOPIC", self.exchange.clone()),
            ],
            _ => Vec::new(),
        }
    }
}
