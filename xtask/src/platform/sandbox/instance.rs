//! One supervised process: started, watched, restarted with back-off, drained and stopped.

use std::net::{SocketAddr, TcpListener};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use tokio::sync::{Notify, watch};

use super::counters::Counters;
use super::process::{self, Child, Tail};
use super::protocol::Run;
use super::routing::Backend;
use crate::platform::InstanceStatus;

/// How often a process that is getting ready is asked, and one that is ready.
const ASK_STARTING: Duration = Duration::from_millis(25);
const ASK_READY: Duration = Duration::from_secs(1);
const ASK_TIMEOUT: Duration = Duration::from_secs(2);
/// Failed checks in a row after which a ready process gets no more requests.
const MISSES: u32 = 3;
const FIRST_BACK_OFF: Duration = Duration::from_millis(100);
const LONGEST_BACK_OFF: Duration = Duration::from_secs(10);
/// A process that was ready for so long has made good for its crashes before.
const PROVEN: Duration = Duration::from_secs(10);
/// Crashes in a row after which waiting will not help.
const HOPELESS: u32 = 3;
/// How long a process may take to end after SIGTERM, beyond its own drain time.
const GRACE: Duration = Duration::from_secs(2);

/// A handle on a supervised process.
pub struct Instance {
    pub name: String,
    shared: Arc<Shared>,
    stop: watch::Sender<bool>,
}

struct Shared {
    view: Mutex<InstanceView>,
    /// Rung whenever `view` changed in a way that routing must follow.
    changed: Arc<Notify>,
}

#[derive(Clone, Default)]
struct InstanceView {
    state: State,
    pid: Option<u32>,
    admin: Option<SocketAddr>,
    backend: Option<Arc<Backend>>,
    restarts: u32,
    /// Crashes without a proven time between them.
    crashes: u32,
    broken: Option<String>,
}

#[derive(Clone, Default, PartialEq)]
enum State {
    #[default]
    Starting,
    Ready,
    NotReady(String),
    Waiting(String),
    Draining,
    Stopped,
}

/// What it takes to run one.
pub struct Setup {
    pub run: Run,
    pub name: String,
    pub log: PathBuf,
    pub counters: Arc<Counters>,
    pub workers: usize,
    /// For readiness checks.
    pub client: reqwest::Client,
}

impl Instance {
    pub fn start(setup: Setup, changed: Arc<Notify>) -> Self {
        let name = setup.name.clone();
        let shared = Arc::new(Shared {
            view: Mutex::default(),
            changed,
        });
        let (stop, stopping) = watch::channel(false);
        tokio::spawn(supervise(setup, Arc::clone(&shared), stopping));
        Self { name, shared, stop }
    }

    /// Drains, then stops. It is done when [`Self::is_stopped`].
    pub fn stop(&self) {
        self.stop.send_replace(true);
    }

    pub fn is_stopping(&self) -> bool {
        *self.stop.borrow()
    }

    pub fn is_stopped(&self) -> bool {
        matches!(self.shared.view().state, State::Stopped)
    }

    /// Where requests can go, while the process is ready for them.
    pub fn backend(&self) -> Option<Arc<Backend>> {
        let view = self.shared.view();
        matches!(view.state, State::Ready)
            .then(|| view.backend.clone())
            .flatten()
    }

    pub fn broken(&self) -> Option<String> {
        self.shared.view().broken.clone()
    }

    pub fn status(&self) -> InstanceStatus {
        let view = self.shared.view();
        InstanceStatus {
            name: self.name.clone(),
            ready: matches!(view.state, State::Ready) && !self.is_stopping(),
            state: view.state.describe(),
            pid: view.pid,
            admin: view.admin,
            restarts: view.restarts,
            in_flight: view
                .backend
                .as_ref()
                .map_or(0, |backend| backend.in_flight()),
        }
    }
}

impl State {
    fn describe(&self) -> String {
        match self {
            Self::Starting => "starting".to_owned(),
            Self::Ready => "ready".to_owned(),
            Self::NotReady(why) => format!("not ready: {why}"),
            Self::Waiting(why) => format!("restarting: {why}"),
            Self::Draining => "draining".to_owned(),
            Self::Stopped => "stopped".to_owned(),
        }
    }
}

impl Shared {
    fn view(&self) -> MutexGuard<'_, InstanceView> {
        self.view.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set(&self, state: State) {
        let before = std::mem::replace(&mut self.view().state, state.clone());
        if before != state {
            self.changed.notify_one();
        }
    }
}

async fn supervise(setup: Setup, shared: Arc<Shared>, mut stopping: watch::Receiver<bool>) {
    while !*stopping.borrow() {
        let tail = Tail::default();
        let why = match launch(&setup, &tail, &shared).await {
            Ok((child, backend, admin)) => {
                let pid = child.pid;
                match live(&setup, child, &backend, admin, &shared, &mut stopping).await {
                    Life::Stopped => break,
                    Life::Crashed { why, proven } => {
                        // What it left running goes with it.
                        process::kill(pid);
                        backend.drain();
                        if proven {
                            shared.view().crashes = 0;
                        }
                        why
                    }
                }
            }
            Err(error) => format!("{error:#}"),
        };
        let crashes = shared.crashed(&why, &tail);
        let back_off = FIRST_BACK_OFF * 2u32.saturating_pow(crashes.saturating_sub(1).min(10));
        tokio::select! {
            () = tokio::time::sleep(back_off.min(LONGEST_BACK_OFF)) => {}
            _ = stopping.wait_for(|stopping| *stopping) => {}
        }
    }
    {
        let mut view = shared.view();
        (view.pid, view.admin) = (None, None);
    }
    shared.set(State::Stopped);
}

