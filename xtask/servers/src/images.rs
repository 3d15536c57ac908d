//! Which images servers are started from.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result, bail};
use serde::Deserialize;
use testcontainers::core::client::docker_client_instance;

use crate::{ADVICE, Server};

/// The images for each server, by its name.
#[derive(Debug, Clone, Default)]
pub struct Images(pub BTreeMap<String, Image>);

#[derive(Debug, Clone, Deserialize)]
pub struct Image {
    /// What a registry has.
    pub ordinary: String,
    /// What `cargo xtask setup` builds where no registry can be reached.
    pub offline: String,
}

impl Images {
    /// What `config/tools.toml` of this workspace names.
    pub fn of_workspace() -> Result<Self> {
        #[derive(Deserialize)]
        struct Pins {
            images: BTreeMap<String, Image>,
        }
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../config/tools.toml");
        let text = std::fs::read_to_string(&path)
            .with_context(|| format!("reading {}", path.display()))?;
        let pins: Pins = toml::from_str(&text).context("in config/tools.toml")?;
        Ok(Self(pins.images))
    }

    /// The ordinary image where it is there, else the one that was built here.
    pub async fn choose(&self, server: Server) -> Result<String> {
        let Some(image) = self.0.get(server.name()) else {
            bail!("config/tools.toml names no image for {}", server.name());
        };
        let docker = docker_client_instance()
            .await
            .with_context(|| format!("reaching a container engine; {ADVICE}"))?;
        // Whether an engine answers at all is another question than what it has.
        docker
            .ping()
            .await
            .with_context(|| format!("no container engine answers; {ADVICE}"))?;
        for name in [&image.ordinary, &image.offline] {
            if docker.inspect_image(name).await.is_ok() {
                return Ok(name.clone());
            }
        }
        bail!(
            "neither {} nor {} is there; {ADVICE}",
            image.ordinary,
            image.offline
        )
    }
}
