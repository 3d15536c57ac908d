//! What a machine lacks for the steps of `ci`, and how it is put there.

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use semver::Version;
use xshell::cmd;

use crate::cargo;
use crate::output::Output;

/// Installs the Rust components and the pinned tools that are missing, and nothing else.
pub fn install_missing(output: &Output) -> Result<()> {
    output.step("setup");
    let shell = cargo::shell()?;
    for (component, probe) in [("rustfmt", "fmt"), ("clippy", "clippy")] {
        if cmd!(shell, "cargo {probe} --version")
            .quiet()
            .ignore_stderr()
            .read()
            .is_ok()
        {
            output.detail(format_args!("{component} is there"));
            continue;
        }
        let add = cmd!(shell, "rustup component add {component}");
        output.command(&add);
        add.quiet()
            .run()
            .with_context(|| format!("installing the Rust component {component}"))?;
    }
    for (tool, pinned) in pinned()? {
        let found = installed(&tool)?;
        if found.as_ref().is_some_and(|found| *found >= pinned) {
            output.detail(format_args!("{tool} {pinned} is there"));
            continue;
        }
        let pinned = pinned.to_string();
        let install = cmd!(shell, "cargo install --locked {tool}@{pinned}");
        output.command(&install);
        cargo::isolated(install)
            .quiet()
            .run()
            .with_context(|| format!("installing {tool}"))?;
    }
    Ok(())
}

/// The tools in `config/tools.toml` that this machine lacks or has too old, each with the
/// command that installs it.
pub fn missing_tools() -> Result<Vec<(String, String)>> {
    let mut missing = Vec::new();
    for (tool, pinned) in pinned()? {
        if installed(&tool)?.is_none_or(|found| found < pinned) {
            missing.push((
                tool.clone(),
                format!("cargo install --locked {tool}@{pinned}"),
            ));
        }
    }
    Ok(missing)
}

fn pinned() -> Result<BTreeMap<String, Version>> {
    let path = cargo::root()?.join("config/tools.toml");
    let text =
        std::fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
    toml::from_str(&text).with_context(|| format!("in {}", path.display()))
}

/// The version of a cargo subcommand, where it is installed.
fn installed(tool: &str) -> Result<Option<Version>> {
    let shell = cargo::shell()?;
    let Ok(text) = cmd!(shell, "{tool} --version")
        .quiet()
        .ignore_stderr()
        .read()
    else {
        return Ok(None);
    };
    Ok(text.split_whitespace().find_map(|word| word.parse().ok()))
}
