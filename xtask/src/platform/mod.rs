//! Where environments run: one trait, one adapter for each platform.
//!
//! A platform never decides. It tells what is there and makes it as an action says.

#[cfg(feature = "kubernetes")]
pub mod kubernetes;
pub mod sandbox;

use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;
use async_trait::async_trait;
use serde::{Deserialize, Serialize};

use crate::config::{MetricsKind, Pipeline, PlatformKind, Stage, TrafficKind};
use crate::release::{Recorded, ReleaseId};
use crate::rollout::desk::{Desk, Files};
use crate::rollout::engine::{Action, Mark, Plan};
use crate::rollout::windows::Counts;

/// Another command has taken over the environment: this one must not go on.
#[derive(Debug)]
pub struct StaleWriter;

impl std::fmt::Display for StaleWriter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(
            "another command has taken over this environment; see `cargo xtask canary status`",
        )
    }
}

impl std::error::Error for StaleWriter {}

/// One environment on its platform.
#[async_trait]
pub trait Platform: Send + Sync {
    async fn status(&self) -> Result<Status>;

    /// Finds all that is wrong with a release before anything is done with it. A release must be
    /// prepared before `apply` can start any of it or give it traffic.
    async fn prepare(&mut self, release: &Recorded) -> Result<()>;

    /// From now on only writers with this fencing token or a newer one are heard: what an older
    /// one still had on its way is refused with [`StaleWriter`].
    async fn claim(&self, token: u64) -> Result<()>;

    /// Makes it so. Done twice it is the same as done once.
    async fn apply(&self, plan: &Plan, action: &Action, token: u64) -> Result<()>;

    /// Ends what a release still runs; it must have no traffic. What only it needs goes too, where
    /// it and the release in service are prepared.
    async fn stop(&self, release: &ReleaseId, token: u64) -> Result<()>;

    /// What the platform's own proxy counted since it started, for each instance.
    async fn counts(&self) -> Result<Vec<InstanceCounts>>;

    /// What an instance answers on its operators' socket.
    async fn ask(&self, instance: &InstanceStatus, path: &str) -> Result<String>;

    /// Where clients reach the environment.
    fn address(&self) -> String;

    /// How often it is worth looking.
    fn tick(&self) -> Duration {
        Duration::from_millis(50)
    }

    /// Where counts come from unless the settings say otherwise.
    fn metrics(&self) -> MetricsKind {
        MetricsKind::Proxy
    }

    /// The stages that can be reached here, for those that are wanted.
    fn stages(&self, wanted: &[Stage], _replicas: u32) -> Vec<Stage> {
        wanted.to_vec()
    }

    /// How many instances a release with traffic has at least.
    fn least(&self) -> u32 {
        1
    }

    /// Whether numbers of instances make the split of the traffic.
    fn by_replicas(&self) -> bool {
        false
    }

    /// What splits the traffic, where the settings can say.
    fn traffic(&self) -> Option<TrafficKind> {
        None
    }

    /// A release that this machine does not know, where the platform keeps it.
    async fn recall(&self, _id: &ReleaseId) -> Result<Option<Recorded>> {
        Ok(None)
    }

    /// What helps to find out why a release does not get ready: messages, or where they are.
    fn explain(&self, release: &ReleaseId) -> Vec<String>;

    /// What a prepared release changes, for people.
    async fn changes(&self, _from: Option<&ReleaseId>, _to: &ReleaseId) -> Vec<String> {
        Vec::new()
    }
}

