//! Numbers of pods behind one Service: no gateway is needed, and few weights can be reached.

use anyhow::Result;
use async_trait::async_trait;
use serde_json::{Value, json};

use super::{Bundles, Known, Split, Traffic, Weights, apply};
use crate::config::{Kubernetes as Settings, Stage};
use crate::platform::kubernetes::api::{self, Api, Kind};
use crate::platform::kubernetes::fence::Fence;
use crate::platform::kubernetes::render::{Bundle, RELEASE};

/// The split that was asked for. The pods that make it are counted by the engine.
const WEIGHTS: &str = "xtask.dev/weights";

pub struct Replicas {
    pub settings: Settings,
}

fn kind() -> Kind {
    Kind::new("v1", "Service")
}

#[async_trait]
impl Traffic for Replicas {
    async fn split(&self, api: &Api, known: &Known) -> Result<Split> {
        let Some(front) = api.get(&kind(), &self.settings.name).await? else {
            return Ok(Split::default());
        };
        let asked: Vec<(String, u8)> = api::annotation(&front, WEIGHTS)
            .and_then(|text| serde_json::from_str(text).ok())
            .unwrap_or_default();
        // Somebody who changes the selector changes the split.
        let only = front["spec"]["selector"][RELEASE].as_str();
        let agrees = match (only, asked.as_slice()) {
            (Some(only), [(one, _)]) => only == one,
            (None, several) => several.len() > 1,
            _ => false,
        };
        let asked = match (agrees, only) {
            (true, _) => asked,
            (false, Some(only)) => vec![(only.to_owned(), 100)],
            (false, None) => Vec::new(),
        };
        let weights = asked
            .into_iter()
            .filter_map(|(short, weight)| Some((known.get(&short)?.clone(), weight)))
            .collect();
        Ok(Split {
            weights,
            unseen: false,
        })
    }

    async fn route(
        &self,
        fence: &Fence<'_>,
        _bundle: &Bundle,
        front: &Value,
        weights: &Weights,
        _bundles: &Bundles,
    ) -> Result<Option<String>> {
        let mut front = front.clone();
        let split: Vec<(&str, u8)> = weights
            .iter()
            .map(|(release, weight)| (release.short(), *weight))
            .collect();
        front["metadata"]["annotations"][WEIGHTS] = json!(json!(split).to_string());
        // With one release its own pods, with two the pods of both. A Service that no pod may answer
        // selects a release that there is none of.
        let selector = &mut front["spec"]["selector"];
        match (split.as_slice(), selector.as_object_mut()) {
            ([], _) => selector[RELEASE] = json!("none"),
            ([(only, _)], _) => selector[RELEASE] = json!(only),
            (_, Some(selector)) => drop(selector.remove(RELEASE)),
            (_, None) => {}
        }
        Ok(apply(fence, &front, weights).await?.1)
    }

    fn objects(&self) -> Vec<(Kind, String)> {
        vec![(kind(), self.settings.name.clone())]
    }

    /// The nearest weight for each that is wanted: `c` pods of the candidate beside all of stable's
    /// get `c / (stable + c)` of the traffic, and everything once stable's pods are left out.
    fn stages(&self, wanted: &[Stage], replicas: u32) -> Vec<Stage> {
        let reachable: Vec<u8> = (1..=replicas)
            .map(|candidate| {
                let share = f64::from(candidate) / f64::from(replicas + candidate);
                (share * 100.0).round() as u8
            })
            .chain([100])
            .collect();
        let mut stages: Vec<Stage> = Vec::new();
        for stage in wanted {
            let nearest = reachable
                .iter()
                .copied()
                .min_by_key(|weight| weight.abs_diff(stage.weight))
                .unwrap_or(100);
            // The last stage is everything, and only the last one.
            let weight = match stage.weight {
                100 => 100,
                _ => nearest.min(*reachable.iter().rev().nth(1).unwrap_or(&nearest)),
            };
            match stages.last_mut() {
                Some(last) if last.weight == weight => {
                    last.gate = stage.gate.clone().or(last.gate.take())
                }
                _ => stages.push(Stage {
                    weight,
                    gate: stage.gate.clone(),
                }),
            }
        }
        stages
    }

    fn by_replicas(&self) -> bool {
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::platform::kubernetes::render::tests::settings;

    #[test]
    fn stages_become_those_that_pods_can_make() {
        let settings = settings();
        let wanted: Vec<Stage> = [10, 25, 50, 75, 100]
            .map(|weight| Stage { weight, gate: None })
            .into();
        let weights = |replicas| -> Vec<u8> {
            let router = Replicas {
                settings: settings.clone(),
            };
            router
                .stages(&wanted, replicas)
                .iter()
                .map(|stage| stage.weight)
                .collect()
        };
        assert_eq!(weights(1), [50, 100]);
        assert_eq!(weights(2), [33, 50, 100]);
        assert_eq!(weights(10), [9, 23, 50, 100]);
    }
}
