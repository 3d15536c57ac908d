//! A pipeline with its own state and ports, and a load on it.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead, BufReader, Read};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde_json::Value;
use tempfile::TempDir;

pub const PRODUCTION: &str = "production";
/// No condition takes longer than this, however busy the machine is.
const PATIENCE: Duration = Duration::from_secs(150);
/// Between two looks at a condition: most of them start a command, and what is tested needs the cores.
const PAUSE: Duration = Duration::from_millis(400);
/// A load ends by itself after this time.
const LONGEST_LOAD: Duration = Duration::from_secs(600);

pub struct Fixture {
    dir: TempDir,
    pub port: u16,
}

/// How a command ended.
#[derive(Debug)]
pub struct Ended {
    pub code: i32,
    pub events: Vec<Value>,
    /// What it told people.
    pub said: String,
}

impl Ended {
    pub fn finished(&self) -> &Value {
        self.events.last().unwrap_or(&Value::Null)
    }

    #[track_caller]
    pub fn expect(self, code: i32, outcome: &str) -> Self {
        let got = (
            self.code,
            self.finished()["outcome"].as_str().unwrap_or_default(),
        );
        assert_eq!(got, (code, outcome), "{}", self.said);
        self
    }
}

impl Fixture {
    pub fn new() -> Self {
        Self::with(&[])
    }

    /// The settings that ship, quicker and smaller, with these changes on top.
    pub fn with(changes: &[(&str, toml::Value)]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let [production, staging] = free_ports();
        let mut fixture = Self {
            dir,
            port: production,
        };
        let stages: Vec<toml::Value> = vec![25.into(), 100.into()];
        let mut settings: Vec<(&str, toml::Value)> = vec![
            ("state_dir", fixture.state().display().to_string().into()),
            ("environments.production.port", i64::from(production).into()),
            ("environments.staging.port", i64::from(staging).into()),
            ("rollout.stages", stages.into()),
            ("rollout.min_stage", "300ms".into()),
            ("rollout.window", "200ms".into()),
            ("rollout.warm_up", "200ms".into()),
            ("rollout.ready_within", "20s".into()),
            ("rollout.max_stage", "60s".into()),
            ("judge.tolerance", 0.02.into()),
            // Builds and other tests run beside these: how slow an answer is says nothing here.
            ("judge.latency_floor", "10s".into()),
            (
                "service.variables.SERVICE__DATABASE__ACQUIRE_TIMEOUT",
                "20s".into(),
            ),
            (
                "service.variables.SERVICE__DATABASE__BUSY_TIMEOUT",
                "20s".into(),
            ),
            (
                "service.variables.SERVICE__SERVER__REQUEST_TIMEOUT",
                "30s".into(),
            ),
        ];
        settings.extend(changes.iter().cloned());
        fixture.rewrite(&settings);
        std::fs::create_dir(fixture.state()).unwrap();
        std::os::unix::fs::symlink(images(), fixture.state().join("images")).unwrap();
        fixture
    }

    fn rewrite(&mut self, changes: &[(&str, toml::Value)]) {
        let shipped = root().join("config/pipeline.toml");
        let mut table: toml::Table = std::fs::read_to_string(shipped).unwrap().parse().unwrap();
        for (path, value) in changes {
            let (sections, key) = path.rsplit_once('.').unwrap_or(("", path));
            let mut section = &mut table;
            for name in sections.split('.').filter(|name| !name.is_empty()) {
                section = section[name].as_table_mut().unwrap();
            }
            section.insert(key.to_owned(), value.clone());
        }
        std::fs::write(self.settings(), table.to_string()).unwrap();
    }

    pub fn settings(&self) -> PathBuf {
        self.dir.path().join("pipeline.toml")
    }

    pub fn state(&self) -> PathBuf {
        self.dir.path().join("state")
    }

    pub fn address(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_xtask"));
        command
            .current_dir(root())
            .args(["--message-format", "json", "--pipeline"])
            .arg(self.settings())
            .args(arguments)
            .stdin(Stdio::null());
        command
    }

    pub fn run(&self, arguments: &[&str]) -> Ended {
        ended(self.command(arguments).output().unwrap())
    }

