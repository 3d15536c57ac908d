//! The service with everything on, against a bare handler that does the same on the same kind of
//! database, in alternating rounds of one run.
//!
//! `cargo xtask servers run -- cargo bench --package service --bench bare` prints requests a second, the 99th
//! percentile, and the ratios, and fails where a median is not what is wanted of the service. Both run as
//! processes of their own beside PostgreSQL and the load, on loopback only, and it ends by itself.
#![expect(clippy::unwrap_used, reason = "a benchmark that cannot go on fails")]
#![expect(clippy::print_stdout, reason = "its result is what it prints")]

mod handler;
mod judged;
mod load;

use std::net::SocketAddr;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use judged::{judged, median};
use load::{Load, Measured};
use sqlx::{Connection, Executor, PgConnection};
use test_servers::{Lease, Server};

const ROUNDS: usize = 5;
const ROUND: Duration = Duration::from_secs(4);
/// Connections that ask one thing after another.
const BUSY: usize = 64;
/// Connections that ask nothing.
const IDLE: usize = 10_000;
/// Of both pools.
const DATABASE_CONNECTIONS: u32 = 16;
/// What the service does in a second, as a share of the bare handler's, and of its own without idle
/// connections; and how many times as long its 99th percentile may be.
const GET_AT_LEAST: f64 = 0.75;
const POST_AT_LEAST: f64 = 0.85;
const BESIDE_IDLE_AT_LEAST: f64 = 0.85;
const P99_AT_MOST: f64 = 1.5;
/// Set, this program is the bare handler.
const ROLE: &str = "BARE_HANDLER";

/// Makes requests to an address, with a token where one is needed, for these orders.
type Prepare = fn(SocketAddr, Option<&str>, &[String]) -> Load;

fn main() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    if let Ok(url) = std::env::var(ROLE) {
        return runtime.block_on(handler::serve(&url, DATABASE_CONNECTIONS));
    }
    load::raise_open_files();
    if !runtime.block_on(compare()) {
        std::process::exit(1);
    }
}

/// Whether all is as is wanted.
async fn compare() -> bool {
    let server = test_servers::lease(Server::Postgres).await.unwrap();
    let bare = Contestant::bare(&server).await;
    let service = Contestant::service(&server).await;
    println!("{BUSY} connections, one request after another on each");
    println!(
        "{:30}{:>10}{:>10}{:>8}{:>12}{:>12}{:>8}",
        "", "bare/s", "service/s", "ratio", "bare p99", "service p99", "ratio"
    );
    let by_transaction: Prepare =
        |address, token, _| Load::post_to(handler::BY_TRANSACTION, address, token);
    let mut all = true;
    for (name, request, of_bare, at_least) in [
        (
            "GET of one order",
            Load::get as Prepare,
            Load::get as Prepare,
            GET_AT_LEAST,
        ),
        ("POST of an order", Load::post, Load::post, POST_AT_LEAST),
        (
            "POST, bare by BEGIN … COMMIT",
            Load::post,
            by_transaction,
            POST_AT_LEAST,
        ),
    ] {
        let mut ratios = [Vec::new(), Vec::new()];
        for _ in 0..ROUNDS {
            let of_bare = bare.round(of_bare).await;
            let of_service = service.round(request).await;
            let throughput = of_service.rate() / of_bare.rate();
            let latency = of_service.p99().as_secs_f64() / of_bare.p99().as_secs_f64();
            ratios[0].push(throughput);
            ratios[1].push(latency);
            println!(
                "{name:30}{:>10.0}{:>10.0}{throughput:>8.2}{:>12.1?}{:>12.1?}{latency:>8.2}",
                of_bare.rate(),
                of_service.rate(),
                of_bare.p99(),
                of_service.p99(),
            );
        }
        let [throughput, latency] = ratios.map(median);
        let is_met = throughput >= at_least && latency <= P99_AT_MOST;
        let medians = format!(
            "{name:30}median ratio: throughput {throughput:.2} (at least {at_least}), p99 {latency:.2} (at \
             most {P99_AT_MOST})"
        );
        all &= judged(&medians, is_met);
        println!();
    }
    println!("GET of one order beside {IDLE} idle connections");
    let mut ratios = Vec::new();
    for _ in 0..ROUNDS {
        let alone = service.round(Load::get).await.rate();
        let idle = load::idle(service.address, IDLE).await;
        let beside = service.round(Load::get).await.rate();
        drop(idle);
        ratios.push(beside / alone);
        println!("{alone:>10.0}/s {beside:>10.0}/s {:>8.2}", beside / alone);
    }
    let ratio = median(ratios);
    let median = format!("median ratio {ratio:.2} (at least {BESIDE_IDLE_AT_LEAST})");
    all & judged(&median, ratio >= BESIDE_IDLE_AT_LEAST)
}

