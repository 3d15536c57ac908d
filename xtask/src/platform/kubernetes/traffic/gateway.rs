//! Weights of a Gateway API HTTPRoute or GRPCRoute.
//! <https://gateway-api.sigs.k8s.io/reference/spec/#httpbackendref>

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use async_trait::async_trait;
use serde_json::{Value, json};

use super::{Known, Traffic, Weights, backends, point, split};
use crate::config::Kubernetes as Settings;
use crate::platform::kubernetes::api::{self, Api, Kind};
use crate::platform::kubernetes::fence::Fence;
use crate::platform::kubernetes::render::Bundle;

/// How long a gateway may take to say that it has taken a route.
const PATIENCE: Duration = Duration::from_secs(20);
const POLL: Duration = Duration::from_millis(50);

pub struct Gateway {
    pub settings: Settings,
}

fn kinds() -> [Kind; 2] {
    let version = "gateway.networking.k8s.io/v1";
    [
        Kind::new(version, "HTTPRoute"),
        Kind::new(version, "GRPCRoute"),
    ]
}

#[async_trait]
impl Traffic for Gateway {
    async fn weights(&self, api: &Api, known: &Known) -> Result<Weights> {
        for kind in kinds() {
            if let Some(route) = api.get(&kind, &self.settings.name).await? {
                let rules = &route["spec"]["rules"];
                let ours = api::items(rules)
                    .find(|rule| !split(&self.settings, &rule["backendRefs"], known).is_empty());
                return Ok(ours.map_or_else(Vec::new, |rule| {
                    split(&self.settings, &rule["backendRefs"], known)
                }));
            }
        }
        Ok(Vec::new())
    }

    async fn route(&self, fence: &Fence<'_>, bundle: &Bundle, weights: &Weights) -> Result<()> {
        let (Some(route), Some(kind)) = (&bundle.route, bundle.route_kind()) else {
            bail!(
                "{} renders no HTTPRoute named {:?}, and traffic is \"gateway\"",
                self.settings.overlay,
                self.settings.name
            );
        };
        let mut wanted = route.clone();
        let mut ours = 0;
        for rule in wanted["spec"]["rules"].as_array_mut().into_iter().flatten() {
            let like = api::items(&rule["backendRefs"])
                .find(|backend| backend["name"] == self.settings.name.as_str())
                .cloned();
            // A rule that leads elsewhere is none of a rollout's business.
            if let Some(like) = like {
                rule["backendRefs"] = self.backends(&like, weights).into();
                ours += 1;
            }
        }
        if ours == 0 {
            bail!(
                "{}: no rule of the route {} leads to the Service {}",
                self.settings.overlay,
                api::name(route),
                self.settings.name
            );
        }
        let applied = fence.apply(&wanted).await?;
        self.taken(fence.api, &kind, &applied).await?;
        point(fence, &self.settings, bundle, weights).await
    }

    fn objects(&self) -> Vec<(Kind, String)> {
        let [http, grpc] = kinds();
        let service = Kind::new("v1", "Service");
        [http, grpc, service]
            .map(|kind| (kind, self.settings.name.clone()))
            .into()
    }
}

impl Gateway {
    fn backends(&self, like: &Value, weights: &Weights) -> Vec<Value> {
        let mut backends = backends(&self.settings, like, weights);
        if let Some(header) = &self.settings.release_header {
            for (backend, (release, _)) in backends.iter_mut().zip(weights) {
                backend["filters"] = json!([{
                    "type": "ResponseHeaderModifier",
                    "responseHeaderModifier": {
                        "set": [{ "name": header, "value": release.short() }]
                    },
                }]);
            }
        }
        backends
    }

    /// Waits until every parent has taken this generation of the route. That is no proof of an
    /// effect, but a parent that refuses it says why.
    async fn taken(&self, api: &Api, kind: &Kind, applied: &Value) -> Result<()> {
        let generation = applied["metadata"]["generation"].as_u64();
        let parents = api::items(&applied["spec"]["parentRefs"]).count();
        let deadline = Instant::now() + PATIENCE;
        loop {
            let route = api
                .get(kind, api::name(applied))
                .await?
                .context("the route is gone")?;
            let mut taken = 0;
            let mut refused = None;
            for parent in api::items(&route["status"]["parents"]) {
                let current = api::items(&parent["conditions"])
                    .filter(|condition| condition["observedGeneration"].as_u64() >= generation);
                let conditions: Vec<&Value> = current.collect();
                let is = |name: &str, status: &str| {
                    conditions
                        .iter()
                        .find(|c| c["type"] == name && c["status"] == status)
                };
                refused = refused.or(is("Accepted", "False").or(is("ResolvedRefs", "False")).map(
                    |condition| {
                        format!(
                            "the gateway {} refuses the route {}: {}: {}",
                            parent["parentRef"]["name"].as_str().unwrap_or_default(),
                            api::name(applied),
                            condition["reason"].as_str().unwrap_or_default(),
                            condition["message"].as_str().unwrap_or_default()
                        )
                    },
                ));
                taken += usize::from(
                    is("Accepted", "True").is_some() && is("ResolvedRefs", "True").is_some(),
                );
            }
            if taken >= parents {
                return Ok(());
            }
            if Instant::now() > deadline {
                match refused {
                    Some(refused) => bail!("{refused}"),
                    None => bail!(
                        "no gateway has taken the route {} within {} s: is there one that its \
                         parentRefs name, and is its controller running?",
                        api::name(applied),
                        PATIENCE.as_secs()
                    ),
                }
            }
            tokio::time::sleep(POLL).await;
        }
    }
}