    /// A release of this version, with the configuration that ships.
    pub fn release(&self, version: &str) -> String {
        self.release_with(version, &[])
    }

    /// A release whose `production.toml` has these lines too.
    pub fn release_with(&self, version: &str, lines: &[&str]) -> String {
        self.image(version, lines, &[])
    }

    /// The same with more words for the command that makes it. The service is built once.
    pub fn image(&self, version: &str, lines: &[&str], words: &[&str]) -> String {
        let config = self.dir.path().join(format!("config-{version}"));
        std::fs::create_dir_all(&config).unwrap();
        for entry in std::fs::read_dir(root().join("config/service")).unwrap() {
            let path = entry.unwrap().path();
            let mut text = std::fs::read_to_string(&path).unwrap();
            if path.ends_with("production.toml") {
                text = format!("{text}\n{}\n", lines.join("\n"));
            }
            std::fs::write(config.join(path.file_name().unwrap()), text).unwrap();
        }
        let config = config.display().to_string();
        let command = ["image", "--version", version, "--config", &config];
        let image = |words: &[&str]| self.run(&[&command, words].concat()).expect(0, "passed");
        static BUILT: OnceLock<String> = OnceLock::new();
        let built = BUILT.get_or_init(|| {
            let ended = image(&[]);
            ended.finished()["binary"].as_str().unwrap().to_owned()
        });
        let ended = image(&[&["--binary", built], words].concat());
        ended.finished()["release"].as_str().unwrap().to_owned()
    }

    /// Puts a release into production without staging and without a judge.
    pub fn in_production(&self, version: &str) -> String {
        let release = self.release(version);
        self.run(&[
            "deploy-staging",
            "--environment",
            PRODUCTION,
            "--release",
            &release,
        ])
        .expect(0, "healthy");
        release
    }

    /// What runs in production: release and weight, processes wanted and ready.
    pub fn production(&self) -> Vec<(String, u64, u64, u64)> {
        let sandbox = self.sandbox();
        let releases = &sandbox["environments"][PRODUCTION]["status"]["releases"];
        let mut running: Vec<_> = releases
            .as_array()
            .unwrap()
            .iter()
            .filter(|release| release["desired"] != 0)
            .map(|release| {
                let instances = release["instances"].as_array().unwrap();
                let ready = instances
                    .iter()
                    .filter(|instance| instance["ready"] == true)
                    .count();
                (
                    release["release"].as_str().unwrap().to_owned(),
                    release["weight"].as_u64().unwrap(),
                    release["desired"].as_u64().unwrap(),
                    ready as u64,
                )
            })
            .collect();
        running.sort();
        running
    }

    /// The process ids of production's processes.
    pub fn pids(&self) -> Vec<u32> {
        let sandbox = self.sandbox();
        let releases = sandbox["environments"][PRODUCTION]["status"]["releases"].as_array();
        releases
            .unwrap()
            .iter()
            .flat_map(|release| release["instances"].as_array().unwrap())
            .filter_map(|instance| instance["pid"].as_u64())
            .map(|pid| u32::try_from(pid).unwrap())
            .collect()
    }

    pub fn daemon_pid(&self) -> u32 {
        u32::try_from(self.sandbox()["pid"].as_u64().unwrap()).unwrap()
    }

    fn sandbox(&self) -> Value {
        let ended = self.run(&["sandbox", "status"]).expect(0, "running");
        ended
            .events
            .into_iter()
            .find(|event| event["event"] == "sandbox")
            .unwrap()
    }

    /// Gives production another port in the settings.
    pub fn move_production(&mut self) {
        let [port] = free_ports();
        let text = std::fs::read_to_string(self.settings()).unwrap();
        let moved = text.replacen(&self.port.to_string(), &port.to_string(), 1);
        std::fs::write(self.settings(), moved).unwrap();
        self.port = port;
    }

    /// Starts a command and returns it when `wanted` came in its events; it goes on.
    pub fn start_until(&self, arguments: &[&str], wanted: impl FnMut(&Value) -> bool) -> Running {
        Running::until(self.command(arguments), wanted)
    }
}

impl Drop for Fixture {
    fn drop(&mut self) {
        // A test that failed must not leave processes behind either.
        let _ = self.command(&["sandbox", "stop"]).output();
    }
}

