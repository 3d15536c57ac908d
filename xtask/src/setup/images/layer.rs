//! The layer, written as a tar archive straight out of the packages: nothing is installed and no
//! script of theirs runs.

use std::collections::HashSet;
use std::fs::{self, File};
use std::io::{BufWriter, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use glob::Pattern;
use tar::{Archive, Builder, EntryType, Header};
use xshell::cmd;

use super::recipe::{DIRS, FILES, UNUSED_FILES};
use crate::cargo;

/// Writes the layer: the packages' files, the jars, and our own.
pub(super) fn assemble(packages: &[PathBuf], jars: &[PathBuf], layer: &Path) -> Result<()> {
    let file = File::create(layer).with_context(|| format!("creating {}", layer.display()))?;
    let mut tar = Builder::new(BufWriter::new(file));
    let mut written = HashSet::new();
    let unused: Vec<Pattern> = UNUSED_FILES
        .iter()
        .map(|pattern| Pattern::new(pattern))
        .collect::<Result<_, _>>()
        .context("in the list of unused files")?;
    // What was of the root is of /usr in every distribution by now.
    for name in ["bin", "sbin", "lib", "lib64"] {
        written.insert(format!("usr/{name}"));
        directory(&mut tar, &format!("usr/{name}/"), 0o755)?;
        let mut link = header(0o777, 0);
        link.set_entry_type(EntryType::Symlink);
        tar.append_link(&mut link, name, format!("usr/{name}"))?;
    }
    for (name, mode) in DIRS {
        written.insert((*name).to_owned());
        directory(&mut tar, &format!("{name}/"), *mode)?;
    }
    for package in packages {
        let shell = cargo::shell()?;
        let unpack = cmd!(shell, "dpkg-deb --fsys-tarfile {package}");
        copy(unpack, "", &unused, &mut tar, &mut written)
            .with_context(|| format!("unpacking {}", package.display()))?;
    }
    for jar in jars {
        let name = jar.file_name().unwrap_or_default().to_string_lossy();
        if name.ends_with(".jar") {
            let content = fs::read(jar).with_context(|| format!("reading {}", jar.display()))?;
            let mut header = header(0o644, content.len() as u64);
            tar.append_data(&mut header, format!("opt/kafka/libs/{name}"), &content[..])?;
        } else if name.ends_with(".txz") {
            let shell = cargo::shell()?;
            let unpack = cmd!(shell, "xz --decompress --stdout {jar}");
            copy(unpack, "opt/postgres/", &unused, &mut tar, &mut written)
                .context("unpacking PostgreSQL")?;
        }
    }
    for (name, mode, content) in FILES {
        let mut header = header(*mode, content.len() as u64);
        tar.append_data(&mut header, name, content.as_bytes())?;
    }
    tar.into_inner()?.flush().context("writing the layer")
}

/// Copies the archive that `command` prints, under `prefix`, with directories of `/usr` in place.
fn copy(
    command: xshell::Cmd<'_>,
    prefix: &str,
    unused: &[Pattern],
    tar: &mut Builder<BufWriter<File>>,
    written: &mut HashSet<String>,
) -> Result<()> {
    let mut child = Command::from(command)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .context("starting the unpacking")?;
    let stdout = child.stdout.take().context("it has no output")?;
    let mut archive = Archive::new(stdout);
    for entry in archive.entries()? {
        let mut entry = entry?;
        let Some(path) = place(&entry.path()?, prefix) else {
            continue;
        };
        if unused.iter().any(|pattern| pattern.matches(&path)) {
            continue;
        }
        // Packages share directories; an engine takes each path of a layer once.
        if !written.insert(path.clone()) {
            continue;
        }
        let mut header = entry.header().clone();
        header.set_uid(0);
        header.set_gid(0);
        match header.entry_type() {
            EntryType::Symlink => {
                let target = entry.link_name()?.unwrap_or_default().into_owned();
                tar.append_link(&mut header, &path, target)?;
            }
            EntryType::Link => {
                let target = entry.link_name()?.unwrap_or_default().into_owned();
                let target = place(&target, prefix).context("a link to nowhere")?;
                tar.append_link(&mut header, &path, target)?;
            }
            EntryType::Directory => {
                tar.append_data(&mut header, format!("{path}/"), std::io::empty())?;
            }
            _ => tar.append_data(&mut header, &path, &mut entry)?,
        }
    }
    // Padding after the archive's end; a closed pipe would be an error to the other side.
    std::io::copy(&mut archive.into_inner().by_ref(), &mut std::io::sink())?;
    if !child.wait().context("waiting for the unpacking")?.success() {
        bail!("it failed");
    }
    Ok(())
}

/// Where a file of a package goes: `./bin/x` to `usr/bin/x`; `None` for the root itself.
fn place(path: &Path, prefix: &str) -> Option<String> {
    let path = path.to_string_lossy();
    let path = path.trim_start_matches("./").trim_matches('/');
    if path.is_empty() || path == "." {
        return None;
    }
    let first = path.split('/').next().unwrap_or_default();
    let moved = prefix.is_empty() && ["bin", "sbin", "lib", "lib64"].contains(&first);
    Some(if moved {
        format!("usr/{path}")
    } else {
        format!("{prefix}{path}")
    })
}

fn directory(tar: &mut Builder<BufWriter<File>>, path: &str, mode: u32) -> Result<()> {
    let mut header = header(mode, 0);
    header.set_entry_type(EntryType::Directory);
    Ok(tar.append_data(&mut header, path, std::io::empty())?)
}

fn header(mode: u32, size: u64) -> Header {
    let mut header = Header::new_gnu();
    header.set_mode(mode);
    header.set_size(size);
    header.set_mtime(0);
    header
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_of_the_root_move_below_usr() {
        let cases = [
            ("./bin/sh", "", Some("usr/bin/sh")),
            (
                "./lib/x86_64-linux-gnu/libc.so.6",
                "",
                Some("usr/lib/x86_64-linux-gnu/libc.so.6"),
            ),
            ("./library/x", "", Some("library/x")),
            ("./", "", None),
            (
                "bin/postgres",
                "opt/postgres/",
                Some("opt/postgres/bin/postgres"),
            ),
        ];
        for (path, prefix, wanted) in cases {
            assert_eq!(place(Path::new(path), prefix).as_deref(), wanted, "{path}");
        }
    }
}
