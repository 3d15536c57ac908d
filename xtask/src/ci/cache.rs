//! Passes that are remembered: one file for each, named by the key of what was passed.
//!
//! Only a pass is ever kept, and only a whole one: an entry is written atomically, and counts only
//! when it can be read and says the very same of every input as the workspace does now.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use super::fingerprint::Fingerprint;
use super::step::Inputs;
use super::tree;
use crate::files;

/// Bytes that all entries together may have.
const LIMIT: u64 = 32 << 20;

pub struct Cache {
    dir: PathBuf,
    limit: u64,
}

/// A step that passed, and on what.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Pass {
    pub fingerprint: Fingerprint,
    pub passed_at: jiff::Timestamp,
    /// How long it ran.
    pub seconds: f64,
    /// What it left for others: path and content.
    pub outputs: BTreeMap<String, String>,
}

impl Cache {
    pub fn open(dir: PathBuf) -> Self {
        Self { dir, limit: LIMIT }
    }

    /// The pass of `step` on exactly this, where one is remembered and what it left is still so.
    pub fn find(
        &self,
        step: &str,
        fingerprint: &Fingerprint,
        inputs: &Inputs,
        root: &Path,
    ) -> Option<Pass> {
        if !fingerprint.is_complete() {
            return None;
        }
        let pass = read(&self.path(step, &fingerprint.key()))?;
        let same = pass.fingerprint == *fingerprint
            && outputs(inputs, root).is_ok_and(|outputs| pass.outputs == outputs);
        same.then_some(pass)
    }

    /// The newest pass of `step`, on whatever; one of the same command where there is any.
    pub fn last(&self, step: &str, argv: &[String]) -> Option<Pass> {
        let entries = fs::read_dir(self.dir.join(step)).ok()?;
        let passes = entries.filter_map(|entry| read(&entry.ok()?.path()));
        passes.max_by_key(|pass| (pass.fingerprint.argv == argv, pass.passed_at))
    }

    /// Remembers a pass. The caller has made sure that the inputs are still what was passed.
    pub fn remember(
        &self,
        step: &str,
        fingerprint: &Fingerprint,
        inputs: &Inputs,
        seconds: f64,
        root: &Path,
    ) -> Result<()> {
        if !fingerprint.is_complete() {
            return Ok(());
        }
        let pass = Pass {
            fingerprint: fingerprint.clone(),
            passed_at: jiff::Timestamp::now(),
            seconds,
            outputs: outputs(inputs, root)?,
        };
        files::write_json(&self.path(step, &fingerprint.key()), &pass)?;
        self.prune()
    }

    fn path(&self, step: &str, key: &str) -> PathBuf {
        self.dir.join(step).join(format!("{key}.json"))
    }

    /// Removes the oldest entries until the rest is within the limit.
    fn prune(&self) -> Result<()> {
        let mut entries: Vec<(SystemTime, u64, PathBuf)> = Vec::new();
        let steps =
            fs::read_dir(&self.dir).with_context(|| format!("reading {}", self.dir.display()))?;
        for step in steps.filter_map(Result::ok) {
            for entry in fs::read_dir(step.path())
                .into_iter()
                .flatten()
                .filter_map(Result::ok)
            {
                // Another run may have removed it meanwhile.
                let Ok(metadata) = entry.metadata() else {
                    continue;
                };
                let written = metadata.modified().unwrap_or(SystemTime::UNIX_EPOCH);
                entries.push((written, metadata.len(), entry.path()));
            }
        }
        entries.sort();
        let mut size: u64 = entries.iter().map(|(_, size, _)| size).sum();
        for (_, bytes, path) in entries {
            if size <= self.limit {
                break;
            }
            let _ = fs::remove_file(&path);
            size -= bytes;
        }
        Ok(())
    }
}

/// An entry that is damaged, half written or of another format is none.
fn read(path: &Path) -> Option<Pass> {
    serde_json::from_slice(&fs::read(path).ok()?).ok()
}

fn outputs(inputs: &Inputs, root: &Path) -> Result<BTreeMap<String, String>> {
    let content = |path: &String| -> Result<(String, String)> {
        let content = tree::describe(&root.join(path))?;
        let content = content.with_context(|| format!("{path}, which the step writes, is gone"))?;
        Ok((path.clone(), content))
    };
    inputs.writes.iter().map(content).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fingerprint(content: &str) -> Fingerprint {
        Fingerprint {
            format: 1,
            argv: vec!["true".to_owned()],
            variables: BTreeMap::new(),
            environment: BTreeMap::new(),
            tools: BTreeMap::new(),
            files: BTreeMap::from([("a".to_owned(), content.to_owned())]),
        }
    }

    #[test]
    fn what_is_damaged_or_incomplete_is_no_pass() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::open(dir.path().join("cache"));
        let inputs = Inputs::default();
        let now = fingerprint("1");
        let find = |now: &Fingerprint| cache.find("s", now, &inputs, dir.path()).is_some();
        assert!(!find(&now));
        cache.remember("s", &now, &inputs, 1.0, dir.path()).unwrap();
        assert!(find(&now));
        assert!(!find(&fingerprint("2")));

        let entry = cache.path("s", &now.key());
        let whole = fs::read(&entry).unwrap();
        for length in 0..whole.len() - 1 {
            fs::write(&entry, &whole[..length]).unwrap();
            assert!(!find(&now), "{length} of {} bytes", whole.len());
        }
        // An entry under the right name that speaks of something else.
        fs::write(
            &entry,
            String::from_utf8(whole).unwrap().replace("\"1\"", "\"2\""),
        )
        .unwrap();
        assert!(!find(&now));

        let mut unknown = fingerprint("1");
        unknown
            .tools
            .insert("deny".into(), super::super::facts::MISSING.into());
        cache
            .remember("s", &unknown, &inputs, 1.0, dir.path())
            .unwrap();
        assert!(!find(&unknown));
    }

    #[test]
    fn the_oldest_entries_go_first() {
        let dir = tempfile::tempdir().unwrap();
        let mut cache = Cache::open(dir.path().to_owned());
        let inputs = Inputs::default();
        for number in 0..10 {
            let now = fingerprint(&number.to_string());
            cache.remember("s", &now, &inputs, 1.0, dir.path()).unwrap();
            let entry = cache.path("s", &now.key());
            let size = fs::metadata(&entry).unwrap().len();
            cache.limit = 3 * size + size / 2;
            // Files of one moment have no order.
            let when = SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(number);
            fs::File::open(&entry).unwrap().set_modified(when).unwrap();
        }
        let kept = (0..10).filter(|number| {
            let now = fingerprint(&number.to_string());
            cache.find("s", &now, &inputs, dir.path()).is_some()
        });
        assert_eq!(kept.collect::<Vec<_>>(), [7, 8, 9]);
    }
}
