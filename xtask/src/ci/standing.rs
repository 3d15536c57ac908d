//! How each step stands, over runs of only some of them: what `--failed` goes by.

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::{Result, bail};

use super::receipt::{Outcome, Receipt};
use crate::files;

pub struct Standing {
    path: PathBuf,
}

impl Standing {
    pub fn at(path: PathBuf) -> Self {
        Self { path }
    }

    /// The steps that did not pass when they were last asked to.
    pub fn failed(&self) -> Result<Vec<String>> {
        if !self.path.is_file() {
            bail!("nothing has run here yet; `cargo xtask ci` runs the steps");
        }
        let outcomes: BTreeMap<String, Outcome> = files::read_json(&self.path)?;
        let failed = outcomes
            .into_iter()
            .filter(|(_, outcome)| !outcome.is_pass());
        Ok(failed.map(|(name, _)| name).collect())
    }

    /// Takes the outcomes of a run over those of the runs before.
    pub fn update(&self, receipt: &Receipt) -> Result<()> {
        let mut outcomes: BTreeMap<String, Outcome> = if self.path.is_file() {
            files::read_json(&self.path).unwrap_or_default()
        } else {
            BTreeMap::new()
        };
        for step in &receipt.steps {
            outcomes.insert(step.name.clone(), step.outcome);
        }
        files::write_json(&self.path, &outcomes)
    }
}
