//! What splits an environment's traffic between two releases: one trait, one adapter for each kind
//! of router.

mod effect;
mod gateway;
mod httpproxy;
mod replicas;
mod rules;
mod weighted;

use std::collections::BTreeMap;

use anyhow::Result;
use async_trait::async_trait;
use serde_json::{Value, json};

use super::api::{self, Api};
use super::fence::Fence;
use super::render::{Bundle, RELEASE};
use crate::config::{Kubernetes as Settings, Stage, TrafficKind};
use crate::release::ReleaseId;
use gateway::Gateway;
use httpproxy::HttpProxy;
use replicas::Replicas;
use weighted::Weighted;

/// The releases that are there, by their short ids.
pub type Known = BTreeMap<String, ReleaseId>;
/// Percents, which sum to 100 or are none at all.
pub type Weights = Vec<(ReleaseId, u8)>;
/// What was rendered of each release that a rollout is about.
pub type Bundles = BTreeMap<ReleaseId, Bundle>;

/// The split that a router was given.
#[derive(Default)]
pub struct Split {
    pub weights: Weights,
    /// Nobody has seen the router follow.
    pub unseen: bool,
}

#[async_trait]
pub trait Traffic: Send + Sync {
    /// The split that the router was given.
    async fn split(&self, api: &Api, known: &Known) -> Result<Split>;

    /// Gives the router this split and waits until it is in effect. `bundle` has the route, and
    /// `front` is the Service inside the cluster as the release in service has it. What was taken
    /// over from somebody else is told.
    async fn route(
        &self,
        fence: &Fence<'_>,
        bundle: &Bundle,
        front: &Value,
        weights: &Weights,
        bundles: &Bundles,
    ) -> Result<Option<String>>;

    /// Takes out of the route what a release that never got traffic has left there; the split stays
    /// as it is.
    async fn settle(&self, _fence: &Fence<'_>, _stable: &Bundle, _bundles: &Bundles) -> Result<()> {
        Ok(())
    }

    /// Refuses manifests whose traffic it could not split, before anything is changed.
    fn check(&self, _bundle: &Bundle) -> Result<()> {
        Ok(())
    }

    /// The objects that it changes: kind and name.
    fn objects(&self) -> Vec<(api::Kind, String)>;

    /// The stages that can be reached at all, for those that are wanted.
    fn stages(&self, wanted: &[Stage], _replicas: u32) -> Vec<Stage> {
        wanted.to_vec()
    }

    /// Whether the split is made by numbers of pods, so that capacity and weight are one.
    fn by_replicas(&self) -> bool {
        false
    }
}

pub fn open(settings: &Settings) -> Box<dyn Traffic> {
    let settings = settings.clone();
    match settings.traffic {
        TrafficKind::Replicas => Box::new(Replicas { settings }),
        TrafficKind::Gateway => Box::new(Weighted {
            shape: Gateway,
            settings,
        }),
        TrafficKind::HttpProxy => Box::new(Weighted {
            shape: HttpProxy,
            settings,
        }),
    }
}

/// The release that gets everything, or else the one that got everything before.
pub fn in_service(weights: &Weights) -> Option<&ReleaseId> {
    let all = weights.iter().find(|(_, weight)| *weight == 100);
    all.or(weights.first()).map(|(release, _)| release)
}

/// Points the Service inside the cluster, which cannot split, at the release in service: the
/// candidate's pods are enough for all of its traffic only once they carry everything. What was taken over
/// is told.
async fn point(fence: &Fence<'_>, front: &Value, weights: &Weights) -> Result<Option<String>> {
    let mut front = front.clone();
    if let Some(release) = in_service(weights) {
        front["spec"]["selector"][RELEASE] = json!(release.short());
    }
    Ok(apply(fence, &front, weights).await?.1)
}

/// Applies what leads to releases, and tells what was taken over from somebody else: where one release is
/// to get everything, nobody's edit may keep a way back closed.
async fn apply(
    fence: &Fence<'_>,
    wanted: &Value,
    weights: &Weights,
) -> Result<(Value, Option<String>)> {
    match fence.apply(wanted).await {
        Err(error) if weights.len() == 1 && api::is_owned_by_others(&error) => {
            Ok((fence.take_over(wanted).await?, Some(format!("{error:#}"))))
        }
        applied => Ok((applied?, None)),
    }
}
