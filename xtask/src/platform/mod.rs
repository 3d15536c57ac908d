//! Where environments run: one trait, one adapter for each platform.
//!
//! A platform never decides. It tells what is there and makes it as an action says.

pub mod sandbox;

use std::sync::Arc;

use anyhow::Result;
use async_trait::async_trait;
use serde::{Deserialize, Serialize};

use crate::config::{Pipeline, PlatformKind};
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
    /// prepared before `apply` can name it.
    async fn prepare(&mut self, release: &Recorded) -> Result<()>;

    /// From now on only writers with this fencing token or a newer one are heard: what an older
    /// one still had on its way is refused with [`StaleWriter`].
    async fn claim(&self, token: u64) -> Result<()>;

    /// Makes it so. Done twice it is the same as done once.
    async fn apply(&self, plan: &Plan, action: &Action, token: u64) -> Result<()>;

    /// What the platform's own proxy counted since it started, for each instance.
    async fn counts(&self) -> Result<Vec<InstanceCounts>>;

    /// Where clients reach the environment.
    fn address(&self) -> String;
}

#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Status {
    pub releases: Vec<ReleaseStatus>,
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

impl Status {
    pub fn release(&self, id: &ReleaseId) -> Option<&ReleaseStatus> {
        self.releases.iter().find(|release| release.release == *id)
    }
}

impl ReleaseStatus {
    pub fn ready(&self) -> u32 {
        self.instances
            .iter()
            .filter(|instance| instance.ready)
            .map(|_| 1)
            .sum()
    }
}

/// The platform of an environment.
pub async fn open(pipeline: &Arc<Pipeline>, environment: &str) -> Result<Box<dyn Platform>> {
    match pipeline.environment(environment)?.platform {
        PlatformKind::Sandbox => Ok(Box::new(
            sandbox::Sandbox::open(pipeline, environment).await?,
        )),
    }
}

/// Where the journals, the lock and the requests of an environment are.
pub async fn desk(pipeline: &Arc<Pipeline>, environment: &str) -> Result<Box<dyn Desk>> {
    match pipeline.environment(environment)?.platform {
        PlatformKind::Sandbox => Ok(Box::new(Files::new(&pipeline.state_dir(), environment))),
    }
}

/// The environment as it is, without starting a platform that was stopped: then `None`.
pub async fn look(pipeline: &Arc<Pipeline>, environment: &str) -> Result<Option<(Status, String)>> {
    match pipeline.environment(environment)?.platform {
        PlatformKind::Sandbox => {
            if !sandbox::should_run(pipeline).await? {
                return Ok(None);
            }
            let platform = open(pipeline, environment).await?;
            Ok(Some((platform.status().await?, platform.address())))
        }
    }
}
