//! What a step's outcome depends on besides files: versions of tools, and the day.

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use xshell::cmd;

use crate::cargo;
use crate::setup::tools::Tools;

/// The compiler, its components and cargo.
pub const RUST: &str = "rust";
/// The commit that is checked out, for checks of what came before it.
pub const HISTORY: &str = "history";
/// The date, for checks that get stricter as time goes by.
pub const TODAY: &str = "today";
/// The advisories that `audit` compares with.
pub const ADVISORIES: &str = "advisories";

/// What stands for a tool that is not there: no pass can be remembered with it.
pub const MISSING: &str = "missing";

/// Each name with what it is now.
pub fn gather<'a>(
    names: impl Iterator<Item = &'a str>,
    tools: &Tools,
) -> Result<BTreeMap<String, String>> {
    let mut facts = BTreeMap::new();
    for name in names {
        if facts.contains_key(name) {
            continue;
        }
        let value = match name {
            RUST => rust()?,
            HISTORY => cargo::head()?.unwrap_or_else(missing),
            TODAY => crate::audit::today().to_string(),
            ADVISORIES => crate::audit::advisories::identity(None)?.unwrap_or_else(missing),
            tool => tools.version(tool)?.unwrap_or_else(missing),
        };
        facts.insert(name.to_owned(), value);
    }
    Ok(facts)
}

fn missing() -> String {
    MISSING.to_owned()
}

fn rust() -> Result<String> {
    let shell = cargo::shell()?;
    let rustc = cmd!(shell, "rustc -vV").quiet().read();
    let cargo = cmd!(shell, "cargo -V").quiet().read();
    let rustc = rustc.context("asking rustc for its version")?;
    let cargo = cargo.context("asking cargo for its version")?;
    let field = |name: &str| rustc.lines().find_map(|line| line.strip_prefix(name));
    Ok(format!(
        "{}, {}, {cargo}",
        rustc.lines().next().unwrap_or_default(),
        field("host: ").unwrap_or_default()
    ))
}
