//! A hash of this program's sources: taken when it is built and again when it runs, so that steps
//! it runs itself are not remembered for sources that it was not built from.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// The hash of all that is compiled from `package`, the directory of this package: FNV-1a with 64
/// bits (it guards against a stale program, not against an adversary), over paths and contents.
pub fn hash(package: &Path) -> io::Result<String> {
    let mut files = Vec::new();
    for part in [
        "Cargo.toml",
        "build.rs",
        "src",
        "servers/Cargo.toml",
        "servers/src",
    ] {
        collect(&package.join(part), &mut files)?;
    }
    files.sort();
    let mut hash: u64 = 0xcbf2_9ce4_8422_2325;
    for file in files {
        let name = file.strip_prefix(package).unwrap_or(&file);
        let name = name.to_string_lossy().into_owned().into_bytes();
        for byte in name.into_iter().chain(fs::read(&file)?) {
            hash = (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
        }
    }
    Ok(format!("{hash:016x}"))
}

fn collect(path: &Path, files: &mut Vec<PathBuf>) -> io::Result<()> {
    if !path.is_dir() {
        files.push(path.to_owned());
        return Ok(());
    }
    for entry in fs::read_dir(path)? {
        collect(&entry?.path(), files)?;
    }
    Ok(())
}