#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Status {
    pub releases: Vec<ReleaseStatus>,
    /// Whether the weights are what the router was given, and nobody has seen it follow.
    #[serde(default)]
    pub unseen: bool,
    /// The release in service.
    pub stable: Option<ReleaseId>,
    /// How rollouts ended, oldest first.
    pub history: Vec<HistoryEntry>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ReleaseStatus {
    pub release: ReleaseId,
    pub version: String,
    pub desired: u32,
    /// Percent of the traffic.
    pub weight: u8,
    pub instances: Vec<InstanceStatus>,
    /// Why it will not get ready by waiting.
    pub broken: Option<String>,
    /// Who has changed what it runs, so that it is not that release any more.
    #[serde(default)]
    pub edited: Option<String>,
    /// Who has stopped it, and how it goes on.
    #[serde(default)]
    pub paused: Option<String>,
    /// How many of the instances that are ready count, where they have to be so for a while.
    #[serde(default)]
    pub available: Option<u32>,
    /// Whether it was begun to be made, so that there may be something to take away.
    #[serde(default)]
    pub unfinished: bool,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct InstanceStatus {
    pub name: String,
    pub ready: bool,
    /// What it is doing, for people.
    pub state: String,
    pub pid: Option<u32>,
    /// Its operators' socket.
    pub admin: Option<std::net::SocketAddr>,
    pub restarts: u32,
    /// Requests it is working on.
    pub in_flight: u64,
}

/// What a release earned in an environment, and by which rollout.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HistoryEntry {
    pub release: ReleaseId,
    pub rollout: String,
    pub mark: Mark,
    pub at: jiff::Timestamp,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct InstanceCounts {
    pub release: ReleaseId,
    pub instance: String,
    pub counts: Counts,
}

/// Puts what a rollout has earned into the history, in place of what it had there before.
pub fn note(history: &mut Vec<HistoryEntry>, rollout: &str, marks: Vec<(ReleaseId, Mark)>) {
    let at = jiff::Timestamp::now();
    history.retain(|entry| entry.rollout != rollout);
    history.extend(marks.into_iter().map(|(release, mark)| HistoryEntry {
        release,
        rollout: rollout.to_owned(),
        mark,
        at,
    }));
}

impl Status {
    /// What keeps the release in service from serving, for people: somebody has taken it away.
    pub fn lost(&self) -> Option<String> {
        let stable = self.stable.as_ref()?;
        let short = stable.short();
        let on_record = format!("{short} is in service on record");
        match self.release(stable) {
            None => Some(format!("{on_record}, but it is gone")),
            Some(release) if release.desired == 0 => {
                Some(format!("{on_record}, but runs no instance"))
            }
            Some(_) if self.releases.iter().all(|release| release.weight == 0) => {
                Some(format!("{on_record}, but nothing leads to it"))
            }
            Some(_) => None,
        }
    }

    pub fn release(&self, id: &ReleaseId) -> Option<&ReleaseStatus> {
        self.releases.iter().find(|release| release.release == *id)
    }
}

impl ReleaseStatus {
    /// How many instances carry what they are given, for good.
    pub fn ready(&self) -> u32 {
        let ready = self.instances.iter().filter(|instance| instance.ready);
        let ready: u32 = ready.map(|_| 1).sum();
        ready.min(self.available.unwrap_or(ready))
    }
}

/// The platform of an environment.
pub async fn open(pipeline: &Arc<Pipeline>, environment: &str) -> Result<Box<dyn Platform>> {
    match pipeline.environment(environment)?.platform {
        PlatformKind::Sandbox => Ok(Box::new(
            sandbox::Sandbox::open(pipeline, environment).await?,
        )),
        #[cfg(feature = "kubernetes")]
        PlatformKind::Kubernetes => Ok(Box::new(
            kubernetes::Kubernetes::open(pipeline, environment).await?,
        )),
        #[cfg(not(feature = "kubernetes"))]
        PlatformKind::Kubernetes => Err(lacking(environment)),
    }
}

/// Where the journals, the lock and the requests of an environment are.
pub async fn desk(pipeline: &Arc<Pipeline>, environment: &str) -> Result<Box<dyn Desk>> {
    match pipeline.environment(environment)?.platform {
        PlatformKind::Sandbox => Ok(Box::new(Files::new(&pipeline.state_dir(), environment))),
        #[cfg(feature = "kubernetes")]
        PlatformKind::Kubernetes => Ok(Box::new(
            kubernetes::Kubernetes::desk(pipeline, environment).await?,
        )),
        #[cfg(not(feature = "kubernetes"))]
        PlatformKind::Kubernetes => Err(lacking(environment)),
    }
}

/// The command line's table of features sees to it that this is never read.
#[cfg(not(feature = "kubernetes"))]
fn lacking(environment: &str) -> anyhow::Error {
    anyhow::anyhow!("{environment} runs on Kubernetes, and this program was built without it")
}

/// The environment as it is, without starting a platform that was stopped: then `None`.
pub async fn look(pipeline: &Arc<Pipeline>, environment: &str) -> Result<Option<(Status, String)>> {
    let is_sandbox = pipeline.environment(environment)?.platform == PlatformKind::Sandbox;
    if is_sandbox && !sandbox::should_run(pipeline).await? {
        return Ok(None);
    }
    let platform = open(pipeline, environment).await?;
    Ok(Some((platform.status().await?, platform.address())))
}
