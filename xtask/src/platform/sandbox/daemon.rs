//! The sandbox itself: outlives the command that started it, keeps every environment as its
//! state file says, and answers commands on a Unix socket.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::Notify;

use super::counters::Counters;
use super::instance::{Instance, Setup};
use super::process;
use super::protocol::{Change, EnvironmentStatus, Places, Reply, Request, SandboxStatus, VERSION};
use super::proxy::{Front, Workers};
use super::routing::{Router, Table, Target};
use super::saved::{Saved, SavedEnvironment, SavedRelease};
use crate::files;
use crate::http;
use crate::platform::{InstanceCounts, ReleaseStatus, Status};
use crate::release::ReleaseId;

/// Another sandbox has the lock (`EX_TEMPFAIL` of sysexits.h).
pub const ALREADY_RUNNING: u8 = 75;

/// What lives only as long as the sandbox.
struct Environment {
    router: Arc<Router>,
    front: Result<Front, String>,
    instances: Vec<(ReleaseId, Instance)>,
    /// Kept when a process ends, so that counts never fall.
    counters: BTreeMap<(ReleaseId, String), Arc<Counters>>,
}

struct Daemon {
    places: Places,
    workers: Workers,
    client: reqwest::Client,
    /// Rung when a process got ready, crashed or ended.
    changed: Arc<Notify>,
    stop: Notify,
    world: Mutex<World>,
}

#[derive(Default)]
struct World {
    saved: Saved,
    environments: BTreeMap<String, Environment>,
}

/// Runs the sandbox until it is told to stop. `Ok(false)`: another one has the lock.
pub fn run(places: &Places) -> Result<bool> {
    process::detach();
    process::allow_many_files();
    let Some(_lock) = lock(places)? else {
        return Ok(false);
    };
    let saved = if places.state().exists() {
        files::read_json(&places.state())?
    } else {
        Saved::default()
    };
    let workers = Workers::start()?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    runtime
        .context("starting the sandbox's runtime")?
        .block_on(async {
            let daemon = Arc::new(Daemon {
                places: places.clone(),
                workers,
                client: http::client()?,
                changed: Arc::new(Notify::new()),
                stop: Notify::new(),
                world: Mutex::new(World {
                    saved,
                    environments: BTreeMap::new(),
                }),
            });
            daemon.restore();
            let socket = places.socket();
            // One that was killed leaves its socket behind; the lock says that it is dead.
            let _ = fs::remove_file(&socket);
            let listener = UnixListener::bind(&socket)
                .with_context(|| format!("listening on {}", socket.display()))?;
            daemon.serve(listener).await?;
            daemon.end().await;
            let _ = fs::remove_file(&socket);
            let _ = fs::remove_file(places.pid());
            Ok(true)
        })
}

fn lock(places: &Places) -> Result<Option<File>> {
    let Some(lock) = files::try_lock(&places.lock())? else {
        return Ok(None);
    };
    let pid = std::process::id().to_string();
    files::write_atomically(&places.pid(), pid.as_bytes())?;
    Ok(Some(lock))
}

impl Daemon {
    /// Everything as it was before the last sandbox ended.
    fn restore(&self) {
        let mut world = self.world();
        let names: Vec<String> = world.saved.environments.keys().cloned().collect();
        for name in names {
            let Some(saved) = world.saved.environments.get_mut(&name) else {
                continue;
            };
            saved.releases.retain(|release| release.replicas > 0);
            let saved = saved.clone();
            let router = Arc::<Router>::default();
            let front = self.front(saved.port, &router);
            let environment = Environment::new(router, front);
            world.environments.insert(name.clone(), environment);
            self.converge(&mut world, &name);
        }
    }

    async fn serve(self: &Arc<Self>, listener: UnixListener) -> Result<()> {
        let mut terminate = signal(SignalKind::terminate()).context("watching for SIGTERM")?;
        loop {
            tokio::select! {
                accepted = listener.accept() => {
                    match accepted {
                        Ok((stream, _)) => {
                            let daemon = Arc::clone(self);
                            tokio::spawn(async move { daemon.converse(stream).await });
                        }
                        // Out of file descriptors: connections that end will free some.
                        Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
                    }
                }
                () = self.changed.notified() => self.follow(),
                () = self.stop.notified() => return Ok(()),
                _ = terminate.recv() => return Ok(()),
            }
        }
    }

    /// One request, one reply.
    async fn converse(&self, stream: UnixStream) {
        let (reader, mut writer) = stream.into_split();
        let mut line = String::new();
        if BufReader::new(reader).read_line(&mut line).await.is_err() {
            return;
        }
        let reply = match serde_json::from_str::<Request>(&line) {
            Ok(request) => self.answer(request).unwrap_or_else(|error| Reply::Refused {
                why: format!("{error:#}"),
            }),
            Err(error) => Reply::Refused {
                why: format!("this is no request: {error}"),
            },
        };
        if let Ok(mut text) = serde_json::to_string(&reply) {
            text.push('\n');
            // Whoever asked may be gone.
            let _ = writer.write_all(text.as_bytes()).await;
        }
    }

