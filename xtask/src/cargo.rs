//! Calls of cargo from within cargo.

use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use xshell::{Cmd, Shell, cmd};

use crate::output::{Finished, Output};

/// A shell in the workspace's root.
pub fn shell() -> Result<Shell> {
    let shell = Shell::new().context("finding the current directory")?;
    shell.change_dir(root()?);
    Ok(shell)
}

/// `command` without the variables that the outer `cargo run` set for this program: build
/// scripts that watch them would run again each time.
pub fn isolated(command: Cmd<'_>) -> Cmd<'_> {
    std::env::vars_os()
        .map(|(name, _)| name)
        .filter(|name| {
            let name = name.to_string_lossy();
            name.starts_with("CARGO_PKG_")
                || name.starts_with("CARGO_MANIFEST_")
                || ["CARGO", "CARGO_BIN_NAME", "CARGO_CRATE_NAME"].contains(&name.as_ref())
        })
        .fold(command, |command, name| command.env_remove(name))
}

/// The workspace's root: the closest directory upwards with a `Cargo.lock`.
pub fn root() -> Result<PathBuf> {
    let here = std::env::current_dir().context("finding the current directory")?;
    match here
        .ancestors()
        .find(|dir| dir.join("Cargo.lock").is_file())
    {
        Some(root) => Ok(root.to_owned()),
        None => bail!(
            "{} is not inside a Cargo workspace; run this in the repository",
            here.display()
        ),
    }
}

/// Where cargo puts what it builds.
pub fn target_dir() -> Result<PathBuf> {
    match std::env::var_os("CARGO_TARGET_DIR") {
        Some(dir) => std::path::absolute(dir).context("resolving CARGO_TARGET_DIR"),
        None => Ok(root()?.join("target")),
    }
}

/// Builds this program with `feature` and becomes it, with the same arguments.
pub fn run_again_with(feature: &str, output: &Output) -> Result<Finished> {
    let arguments: Vec<String> = std::env::args_os()
        .skip(1)
        .map(|word| word.to_string_lossy().into_owned())
        .collect();
    output.command(format_args!(
        "cargo run --package xtask --features {feature} -- {}",
        arguments.join(" ")
    ));
    let shell = shell()?;
    isolated(cmd!(
        shell,
        "cargo build --package xtask --features {feature}"
    ))
    .quiet()
    .run()
    .with_context(|| format!("building xtask with feature {feature}"))?;
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = std::process::Command::new(cargo);
    command.args([
        "run",
        "--quiet",
        "--package",
        "xtask",
        "--features",
        feature,
        "--",
    ]);
    command.args(std::env::args_os().skip(1));
    Err(replace(command)).context("running cargo")
}

/// Becomes `command`; returns only when that fails.
fn replace(mut command: std::process::Command) -> std::io::Error {
    use std::os::unix::process::CommandExt;
    command.exec()
}
