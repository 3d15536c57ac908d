//! Values of settings, which cannot be wrong once they are read.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Deserializer, Serialize};

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(try_from = "u32")]
pub struct Replicas(pub u32);

/// The stages of a rollout: weights that rise and end at 100.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(try_from = "Vec<StageEntry>")]
pub struct Stages(pub Vec<Stage>);

#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Stage {
    /// Percent of requests for the candidate.
    pub weight: u8,
    /// A stop that a person opens with `canary promote`, before the next stage.
    pub gate: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(
    untagged,
    expecting = "expected a weight or { weight = 50, gate = \"why\" }"
)]
enum StageEntry {
    Weight(u8),
    Gated(GatedStage),
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct GatedStage {
    weight: u8,
    gate: Option<String>,
}

/// More than 0, less than 1.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "f64")]
pub struct Probability(pub f64);

/// More than 1.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "f64")]
pub struct Ratio(pub f64);

/// Where a secret is; never the secret itself.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "lowercase", deny_unknown_fields)]
pub enum Secret {
    /// In an environment variable of that name.
    Env(String),
    File(PathBuf),
}

impl Secret {
    /// What it is now: a file may have a new one by then.
    pub fn read(&self) -> Result<String> {
        let text = match self {
            Self::Env(name) => std::env::var(name).with_context(|| format!("reading {self}"))?,
            Self::File(path) => {
                std::fs::read_to_string(path).with_context(|| format!("reading {self}"))?
            }
        };
        let text = text.trim();
        ensure!(!text.is_empty(), "{self} is empty");
        Ok(text.to_owned())
    }
}

impl fmt::Display for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Env(name) => write!(f, "the variable {name}"),
            Self::File(path) => path.display().fmt(f),
        }
    }
}

/// A time of more than 0 and at most a day; written `250ms`, `5s`, `2m`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Time(pub Duration);

impl TryFrom<Vec<StageEntry>> for Stages {
    type Error = String;

    fn try_from(entries: Vec<StageEntry>) -> Result<Self, String> {
        let stages: Vec<Stage> = entries
            .into_iter()
            .map(|entry| match entry {
                StageEntry::Weight(weight) => Stage { weight, gate: None },
                StageEntry::Gated(GatedStage { weight, gate }) => Stage { weight, gate },
            })
            .collect();
        let weights: Vec<u8> = stages.iter().map(|stage| stage.weight).collect();
        if let Some(weight) = weights.iter().find(|weight| !(1..=100).contains(*weight)) {
            return Err(format!(
                "a stage's weight is 1 to 100 percent, not {weight}"
            ));
        }
        if let Some(pair) = weights.windows(2).find(|pair| pair[0] >= pair[1]) {
            return Err(format!(
                "weights must rise, but {} comes after {}",
                pair[1], pair[0]
            ));
        }
        if weights.last() != Some(&100) {
            return Err("the last stage's weight must be 100".to_owned());
        }
        Ok(Self(stages))
    }
}

impl TryFrom<u32> for Replicas {
    type Error = String;

    fn try_from(number: u32) -> Result<Self, String> {
        if (1..=100).contains(&number) {
            Ok(Self(number))
        } else {
            Err(format!("replicas must be 1 to 100, not {number}"))
        }
    }
}

impl TryFrom<f64> for Probability {
    type Error = String;

    fn try_from(number: f64) -> Result<Self, String> {
        if number > 0.0 && number < 1.0 {
            Ok(Self(number))
        } else {
            Err(format!("expected a number between 0 and 1, not {number}"))
        }
    }
}

impl TryFrom<f64> for Ratio {
    type Error = String;

    fn try_from(number: f64) -> Result<Self, String> {
        if number > 1.0 && number.is_finite() {
            Ok(Self(number))
        } else {
            Err(format!("expected a ratio above 1, not {number}"))
        }
    }
}

impl<'de> Deserialize<'de> for Time {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        jiff::SignedDuration::from_str(&text)
            .ok()
            .and_then(|time| Duration::try_from(time).ok())
            .filter(|time| !time.is_zero() && *time <= Duration::from_secs(86_400))
            .map(Time)
            .ok_or_else(|| {
                serde::de::Error::custom(format!(
                    "expected a time of more than 0 and at most a day, such as \"5s\", not {text:?}"
                ))
            })
    }
}

impl Serialize for Time {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl fmt::Display for Time {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}ms", self.0.as_millis())
    }
}

impl Time {
    pub fn millis(self) -> u64 {
        u64::try_from(self.0.as_millis()).unwrap_or(u64::MAX)
    }
}