/// A command that is still at work.
pub struct Running {
    child: Child,
    events: JoinHandle<Vec<Value>>,
    said: JoinHandle<String>,
}

impl Running {
    /// Starts it and returns it when `wanted` came in its events; it goes on.
    pub fn until(mut command: Command, mut wanted: impl FnMut(&Value) -> bool) -> Self {
        let mut child = command
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        // It must never wait for somebody to read what it says.
        let mut said = child.stderr.take().unwrap();
        let said = std::thread::spawn(move || {
            let mut all = Vec::new();
            said.read_to_end(&mut all).unwrap();
            String::from_utf8_lossy(&all).into_owned()
        });
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let mut events = Vec::new();
        let found = lines.by_ref().any(|line| {
            let event: Value = serde_json::from_str(&line.unwrap()).unwrap();
            let found = wanted(&event);
            events.push(event);
            found
        });
        if !found {
            child.wait().unwrap();
            let said = said.join().unwrap();
            panic!("{command:?} ended before that: {said}");
        }
        let events = std::thread::spawn(move || {
            // One that is killed may leave half a line.
            let rest = lines.map_while(|line| serde_json::from_str(&line.ok()?).ok());
            events.into_iter().chain(rest).collect()
        });
        Self {
            child,
            events,
            said,
        }
    }

    /// Asks it to end, and nothing that it has started.
    pub fn ask_to_end(&self) {
        use rustix::process::{Pid, Signal, kill_process};
        kill_process(Pid::from_child(&self.child), Signal::TERM).unwrap();
    }

    /// Kills it; whether that is what ended it, and not its own end a moment before.
    pub fn kill(mut self) -> bool {
        self.child.kill().unwrap();
        self.child.wait().unwrap().code().is_none()
    }

    pub fn wait(mut self) -> Ended {
        let status = self.child.wait().unwrap();
        Ended {
            code: status.code().unwrap(),
            events: self.events.join().unwrap(),
            said: self.said.join().unwrap(),
        }
    }
}

pub fn ended(output: Output) -> Ended {
    let stdout = String::from_utf8(output.stdout).unwrap();
    Ended {
        code: output.status.code().unwrap(),
        events: stdout
            .lines()
            .map(|line| serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line}")))
            .collect(),
        said: String::from_utf8_lossy(&output.stderr).into_owned(),
    }
}

/// Where the images of all fixtures are: they have one layer in common, which is packed once.
fn images() -> PathBuf {
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join("images");
    std::fs::create_dir_all(&dir).unwrap();
    dir
}

pub fn root() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
}

/// Ports that no other test of this process gets, below those that systems give to whoever asks for
/// any: nobody takes them before their environment does.
fn free_ports<const N: usize>() -> [u16; N] {
    const PORTS: std::ops::Range<u32> = 10_000..32_000;
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let first = std::process::id() * 100;
    std::array::from_fn(|_| {
        loop {
            let next = first.wrapping_add(NEXT.fetch_add(1, Ordering::SeqCst));
            let port = PORTS.start + next % (PORTS.end - PORTS.start);
            let port = u16::try_from(port).unwrap();
            if TcpListener::bind(("127.0.0.1", port)).is_ok() {
                break port;
            }
        }
    })
}

/// Waits until `condition` holds.
#[track_caller]
pub fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < deadline, "{what} did not come about");
        std::thread::sleep(PAUSE);
    }
}

/// Requests to an environment at a steady rate, on a thread of their own.
pub struct Load {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Seen>,
}

/// What became of a load's requests.
#[derive(Default)]
struct Seen {
    failures: BTreeMap<Failure, u64>,
    /// The releases that named themselves.
    answered: BTreeSet<String>,
}

impl Seen {
    fn note(&mut self, outcome: Result<String, Failure>) {
        match outcome {
            Ok(by) => drop(self.answered.insert(by)),
            Err(failure) => *self.failures.entry(failure).or_default() += 1,
        }
    }
}

/// Makes a load's n-th request.
pub type Request = fn(&reqwest::Client, &str, u64) -> reqwest::RequestBuilder;

