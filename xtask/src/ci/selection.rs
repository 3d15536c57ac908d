//! Which steps of the table run.

use anyhow::{Context, Result, bail};
use xshell::{Shell, cmd};

use super::receipt::{Outcome, Receipt};
use super::standing::Standing;
use super::step::Step;
use super::tree::{Packages, Patterns};
use crate::cargo;
use crate::cli::{CiArgs, Profile};
use crate::config::unknown;
use crate::output::Output;

/// The part of `table` that the arguments ask for, in the table's order.
pub fn select(
    table: Vec<Step>,
    args: &CiArgs,
    standing: &Standing,
    packages: &Packages,
    output: &Output,
) -> Result<Vec<Step>> {
    for name in args.only.iter().chain(&args.skip) {
        known(&table, name)?;
    }
    let failed = match (args.failed, &args.from) {
        (false, _) => None,
        (true, Some(path)) => Some(failed(&Receipt::read(path)?)),
        (true, None) => Some(standing.failed()?),
    };
    let changed = match args.affected {
        true => changed_files(args.base.as_deref(), output)?,
        false => None,
    };
    for step in table.iter().filter(|step| args.only.contains(&step.name)) {
        let why = match args.profile {
            Profile::Fast if !step.fast => "`ci fast` leaves it out",
            _ if args.skip.contains(&step.name) => "--skip leaves it out",
            _ => continue,
        };
        bail!("--only {step}: {why}");
    }
    let mut selected = Vec::new();
    for step in table {
        let affected = match (&changed, step.inputs()) {
            (Some(files), Some(inputs)) => {
                let patterns = Patterns::of(inputs, packages)?;
                files.iter().any(|file| patterns.match_(file))
            }
            // What has an effect depends on more than files.
            (Some(_), None) | (None, _) => true,
        };
        let wanted = (args.only.is_empty() || args.only.contains(&step.name))
            && !args.skip.contains(&step.name)
            && (args.profile == Profile::All || step.fast)
            && failed.as_ref().is_none_or(|f| f.contains(&step.name))
            && affected;
        if wanted {
            selected.push(step);
        }
    }
    Ok(selected)
}

/// The step called `name`, or what there is instead.
pub fn known<'a>(table: &'a [Step], name: &str) -> Result<&'a Step> {
    let found = table.iter().find(|step| step.name == name);
    found.ok_or_else(|| unknown("step", name, table.iter().map(|step| step.name.as_str())))
}

fn failed(receipt: &Receipt) -> Vec<String> {
    receipt
        .steps
        .iter()
        .filter(|step| matches!(step.outcome, Outcome::Failed | Outcome::NotRun))
        .map(|step| step.name.clone())
        .collect()
}

/// The files that differ from the base, committed or not; `None` where that cannot be told or
/// where it means everything, which is then said.
fn changed_files(base: Option<&str>, output: &Output) -> Result<Option<Vec<String>>> {
    let shell = cargo::shell()?;
    let everything = |why: &str| {
        output.warn(format_args!("everything runs: {why}"));
        Ok(None)
    };
    if git(&shell, &["rev-parse", "--is-shallow-repository"])?.trim() == "true" {
        return everything(
            "this clone is shallow, so what changed is not known (fetch-depth: 0 in Actions)",
        );
    }
    let base = match base {
        Some(base) => base.to_owned(),
        None => match default_base(&shell) {
            Some(base) => base,
            None => return everything("there is no main branch to compare with; --base names one"),
        },
    };
    let fork = git(&shell, &["merge-base", &base, "HEAD"])
        .with_context(|| format!("finding where this branch left {base}; --base names another"))?;
    let differing = git(
        &shell,
        &[
            "diff",
            "--name-only",
            "--no-renames",
            "--relative",
            "-z",
            fork.trim(),
        ],
    )?;
    let untracked = git(
        &shell,
        &["ls-files", "-z", "--others", "--exclude-standard"],
    )?;
    let files: Vec<String> = differing
        .split('\0')
        .chain(untracked.split('\0'))
        .filter(|path| !path.is_empty())
        .map(str::to_owned)
        .collect();
    if files.iter().any(|file| file == "Cargo.lock") {
        return everything("Cargo.lock changed, and with it what everything is built from");
    }
    output.detail(format_args!("{} files differ from {base}", files.len()));
    Ok(Some(files))
}

fn default_base(shell: &Shell) -> Option<String> {
    ["origin/HEAD", "origin/main", "main"]
        .into_iter()
        .find(|name| git(shell, &["rev-parse", "--verify", "--quiet", name]).is_ok())
        .map(str::to_owned)
}

fn git(shell: &Shell, arguments: &[&str]) -> Result<String> {
    cmd!(shell, "git {arguments...}")
        .quiet()
        .ignore_stderr()
        .read()
        .with_context(|| format!("running git {}", arguments.join(" ")))
}
