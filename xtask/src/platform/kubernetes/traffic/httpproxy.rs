//! Weights of a Contour HTTPProxy.
//! <https://projectcontour.io/docs/1.33/config/request-routing/#upstream-weighting>

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use async_trait::async_trait;
use serde_json::{Value, json};

use super::{Known, Traffic, Weights, backends, point, split};
use crate::config::Kubernetes as Settings;
use crate::platform::kubernetes::api::{self, Api, Kind};
use crate::platform::kubernetes::fence::Fence;
use crate::platform::kubernetes::render::Bundle;

const PATIENCE: Duration = Duration::from_secs(20);
const POLL: Duration = Duration::from_millis(50);

pub struct HttpProxy {
    pub settings: Settings,
}

fn kind() -> Kind {
    Kind::new("projectcontour.io/v1", "HTTPProxy")
}

#[async_trait]
impl Traffic for HttpProxy {
    async fn weights(&self, api: &Api, known: &Known) -> Result<Weights> {
        let Some(proxy) = api.get(&kind(), &self.settings.name).await? else {
            return Ok(Vec::new());
        };
        let weights = api::items(&proxy["spec"]["routes"])
            .map(|route| split(&self.settings, &route["services"], known))
            .find(|weights| !weights.is_empty());
        Ok(weights.unwrap_or_default())
    }

    async fn route(&self, fence: &Fence<'_>, bundle: &Bundle, weights: &Weights) -> Result<()> {
        let route = bundle
            .route
            .as_ref()
            .filter(|route| route["kind"] == "HTTPProxy");
        let route = route.with_context(|| {
            format!(
                "{} renders no HTTPProxy named {:?}, and traffic is \"httpproxy\"",
                self.settings.overlay, self.settings.name
            )
        })?;
        let mut wanted = route.clone();
        for route in wanted["spec"]["routes"]
            .as_array_mut()
            .into_iter()
            .flatten()
        {
            let like = api::items(&route["services"])
                .find(|service| service["name"] == self.settings.name.as_str())
                .cloned();
            if let Some(like) = like {
                route["services"] = self.services(&like, weights).into();
            }
        }
        let applied = fence.apply(&wanted).await?;
        self.taken(fence.api, &applied).await?;
        point(fence, &self.settings, bundle, weights).await
    }

    fn objects(&self) -> Vec<(Kind, String)> {
        [kind(), Kind::new("v1", "Service")]
            .map(|kind| (kind, self.settings.name.clone()))
            .into()
    }
}

impl HttpProxy {
    fn services(&self, like: &Value, weights: &Weights) -> Vec<Value> {
        let mut services = backends(&self.settings, like, weights);
        if let Some(header) = &self.settings.release_header {
            for (service, (release, _)) in services.iter_mut().zip(weights) {
                service["responseHeadersPolicy"] =
                    json!({ "set": [{ "name": header, "value": release.short() }] });
            }
        }
        services
    }

    async fn taken(&self, api: &Api, applied: &Value) -> Result<()> {
        let generation = applied["metadata"]["generation"].as_u64();
        let deadline = Instant::now() + PATIENCE;
        loop {
            let proxy = api.get(&kind(), api::name(applied)).await?;
            let proxy = proxy.context("the HTTPProxy is gone")?;
            let valid = api::items(&proxy["status"]["conditions"]).find(|condition| {
                condition["type"] == "Valid"
                    && condition["observedGeneration"].as_u64() >= generation
            });
            match valid {
                Some(valid) if valid["status"] == "True" => return Ok(()),
                _ if Instant::now() < deadline => {}
                Some(_) => bail!(
                    "Contour refuses the HTTPProxy {}: {}",
                    api::name(applied),
                    proxy["status"]["description"].as_str().unwrap_or_default()
                ),
                None => bail!(
                    "Contour has not taken the HTTPProxy {} within {} s: is it running?",
                    api::name(applied),
                    PATIENCE.as_secs()
                ),
            }
            tokio::time::sleep(POLL).await;
        }
    }
}