    fn answer(&self, request: Request) -> Result<Reply> {
        let mut world = self.world();
        match request {
            Request::Hello => Ok(Reply::Hello {
                version: VERSION,
                pid: std::process::id(),
            }),
            Request::Status => {
                let environments = world
                    .saved
                    .environments
                    .iter()
                    .map(|(name, saved)| (name.clone(), world.status(name, saved)))
                    .collect();
                Ok(Reply::Sandbox(SandboxStatus {
                    pid: std::process::id(),
                    environments,
                }))
            }
            Request::Open { environment, port } => {
                self.open(&mut world, &environment, port)?;
                Ok(Reply::Done)
            }
            Request::Environment { environment } => {
                let saved = world.saved(&environment)?;
                Ok(Reply::Environment(world.status(&environment, saved).status))
            }
            Request::Counts { environment } => {
                let counts = world
                    .environments
                    .get(&environment)
                    .into_iter()
                    .flat_map(|environment| &environment.counters)
                    .map(|((release, instance), counters)| InstanceCounts {
                        release: release.clone(),
                        instance: instance.clone(),
                        counts: counters.read(),
                    })
                    .collect();
                Ok(Reply::Counts { counts })
            }
            Request::Change {
                environment,
                token,
                change,
            } => self.change(&mut world, &environment, token, change),
            Request::Stop => {
                self.stop.notify_one();
                Ok(Reply::Done)
            }
        }
    }

    fn open(&self, world: &mut World, name: &str, port: u16) -> Result<()> {
        let served = world.environments.get(name).is_some_and(|environment| {
            environment
                .front
                .as_ref()
                .is_ok_and(|f| f.address.port() == port)
        });
        if served {
            return Ok(());
        }
        // An environment that is there already keeps its processes; only the port is a new one.
        let router = world
            .environments
            .get(name)
            .map(|environment| Arc::clone(&environment.router));
        let router = router.unwrap_or_default();
        let front = self.front(port, &router).map_err(anyhow::Error::msg)?;
        let mut saved = world
            .saved
            .environments
            .get(name)
            .cloned()
            .unwrap_or_default();
        saved.port = port;
        self.save(world, name, saved)?;
        match world.environments.get_mut(name) {
            Some(environment) => environment.front = Ok(front),
            None => {
                let environment = Environment::new(router, Ok(front));
                world.environments.insert(name.to_owned(), environment);
            }
        }
        self.converge(world, name);
        Ok(())
    }

    fn front(&self, port: u16, router: &Arc<Router>) -> Result<Front, String> {
        let address = SocketAddr::from(([127, 0, 0, 1], port));
        self.workers.serve(address, router).map_err(|error| {
            format!(
                "port {port} cannot be used ({error}); end what listens there, or give the \
                 environment another port in the pipeline's settings"
            )
        })
    }

    fn change(&self, world: &mut World, name: &str, token: u64, change: Change) -> Result<Reply> {
        let mut saved = world.saved(name)?.clone();
        if token < saved.token {
            return Ok(Reply::Stale {
                newest: saved.token,
            });
        }
        saved.token = token;
        match change {
            Change::Claim => {}
            Change::Scale { run, replicas } => saved.scale(run, replicas),
            Change::Stop { release } => saved.stop(&release),
            Change::Route { weights } => {
                world.check_weights(name, &weights)?;
                saved.weights = weights;
            }
            Change::Record {
                rollout,
                stable,
                marks,
            } => saved.record(&rollout, stable, marks),
        }
        self.save(world, name, saved)?;
        self.converge(world, name);
        Ok(Reply::Done)
    }

    /// On disk first: what a command was told is done survives the sandbox.
    fn save(&self, world: &mut World, name: &str, new: SavedEnvironment) -> Result<()> {
        let old = world.saved.environments.insert(name.to_owned(), new);
        let written = files::write_json(&self.places.state(), &world.saved);
        if written.is_err() {
            match old {
                Some(old) => world.saved.environments.insert(name.to_owned(), old),
                None => world.saved.environments.remove(name),
            };
        }
        written
    }

