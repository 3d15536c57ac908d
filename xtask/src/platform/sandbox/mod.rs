//! The sandbox: a platform on this machine, without containers and without a cluster.
//!
//! A daemon runs each release's processes from the image's own layer, supervises them, and
//! fronts each environment with a weighted proxy. This file is the commands' side of it.

mod bodies;
pub mod commands;
mod counters;
mod daemon;
mod instance;
mod process;
mod protocol;
mod proxy;
#[cfg(test)]
mod proxy_tests;
mod routing;
mod saved;

use std::collections::BTreeMap;
use std::fs::OpenOptions;
use std::path::PathBuf;
use std::process::{Child, Command};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use async_trait::async_trait;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;

use super::{InstanceCounts, InstanceStatus, Platform, StaleWriter, Status};
use crate::config::Pipeline;
use crate::files;
use crate::http;
use crate::image::layout::Layout;
use crate::release::{Recorded, ReleaseId};
use crate::rollout::engine::{Action, Plan};
use protocol::{Change, Places, Reply, Request, Run, VERSION};

/// Longer than processes usually take to drain.
const START_TIMEOUT: Duration = Duration::from_secs(30);
/// How long an instance may take to answer on its operators' socket.
const ASK_TIMEOUT: Duration = Duration::from_secs(2);
const REPLY_TIMEOUT: Duration = Duration::from_secs(10);

/// One environment in the sandbox.
pub struct Sandbox {
    pipeline: Arc<Pipeline>,
    places: Places,
    environment: String,
    port: u16,
    runs: BTreeMap<ReleaseId, Run>,
    client: reqwest::Client,
}

impl Sandbox {
    /// Starts the sandbox where it is not running, and opens the environment's port.
    pub async fn open(pipeline: &Arc<Pipeline>, environment: &str) -> Result<Self> {
        let sandbox = Self {
            pipeline: Arc::clone(pipeline),
            places: places(pipeline),
            environment: environment.to_owned(),
            port: pipeline.environment(environment)?.port,
            runs: BTreeMap::new(),
            client: http::client()?,
        };
        start(&sandbox.places).await?;
        sandbox.open_port().await?;
        Ok(sandbox)
    }

    async fn open_port(&self) -> Result<()> {
        let request = Request::Open {
            environment: self.environment.clone(),
            port: self.port,
        };
        self.done(&request).await
    }

    async fn done(&self, request: &Request) -> Result<()> {
        match ask(&self.places, request).await? {
            Reply::Done => Ok(()),
            Reply::Stale { .. } => Err(StaleWriter.into()),
            Reply::Refused { why } => bail!("{why}"),
            other => bail!("the sandbox gave an answer to something else: {other:?}"),
        }
    }

    async fn change(&self, token: u64, change: Change) -> Result<()> {
        let environment = self.environment.clone();
        self.done(&Request::Change {
            environment,
            token,
            change,
        })
        .await
    }

    /// A daemon that was killed is replaced, and finds the state it had.
    async fn ask_alive(&self, request: &Request) -> Result<Reply> {
        match ask(&self.places, request).await {
            Ok(reply) => Ok(reply),
            Err(_) => {
                start(&self.places).await?;
                ask(&self.places, request).await
            }
        }
    }

    fn run(&self, release: &ReleaseId) -> Result<&Run> {
        self.runs.get(release).with_context(|| {
            format!(
                "release {} was not prepared for the sandbox",
                release.short()
            )
        })
    }
}

#[async_trait]
impl Platform for Sandbox {
    async fn status(&self) -> Result<Status> {
        let request = Request::Environment {
            environment: self.environment.clone(),
        };
        match self.ask_alive(&request).await? {
            Reply::Environment(status) => Ok(status),
            other => bail!("the sandbox does not tell its status: {other:?}"),
        }
    }

    async fn prepare(&mut self, release: &Recorded) -> Result<()> {
        let run = prepare(&self.pipeline, &self.places, &self.environment, release)?;
        self.runs.insert(release.id.clone(), run);
        Ok(())
    }

    async fn claim(&self, token: u64) -> Result<()> {
        self.change(token, Change::Claim).await
    }

    async fn apply(&self, plan: &Plan, action: &Action, token: u64) -> Result<()> {
        let change = match action {
            Action::Scale {
                release,
                replicas: 0,
            } => Change::Stop {
                release: release.clone(),
            },
            Action::Scale { release, replicas } => Change::Scale {
                run: self.run(release)?.clone(),
                replicas: *replicas,
            },
            Action::Route { weights } => Change::Route {
                weights: weights.clone(),
            },
            Action::Record { mark } => Change::Record {
                rollout: plan.rollout.clone(),
                stable: plan.stable_after(*mark).cloned(),
                marks: plan.marks(*mark),
            },
        };
        self.change(token, change).await
    }

    async fn stop(&self, release: &ReleaseId, token: u64) -> Result<()> {
        let release = release.clone();
        self.change(token, Change::Stop { release }).await
    }

    async fn counts(&self) -> Result<Vec<InstanceCounts>> {
        let request = Request::Counts {
            environment: self.environment.clone(),
        };
        match self.ask_alive(&request).await? {
            Reply::Counts { counts } => Ok(counts),
            other => bail!("the sandbox does not tell its counts: {other:?}"),
        }
    }

    async fn ask(&self, instance: &InstanceStatus, path: &str) -> Result<String> {
        let Some(address) = instance.admin else {
            bail!("{} has no operators' socket yet", instance.name);
        };
        let url = format!("http://{address}{path}");
        let request = self.client.get(&url).timeout(ASK_TIMEOUT);
        let answer = async { request.send().await?.error_for_status()?.text().await };
        answer.await.with_context(|| format!("asking {url}"))
    }

