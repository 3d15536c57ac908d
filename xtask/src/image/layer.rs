//! The image's one layer: a tar archive with nothing of the machine that made it.

use std::io::Write;

use anyhow::{Context, Result};
use flate2::{Compression, GzBuilder};
use tar::{EntryType, Header};

use crate::files;

/// The executable and where it goes, without a leading slash.
pub struct Entry<'a> {
    pub path: &'a str,
    pub content: &'a [u8],
}

/// A compressed layer and the digest of what is inside.
pub struct Packed {
    pub gzip: Vec<u8>,
    /// SHA-256 of the uncompressed archive: the `diff_id` of the OCI image configuration.
    pub diff_id: String,
}

/// Everything that decides the layer's bytes, so that an unchanged one is not packed again.
pub fn key(entry: &Entry<'_>) -> String {
    format!(
        "1-{}-{}",
        files::sha256(entry.path.as_bytes()),
        files::sha256(entry.content)
    )
}

pub fn pack(entry: &Entry<'_>) -> Result<Packed> {
    let archive = archive(entry).context("packing the layer")?;
    // The time 0 and the unknown system are what RFC 1952 has for "none".
    let mut gzip = GzBuilder::new()
        .mtime(0)
        .operating_system(255)
        .write(Vec::new(), Compression::new(6));
    gzip.write_all(&archive)
        .and_then(|()| gzip.try_finish())
        .context("compressing the layer")?;
    let gzip = gzip.finish().context("compressing the layer")?;
    Ok(Packed {
        gzip,
        diff_id: files::sha256(&archive),
    })
}

fn archive(entry: &Entry<'_>) -> std::io::Result<Vec<u8>> {
    let mut builder = tar::Builder::new(Vec::with_capacity(entry.content.len() + 4096));
    let directories: Vec<&str> = entry
        .path
        .match_indices('/')
        .map(|(end, _)| &entry.path[..=end])
        .collect();
    for directory in directories {
        builder.append_data(
            &mut header(EntryType::Directory, 0),
            directory,
            std::io::empty(),
        )?;
    }
    let size = entry.content.len() as u64;
    builder.append_data(
        &mut header(EntryType::Regular, size),
        entry.path,
        entry.content,
    )?;
    builder.into_inner()
}

fn header(kind: EntryType, size: u64) -> Header {
    let mut header = Header::new_ustar();
    header.set_entry_type(kind);
    header.set_mode(0o755);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    header.set_size(size);
    header
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_content_gives_the_same_bytes() {
        let entry = Entry {
            path: "app/service",
            content: b"#!/bin/true",
        };
        let (one, two) = (pack(&entry).unwrap(), pack(&entry).unwrap());
        assert_eq!(one.gzip, two.gzip);
        let mut archive = tar::Archive::new(flate2::read::GzDecoder::new(one.gzip.as_slice()));
        let entries: Vec<(String, u32, u64)> = archive
            .entries()
            .unwrap()
            .map(|entry| {
                let entry = entry.unwrap();
                let path = entry.path().unwrap().display().to_string();
                (
                    path,
                    entry.header().mode().unwrap(),
                    entry.header().mtime().unwrap(),
                )
            })
            .collect();
        assert_eq!(
            entries,
            [
                ("app/".to_owned(), 0o755, 0),
                ("app/service".to_owned(), 0o755, 0)
            ]
        );
    }
}