    /// Starts what is missing and stops what is too much.
    fn converge(&self, world: &mut World, name: &str) {
        let Some(saved) = world.saved.environments.get(name).cloned() else {
            return;
        };
        let Some(environment) = world.environments.get_mut(name) else {
            return;
        };
        let logs = self.places.logs(name);
        // Without its log a process runs all the same.
        let _ = fs::create_dir_all(&logs);
        for (release, instance) in &environment.instances {
            let wanted = saved.replicas(release);
            if instance.number() >= wanted && !instance.is_stopping() {
                instance.stop();
            }
        }
        for SavedRelease { run, replicas } in &saved.releases {
            for number in 0..*replicas {
                let instance = format!("{}-{number}", run.release.short());
                let running = environment.instances.iter().any(|(release, other)| {
                    *release == run.release && other.name == instance && !other.is_stopping()
                });
                if running {
                    continue;
                }
                let key = (run.release.clone(), instance.clone());
                let counters = Arc::clone(environment.counters.entry(key).or_default());
                let setup = Setup {
                    run: run.clone(),
                    name: instance.clone(),
                    log: logs.join(&instance).with_extension("log"),
                    counters,
                    workers: self.workers.count(),
                    client: self.client.clone(),
                };
                let instance = Instance::start(setup, Arc::clone(&self.changed));
                environment.instances.push((run.release.clone(), instance));
            }
        }
        environment.route(&saved);
    }

    /// A process got ready, crashed or ended: routing follows, and ended ones are forgotten.
    fn follow(&self) {
        let mut world = self.world();
        let World {
            saved,
            environments,
        } = &mut *world;
        for (name, environment) in environments {
            environment
                .instances
                .retain(|(_, instance)| !instance.is_stopped());
            if let Some(saved) = saved.environments.get(name) {
                environment.route(saved);
            }
        }
    }

    /// Drains and stops every process.
    async fn end(&self) {
        for environment in self.world().environments.values() {
            for (_, instance) in &environment.instances {
                instance.stop();
            }
        }
        while self
            .world()
            .environments
            .values()
            .any(|e| e.instances.iter().any(|(_, i)| !i.is_stopped()))
        {
            // Each process has its own time limit, so this ends.
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    fn world(&self) -> MutexGuard<'_, World> {
        self.world.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl World {
    fn saved(&self, name: &str) -> Result<&SavedEnvironment> {
        self.saved
            .environments
            .get(name)
            .with_context(|| format!("{name} is not open in the sandbox"))
    }

    /// A release gets traffic only when a process of it is ready.
    fn check_weights(&self, name: &str, weights: &[(ReleaseId, u8)]) -> Result<()> {
        let sum: u32 = weights.iter().map(|(_, weight)| u32::from(*weight)).sum();
        if !weights.is_empty() && sum != 100 {
            bail!("the weights sum to {sum}, not to 100");
        }
        let environment = self
            .environments
            .get(name)
            .context("the environment is not open")?;
        for (release, weight) in weights {
            let ready = environment
                .instances
                .iter()
                .any(|(other, instance)| other == release && instance.backend().is_some());
            if *weight > 0 && !ready {
                bail!("no process of {} is ready for traffic", release.short());
            }
        }
        Ok(())
    }

    fn status(&self, name: &str, saved: &SavedEnvironment) -> EnvironmentStatus {
        let environment = self.environments.get(name);
        let releases = saved
            .releases
            .iter()
            .map(|SavedRelease { run, replicas }| {
                let instances = || {
                    environment
                        .into_iter()
                        .flat_map(|environment| &environment.instances)
                        .filter(|(release, _)| *release == run.release)
                };
                ReleaseStatus {
                    release: run.release.clone(),
                    version: run.version.clone(),
                    desired: *replicas,
                    weight: saved.weight(&run.release),
                    instances: instances().map(|(_, instance)| instance.status()).collect(),
                    available: None,
                    unfinished: false,
                    edited: None,
                    paused: None,
                    broken: instances().find_map(|(_, instance)| instance.broken()),
                }
            })
            .filter(|release| release.desired > 0 || !release.instances.is_empty())
            .collect();
        EnvironmentStatus {
            port: saved.port,
            problem: environment.and_then(|environment| environment.front.as_ref().err().cloned()),
            status: Status {
                releases,
                unseen: false,
                stable: saved.stable.clone(),
                history: saved.history.clone(),
            },
        }
    }
}

impl Environment {
    fn new(router: Arc<Router>, front: Result<Front, String>) -> Self {
        Self {
            router,
            front,
            instances: Vec::new(),
            counters: BTreeMap::new(),
        }
    }

    fn route(&self, saved: &SavedEnvironment) {
        let targets = saved
            .weights
            .iter()
            .map(|(release, weight)| {
                let backends = self
                    .instances
                    .iter()
                    .filter(|(other, instance)| other == release && !instance.is_stopping())
                    .filter_map(|(_, instance)| instance.backend())
                    .collect();
                Target::new(release, *weight, backends)
            })
            .collect();
        self.router.set(Table { targets });
    }
}

impl Instance {
    /// The number at the end of the name.
    fn number(&self) -> u32 {
        self.name
            .rsplit('-')
            .next()
            .and_then(|number| number.parse().ok())
            .unwrap_or(0)
    }
}

/// Why the sandbox ended by itself, in its own log.
pub fn log_failure(places: &Places, error: &anyhow::Error) {
    if let Ok(mut log) = OpenOptions::new()
        .create(true)
        .append(true)
        .open(places.log())
    {
        let _ = writeln!(log, "{} {error:#}", jiff::Timestamp::now());
    }
}
