//! What a step's outcome depends on besides files: versions of tools, and the day.

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use xshell::cmd;

use crate::cargo;
use crate::files;
use crate::setup::tools::Tools;
use crate::sources;

/// This program: steps that it runs itself depend on what it was built from.
pub const XTASK: &str = "xtask";
/// The toolchain (its components come with it), the C compiler and the user's settings of cargo.
pub const RUST: &str = "rust";
/// Every commit that git can reach, for checks of what came before.
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
            HISTORY => history()?.unwrap_or_else(missing),
            XTASK => this_program()?,
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
    let compiler = cmd!(shell, "cc --version").quiet().ignore_stderr().read();
    let compiler = compiler.unwrap_or_default();
    let mut fact = format!(
        "{}, {}, {cargo}, {}",
        rustc.lines().next().unwrap_or_default(),
        field("host: ").unwrap_or_default(),
        compiler.lines().next().unwrap_or("no C compiler"),
    );
    for name in ["config.toml", "config"] {
        if let Ok(settings) = std::fs::read(cargo::home()?.join(name)) {
            fact.push_str(&format!(", {name} {}", &files::sha256(&settings)[..12]));
        }
    }
    Ok(fact)
}

/// What names all that the history holds; `None` without git.
fn history() -> Result<Option<String>> {
    let shell = cargo::shell()?;
    let head = cargo::git(&shell, &["rev-parse", "HEAD", "--is-shallow-repository"]);
    let refs = cargo::git(&shell, &["for-each-ref", "--format=%(objectname)"]);
    Ok(head.zip(refs).map(|(head, refs)| {
        let mut refs: Vec<&str> = refs.lines().collect();
        refs.sort_unstable();
        refs.dedup();
        files::sha256(format!("{head} {}", refs.join(" ")).as_bytes())[..16].to_owned()
    }))
}

/// The hash of the sources that this program was built from, where they are those in the workspace.
fn this_program() -> Result<String> {
    let built_from = env!("XTASK_SOURCES");
    let there = sources::hash(&cargo::root()?.join("xtask"));
    Ok(match there {
        Ok(there) if there == built_from => there,
        _ => missing(),
    })
}
