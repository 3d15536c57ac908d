//! Where the demo takes place: what is put up for it, and taken away afterwards.

use std::path::Path;

use anyhow::{Context, Result, bail};
use serde_json::json;

use super::Stage;
use super::steps::{PRODUCTION, Steps};
use crate::cluster::{self, Cluster, places};
use crate::config::{Pipeline, PlatformKind};
use crate::files;
use crate::output::Output;
use crate::release;

/// The ports of the cluster's gateway that are the demo's, so that it disturbs nothing.
const LISTENERS: [(&str, u16); 2] = [(PRODUCTION, 18082), ("staging", 18083)];

/// Changes the settings so that all takes place on the cluster, in namespaces and behind listeners
/// of the demo's own. `into` gets a copy of the manifests; production's address comes back.
pub fn on_cluster<'a>(
    pipeline: &'a Pipeline,
    into: &Path,
    changes: &mut Vec<(Vec<&'a str>, toml::Value)>,
) -> Result<String> {
    let manifests = pipeline.manifests_dir();
    let manifests = manifests.context("the pipeline has no [kubernetes] section")?;
    for (path, text) in release::read_manifests(&manifests)? {
        files::replace(&into.join(path), text.as_bytes())?;
    }
    changes.push((vec!["kubernetes", "manifests"], super::text(into)));
    changes.push((
        vec!["kubernetes", "namespace"],
        "service-demo-{environment}".into(),
    ));
    let mut production = String::new();
    for name in pipeline.environments.keys() {
        let Some((_, port)) = LISTENERS
            .iter()
            .find(|(environment, _)| environment == name)
        else {
            bail!("the cluster's gateway has no port for a demo of the environment {name:?}");
        };
        let settings = pipeline.kubernetes(name)?;
        let overlay = format!("overlays/demo/{name}");
        let kustomization = json!({
            "apiVersion": "kustomize.config.k8s.io/v1beta1",
            "kind": "Kustomization",
            "resources": [format!("../../../{}", settings.overlay)],
            "patches": [{
                "target": { "kind": "HTTPRoute", "name": settings.name },
                "patch": json!([{
                    "op": "replace",
                    "path": "/spec/parentRefs/0/sectionName",
                    "value": format!("demo-{name}"),
                }]).to_string(),
            }],
        });
        let file = into.join(&overlay).join("kustomization.yaml");
        files::replace(&file, kustomization.to_string().as_bytes())?;
        let address = format!("http://{}:{port}", places::ADDRESS);
        if name == PRODUCTION {
            production.clone_from(&address);
        }
        let environment = |key: &'a str| vec!["environments", name.as_str(), key];
        let kubernetes = |key: &'a str| vec!["environments", name.as_str(), "kubernetes", key];
        changes.push((environment("platform"), "kubernetes".into()));
        changes.push((environment("metrics"), "scrape".into()));
        changes.push((kubernetes("overlay"), overlay.into()));
        changes.push((kubernetes("address"), address.into()));
    }
    Ok(production)
}

pub enum Ground {
    Sandbox,
    Cluster {
        cluster: Cluster,
        /// Whether it was started for the demo.
        is_ours: bool,
        namespaces: Vec<String>,
    },
}

impl Ground {
    pub fn find(stage: &Stage) -> Result<Self> {
        if stage.platform == PlatformKind::Sandbox {
            return Ok(Self::Sandbox);
        }
        let cluster = Cluster::open()?;
        let given = std::env::var_os(cluster::KUBECONFIG);
        if let Some(given) = given.filter(|given| **given != *cluster.kubeconfig()) {
            bail!(
                "{} = {} names another cluster, and the demo runs on its own, whose gateway it knows: unset \
                 it, or give that cluster's context to kubernetes.context and type the demo's commands",
                cluster::KUBECONFIG,
                given.display()
            );
        }
        let mut namespaces = Vec::new();
        for name in stage.pipeline.environments.keys() {
            namespaces.push(stage.pipeline.kubernetes(name)?.namespace);
        }
        Ok(Self::Cluster {
            is_ours: !cluster.is_running(),
            cluster,
            namespaces,
        })
    }

    /// What makes a release known where it is to run.
    pub fn image_arguments(&self) -> Vec<String> {
        match self {
            Self::Sandbox => Vec::new(),
            Self::Cluster { .. } => ["--load", PRODUCTION].map(str::to_owned).into(),
        }
    }

    /// Puts up what there has to be, and removes what an earlier demo left.
    pub fn prepare(&self, steps: &Steps<'_>, stage: &Stage, output: &Output) -> Result<()> {
        let state = stage.dir.join("state");
        match self {
            Self::Sandbox if state.exists() => steps.quiet(&["sandbox", "stop"])?,
            Self::Sandbox => {}
            Self::Cluster {
                cluster,
                namespaces,
                ..
            } => {
                output.step("starting a cluster");
                cluster.up(output)?;
                cluster.remove_namespaces(namespaces)?;
                cluster.make_namespaces(&stage.pipeline)?;
            }
        }
        if state.exists() {
            std::fs::remove_dir_all(&state)
                .with_context(|| format!("removing {}", state.display()))?;
        }
        Ok(())
    }

    /// Whoever is interrupted leaves nothing behind either.
    pub fn leave_on_interrupt(&self, steps: &Steps<'_>) -> Result<()> {
        let is_theirs = matches!(self, Self::Cluster { is_ours: false, .. });
        steps.end_on_interrupt((!is_theirs).then(|| steps.command(self.stop_words())))
    }

    /// The command that ends all of it.
    pub fn stop_words(&self) -> &'static [&'static str] {
        match self {
            Self::Sandbox => &["sandbox", "stop"],
            Self::Cluster { .. } => &["cluster", "down"],
        }
    }

    /// Takes away what was put up.
    pub fn leave(&self, steps: &Steps<'_>) -> Result<()> {
        match self {
            Self::Cluster {
                cluster,
                is_ours: false,
                namespaces,
            } => cluster.remove_namespaces(namespaces),
            _ => steps.quiet(self.stop_words()),
        }
    }

    /// The same commands as on another machine, which knows of no release and no rollout: the
    /// cluster has all of it. In the sandbox the machine is the platform.
    pub fn elsewhere<'a>(&self, stage: &Stage, steps: &Steps<'a>) -> Result<Option<Steps<'a>>> {
        if matches!(self, Self::Sandbox) {
            return Ok(None);
        }
        let state = stage.dir.join("elsewhere");
        if state.exists() {
            std::fs::remove_dir_all(&state)
                .with_context(|| format!("removing {}", state.display()))?;
        }
        let settings = stage.dir.join("elsewhere.toml");
        let changes = [(vec!["state_dir"], super::text(&state))];
        let content = Pipeline::rewrite(&stage.settings, &changes)?;
        files::write_atomically(&settings, content.as_bytes())?;
        Ok(Some(steps.by(settings)))
    }
}
