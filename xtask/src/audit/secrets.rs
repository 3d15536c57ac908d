//! kingfisher: credentials in files and in what git remembers. Nothing is asked of the network.

use std::fs;

use anyhow::{Context as _, Result, bail};
use serde_json::Value;
use xshell::cmd;

use super::{Context, Report};
use crate::cargo;
use crate::findings::{Finding, Level};
use crate::setup;

/// Its exit code where it found something.
const FOUND: i32 = 200;

pub fn check(context: &Context) -> Result<Report> {
    let shell = context.shell()?;
    let Some(shallow) = cargo::git(&shell, &["rev-parse", "--is-shallow-repository"]) else {
        bail!("this is no git repository, so there is no history to look at");
    };
    let linked = context.root.join(".git").is_file();
    let program = context.tools.program("kingfisher")?;
    let ignored = cargo::git(
        &shell,
        &[
            "ls-files",
            "--others",
            "--ignored",
            "--exclude-standard",
            "--directory",
        ],
    );
    // What git ignores is built, not written, and nobody gets to see it.
    let exclude: Vec<String> = ignored
        .unwrap_or_default()
        .lines()
        .flat_map(|path| match path.strip_suffix('/') {
            Some(dir) => ["--exclude".to_owned(), format!("./{dir}/**")],
            None => ["--exclude".to_owned(), format!("./{path}")],
        })
        .collect();
    let report = context.dir.join("secrets.json");
    let _ = fs::remove_file(&report);
    let ended = cmd!(
        shell,
        "{program} scan --no-validate --no-update-check --redact --format json --output {report} {exclude...} ."
    )
    // Its compiled rules.
    .env("KF_RULE_CACHE_DIR", setup::cache_dir()?.join("kingfisher"))
    .quiet()
    .ignore_status()
    .output()
    .context("running kingfisher")?;
    let said = String::from_utf8_lossy(&ended.stderr);
    if ![Some(0), Some(FOUND)].contains(&ended.status.code()) {
        bail!(
            "kingfisher could not look ({}): {}",
            ended.status,
            said.trim()
        );
    }
    let text = fs::read_to_string(&report).context("reading what kingfisher found")?;
    let found: Value = serde_json::from_str(&text).context("reading what kingfisher found")?;
    let findings = found["findings"].as_array();
    let findings = findings.context("kingfisher named no findings, not even none")?;
    let findings: Vec<Finding> = findings
        .iter()
        .map(|found| finding(found, context))
        .collect();
    if findings.is_empty() && ended.status.code() == Some(FOUND) {
        bail!("kingfisher found something and did not say what");
    }
    let commits = cargo::git(&shell, &["rev-list", "--all", "--count"]).unwrap_or_default();
    Ok(Report {
        findings,
        looked_at: format!("the files, and {} commits", commits.trim()),
        unavailable: match (shallow.trim() == "true", linked) {
            (true, _) => Some(
                "the clone is shallow, so most of the history was not looked at \
                 (fetch-depth: 0 in Actions, `git fetch --unshallow` here)"
                    .to_owned(),
            ),
            (false, true) => Some(
                "this is a linked worktree, so only its files were looked at; \
                 run it in the main one for the history"
                    .to_owned(),
            ),
            (false, false) => None,
        },
    })
}

fn finding(found: &Value, context: &Context) -> Finding {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let (rule, place) = (&found["rule"], &found["finding"]);
    let number = |value: &Value| value.as_u64().and_then(|n| u32::try_from(n).ok());
    let commit = place["git_metadata"]["commit"]["id"].as_str();
    let commit = commit.map_or_else(String::new, |id| format!(" (in commit {id})"));
    Finding {
        check: "secrets".into(),
        rule: text(&rule["name"]),
        level: Level::Error,
        message: format!(
            "{}{commit}; take it back where it was issued, then out of the history",
            text(&rule["description"])
        ),
        file: context.relative(&text(&place["path"])),
        line: number(&place["line"]).unwrap_or(1),
        column: number(&place["column_start"]).unwrap_or(0) + 1,
    }
}
