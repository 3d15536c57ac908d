//! `cargo xtask workflows`: GitHub Actions runs the steps of this program, and nothing else.
//!
//! The files are rendered from the table of steps; the check proves it of any files, rendered or
//! not, so that it also stands where a team writes its own.

mod check;
mod render;

use std::path::Path;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::cargo;
use crate::cli::{WorkflowsCheckArgs, WorkflowsCommand};
use crate::files;
use crate::findings::{self, Finding, Level};
use crate::output::{Exit, Finished, Output};

/// Where GitHub looks.
const DIR: &str = ".github";

/// An action of somebody else's that the workflows may use, at one commit.
struct Action {
    name: &'static str,
    commit: &'static str,
    version: &'static str,
}

/// The allow-list. A new version is a new commit here, and `workflows write`.
const CHECKOUT: Action = Action {
    name: "actions/checkout",
    commit: "08c6903cd8c0fde910a37f88322edcfb5dd907a8",
    version: "v5.0.0",
};
const CACHE: Action = Action {
    name: "actions/cache",
    commit: "0057852bfaa89a56745cba8c7296529d2fc39830",
    version: "v4.3.0",
};
/// The two halves of the one above, for what must be kept whatever happens in between.
const CACHE_RESTORE: Action = Action {
    name: "actions/cache/restore",
    ..CACHE
};
const CACHE_SAVE: Action = Action {
    name: "actions/cache/save",
    ..CACHE
};
const UPLOAD_ARTIFACT: Action = Action {
    name: "actions/upload-artifact",
    commit: "ea165f8d65b6e75b540449e92b4886f43607fa02",
    version: "v4.6.2",
};
const UPLOAD_SARIF: Action = Action {
    name: "github/codeql-action/upload-sarif",
    commit: "0499de31b99561a6d14a36a5f662c2a54f91beee",
    version: "v4.31.2",
};
const ALLOWED: &[Action] = &[
    CHECKOUT,
    CACHE,
    CACHE_RESTORE,
    CACHE_SAVE,
    UPLOAD_ARTIFACT,
    UPLOAD_SARIF,
];

pub fn run(command: &WorkflowsCommand, output: &Output) -> Result<Finished> {
    match command {
        WorkflowsCommand::Check(args) => check(args, output),
        WorkflowsCommand::Write => write(output),
        WorkflowsCommand::Conclude => conclude(output),
    }
}

fn check(args: &WorkflowsCheckArgs, output: &Output) -> Result<Finished> {
    let dir = cargo::root()?.join(&args.dir);
    let mut findings = check::check(&dir)?;
    if args.dir == Path::new(DIR) {
        findings.extend(stale(&dir));
    }
    findings.sort();
    for finding in &findings {
        let Finding {
            file,
            line,
            message,
            rule,
            ..
        } = finding;
        output.bad(format_args!(
            "{}/{file}:{line}: {message} [{rule}]",
            args.dir.display()
        ));
        output.event("finding", finding);
        output.annotate(&findings::annotation(&Finding {
            file: format!("{}/{file}", args.dir.display()),
            ..finding.clone()
        }));
    }
    if findings.is_empty() {
        output.good("Actions runs each step once, by the commands of this program");
        return Ok(Finished::passed());
    }
    output.line("    mend the files, or let `cargo xtask workflows write` write them anew");
    Ok(Finished::new(Exit::No, "failed").with("findings", findings))
}

/// Files that are not what the steps render to.
fn stale(dir: &Path) -> Vec<Finding> {
    let differs = |(name, text): &(&str, String)| {
        std::fs::read_to_string(dir.join(name)).ok().as_ref() != Some(text)
    };
    let files = render::files();
    let stale = files.iter().filter(|file| differs(file));
    stale
        .map(|(name, _)| finding(name, 1, "stale", "is not what the steps render to"))
        .collect()
}

fn write(output: &Output) -> Result<Finished> {
    let dir = cargo::root()?.join(DIR);
    for (name, text) in render::files() {
        let path = dir.join(name);
        files::write_atomically(&path, text.as_bytes())?;
        output.detail(format_args!("wrote {}", path.display()));
    }
    Ok(Finished::passed())
}

/// Whether all jobs that came before succeeded: what branch protection asks for. `NEEDS` has
/// GitHub's `needs` context as JSON.
fn conclude(output: &Output) -> Result<Finished> {
    let text = std::env::var("NEEDS").context(
        "NEEDS is not set; the concluding job passes the `needs` context in it, as JSON",
    )?;
    let needs: Value = serde_json::from_str(&text).context("reading NEEDS")?;
    let Some(jobs) = needs.as_object().filter(|jobs| !jobs.is_empty()) else {
        bail!("NEEDS names no job, so nothing is proven");
    };
    let mut failed = Vec::new();
    for (name, job) in jobs {
        let result = job["result"].as_str().unwrap_or("unknown");
        output.line(format_args!("{name}: {result}"));
        // Skipped is not passed.
        if result != "success" {
            failed.push(name.clone());
        }
    }
    if failed.is_empty() {
        return Ok(Finished::passed());
    }
    Ok(Finished::new(Exit::No, "failed").with("jobs", failed))
}

fn finding(file: &str, line: usize, rule: &str, message: impl Into<String>) -> Finding {
    Finding {
        check: "workflows".into(),
        rule: rule.into(),
        level: Level::Error,
        message: message.into(),
        file: file.into(),
        line: u32::try_from(line).unwrap_or(u32::MAX),
        column: 1,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_rendered_passes_the_check() {
        let dir = tempfile::tempdir().unwrap();
        for (name, text) in render::files() {
            files::write_atomically(&dir.path().join(name), text.as_bytes()).unwrap();
        }
        let findings = check::check(dir.path()).unwrap();
        assert_eq!(findings, []);
        assert_eq!(stale(dir.path()), []);
    }
}
