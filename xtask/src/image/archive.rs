//! An image as one file, as container engines load it: an OCI image layout in a tar archive.
//! <https://github.com/opencontainers/image-spec/blob/v1.1.1/image-layout.md>

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

use anyhow::{Context, Result};
use serde_json::{Value, json};
use tar::{EntryType, Header};

use super::layout::{INDEX, Layout, MANIFEST};

/// What containerd, and so k3s, calls the image after loading it.
const CONTAINERD_NAME: &str = "io.containerd.image.name";
const NAME: &str = "org.opencontainers.image.ref.name";

impl Layout {
    /// Writes the image with this digest to `path`, under `name`.
    pub fn archive(&self, digest: &str, name: &str, path: &Path) -> Result<()> {
        let manifest = self.read(digest)?;
        let parsed: Value = serde_json::from_slice(&manifest)
            .with_context(|| format!("reading the manifest {digest}"))?;
        let index = json!({
            "schemaVersion": 2,
            "mediaType": INDEX,
            "manifests": [{
                "mediaType": MANIFEST,
                "digest": digest,
                "size": manifest.len(),
                "annotations": { CONTAINERD_NAME: name, NAME: name },
            }],
        });
        let mut blobs = vec![(digest.to_owned(), manifest)];
        for digest in Self::blobs(&parsed) {
            blobs.push((digest.clone(), self.read(&digest)?));
        }
        let write = || -> std::io::Result<()> {
            let mut archive = tar::Builder::new(BufWriter::new(File::create(path)?));
            add(
                &mut archive,
                "oci-layout",
                br#"{"imageLayoutVersion":"1.0.0"}"#,
            )?;
            add(&mut archive, "index.json", index.to_string().as_bytes())?;
            for (digest, content) in &blobs {
                add(
                    &mut archive,
                    &format!("blobs/{}", digest.replace(':', "/")),
                    content,
                )?;
            }
            archive.into_inner()?.flush()
        };
        write().with_context(|| format!("writing {}", path.display()))
    }

    /// The digests of what a manifest names: its configuration and its layers.
    pub fn blobs(manifest: &Value) -> Vec<String> {
        let layers = manifest["layers"].as_array().into_iter().flatten();
        [&manifest["config"]]
            .into_iter()
            .chain(layers)
            .filter_map(|blob| blob["digest"].as_str().map(str::to_owned))
            .collect()
    }
}

fn add(archive: &mut tar::Builder<impl Write>, path: &str, content: &[u8]) -> std::io::Result<()> {
    let mut header = Header::new_ustar();
    header.set_entry_type(EntryType::Regular);
    header.set_mode(0o644);
    header.set_mtime(0);
    header.set_size(content.len() as u64);
    archive.append_data(&mut header, path, content)
}
