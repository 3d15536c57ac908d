//! A bus of a test's own, of each kind that there is an adapter for.

use std::net::SocketAddr;
use std::sync::Arc;

use base64::prelude::{BASE64_STANDARD, Engine};
use krafka::producer::{Producer, ProducerRecord};
use reqwest::{Method, RequestBuilder};
use serde_json::{Value, json};
use service::config::{BusKind, Config, ServerUrl};
use test_servers::{Lease, Server};

#[derive(Clone)]
pub struct Broker {
    pub kind: &'static str,
    url: String,
    /// No other test has an exchange of this name.
    exchange: String,
    server: Option<Arc<Lease>>,
}

impl Broker {
    pub fn in_process() -> Self {
        Self {
            kind: "in-process",
            url: String::new(),
            exchange: String::new(),
            server: None,
        }
    }

    pub async fn rabbitmq() -> Self {
        let server = test_servers::lease(Server::RabbitMq).await.unwrap();
        let (url, _management) = test_servers::rabbitmq(&server.address).unwrap();
        Self {
            kind: "rabbitmq",
            url,
            exchange: format!("orders-{}", uuid::Uuid::now_v7().simple()),
            server: Some(Arc::new(server)),
        }
    }

    pub async fn kafka() -> Self {
        let server = test_servers::lease(Server::Kafka).await.unwrap();
        Self {
            server: Some(Arc::new(server.clone())),
            ..Self::kafka_at(&server.address)
        }
    }

    /// One that the test itself has started.
    pub fn kafka_at(address: &str) -> Self {
        Self {
            kind: "kafka",
            url: address.to_owned(),
            exchange: format!("orders-{}", uuid::Uuid::now_v7().simple()),
            server: None,
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

    /// RabbitMQ's management of a consumer's queue.
    fn queue(&self, method: Method, consumer: &str) -> RequestBuilder {
        let server = self.server.as_ref().unwrap();
        let (_, management) = test_servers::rabbitmq(&server.address).unwrap();
        let url = format!("{management}/api/queues/%2f/{}.{consumer}", self.exchange);
        let request = reqwest::Client::new().request(method, url);
        request.basic_auth("guest", Some("guest"))
    }

    /// Makes RabbitMQ's queue for a consumer, before the service does.
    pub async fn make_queue(&self, consumer: &str, arguments: &Value) {
        let queue = self.queue(Method::PUT, consumer);
        let queue = queue.json(&json!({ "durable": true, "arguments": arguments }));
        assert_eq!(queue.send().await.unwrap().status(), 201);
    }

    pub async fn remove_queue(&self, consumer: &str) {
        let removed = self.queue(Method::DELETE, consumer).send().await.unwrap();
        assert_eq!(removed.status(), 204);
    }

    /// What that queue was made with.
    pub async fn arguments(&self, consumer: &str) -> Value {
        let answer = self.queue(Method::GET, consumer).send().await.unwrap();
        let mut queue: Value = answer.json().await.unwrap();
        queue["arguments"].take()
    }

    /// Puts something of somebody else's where the service's events are.
    pub async fn put(&self, what: &[u8]) {
        if self.kind == "kafka" {
            let producer = Producer::builder().bootstrap_servers(&self.url);
            let producer = producer.build().await.unwrap();
            let record = ProducerRecord::new(&self.exchange, what.to_vec());
            let _placed = producer.send_record(record).await.unwrap();
            return;
        }
        let server = self.server.as_ref().unwrap();
        let (_, management) = test_servers::rabbitmq(&server.address).unwrap();
        let url = format!("{management}/api/exchanges/%2f/{}/publish", self.exchange);
        let request = reqwest::Client::new().post(url);
        let request = request.basic_auth("guest", Some("guest"));
        let request = request.json(&json!({
            "properties": { "delivery_mode": 2 },
            "routing_key": "order.placed.v1",
            "payload": BASE64_STANDARD.encode(what),
            "payload_encoding": "base64",
        }));
        let answer: Value = request.send().await.unwrap().json().await.unwrap();
        assert_eq!(answer, json!({ "routed": true }));
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
