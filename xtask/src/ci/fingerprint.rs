//! All that the outcome of a check depends on, and the key made from it.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::Result;
use serde::{Deserialize, Serialize};

use super::facts::MISSING;
use super::step::{Inputs, Step};
use super::tree::{Packages, Tree};
use crate::files;

/// Raised where the meaning of a key changes, so that older passes do not count.
pub const FORMAT: u32 = 1;

/// The state of the workspace and the machine that fingerprints are taken from.
pub struct Situation {
    pub tree: Tree,
    pub packages: Packages,
    pub facts: BTreeMap<String, String>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fingerprint {
    pub format: u32,
    pub argv: Vec<String>,
    /// What the step sets itself.
    pub variables: BTreeMap<String, String>,
    /// What it sees of the environment; `None` where it is not set.
    pub environment: BTreeMap<String, Option<String>>,
    pub tools: BTreeMap<String, String>,
    /// Each file's path and content, see [`Tree`].
    pub files: BTreeMap<String, String>,
}

impl Fingerprint {
    /// The fingerprint of a check. `inputs` are the step's: without any there is no key.
    pub fn take(
        step: &Step,
        inputs: &Inputs,
        arguments: &[String],
        now: &Situation,
    ) -> Result<Self> {
        let environment = inputs
            .environment
            .iter()
            .map(|name| (name.clone(), std::env::var(name).ok()));
        let tools = step.facts().map(|name| {
            let fact = now.facts.get(name).cloned();
            (name.to_owned(), fact.unwrap_or_else(|| MISSING.to_owned()))
        });
        Ok(Self {
            format: FORMAT,
            argv: step.argv.iter().chain(arguments).cloned().collect(),
            variables: step.variables.clone(),
            environment: environment.collect(),
            tools: tools.collect(),
            files: now.tree.select(inputs, &now.packages)?,
        })
    }

    /// SHA-256 of its canonical JSON (sorted keys, no spaces).
    pub fn key(&self) -> String {
        // Maps with text for keys always have a JSON form.
        let json = serde_json::to_vec(self).unwrap_or_default();
        files::sha256(&json)
    }

    /// Whether all that it names is known, so that a pass may be remembered.
    pub fn is_complete(&self) -> bool {
        !self.tools.values().any(|version| version == MISSING)
    }

    /// What is different from `before`, a line each.
    pub fn differences(&self, before: &Self) -> Vec<String> {
        let mut lines = Vec::new();
        if self.argv != before.argv {
            lines.push(format!(
                "command: {} (was {})",
                self.argv.join(" "),
                before.argv.join(" ")
            ));
        }
        if self.format != before.format {
            lines.push("the cache's format is another one".to_owned());
        }
        compare("variable", &self.variables, &before.variables, &mut lines);
        let shown = |map: &BTreeMap<String, Option<String>>| -> BTreeMap<String, String> {
            let value = |value: &Option<String>| value.clone().unwrap_or("not set".to_owned());
            map.iter().map(|(k, v)| (k.clone(), value(v))).collect()
        };
        let (now, then) = (shown(&self.environment), shown(&before.environment));
        compare("environment", &now, &then, &mut lines);
        compare("tool", &self.tools, &before.tools, &mut lines);
        lines.extend(files_changed(&self.files, &before.files));
        lines
    }
}

fn compare(
    what: &str,
    now: &BTreeMap<String, String>,
    before: &BTreeMap<String, String>,
    lines: &mut Vec<String>,
) {
    for name in now.keys().chain(before.keys()).collect::<BTreeSet<_>>() {
        let (now, before) = (now.get(name), before.get(name));
        if now != before {
            let text = |value: Option<&String>| value.map_or("nothing", String::as_str).to_owned();
            lines.push(format!(
                "{what} {name}: {} (was {})",
                text(now),
                text(before)
            ));
        }
    }
}

/// The files that are new, gone or different, a line each.
pub fn files_changed(
    now: &BTreeMap<String, String>,
    before: &BTreeMap<String, String>,
) -> Vec<String> {
    let paths: BTreeSet<&String> = now.keys().chain(before.keys()).collect();
    paths
        .into_iter()
        .filter_map(|path| {
            let how = match (now.get(path), before.get(path)) {
                (Some(_), None) => "new",
                (None, Some(_)) => "gone",
                (Some(a), Some(b)) if a == b => return None,
                (Some(a), Some(b)) if a.split(' ').next_back() == b.split(' ').next_back() => {
                    "mode changed"
                }
                _ => "changed",
            };
            Some(format!("file {path}: {how}"))
        })
        .collect()
}