    fn address(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    fn explain(&self, _release: &ReleaseId) -> Vec<String> {
        vec![format!(
            "its logs: cargo xtask sandbox logs --environment {}",
            self.environment
        )]
    }
}

/// Where the pipeline's sandbox keeps its files.
fn places(pipeline: &Pipeline) -> Places {
    Places::new(pipeline.state_dir().join("sandbox"))
}

/// Unpacks a release: its image's layer, and its configuration as files.
fn prepare(
    pipeline: &Pipeline,
    places: &Places,
    environment: &str,
    recorded: &Recorded,
) -> Result<Run> {
    let release = &recorded.release;
    let layout = Layout::open(pipeline.state_dir().join("images"))?;
    let root = places.root(&release.image);
    let runnable = layout.unpack(&release.image, &root)?;
    let config_dir = places.config(&recorded.id);
    for (name, text) in &release.config {
        let path = config_dir.join(name);
        if std::fs::read_to_string(&path).ok().as_ref() != Some(text) {
            files::write_atomically(&path, text.as_bytes())?;
        }
    }
    let data_dir = places.data(environment);
    std::fs::create_dir_all(&data_dir)
        .with_context(|| format!("creating {}", data_dir.display()))?;

    let fill = |template: &String| {
        template
            .replace("{environment}", environment)
            .replace("{config_dir}", &config_dir.to_string_lossy())
            .replace("{data_dir}", &data_dir.to_string_lossy())
    };
    let mut variables: BTreeMap<String, String> = runnable
        .variables
        .iter()
        .filter_map(|pair| pair.split_once('='))
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .collect();
    variables.extend(
        pipeline
            .service
            .variables
            .iter()
            .map(|(name, value)| (name.clone(), fill(value))),
    );
    let (program, arguments) = runnable
        .entrypoint
        .split_first()
        .context("the image has no entry point")?;
    Ok(Run {
        release: recorded.id.clone(),
        version: release.version.to_string(),
        program: root.join(program.trim_start_matches('/')),
        arguments: arguments.to_vec(),
        variables,
        directory: data_dir,
        ready_path: pipeline.service.ready_path.clone(),
        drain_timeout: pipeline.service.drain_timeout,
    })
}

/// Whether the sandbox is running, or was killed and should be.
pub async fn should_run(pipeline: &Pipeline) -> Result<bool> {
    let places = places(pipeline);
    Ok(places.pid().exists() || is_alive(&places).await?)
}

/// Makes sure that a sandbox answers, starting one if need be.
async fn start(places: &Places) -> Result<()> {
    if is_alive(places).await? {
        return Ok(());
    }
    std::fs::create_dir_all(&places.dir)
        .with_context(|| format!("creating {}", places.dir.display()))?;
    let mut child = spawn(places)?;
    let deadline = Instant::now() + START_TIMEOUT;
    while Instant::now() < deadline {
        if is_alive(places).await? {
            return Ok(());
        }
        if let Some(status) = child.try_wait().context("watching the sandbox start")? {
            if status.code() != Some(i32::from(daemon::ALREADY_RUNNING)) {
                bail!(
                    "the sandbox did not start ({status}):\n{}",
                    files::last_lines(&places.log(), 10).join("\n")
                );
            }
            // The one before is still draining its processes, or another command was faster.
            child = spawn(places)?;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    bail!(
        "the sandbox did not answer within 30 s:\n{}",
        files::last_lines(&places.log(), 10).join("\n")
    )
}

fn spawn(places: &Places) -> Result<Child> {
    let log = OpenOptions::new()
        .create(true)
        .append(true)
        .open(places.log())
        .with_context(|| format!("opening {}", places.log().display()))?;
    let mut daemon = Command::new(this_program()?);
    daemon
        .args(["sandbox", "daemon", "--dir"])
        .arg(&places.dir)
        .current_dir("/");
    files::log_into(&mut daemon, log)?
        .spawn()
        .context("starting the sandbox")
}

/// Whether a sandbox of this version answers.
async fn is_alive(places: &Places) -> Result<bool> {
    match ask(places, &Request::Hello).await {
        Ok(Reply::Hello {
            version: VERSION, ..
        }) => Ok(true),
        Ok(_) => bail!(
            "the sandbox that is running is of another version; `cargo xtask sandbox stop` ends it"
        ),
        Err(_) => Ok(false),
    }
}

async fn ask(places: &Places, request: &Request) -> Result<Reply> {
    let path = places.socket();
    let talk = async {
        let stream = UnixStream::connect(&path).await?;
        let (reader, mut writer) = stream.into_split();
        let mut line = serde_json::to_string(request)?;
        line.push('\n');
        writer.write_all(line.as_bytes()).await?;
        let mut reply = String::new();
        BufReader::new(reader).read_line(&mut reply).await?;
        anyhow::Ok(serde_json::from_str(&reply)?)
    };
    tokio::time::timeout(REPLY_TIMEOUT, talk)
        .await
        .context("the sandbox does not answer")?
        .with_context(|| format!("talking to the sandbox on {}", path.display()))
}

/// The file of this program, even after cargo has put another one in its place.
fn this_program() -> Result<PathBuf> {
    if cfg!(target_os = "linux") {
        return Ok(PathBuf::from("/proc/self/exe"));
    }
    std::env::current_exe().context("finding this program")
}
