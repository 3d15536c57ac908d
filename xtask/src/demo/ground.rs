//! Where the demo takes place: what is put up for it, and taken away afterwards.

use anyhow::{Context, Result};

use super::Stage;
use super::steps::{PRODUCTION, Steps};
use crate::cluster::Cluster;
use crate::config::{Pipeline, PlatformKind};
use crate::files;
use crate::output::Output;

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
    pub fn prepare(stage: &Stage, output: &Output) -> Result<Self> {
        if stage.platform == PlatformKind::Sandbox {
            return Ok(Self::Sandbox);
        }
        output.step("starting a cluster");
        let cluster = Cluster::open()?;
        let is_ours = !cluster.is_running();
        cluster.up(output)?;
        let mut namespaces = Vec::new();
        for name in stage.pipeline.environments.keys() {
            namespaces.push(stage.pipeline.kubernetes(name)?.namespace);
        }
        Ok(Self::Cluster {
            cluster,
            is_ours,
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

    /// Removes what an earlier demo left.
    pub fn clear(&self, steps: &Steps<'_>, stage: &Stage) -> Result<()> {
        let state = stage.dir.join("state");
        match self {
            Self::Sandbox if state.exists() => steps.quiet(&["sandbox", "stop"])?,
            Self::Sandbox => {}
            Self::Cluster {
                cluster,
                namespaces,
                ..
            } => {
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

    /// On Ctrl-C what is no child of the terminal's is stopped as well.
    pub fn stop_on_interrupt(&self, steps: &Steps<'_>) -> Result<()> {
        let stops = match self {
            Self::Cluster { is_ours: false, .. } => Vec::new(),
            _ => vec![steps.command(self.stop_words())],
        };
        steps.stop_on_interrupt(stops)
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
    pub fn elsewhere<'a>(&self, stage: &Stage, output: &'a Output) -> Result<Option<Steps<'a>>> {
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
        Steps::new(settings, self.image_arguments(), output).map(Some)
    }
}
