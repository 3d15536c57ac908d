//! cargo-deny and cargo-shear: what the workspace is built from.

use std::fs;

use anyhow::{Context as _, Result, bail};
use serde_json::Value;
use xshell::cmd;

use super::advisories::{Database, Found, prepare};
use super::{Context, Report, position};
use crate::cargo;
use crate::findings::{Finding, Level};

pub fn advisories(context: &Context) -> Result<Report> {
    let database = match prepare(context.advisory_db.as_deref())? {
        Found::Ready(database) => database,
        Found::Unavailable(why) => {
            return Ok(Report {
                unavailable: Some(why),
                ..Report::default()
            });
        }
    };
    if let Some(stale) = database.stale() {
        return Ok(Report {
            unavailable: Some(stale),
            ..Report::default()
        });
    }
    let mut looked_at = format!(
        "advisories of {} ({} days old), commit {}",
        database.date.strftime("%F"),
        database.age_days(),
        &database.commit[..database.commit.len().min(12)]
    );
    if database.not_refreshed.is_some() {
        looked_at.push_str(", which could not be fetched anew");
    }
    // A copy of the settings with the database's place; the committed ones stay as they are.
    let mut settings = settings(context)?;
    let section = settings
        .entry("advisories")
        .or_insert_with(|| toml::Table::new().into());
    let section = section
        .as_table_mut()
        .context("deny.toml: advisories is no table")?;
    let Database { path, .. } = &database;
    section.insert("db-path".into(), path.display().to_string().into());
    let file = context.dir.join("deny-advisories.toml");
    let text = toml::to_string(&settings).context("writing settings for cargo-deny")?;
    fs::write(&file, text).with_context(|| format!("writing {}", file.display()))?;
    let config = file.display().to_string();
    let findings = deny(context, &["--config", &config, "check", "advisories"])?;
    Ok(Report {
        findings: named(findings, "advisories"),
        looked_at,
        unavailable: None,
    })
}

pub fn policy(context: &Context) -> Result<Report> {
    settings(context)?;
    let config = context.root.join("deny.toml").display().to_string();
    let words = ["--config", &config, "check", "bans", "licenses", "sources"];
    let findings = deny(context, &words)?;
    let packages = lock(context)?.matches("[[package]]").count();
    Ok(Report {
        findings: named(findings, "dependencies"),
        looked_at: format!("{packages} packages in Cargo.lock"),
        unavailable: None,
    })
}

pub fn unused(context: &Context) -> Result<Report> {
    fetch(context)?;
    let shell = context.shell()?;
    let program = context.tools.program("cargo-shear")?;
    let root = &context.root;
    let ended = cargo::isolated(cmd!(shell, "{program} --frozen --format json {root}"))
        .quiet()
        .ignore_status()
        .output()
        .context("running cargo-shear")?;
    let report: Value = serde_json::from_slice(&ended.stdout).with_context(|| {
        format!(
            "cargo-shear could not look: {}",
            String::from_utf8_lossy(&ended.stderr).trim()
        )
    })?;
    let mut findings = Vec::new();
    let found = report["findings"].as_array();
    for found in found.context("cargo-shear named no findings, not even none")? {
        let text = |name: &str| found[name].as_str().unwrap_or_default().to_owned();
        let file = context.relative(&text("file"));
        let manifest = fs::read_to_string(root.join(&file)).unwrap_or_default();
        let offset = found["location"]["offset"].as_u64().unwrap_or(0);
        let (line, column) = position(&manifest, usize::try_from(offset).unwrap_or(0));
        findings.push(Finding {
            check: "unused".into(),
            rule: text("code"),
            level: if text("severity") == "error" {
                Level::Error
            } else {
                Level::Warning
            },
            message: text("message"),
            file,
            line,
            column,
        });
    }
    Ok(Report {
        findings,
        looked_at: "the workspace's manifests".to_owned(),
        unavailable: None,
    })
}