/// A running process with a database of its own.
struct Contestant {
    address: SocketAddr,
    token: Option<String>,
    orders: Vec<String>,
    _process: Process,
}

/// It ends with the benchmark.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        let _ = Command::new("kill").arg(self.0.id().to_string()).status();
        let _ = self.0.wait();
    }
}

impl Contestant {
    async fn bare(server: &Lease) -> Self {
        let url = database(server).await;
        migrate(&url);
        // Audit is the service's, and nobody here empties what waits for it.
        let mut connection = PgConnection::connect(&url).await.unwrap();
        let drop = "DROP TRIGGER outbox_is_audited ON outbox";
        connection.execute(drop).await.unwrap();
        let address = load::free_address();
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.env(ROLE, &url).env("LISTEN", address.to_string());
        Self::ready(address, None, command).await
    }

    async fn service(server: &Lease) -> Self {
        let url = database(server).await;
        let dir = std::env::temp_dir().join(format!("service-bench-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let address = load::free_address();
        let collector = handler::collector().await;
        let configure = |command: &mut Command| {
            for (key, value) in [
                ("AUTH__MODE", "development".to_owned()),
                (
                    "AUTH__DEVELOPMENT_KEY",
                    dir.join("key").display().to_string(),
                ),
                ("CACHE__KIND", "off".to_owned()),
                ("DATABASE__URL", url.clone()),
                (
                    "DATABASE__MAX_CONNECTIONS",
                    DATABASE_CONNECTIONS.to_string(),
                ),
                ("LOGGING__FORMAT", "json".to_owned()),
                ("RATE_LIMIT__BURST", "100000000".to_owned()),
                ("RATE_LIMIT__PER_SECOND", "100000000".to_owned()),
                ("SERVER__ADMIN_LISTEN", "127.0.0.1:0".to_owned()),
                ("SERVER__LISTEN", address.to_string()),
                ("TRACING__ENDPOINT", collector.clone()),
            ] {
                command.env(format!("SERVICE__{key}"), value);
            }
        };
        let mut token = service();
        configure(token.args(["token", "bench"]));
        let token = token.output().unwrap();
        assert!(token.status.success(), "{token:?}");
        let token = String::from_utf8(token.stdout).unwrap().trim().to_owned();
        let mut command = service();
        configure(&mut command);
        Self::ready(address, Some(token), command).await
    }

    /// Starts it, and gives it orders to ask for.
    async fn ready(address: SocketAddr, token: Option<String>, mut command: Command) -> Self {
        let process = command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let process = Process(process);
        while tokio::net::TcpStream::connect(address).await.is_err() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        let orders = load::orders(address, token.as_deref(), 500).await;
        Self {
            address,
            token,
            orders,
            _process: process,
        }
    }

    async fn round(&self, request: Prepare) -> Measured {
        let load = request(self.address, self.token.as_deref(), &self.orders);
        load.run(BUSY, ROUND).await
    }
}

fn service() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_service"));
    let config = concat!(env!("CARGO_MANIFEST_DIR"), "/../config/service");
    command.env("SERVICE_CONFIG_DIR", config);
    command
}

fn migrate(url: &str) {
    let mut command = service();
    let migrated = command.arg("migrate").env("SERVICE__DATABASE__URL", url);
    assert!(migrated.status().unwrap().success());
}

async fn database(server: &Lease) -> String {
    let name = format!("bench_{}", uuid::Uuid::now_v7().simple());
    let mut admin = PgConnection::connect(&server.address).await.unwrap();
    let create = format!("CREATE DATABASE {name}");
    admin.execute(create.as_str()).await.unwrap();
    let (place, _) = server.address.rsplit_once('/').unwrap();
    format!("{place}/{name}")
}
