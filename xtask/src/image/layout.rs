//! An OCI image layout on disk, which holds the images of all releases by digest.
//! <https://github.com/opencontainers/image-spec/blob/v1.1.1/image-layout.md>

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::layer;
use crate::files;

pub const INDEX: &str = "application/vnd.oci.image.index.v1+json";
pub const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
const LAYER: &str = "application/vnd.oci.image.layer.v1.tar+gzip";

pub struct Layout {
    dir: PathBuf,
}

/// What a container's process is started with, and what people read of the image.
pub struct ImageConfig {
    pub entrypoint: Vec<String>,
    pub variables: Vec<String>,
    pub version: String,
    pub revision: String,
    /// Seconds since the Unix epoch.
    pub created: i64,
}

/// A layer that is in the layout.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Layer {
    digest: String,
    diff_id: String,
    /// Bytes, compressed.
    pub size: u64,
}

/// What running an image needs.
pub struct Runnable {
    pub entrypoint: Vec<String>,
    /// `NAME=value`
    pub variables: Vec<String>,
    layer: String,
}

impl Layout {
    pub fn open(dir: PathBuf) -> Result<Self> {
        let marker = dir.join("oci-layout");
        if !marker.exists() {
            files::write_atomically(&marker, br#"{"imageLayoutVersion":"1.0.0"}"#)?;
        }
        Ok(Self { dir })
    }

    /// Adds the layer that holds `entry`; an unchanged one is found, not packed again.
    pub fn layer(&self, entry: &layer::Entry<'_>) -> Result<Layer> {
        let known = self
            .dir
            .join("packed")
            .join(layer::key(entry))
            .with_extension("json");
        if let Ok(layer) = files::read_json::<Layer>(&known)
            && fs::metadata(self.blob(&layer.digest)).is_ok_and(|blob| blob.len() == layer.size)
        {
            return Ok(layer);
        }
        let packed = layer::pack(entry)?;
        let layer = Layer {
            digest: self.add(&packed.gzip)?,
            diff_id: format!("sha256:{}", packed.diff_id),
            size: packed.gzip.len() as u64,
        };
        files::write_json(&known, &layer)?;
        Ok(layer)
    }

    /// Adds an image with one layer; returns the digest of its manifest.
    pub fn image(&self, layer: &Layer, config: &ImageConfig) -> Result<String> {
        let created = jiff::Timestamp::from_second(config.created)
            .context("the source's date is out of range")?
            .to_string();
        let labels = json!({
            "org.opencontainers.image.revision": config.revision,
            "org.opencontainers.image.version": config.version,
        });
        let image_config = json!({
            "architecture": architecture(),
            "os": std::env::consts::OS,
            "created": created,
            "config": {
                "Entrypoint": config.entrypoint,
                "Env": config.variables,
                "Labels": labels,
                // The user "nonroot" by the convention of distroless images.
                "User": "65532:65532",
            },
            "rootfs": { "type": "layers", "diff_ids": [layer.diff_id] },
        });
        let image_config = image_config.to_string().into_bytes();
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": {
                "mediaType": CONFIG,
                "digest": self.add(&image_config)?,
                "size": image_config.len(),
            },
            "layers": [{ "mediaType": LAYER, "digest": layer.digest, "size": layer.size }],
            "annotations": labels,
        });
        let manifest = manifest.to_string().into_bytes();
        let digest = self.add(&manifest)?;
        self.index(&digest, manifest.len(), &config.version)?;
        Ok(digest)
    }

    /// Unpacks the image into `into`, unless it is there already. Every blob is checked against
    /// its digest first.
    pub fn unpack(&self, digest: &str, into: &Path) -> Result<Runnable> {
        let runnable = self.runnable(digest)?;
        if into.exists() {
            return Ok(runnable);
        }
        let layer = self.read(&runnable.layer)?;
        let parent = into.parent().unwrap_or(Path::new("."));
        let temporary = parent.join(format!(".unpack-{}", std::process::id()));
        let unpack = || -> std::io::Result<()> {
            fs::create_dir_all(&temporary)?;
            let mut archive = tar::Archive::new(flate2::read::GzDecoder::new(layer.as_slice()));
            archive.set_preserve_mtime(false);
            for entry in archive.entries()? {
                let mut entry = entry?;
                let path = temporary.join(entry.path()?);
                if entry.unpack_in(&temporary)? && path.is_file() {
                    // What is there is trusted from now on, so it must survive a power failure.
                    File::open(path)?.sync_all()?;
                }
            }
            File::open(&temporary)?.sync_all()?;
            match fs::rename(&temporary, into) {
                // Another command was faster with the same content.
                Err(_) if into.exists() => fs::remove_dir_all(&temporary),
                renamed => renamed,
            }
        };
        let unpacked = unpack();
        if unpacked.is_err() {
            // What was unpacked so far is of no use; the first error is the one to report.
            let _ = fs::remove_dir_all(&temporary);
        }
        unpacked.with_context(|| format!("unpacking image {digest} to {}", into.display()))?;
        Ok(runnable)
    }

    fn runnable(&self, digest: &str) -> Result<Runnable> {
        let manifest: Value = serde_json::from_slice(&self.read(digest)?)
            .with_context(|| format!("reading the manifest {digest}"))?;
        let text = |value: &Value| value.as_str().map(str::to_owned);
        let list = |value: &Value| -> Vec<String> {
            value
                .as_array()
                .into_iter()
                .flatten()
                .filter_map(text)
                .collect()
        };
        let config = text(&manifest["config"]["digest"]).context("the manifest names no config")?;
        let config: Value = serde_json::from_slice(&self.read(&config)?)
            .with_context(|| format!("reading the configuration of {digest}"))?;
        Ok(Runnable {
            entrypoint: list(&config["config"]["Entrypoint"]),
            variables: list(&config["config"]["Env"]),
            layer: text(&manifest["layers"][0]["digest"]).context("the manifest names no layer")?,
        })
    }

    /// The blob with this digest, whose content was compared with it.
    pub fn read(&self, digest: &str) -> Result<Vec<u8>> {
        let path = self.blob(digest);
        let content = fs::read(&path).with_context(|| {
            format!(
                "the image is not complete: reading {}; run `cargo xtask image` again",
                path.display()
            )
        })?;
        if format!("sha256:{}", files::sha256(&content)) != digest {
            bail!(
                "the image is damaged: {} is not what its digest says; \
                 remove the file and run `cargo xtask image` again",
                path.display()
            );
        }
        Ok(content)
    }

    fn add(&self, content: &[u8]) -> Result<String> {
        let digest = format!("sha256:{}", files::sha256(content));
        let path = self.blob(&digest);
        if !fs::metadata(&path).is_ok_and(|blob| blob.len() == content.len() as u64) {
            files::write_atomically(&path, content)?;
        }
        Ok(digest)
    }

    /// Lists the manifest in `index.json`, once.
    fn index(&self, digest: &str, size: usize, version: &str) -> Result<()> {
        let lock = self.dir.join("index.lock");
        let lock = File::create(&lock).with_context(|| format!("creating {}", lock.display()))?;
        lock.lock().context("locking the image index")?;
        let path = self.dir.join("index.json");
        let mut manifests: Vec<Value> = if path.exists() {
            let index: Value = files::read_json(&path)?;
            index["manifests"].as_array().cloned().unwrap_or_default()
        } else {
            Vec::new()
        };
        if manifests
            .iter()
            .all(|manifest| manifest["digest"] != digest)
        {
            manifests.push(json!({
                "mediaType": MANIFEST,
                "digest": digest,
                "size": size,
                "annotations": { "org.opencontainers.image.ref.name": version },
            }));
            let index = json!({ "schemaVersion": 2, "mediaType": INDEX, "manifests": manifests });
            files::write_json(&path, &index)?;
        }
        Ok(())
    }

    fn blob(&self, digest: &str) -> PathBuf {
        self.dir.join("blobs").join(digest.replacen(':', "/", 1))
    }
}

/// This machine's processor in the words of the OCI specification (those of Go's `GOARCH`).
fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}
