//! A release: what is rolled out and rolled back as one thing.

mod store;

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use crate::cli::Cli;
use crate::config::Pipeline;
use crate::files;
use crate::output::{Finished, Output};
pub use store::Store;

/// SHA-256 of the release's canonical JSON, in hexadecimal.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ReleaseId(String);

/// Everything that travels together: the image, the configuration and the schema version.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Release {
    /// The digest of the image's manifest, `sha256:` and 64 hexadecimal digits.
    pub image: String,
    /// The configuration's files by name, whole.
    pub config: BTreeMap<String, String>,
    /// The files of Kubernetes manifests by path, whole; none where nothing runs there.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub manifests: BTreeMap<String, String>,
    /// The number of the newest migration that the image carries.
    pub schema_version: u64,
    /// The image's version: part of the image already, repeated for people.
    pub version: semver::Version,
}

/// A release as the store keeps it.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recorded {
    pub id: ReleaseId,
    pub created_at: jiff::Timestamp,
    pub release: Release,
}

impl Release {
    /// A release of the image with this digest, with the configuration in `config_dir`.
    pub fn compose(
        image: String,
        version: semver::Version,
        config_dir: &Path,
        manifests_dir: Option<&Path>,
        migrations_dir: &Path,
    ) -> Result<Self> {
        Ok(Self {
            image,
            version,
            config: read_config(config_dir)?,
            manifests: match manifests_dir {
                Some(dir) => read_manifests(dir)?,
                None => BTreeMap::new(),
            },
            schema_version: newest_migration(migrations_dir)?,
        })
    }

    /// The identity: SHA-256 over JSON with sorted keys and no white space (as in RFC 8785).
    pub fn id(&self) -> Result<ReleaseId> {
        // serde_json's map is sorted, so going through a value sorts the struct's fields too.
        let canonical = serde_json::to_value(self)
            .context("describing the release")?
            .to_string();
        Ok(ReleaseId(files::sha256(canonical.as_bytes())))
    }
}

impl ReleaseId {
    /// The first twelve digits: enough for people and for file names.
    pub fn short(&self) -> &str {
        self.0.get(..12).unwrap_or(&self.0)
    }

    /// Whether a text could be such a short one.
    pub fn is_short(text: &str) -> bool {
        text.len() == 12
            && text
                .bytes()
                .all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for ReleaseId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
impl From<&str> for ReleaseId {
    fn from(text: &str) -> Self {
        Self(text.to_owned())
    }
}

impl fmt::Display for Recorded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.release.version, self.id.short())
    }
}

fn read_config(dir: &Path) -> Result<BTreeMap<String, String>> {
    let entries = std::fs::read_dir(dir)
        .with_context(|| format!("reading the configuration in {}", dir.display()))?;
    let mut config = BTreeMap::new();
    for entry in entries {
        let path = entry
            .with_context(|| format!("reading {}", dir.display()))?
            .path();
        if path.is_file() {
            let text = std::fs::read_to_string(&path)
                .with_context(|| format!("reading {} as text", path.display()))?;
            config.insert(file_name(&path), text);
        }
    }
    if config.is_empty() {
        bail!("{} holds no configuration file", dir.display());
    }
    Ok(config)
}

/// All files below `dir`, by their paths there.
pub fn read_manifests(dir: &Path) -> Result<BTreeMap<String, String>> {
    let paths =
        files::below(dir).with_context(|| format!("reading the manifests in {}", dir.display()))?;
    let mut manifests = BTreeMap::new();
    for path in paths {
        let text = std::fs::read_to_string(&path)
            .with_context(|| format!("reading {} as text", path.display()))?;
        let inside = path.strip_prefix(dir).unwrap_or(&path);
        manifests.insert(inside.to_string_lossy().into_owned(), text);
    }
    Ok(manifests)
}

/// The highest leading number of the files in `dir`: `0002_discounts.sql` is 2.
fn newest_migration(dir: &Path) -> Result<u64> {
    let entries = std::fs::read_dir(dir)
        .with_context(|| format!("reading the migrations in {}", dir.display()))?;
    let mut newest = 0;
    for entry in entries {
        let name = file_name(
            &entry
                .with_context(|| format!("reading {}", dir.display()))?
                .path(),
        );
        let digits: String = name.chars().take_while(char::is_ascii_digit).collect();
        newest = newest.max(digits.parse().unwrap_or(0));
    }
    Ok(newest)
}

fn file_name(path: &Path) -> String {
    path.file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned()
}

/// `cargo xtask releases`
pub fn list(cli: &Cli, output: &Output) -> Result<Finished> {
    let pipeline = Pipeline::load(&cli.pipeline)?;
    let releases = Store::open(&pipeline).all()?;
    if releases.is_empty() {
        output.line("no release yet; `cargo xtask image` makes one");
    } else {
        let rows: Vec<Vec<String>> = releases.iter().map(row).collect();
        output.table(&["RELEASE", "VERSION", "IMAGE", "SCHEMA", "CREATED"], &rows);
    }
    for recorded in &releases {
        output.event("release", recorded);
    }
    Ok(Finished::passed().with("releases", releases.len()))
}

fn row(recorded: &Recorded) -> Vec<String> {
    let digest: String = recorded
        .release
        .image
        .chars()
        .take("sha256:".len() + 12)
        .collect();
    vec![
        recorded.id.short().to_owned(),
        recorded.release.version.to_string(),
        digest,
        recorded.release.schema_version.to_string(),
        recorded
            .created_at
            .strftime("%Y-%m-%d %H:%M:%S UTC")
            .to_string(),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_part_is_part_of_the_identity() {
        let release = Release {
            image: format!("sha256:{}", "0".repeat(64)),
            config: BTreeMap::from([("a.toml".into(), "x = 1".into())]),
            manifests: BTreeMap::new(),
            schema_version: 1,
            version: semver::Version::new(1, 0, 0),
        };
        let mut image = release.clone();
        image.image = format!("sha256:{}", "1".repeat(64));
        let mut config = release.clone();
        config.config.insert("a.toml".into(), "x = 2".into());
        let mut manifests = release.clone();
        manifests.manifests.insert("a.yaml".into(), "x: 1".into());
        let mut schema = release.clone();
        schema.schema_version = 2;
        let ids: std::collections::BTreeSet<_> = [&release, &image, &config, &manifests, &schema]
            .iter()
            .map(|r| r.id().unwrap())
            .collect();
        assert_eq!(ids.len(), 5);
        assert_eq!(release.id().unwrap(), release.clone().id().unwrap());
    }
}
