//! Releases on disk: one file each, named by the release's id.

use std::path::PathBuf;

use anyhow::{Context, Result, bail};

use super::{Recorded, Release, ReleaseId};
use crate::config::Pipeline;
use crate::files;

pub struct Store {
    dir: PathBuf,
}

impl Store {
    pub fn open(pipeline: &Pipeline) -> Self {
        Self {
            dir: pipeline.state_dir().join("releases"),
        }
    }

    /// Keeps `release`; keeping the same one again changes only when it was last made.
    pub fn keep(&self, release: Release) -> Result<Recorded> {
        let recorded = Recorded {
            id: release.id()?,
            created_at: jiff::Timestamp::now(),
            release,
        };
        files::write_json(&self.path(&recorded.id), &recorded)?;
        Ok(recorded)
    }

    pub fn get(&self, id: &ReleaseId) -> Result<Recorded> {
        let path = self.path(id);
        let recorded: Recorded = files::read_json(&path)?;
        let actual = recorded.release.id()?;
        if actual != *id {
            bail!(
                "{} does not hold the release it is named after (its content is {actual}); \
                 move it away and run `cargo xtask image` again",
                path.display()
            );
        }
        Ok(recorded)
    }

    /// All releases, the newest first.
    pub fn all(&self) -> Result<Vec<Recorded>> {
        if !self.dir.exists() {
            return Ok(Vec::new());
        }
        let mut releases = Vec::new();
        for entry in std::fs::read_dir(&self.dir)
            .with_context(|| format!("reading {}", self.dir.display()))?
        {
            let name = entry.context("listing the releases")?.file_name();
            if let Some(id) = name.to_string_lossy().strip_suffix(".json")
                && !id.starts_with('.')
            {
                releases.push(self.get(&ReleaseId(id.to_owned()))?);
            }
        }
        releases.sort_by(|a, b| (b.created_at, &b.id).cmp(&(a.created_at, &a.id)));
        Ok(releases)
    }

    /// The release that `text` means: `latest`, an id, the start of one, or a version (the
    /// newest release of it).
    pub fn resolve(&self, text: &str) -> Result<Recorded> {
        let all = self.all()?;
        if all.is_empty() {
            bail!("there is no release yet; make one with `cargo xtask image`");
        }
        let mut found: Vec<&Recorded> = match text {
            "latest" => all.iter().take(1).collect(),
            _ => {
                let version = |r: &&Recorded| r.release.version.to_string() == text;
                let by_version: Vec<_> = all.iter().filter(version).take(1).collect();
                if by_version.is_empty() && text.len() >= 4 {
                    all.iter()
                        .filter(|r| r.id.as_str().starts_with(text))
                        .collect()
                } else {
                    by_version
                }
            }
        };
        match (found.pop(), found.is_empty()) {
            (Some(one), true) => Ok(one.clone()),
            (Some(_), false) => {
                bail!("{text:?} is the start of several releases; give more of the id")
            }
            (None, _) => {
                let known: Vec<String> = all.iter().take(5).map(ToString::to_string).collect();
                bail!(
                    "there is no release {text:?}; the newest are {}; `cargo xtask releases` lists all",
                    known.join(", ")
                )
            }
        }
    }

    fn path(&self, id: &ReleaseId) -> PathBuf {
        self.dir.join(format!("{id}.json"))
    }
}
