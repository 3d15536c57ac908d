//! A closed-loop load by plain sockets, so that it costs little beside what it measures.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinSet;

const BODY: &str = r#"{"customer":"bench","currency":"EUR","items":[{"sku":"tea","quantity":2,"unit_price_cents":450},{"sku":"cup","quantity":1,"unit_price_cents":1200}]}"#;

/// Requests as they go over the wire, and the status that each must get.
pub struct Load {
    address: SocketAddr,
    requests: Vec<Vec<u8>>,
    status: &'static str,
}

pub struct Measured {
    seconds: f64,
    /// Sorted.
    latencies: Vec<Duration>,
}

impl Measured {
    pub fn rate(&self) -> f64 {
        self.latencies.len() as f64 / self.seconds
    }

    pub fn p99(&self) -> Duration {
        self.latencies[self.latencies.len() * 99 / 100]
    }
}

impl Load {
    pub fn get(address: SocketAddr, token: Option<&str>, orders: &[String]) -> Self {
        let requests = orders.iter().map(|id| {
            let line = format!("GET /v1/orders/{id} HTTP/1.1\r\nhost: bench\r\n");
            format!("{line}{}\r\n", authorization(token)).into_bytes()
        });
        Self {
            address,
            requests: requests.collect(),
            status: "200",
        }
    }

    pub fn post(address: SocketAddr, token: Option<&str>, _: &[String]) -> Self {
        Self::post_to("/v1/orders", address, token)
    }

    pub fn post_to(path: &str, address: SocketAddr, token: Option<&str>) -> Self {
        let request = format!(
            "POST {path} HTTP/1.1\r\nhost: bench\r\ncontent-type: application/json\r\n\
             content-length: {}\r\n{}\r\n{BODY}",
            BODY.len(),
            authorization(token),
        );
        Self {
            address,
            requests: vec![request.into_bytes()],
            status: "201",
        }
    }

    /// Sends one of the requests, and looks at the answer.
    pub async fn ask(&self, connection: &mut Connection, number: usize) {
        let request = &self.requests[number % self.requests.len()];
        let answer = connection.ask(request).await;
        assert_eq!(&answer[9..12], self.status, "{answer}");
    }

    /// Asks on so many connections for so long; one answer that is not as it must be ends it all.
    pub async fn run(self, connections: usize, time: Duration) -> Measured {
        let load = Arc::new(self);
        let mut clients = JoinSet::new();
        for first in 0..connections {
            let load = Arc::clone(&load);
            clients.spawn(async move {
                let mut socket = Connection::open(load.address).await;
                let mut latencies = Vec::new();
                let began = Instant::now();
                for number in first.. {
                    let sent = Instant::now();
                    if sent - began >= time {
                        break;
                    }
                    load.ask(&mut socket, number).await;
                    latencies.push(sent.elapsed());
                }
                latencies
            });
        }
        let latencies = clients.join_all().await;
        let mut latencies: Vec<Duration> = latencies.into_iter().flatten().collect();
        latencies.sort_unstable();
        Measured {
            seconds: time.as_secs_f64(),
            latencies,
        }
    }
}

fn authorization(token: Option<&str>) -> String {
    token.map_or_else(String::new, |token| {
        format!("authorization: Bearer {token}\r\n")
    })
}

pub struct Connection {
    socket: TcpStream,
    read: Vec<u8>,
}

impl Connection {
    pub async fn open(address: SocketAddr) -> Self {
        let socket = TcpStream::connect(address).await.unwrap();
        socket.set_nodelay(true).unwrap();
        let read = Vec::with_capacity(4096);
        Self { socket, read }
    }

    /// Sends a request and reads its whole answer, which has a length.
    async fn ask(&mut self, request: &[u8]) -> String {
        self.socket.write_all(request).await.unwrap();
        self.read.clear();
        loop {
            let read = self.socket.read_buf(&mut self.read).await.unwrap();
            let text = std::str::from_utf8(&self.read).unwrap();
            assert!(read > 0, "the connection was closed after {text:?}");
            let Some((head, body)) = text.split_once("\r\n\r\n") else {
                continue;
            };
            let length = head
                .split("\r\n")
                .find_map(|line| line.strip_prefix("content-length: "));
            let length: usize = length.unwrap().parse().unwrap();
            if body.len() >= length {
                return text.to_owned();
            }
        }
    }
}

/// Places so many orders; their ids.
pub async fn orders(address: SocketAddr, token: Option<&str>, number: usize) -> Vec<String> {
    let load = Load::post(address, token, &[]);
    let mut connection = Connection::open(address).await;
    let mut ids = Vec::new();
    for _ in 0..number {
        let answer = connection.ask(&load.requests[0]).await;
        let (_, body) = answer.split_once("\r\n\r\n").unwrap();
        let order: serde_json::Value = serde_json::from_str(body).unwrap();
        ids.push(order["id"].as_str().unwrap().to_owned());
    }
    ids
}

/// Connections that stay open and ask nothing.
pub async fn idle(address: SocketAddr, number: usize) -> Vec<TcpStream> {
    let mut open = Vec::new();
    for _ in 0..number {
        open.push(TcpStream::connect(address).await.unwrap());
    }
    open
}

/// Where nobody listens yet.
pub fn free_address() -> SocketAddr {
    let socket = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    socket.local_addr().unwrap()
}

/// As many open files as this user may have.
pub fn raise_open_files() {
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: limit.maximum,
        ..limit
    };
    setrlimit(Resource::Nofile, raised).unwrap();
}
