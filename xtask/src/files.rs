//! Files that are either the old ones or the new ones, never half of either.

use std::fs::{self, File};
use std::io::{self, ErrorKind, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result};
use serde::Serialize;
use serde::de::DeserializeOwned;
use sha2::{Digest, Sha256};

/// Replaces `path` by `content`: written beside it, synced, then renamed.
pub fn write_atomically(path: &Path, content: &[u8]) -> Result<()> {
    put(path, content, true)
}

/// The same for what can be made again: after a power cut it may be the old one, or empty.
pub fn replace(path: &Path, content: &[u8]) -> Result<()> {
    put(path, content, false)
}

fn put(path: &Path, content: &[u8], durable: bool) -> Result<()> {
    let write = || -> io::Result<()> {
        let dir = path.parent().unwrap_or(Path::new("."));
        fs::create_dir_all(dir)?;
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let temporary = dir.join(format!(".{name}.{}", std::process::id()));
        let written = (|| {
            let mut file = File::create(&temporary)?;
            file.write_all(content)?;
            if !durable {
                return fs::rename(&temporary, path);
            }
            file.sync_all()?;
            fs::rename(&temporary, path)?;
            // The rename itself is durable only when the directory is.
            File::open(dir)?.sync_all()
        })();
        if written.is_err() {
            // The first error is the one to report.
            let _ = fs::remove_file(&temporary);
        }
        written
    };
    write().with_context(|| format!("writing {}", path.display()))
}

pub fn write_json(path: &Path, value: &impl Serialize) -> Result<()> {
    let mut text = serde_json::to_vec_pretty(value).context("writing JSON")?;
    text.push(b'\n');
    write_atomically(path, &text)
}

/// The JSON in `path`; a damaged file is an error that says which one and what to do.
pub fn read_json<T: DeserializeOwned>(path: &Path) -> Result<T> {
    let text = fs::read(path).with_context(|| format!("reading {}", path.display()))?;
    serde_json::from_slice(&text).with_context(|| {
        format!(
            "{} is damaged; move it away and repeat the command that made it",
            path.display()
        )
    })
}

/// Takes the lock `path`, creating the file and its directory; `None` where another process has
/// it. The kernel takes it back when the file is dropped or the process ends, however it ends.
pub fn try_lock(path: &Path) -> Result<Option<File>> {
    let context = || format!("locking {}", path.display());
    fs::create_dir_all(path.parent().unwrap_or(Path::new("."))).with_context(context)?;
    let lock = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(path);
    let lock = match lock {
        // A lock needs no right to write, and root may have been first.
        Err(error) if error.kind() == ErrorKind::PermissionDenied => File::open(path),
        lock => lock,
    };
    let lock = lock.with_context(context)?;
    match lock.try_lock() {
        Ok(()) => Ok(Some(lock)),
        Err(fs::TryLockError::WouldBlock) => Ok(None),
        Err(fs::TryLockError::Error(error)) => Err(error).with_context(context),
    }
}

/// Lets a command that goes on by itself write into `log`, and read nothing.
pub fn log_into(command: &mut Command, log: File) -> Result<&mut Command> {
    let shared = log.try_clone().context("sharing a log")?;
    Ok(command.stdin(Stdio::null()).stdout(shared).stderr(log))
}

/// The last `number` lines of the file; bytes that are not UTF-8 are replaced. However long the
/// file is, only its end is read.
pub fn last_lines(path: &Path, number: usize) -> Vec<String> {
    const END: u64 = 256 << 10;
    let read = || -> io::Result<Vec<u8>> {
        let mut file = File::open(path)?;
        let length = file.metadata()?.len();
        file.seek(SeekFrom::Start(length.saturating_sub(END)))?;
        let mut end = Vec::new();
        file.take(END).read_to_end(&mut end)?;
        Ok(end)
    };
    let text = read().unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let lines: Vec<&str> = text.trim_end().lines().collect();
    lines[lines.len().saturating_sub(number)..]
        .iter()
        .map(|line| (*line).to_owned())
        .collect()
}

/// SHA-256 in lower-case hexadecimal.
/// All files below a directory, in no order.
pub fn below(dir: &Path) -> io::Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    let mut unread = vec![dir.to_owned()];
    while let Some(dir) = unread.pop() {
        for entry in fs::read_dir(dir)? {
            let path = entry?.path();
            match path.is_dir() {
                true => unread.push(path),
                false => files.push(path),
            }
        }
    }
    Ok(files)
}

pub fn sha256(content: &[u8]) -> String {
    hex(&Sha256::digest(content))
}

pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_write_that_fails_leaves_the_old_file_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state.json");
        write_atomically(&path, b"old").unwrap();
        // Renaming a file over a directory fails after the new content was written.
        let blocked = dir.path().join("blocked");
        fs::create_dir(&blocked).unwrap();
        write_atomically(&blocked, b"new").unwrap_err();
        write_atomically(&path, b"new").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"new");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2);
    }
}