/// Runs cargo-deny and reads what it says: JSON lines on standard error, the last of which is a
/// summary. Without one it could not look, whatever its exit code.
fn deny(context: &Context, words: &[&str]) -> Result<Vec<Finding>> {
    fetch(context)?;
    let shell = context.shell()?;
    let program = context.tools.program("cargo-deny")?;
    let manifest = context.root.join("Cargo.toml");
    let ended = cargo::isolated(cmd!(
        shell,
        "{program} --offline --locked --all-features --format json --manifest-path {manifest} {words...}"
    ))
    .quiet()
    .ignore_status()
    .output()
    .context("running cargo-deny")?;
    let said = String::from_utf8_lossy(&ended.stderr);
    let lines: Vec<Value> = said
        .lines()
        .filter_map(|line| serde_json::from_str(line).ok())
        .collect();
    if !lines.iter().any(|line| line["type"] == "summary") {
        let logs = lines.iter().filter(|line| line["type"] == "log");
        let messages: Vec<&str> = logs
            .filter_map(|log| log["fields"]["message"].as_str())
            .collect();
        let why = match messages.is_empty() {
            true => said.trim().to_owned(),
            false => messages.join("; "),
        };
        bail!("cargo-deny could not look: {why}");
    }
    let lock = lock(context)?;
    let rules = fs::read_to_string(context.root.join("deny.toml")).context("reading deny.toml")?;
    let diagnostics = lines.iter().filter(|line| line["type"] == "diagnostic");
    Ok(diagnostics
        .filter_map(|line| finding(&line["fields"], &lock, &rules))
        .collect())
}

/// A diagnostic at the place of its package in Cargo.lock, or of its line in deny.toml.
fn finding(fields: &Value, lock: &str, rules: &str) -> Option<Finding> {
    let level = match fields["severity"].as_str()? {
        "error" => Level::Error,
        "warning" => Level::Warning,
        _ => return None,
    };
    let package = &fields["graphs"][0]["Krate"];
    let place = match (package["name"].as_str(), package["version"].as_str()) {
        (Some(name), Some(version)) => {
            let entry = format!("name = \"{name}\"\nversion = \"{version}\"");
            lock.find(&entry).map(|at| position(lock, at).0)
        }
        _ => None,
    };
    let advisory = fields["advisory"]["id"].as_str();
    let message = fields["message"].as_str().unwrap_or_default();
    // cargo-deny may have read a copy of the rules, so the line is looked for in ours.
    let span = fields["labels"][0]["span"].as_str().unwrap_or_default();
    let rule = rules.find(span).filter(|_| !span.is_empty());
    let (file, line) = match place {
        Some(line) => ("Cargo.lock", line),
        None => ("deny.toml", rule.map_or(1, |at| position(rules, at).0)),
    };
    let subject = package["name"].as_str().map_or_else(String::new, |name| {
        format!(
            "{name} {}: ",
            package["version"].as_str().unwrap_or_default()
        )
    });
    Some(Finding {
        check: String::new(),
        rule: advisory
            .or(fields["code"].as_str())
            .unwrap_or("deny")
            .to_owned(),
        level,
        message: format!("{subject}{message}"),
        file: file.to_owned(),
        line,
        column: 1,
    })
}

fn named(findings: Vec<Finding>, check: &str) -> Vec<Finding> {
    let named = findings.into_iter().map(|finding| Finding {
        check: check.to_owned(),
        ..finding
    });
    named.collect()
}

fn settings(context: &Context) -> Result<toml::Table> {
    let path = context.root.join("deny.toml");
    let text = fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
    text.parse()
        .with_context(|| format!("in {}", path.display()))
}

fn lock(context: &Context) -> Result<String> {
    let path = context.root.join("Cargo.lock");
    fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))
}

/// Both tools read every package's manifest, those for other systems too.
fn fetch(context: &Context) -> Result<()> {
    let shell = context.shell()?;
    cargo::isolated(cmd!(shell, "cargo fetch --quiet --locked"))
        .quiet()
        .run()
        .context("fetching the packages that Cargo.lock names")
}
