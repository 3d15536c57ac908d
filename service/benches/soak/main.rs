//! What the service does under many connections, and after a while.
//!
//! `cargo bench --package service --bench soak [-- MINUTES]` opens 12,000 connections that each ask
//! something, then 500 WebSockets that must each be told of every order for a minute, then sends
//! requests for so many minutes (10 unless told: its cache fills for six) and prints how much memory the
//! process has meanwhile. The service runs as a process of its own on its embedded defaults; all of it ends
//! by itself, with a panic where an answer or an event is missing, and fails where memory grows by more than
//! noise or the start took too long.
#![expect(clippy::unwrap_used, reason = "a benchmark that cannot go on fails")]
#![expect(clippy::print_stdout, reason = "its result is what it prints")]

#[expect(dead_code, reason = "some of it is for the other benchmarks only")]
#[path = "../bare/judged.rs"]
mod judged;
#[expect(dead_code, reason = "some of it is for the other benchmark only")]
#[path = "../bare/load.rs"]
mod load;

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::StreamExt;
use judged::judged;
use load::{Connection, Load};
use serde_json::Value;
use tokio::sync::{Barrier, watch};
use tokio::task::JoinSet;
use tokio_tungstenite::tungstenite::Message;

const CONNECTIONS: usize = 12_000;
/// Requests at a time; the service takes on some more.
const AT_A_TIME: usize = 500;
const WEBSOCKETS: usize = 500;
const WATCHED_FOR: Duration = Duration::from_secs(60);
const ORDERS_A_SECOND: u32 = 20;
/// What is not there by then is lost.
const PATIENCE: Duration = Duration::from_secs(30);
const SAMPLES_A_MINUTE: u32 = 12;
/// MiB that the allocator takes at a time.
const PIECE: f64 = 1.0;
/// From the process' start until it says that it is ready.
const READY_WITHIN: Duration = Duration::from_secs(1);

fn main() {
    let minutes = std::env::args().skip(1).find_map(|word| word.parse().ok());
    load::raise_open_files();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let all = runtime.block_on(async {
        let (service, took) = Service::start().await;
        let ready = format!("ready after {took:.2?} (at most {READY_WITHIN:?})");
        let is_soon = judged(&ready, took <= READY_WITHIN);
        service.many_connections().await;
        service.many_websockets().await;
        is_soon & service.memory(minutes.unwrap_or(10)).await
    });
    if !all {
        std::process::exit(1);
    }
}

/// The service, for as long as this lives.
struct Service {
    process: Child,
    address: SocketAddr,
    _database: tempfile::TempDir,
}

