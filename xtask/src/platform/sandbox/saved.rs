//! What survives the sandbox: how every environment should be, in one file.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::protocol::Run;
use crate::platform::{HistoryEntry, note};
use crate::release::ReleaseId;
use crate::rollout::engine::Mark;

#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Saved {
    pub environments: BTreeMap<String, SavedEnvironment>,
}

#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SavedEnvironment {
    pub port: u16,
    /// The highest fencing token seen.
    pub token: u64,
    pub releases: Vec<SavedRelease>,
    pub weights: Vec<(ReleaseId, u8)>,
    pub stable: Option<ReleaseId>,
    pub history: Vec<HistoryEntry>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SavedRelease {
    pub run: Run,
    pub replicas: u32,
}

impl SavedEnvironment {
    pub fn scale(&mut self, run: Run, replicas: u32) {
        match self
            .releases
            .iter_mut()
            .find(|saved| saved.run.release == run.release)
        {
            Some(saved) => *saved = SavedRelease { run, replicas },
            None => self.releases.push(SavedRelease { run, replicas }),
        }
    }

    pub fn stop(&mut self, release: &ReleaseId) {
        for saved in &mut self.releases {
            if saved.run.release == *release {
                saved.replicas = 0;
            }
        }
    }

    pub fn replicas(&self, release: &ReleaseId) -> u32 {
        let saved = self
            .releases
            .iter()
            .find(|saved| saved.run.release == *release);
        saved.map_or(0, |saved| saved.replicas)
    }

    pub fn weight(&self, release: &ReleaseId) -> u8 {
        self.weights
            .iter()
            .find(|(other, _)| other == release)
            .map_or(0, |(_, weight)| *weight)
    }

    pub fn record(
        &mut self,
        rollout: &str,
        stable: Option<ReleaseId>,
        marks: Vec<(ReleaseId, Mark)>,
    ) {
        self.stable = stable;
        note(&mut self.history, rollout, marks);
    }
}
