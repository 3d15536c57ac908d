//! The size of cargo's directory of what is built, and a limit to it.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use anyhow::Result;

use crate::cargo;
use crate::output::Output;

/// Bytes that the directory may have after a run of `ci`: what is removed may take a quarter of an hour
/// to build again.
pub const LIMIT: u64 = 20 << 30;

/// Bytes in the directory, files with several names counted once.
pub fn size() -> Result<u64> {
    Ok(measure(&cargo::target_dir()?))
}

/// Removes incremental state, then what was built longest ago, until the rest is within the limit.
pub fn keep_small(output: &Output) -> Result<()> {
    let target = cargo::target_dir()?;
    shrink(&target, LIMIT, output);
    Ok(())
}

fn shrink(target: &Path, limit: u64, output: &Output) {
    let mut size = measure(target);
    if size <= limit {
        return;
    }
    let before = size;
    for dir in candidates(target) {
        if size <= limit {
            break;
        }
        let freed = measure(&dir);
        // What a build in another terminal holds open stays usable to it.
        if fs::remove_dir_all(&dir).is_ok() {
            size = size.saturating_sub(freed);
        }
    }
    output.warn(format_args!(
        "{} had {}, more than {}: removed what was built longest ago ({} left)",
        target.display(),
        gibibytes(before),
        gibibytes(limit),
        gibibytes(size)
    ));
}

/// Directories that cargo makes again when they are gone, the most dispensable first.
fn candidates(target: &Path) -> Vec<PathBuf> {
    let mut profiles: Vec<PathBuf> = Vec::new();
    // PROFILE, TRIPLE/PROFILE, and the same once more below directories of their own.
    let mut open = vec![(target.to_owned(), 3)];
    while let Some((dir, depth)) = open.pop() {
        for dir in dirs(&dir) {
            if is_profile(&dir) {
                profiles.push(dir);
            } else if depth > 1 {
                open.push((dir, depth - 1));
            }
        }
    }
    let incremental = profiles.iter().map(|dir| dir.join("incremental"));
    let mut removable: Vec<PathBuf> = incremental.filter(|dir| dir.is_dir()).collect();
    // It changes with each thing that is built in it; the lock stays as it was made.
    let built = |dir: &PathBuf| {
        let metadata = fs::metadata(dir.join("deps"));
        metadata
            .and_then(|m| m.modified())
            .unwrap_or(SystemTime::UNIX_EPOCH)
    };
    // A build for a triple has its macros and build scripts in PROFILE, and is worth nothing without.
    let newest = |dir: &PathBuf| {
        let same = profiles
            .iter()
            .filter(|other| other.file_name() == dir.file_name());
        same.map(built).max()
    };
    let mut profiles = profiles.clone();
    profiles.sort_by_cached_key(|dir| (newest(dir), built(dir)));
    removable.extend(profiles);
    removable
}

fn is_profile(dir: &Path) -> bool {
    dir.join(".cargo-lock").is_file()
}

fn dirs(dir: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(dir).into_iter().flatten();
    let paths = entries.filter_map(|entry| Some(entry.ok()?.path()));
    paths
        .filter(|path| path.is_dir() && !path.is_symlink())
        .collect()
}

fn measure(dir: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    let mut seen = std::collections::HashSet::new();
    let mut open = vec![dir.to_owned()];
    let mut size = 0;
    while let Some(dir) = open.pop() {
        for entry in fs::read_dir(&dir).into_iter().flatten().flatten() {
            // Files come and go while others build.
            let Ok(metadata) = entry.metadata() else {
                continue;
            };
            if metadata.is_dir() {
                open.push(entry.path());
            } else if metadata.nlink() == 1 || seen.insert(metadata.ino()) {
                size += metadata.blocks() * 512;
            }
        }
    }
    size
}

pub fn gibibytes(bytes: u64) -> String {
    format!("{:.1} GiB", bytes as f64 / f64::from(1 << 30))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn what_was_built_longest_ago_goes_first() {
        let target = tempfile::tempdir().unwrap();
        let now = SystemTime::now();
        // In the order in which they were made, with the hours since something was built in them.
        let profiles = [("debug", 2), ("release", 3), ("triple/release", 1)];
        for (profile, hours) in profiles {
            let dir = target.path().join(profile);
            fs::create_dir_all(dir.join("deps")).unwrap();
            fs::create_dir_all(dir.join("incremental")).unwrap();
            fs::write(dir.join(".cargo-lock"), "").unwrap();
            let deps = fs::File::open(dir.join("deps")).unwrap();
            deps.set_modified(now - Duration::from_secs(hours * 3600))
                .unwrap();
        }
        let order = candidates(target.path());
        let order = order.iter().map(|dir| dir.strip_prefix(target.path()));
        let order: Vec<&Path> = order.map(Result::unwrap).collect();
        let (incremental, profiles) = order.split_at(3);
        assert!(incremental.iter().all(|dir| dir.ends_with("incremental")));
        let wanted = ["debug", "release", "triple/release"];
        assert_eq!(profiles, wanted.map(Path::new));
    }
}