impl Shared {
    /// Notes a crash; returns how many there were in a row.
    fn crashed(&self, why: &str, tail: &Tail) -> u32 {
        let crashes = {
            let mut view = self.view();
            view.pid = None;
            view.admin = None;
            view.crashes += 1;
            view.restarts += 1;
            if view.crashes >= HOPELESS {
                let tail = tail.lock().unwrap_or_else(PoisonError::into_inner);
                let lines: Vec<String> = tail.iter().map(|line| format!("\n    {line}")).collect();
                let times = view.crashes;
                view.broken = Some(format!(
                    "{why}, {times} times in a row; its last lines:{}",
                    lines.concat()
                ));
            }
            view.crashes
        };
        self.set(State::Waiting(why.to_owned()));
        crashes
    }
}

/// Starts the process on two fresh sockets.
async fn launch(
    setup: &Setup,
    tail: &Tail,
    shared: &Shared,
) -> Result<(Child, Arc<Backend>, SocketAddr)> {
    let listen = || TcpListener::bind(("127.0.0.1", 0)).context("finding a free port");
    let (service, operators) = (listen()?, listen()?);
    let address = service.local_addr().context("asking for the port")?;
    let admin = operators.local_addr().context("asking for the port")?;
    let extra = vec![("INSTANCE".to_owned(), setup.name.clone())];
    let sockets = [service, operators];
    let child = process::start(
        &setup.run,
        extra,
        sockets,
        setup.log.clone(),
        Arc::clone(tail),
    )
    .await?;
    let backend = Backend::new(address, Arc::clone(&setup.counters), setup.workers);
    {
        let mut view = shared.view();
        view.pid = Some(child.pid);
        view.admin = Some(admin);
        view.backend = Some(Arc::clone(&backend));
    }
    shared.set(State::Starting);
    Ok((child, backend, admin))
}

enum Life {
    Stopped,
    Crashed { why: String, proven: bool },
}

/// Watches a process to its end, or stops it when asked to.
async fn live(
    setup: &Setup,
    mut child: Child,
    backend: &Arc<Backend>,
    admin: SocketAddr,
    shared: &Shared,
    stopping: &mut watch::Receiver<bool>,
) -> Life {
    let url = format!("http://{admin}{}", setup.run.ready_path);
    let mut ready_since: Option<Instant> = None;
    let mut misses = 0;
    let mut next = tokio::time::Instant::now();
    loop {
        let answer = async {
            tokio::time::sleep_until(next).await;
            ask(&setup.client, &url).await
        };
        tokio::select! {
            status = &mut child.ended => {
                let why = status.map_or_else(|_| "it vanished".to_owned(), |s| s.to_string());
                let proven = ready_since.is_some_and(|since| since.elapsed() >= PROVEN);
                return Life::Crashed { why, proven };
            }
            _ = stopping.wait_for(|stopping| *stopping) => break,
            answer = answer => match answer {
                Ok(()) => {
                    misses = 0;
                    ready_since.get_or_insert_with(Instant::now);
                    shared.view().broken = None;
                    shared.set(State::Ready);
                }
                Err(why) => {
                    misses += 1;
                    if ready_since.is_none() || misses >= MISSES {
                        ready_since = None;
                        shared.set(State::NotReady(why));
                    }
                }
            },
        }
        let pause = if ready_since.is_some() {
            ASK_READY
        } else {
            ASK_STARTING
        };
        next = tokio::time::Instant::now() + pause;
    }
    stop(setup, child, backend, shared).await;
    Life::Stopped
}

async fn ask(client: &reqwest::Client, url: &str) -> Result<(), String> {
    match client.get(url).timeout(ASK_TIMEOUT).send().await {
        Ok(answer) if answer.status().is_success() => Ok(()),
        Ok(answer) => {
            let status = answer.status();
            let text = answer.text().await.unwrap_or_default();
            Err(format!(
                "{status} {}",
                text.chars().take(300).collect::<String>()
            ))
        }
        Err(error) => Err(error.to_string()),
    }
}

/// No more requests, then wait for those in flight, then SIGTERM, then SIGKILL.
async fn stop(setup: &Setup, child: Child, backend: &Backend, shared: &Shared) {
    backend.drain();
    shared.set(State::Draining);
    let limit = setup.run.drain_timeout.0;
    let drained = async {
        while backend.in_flight() > 0 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    // A tunnel or an endless stream never drains by itself: that is what the limit is for.
    let _ = tokio::time::timeout(limit, drained).await;
    backend.close_idle();
    process::terminate(child.pid);
    let pid = child.pid;
    if tokio::time::timeout(limit + GRACE, child.ended)
        .await
        .is_err()
    {
        process::kill(pid);
    }
}