impl Drop for Service {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

impl Service {
    /// The service, and how long it took until it was ready.
    async fn start() -> (Self, Duration) {
        let dir = tempfile::tempdir().unwrap();
        let address = load::free_address();
        let config = concat!(env!("CARGO_MANIFEST_DIR"), "/../config/service");
        let database = format!("sqlite://{}", dir.path().join("orders.db").display());
        let began = Instant::now();
        let process = Command::new(env!("CARGO_BIN_EXE_service"))
            .env("SERVICE_CONFIG_DIR", config)
            .env("SERVICE__DATABASE__URL", database)
            .env("SERVICE__SERVER__LISTEN", address.to_string())
            .env("SERVICE__SERVER__ADMIN_LISTEN", "127.0.0.1:0")
            .env("SERVICE__RATE_LIMIT__PER_SECOND", "100000000")
            .env("SERVICE__RATE_LIMIT__BURST", "100000000")
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let service = Self {
            process,
            address,
            _database: dir,
        };
        let client = reqwest::Client::new();
        let ready = format!("http://{address}/health/ready");
        let is_ready = async || {
            let answer = client.get(&ready).send().await;
            answer.is_ok_and(|answer| answer.status().is_success())
        };
        while !is_ready().await {
            assert!(began.elapsed() < PATIENCE, "the service did not start");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        (service, began.elapsed())
    }

    /// All are open before the first asks, and all are answered.
    async fn many_connections(&self) {
        let orders = load::orders(self.address, None, 100).await;
        let load = Arc::new(Load::get(self.address, None, &orders));
        let began = Instant::now();
        let mut connections = Vec::new();
        for _ in 0..CONNECTIONS {
            connections.push(Connection::open(self.address).await);
        }
        let opened = began.elapsed();
        let memory = self.resident_mebibytes();
        let mut groups: Vec<Vec<Connection>> = (0..AT_A_TIME).map(|_| Vec::new()).collect();
        for (number, connection) in connections.into_iter().enumerate() {
            groups[number % AT_A_TIME].push(connection);
        }
        let began = Instant::now();
        let mut asking = JoinSet::new();
        for mut group in groups {
            let load = Arc::clone(&load);
            asking.spawn(async move {
                for (number, connection) in group.iter_mut().enumerate() {
                    load.ask(connection, number).await;
                }
                group.len()
            });
        }
        // Nobody hangs up before all have been answered.
        let answered: usize = asking.join_all().await.into_iter().sum();
        println!(
            "{answered} connections at a time: opened in {opened:.1?}, {memory:.0} MiB; each asked once, \
             all answered in {:.1?}",
            began.elapsed()
        );
    }

    /// Each is told of every order.
    async fn many_websockets(&self) {
        let url = format!("ws://{}/v1/events", self.address);
        let (stop, stopped) = watch::channel(0);
        let ready = Arc::new(Barrier::new(WEBSOCKETS + 1));
        let mut clients = JoinSet::new();
        for _ in 0..WEBSOCKETS {
            let (mut socket, _) = tokio_tungstenite::connect_async(&url).await.unwrap();
            let (ready, mut stopped) = (Arc::clone(&ready), stopped.clone());
            clients.spawn(async move {
                ready.wait().await;
                let mut events = BTreeSet::new();
                // The number of events, once it is known.
                let mut wanted = None;
                while wanted.is_none_or(|wanted| events.len() < wanted) {
                    tokio::select! {
                        message = socket.next() => match message.unwrap().unwrap() {
                            Message::Text(text) => {
                                let event: Value = serde_json::from_str(&text).unwrap();
                                assert!(events.insert(event["id"].to_string()), "{text} came twice");
                            }
                            Message::Ping(_) | Message::Pong(_) => {}
                            other => panic!("{other:?}"),
                        },
                        Ok(()) = stopped.changed(), if wanted.is_none() => {
                            wanted = Some(*stopped.borrow());
                        }
                    }
                }
                events.len()
            });
        }
        ready.wait().await;
        let began = Instant::now();
        let mut placed = 0;
        let mut ticks = tokio::time::interval(Duration::from_secs(1) / ORDERS_A_SECOND);
        while began.elapsed() < WATCHED_FOR {
            ticks.tick().await;
            load::orders(self.address, None, 1).await;
            placed += 1;
        }
        stop.send_replace(placed);
        let told = tokio::time::timeout(PATIENCE, clients.join_all()).await;
        let told: usize = told.unwrap().into_iter().sum();
        println!(
            "{WEBSOCKETS} WebSockets for {WATCHED_FOR:?}: {placed} orders, {told} events, none missing, none \
             twice; {:.0} MiB",
            self.resident_mebibytes()
        );
    }

    /// How much memory the process has while requests come: whether it stays as it is.
    async fn memory(&self, minutes: u32) -> bool {
        println!("{minutes} minutes of requests: minutes, MiB, requests/s");
        let orders = load::orders(self.address, None, 100).await;
        let mut samples = Vec::new();
        for sample in 0..minutes * SAMPLES_A_MINUTE {
            let time = Duration::from_secs(60) / SAMPLES_A_MINUTE / 2;
            let post = Load::post(self.address, None, &orders).run(8, time).await;
            let get = Load::get(self.address, None, &orders).run(8, time).await;
            let at = f64::from(sample + 1) / f64::from(SAMPLES_A_MINUTE);
            let memory = self.resident_mebibytes();
            samples.push((at, memory));
            let rate = f64::midpoint(post.rate(), get.rate());
            println!("{at:>8.2}{memory:>8.1}{rate:>8.0}");
        }
        // What it fills once, such as its cache, is full by then.
        let settled = &samples[samples.len() / 2..];
        let Line { slope, noise } = line(settled);
        let grown = slope * (settled[settled.len() - 1].0 - settled[0].0);
        let growth = format!(
            "in the second half: {slope:+.2} MiB a minute, {grown:+.2} MiB in all (at most twice the noise \
             of {noise:.2} MiB)"
        );
        judged(&growth, grown <= 2.0 * noise)
    }

    fn resident_mebibytes(&self) -> f64 {
        let status = format!("/proc/{}/status", self.process.id());
        let status = std::fs::read_to_string(status).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let kibibytes = line.unwrap().trim().trim_end_matches(" kB");
        kibibytes.parse::<f64>().unwrap() / 1024.0
    }
}

/// The least squares' line.
struct Line {
    slope: f64,
    /// The standard deviation of the points from it, or a piece that the allocator takes at a time.
    noise: f64,
}

fn line(points: &[(f64, f64)]) -> Line {
    let number = points.len() as f64;
    let (x, y) = points
        .iter()
        .fold((0.0, 0.0), |(x, y), p| (x + p.0, y + p.1));
    let (x, y) = (x / number, y / number);
    let covariance: f64 = points.iter().map(|p| (p.0 - x) * (p.1 - y)).sum();
    let variance: f64 = points.iter().map(|p| (p.0 - x).powi(2)).sum();
    let slope = covariance / variance;
    let away = points.iter().map(|p| p.1 - y - slope * (p.0 - x));
    let squares: f64 = away.map(|away| away.powi(2)).sum();
    Line {
        slope,
        noise: (squares / (number - 2.0)).sqrt().max(PIECE),
    }
}
