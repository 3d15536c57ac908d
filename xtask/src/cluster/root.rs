//! What only root may do, done for a user who has sudo.

use std::ffi::{OsStr, OsString};
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::cargo;
use crate::setup;

/// Variables that decide what a command does, which sudo would leave out.
const ROOTS_VARIABLES: [&str; 3] = ["DOCKER_HOST", "PATH", "CARGO_TERM_COLOR"];

/// Runs this program's `cluster` command as root; what a node is made of is root's.
pub fn run(words: &[&OsStr]) -> Result<()> {
    let mut command = Command::new("sudo");
    command.args(["-n", "env"]);
    for name in ROOTS_VARIABLES {
        if let Some(value) = std::env::var_os(name) {
            let mut variable = OsString::from(format!("{name}="));
            variable.push(value);
            command.arg(variable);
        }
    }
    // Not the user's home: what root's programs write there would be root's.
    let mut cache = OsString::from("XTASK_CACHE_DIR=");
    cache.push(setup::cache_dir()?);
    command
        .arg(cache)
        .arg(std::env::current_exe().context("finding this program")?)
        .arg("cluster")
        .args(words)
        // What it says is for people: standard output is this command's own.
        .stdout(std::io::stderr())
        .current_dir(cargo::root()?);
    let ended = command.status().context("starting sudo")?;
    if !ended.success() {
        bail!(
            "`cluster {}` as root failed",
            words.join(" ".as_ref()).display()
        );
    }
    Ok(())
}

/// What root has made is its user's to read.
pub fn give_to_user(path: &Path) -> Result<()> {
    let number = |name: &str| std::env::var(name).ok()?.parse::<u32>().ok();
    if let (Some(user), Some(group)) = (number("SUDO_UID"), number("SUDO_GID")) {
        std::os::unix::fs::chown(path, Some(user), Some(group))
            .with_context(|| format!("giving {} to its user", path.display()))?;
    }
    Ok(())
}
