//! What a run proved, of what: `run.json`.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use serde::{Deserialize, Serialize};

use super::fingerprint::{FORMAT, Fingerprint};
use crate::files;

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Receipt {
    pub started_at: jiff::Timestamp,
    pub ended_at: jiff::Timestamp,
    /// The git commit, with `-dirty` where the tree differs from it.
    pub revision: String,
    pub interrupted: bool,
    pub steps: Vec<StepReceipt>,
    /// The workspace's files by content, as steps saw them: `MODE SHA-256`.
    pub files: BTreeMap<String, String>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct StepReceipt {
    pub name: String,
    pub command: String,
    pub outcome: Outcome,
    /// Why it failed or was not run, or what is odd about a pass.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub reason: String,
    /// How long it ran; for a cached step, how long it ran when it passed.
    pub seconds: f64,
    /// From the start of the run.
    pub started: f64,
    pub log: PathBuf,
    /// `None` for what has an effect.
    pub key: Option<String>,
    /// All that the key is made from, save the files' content, which `files` has.
    pub inputs: Option<Inputs>,
}

/// A fingerprint as a receipt keeps it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Inputs {
    pub argv: Vec<String>,
    pub variables: BTreeMap<String, String>,
    pub environment: BTreeMap<String, Option<String>>,
    pub tools: BTreeMap<String, String>,
    pub files: Vec<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    Passed,
    Failed,
    /// It passed before, on the same inputs.
    Cached,
    NotRun,
}

impl Outcome {
    pub fn is_pass(self) -> bool {
        matches!(self, Self::Passed | Self::Cached)
    }
}

impl Receipt {
    pub fn read(path: &Path) -> Result<Self> {
        if !path.is_file() {
            bail!(
                "{} is no receipt; `cargo xtask ci` writes one, and Actions keeps it as an artifact",
                path.display()
            );
        }
        files::read_json(path)
    }

    pub fn passed(&self) -> bool {
        !self.interrupted && self.steps.iter().all(|step| step.outcome.is_pass())
    }

    pub fn failures(&self) -> impl Iterator<Item = &StepReceipt> {
        self.steps
            .iter()
            .filter(|step| step.outcome == Outcome::Failed)
    }

    /// How many steps ended in each way: `3 passed, 1 failed`.
    pub fn tally(&self) -> String {
        let all = [
            Outcome::Passed,
            Outcome::Cached,
            Outcome::Failed,
            Outcome::NotRun,
        ];
        let counts = all.iter().filter_map(|outcome| {
            let number = self.steps.iter().filter(|s| s.outcome == *outcome).count();
            (number > 0).then(|| format!("{number} {outcome}"))
        });
        counts.collect::<Vec<_>>().join(", ")
    }
}

impl Inputs {
    pub fn of(fingerprint: &Fingerprint) -> Self {
        Self {
            argv: fingerprint.argv.clone(),
            variables: fingerprint.variables.clone(),
            environment: fingerprint.environment.clone(),
            tools: fingerprint.tools.clone(),
            files: fingerprint.files.keys().cloned().collect(),
        }
    }

    /// The fingerprint again, with the files' content as `receipt` has it.
    pub fn fingerprint(&self, receipt: &Receipt) -> Fingerprint {
        let content = |path: &String| {
            let content = receipt.files.get(path).cloned().unwrap_or_default();
            (path.clone(), content)
        };
        Fingerprint {
            format: FORMAT,
            argv: self.argv.clone(),
            variables: self.variables.clone(),
            environment: self.environment.clone(),
            tools: self.tools.clone(),
            files: self.files.iter().map(content).collect(),
        }
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Passed => "passed",
            Self::Failed => "failed",
            Self::Cached => "cached",
            Self::NotRun => "not run",
        })
    }
}
