//! What splits an environment's traffic between two releases: one trait, one adapter for each kind
//! of router.

mod gateway;
mod httpproxy;
mod replicas;

use std::collections::BTreeMap;

use anyhow::Result;
use async_trait::async_trait;
use serde_json::{Value, json};

use super::api::{self, Api};
use super::fence::Fence;
use super::render::{Bundle, RELEASE, name_of};
use crate::config::{Kubernetes as Settings, Stage, TrafficKind};
use crate::release::ReleaseId;

/// The releases that are there, by their short ids.
pub type Known = BTreeMap<String, ReleaseId>;
/// Percents, which sum to 100 or are none at all.
pub type Weights = Vec<(ReleaseId, u8)>;

#[async_trait]
pub trait Traffic: Send + Sync {
    /// The split that the router was given.
    async fn weights(&self, api: &Api, known: &Known) -> Result<Weights>;

    /// Gives the router this split and waits until it has taken it. `bundle` has the route.
    async fn route(&self, fence: &Fence<'_>, bundle: &Bundle, weights: &Weights) -> Result<()>;

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
        TrafficKind::Replicas => Box::new(replicas::Replicas { settings }),
        TrafficKind::Gateway => Box::new(gateway::Gateway { settings }),
        TrafficKind::HttpProxy => Box::new(httpproxy::HttpProxy { settings }),
    }
}

/// Points the Service inside the cluster at the release with most of the traffic.
async fn point(
    fence: &Fence<'_>,
    settings: &Settings,
    bundle: &Bundle,
    weights: &Weights,
) -> Result<()> {
    let mut front = bundle.front.clone();
    if let Some((release, _)) = weights.iter().max_by_key(|(_, weight)| *weight) {
        front["spec"]["selector"][RELEASE] = json!(release.short());
    }
    let _ = settings;
    fence.apply(&front).await.map(|_| ())
}

/// The backends of a weighted list: `{name, port, weight}`, as both kinds of routes have them.
fn backends(settings: &Settings, like: &Value, weights: &Weights) -> Vec<Value> {
    weights
        .iter()
        .map(|(release, weight)| {
            let mut backend = like.clone();
            backend["name"] = json!(name_of(settings, release));
            backend["weight"] = json!(weight);
            backend
        })
        .collect()
}

/// The split that a weighted list of backends makes.
fn split(settings: &Settings, backends: &Value, known: &Known) -> Weights {
    let prefix = format!("{}-", settings.name);
    let weighted: Vec<(ReleaseId, u64)> = api::items(backends)
        .filter_map(|backend| {
            let short = backend["name"].as_str()?.strip_prefix(&prefix)?;
            let weight = backend["weight"].as_u64().unwrap_or(1);
            Some((known.get(short)?.clone(), weight))
        })
        .collect();
    let sum: u64 = weighted.iter().map(|(_, weight)| weight).sum();
    weighted
        .into_iter()
        .filter(|(_, weight)| *weight > 0)
        .map(|(release, weight)| {
            let percent = (weight * 100 + sum / 2) / sum;
            (release, u8::try_from(percent).unwrap_or(100))
        })
        .collect()
}