/// How a request failed.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Failure {
    /// A release's short id; where none answered, why.
    by: String,
    answer: String,
}

impl Load {
    /// Two reads for each write, 300 requests a second.
    pub fn start(address: String) -> Self {
        Self::with(address, Self::client(), 300)
    }

    /// It keeps no connection for as long as a gateway does: a request that is on its way when that
    /// closes one would be lost by nobody's fault but the client's.
    pub fn client() -> reqwest::ClientBuilder {
        const KEPT_IDLE: Duration = Duration::from_secs(20);
        reqwest::Client::builder().pool_idle_timeout(KEPT_IDLE)
    }

    /// The same with a client of the caller's, and at this rate, in requests a second.
    pub fn with(address: String, client: reqwest::ClientBuilder, rate: u32) -> Self {
        Self::of(rest, address, client, rate)
    }

    /// Other requests.
    pub fn of(
        request: Request,
        address: String,
        client: reqwest::ClientBuilder,
        rate: u32,
    ) -> Self {
        let client = client.build().unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build();
            runtime
                .unwrap()
                .block_on(send(request, address, client, rate, stopped))
        });
        Self { stop, thread }
    }

    /// No request may have failed; the releases that have answered.
    #[track_caller]
    pub fn stop_without_failures(self) -> BTreeSet<String> {
        let Seen { failures, answered } = self.seen();
        assert_eq!(failures, BTreeMap::new(), "requests failed");
        answered
    }

    /// The failed requests by release; where none answered, why.
    pub fn stop(self) -> BTreeMap<String, u64> {
        let mut failed = BTreeMap::new();
        for (failure, number) in self.seen().failures {
            *failed.entry(failure.by).or_default() += number;
        }
        failed
    }

    fn seen(self) -> Seen {
        self.stop.store(true, Ordering::SeqCst);
        self.thread.join().unwrap()
    }
}

fn rest(client: &reqwest::Client, address: &str, number: u64) -> reqwest::RequestBuilder {
    let url = format!("{address}/v1/orders");
    let body = r#"{"customer":"test","currency":"EUR","items":[{"sku":"a","quantity":1,"unit_price_cents":5}]}"#;
    if number.is_multiple_of(3) {
        client
            .post(url)
            .header("content-type", "application/json")
            .body(body)
    } else {
        client.get(url).query(&[("limit", "2")])
    }
}

async fn send(
    request: Request,
    address: String,
    client: reqwest::Client,
    rate: u32,
    stop: Arc<AtomicBool>,
) -> Seen {
    let began = Instant::now();
    let mut ticks = tokio::time::interval(Duration::from_secs(1) / rate);
    let mut requests = tokio::task::JoinSet::new();
    let mut seen = Seen::default();
    let mut number = 0;
    while !stop.load(Ordering::SeqCst) && began.elapsed() < LONGEST_LOAD {
        ticks.tick().await;
        number += 1;
        // One that is late on a busy machine is not lost.
        let request = request(&client, &address, number).timeout(Duration::from_secs(30));
        requests.spawn(outcome(request));
        while let Some(outcome) = requests.try_join_next() {
            seen.note(outcome.unwrap());
        }
    }
    while let Some(outcome) = requests.join_next().await {
        seen.note(outcome.unwrap());
    }
    seen
}

/// Who has answered, or how it failed.
async fn outcome(request: reqwest::RequestBuilder) -> Result<String, Failure> {
    let answer = request.send().await.map_err(|error| Failure {
        by: format!("nobody: {error:?}"),
        answer: "none".to_owned(),
    })?;
    let status = answer.status();
    let header = |name: &str| {
        let value = answer.headers().get(name)?;
        Some(value.to_str().unwrap().to_owned())
    };
    let by = header("x-release").unwrap_or_else(|| format!("nobody: {status}"));
    // Of calls by gRPC only those that fail have their status there.
    let grpc = header("grpc-status").filter(|status| status != "0");
    if !status.is_server_error() && grpc.is_none() {
        return Ok(by);
    }
    let said = header("grpc-message").unwrap_or_default();
    let body = answer.text().await.unwrap_or_default();
    let answer = format!("{status} {body}{}{said}", grpc.unwrap_or_default());
    Err(Failure { by, answer })
}
