//! zizmor and GitHub's own parser: whether workflows are safe and mean something.

use anyhow::{Context as _, Result, bail};
use serde_json::Value;
use xshell::cmd;

use super::{Context, Report};
use crate::findings::{Finding, Level};

pub fn zizmor(context: &Context) -> Result<Report> {
    let files = files(context)?;
    if files.is_empty() {
        return Ok(none());
    }
    let shell = context.shell()?;
    let program = context.tools.program("zizmor")?;
    let words = &files;
    let ended = cmd!(
        shell,
        "{program} --offline --persona pedantic --strict-collection --no-progress --quiet --format json {words...}"
    )
    .quiet()
    .ignore_status()
    .output()
    .context("running zizmor")?;
    // 11 to 14: the highest severity found.
    if !matches!(ended.status.code(), Some(0 | 11..=14)) {
        bail!(
            "zizmor could not look ({}): {}",
            ended.status,
            String::from_utf8_lossy(&ended.stderr).trim()
        );
    }
    let found: Vec<Value> =
        serde_json::from_slice(&ended.stdout).context("reading what zizmor found")?;
    if found.is_empty() && ended.status.code() != Some(0) {
        bail!("zizmor found something and did not say what");
    }
    let findings = found.iter().map(|found| {
        let locations = found["locations"].as_array().into_iter().flatten();
        let primary = locations
            .clone()
            .find(|location| location["symbolic"]["kind"] == "Primary")
            .or(locations.clone().next())
            .unwrap_or(&Value::Null);
        let start = &primary["concrete"]["location"]["start_point"];
        let path = &primary["symbolic"]["key"]["Local"]["verbatim_path"];
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        Finding {
            check: "workflows".into(),
            rule: text(&found["ident"]),
            level: Level::Error,
            message: format!("{} ({})", text(&found["desc"]), text(&found["url"])),
            file: context.relative(&text(path)),
            line: from_zero(&start["row"]),
            column: from_zero(&start["column"]),
        }
    });
    Ok(Report {
        findings: findings.collect(),
        looked_at: format!("{} files", files.len()),
        unavailable: None,
    })
}

pub fn syntax(context: &Context) -> Result<Report> {
    let files = files(context)?;
    if files.is_empty() {
        return Ok(none());
    }
    let shell = context.shell()?;
    let words = &files;
    let node = context.tools.program("node")?;
    let driver = context.tools.program("workflow-parser")?;
    let ended = cmd!(shell, "{node} {driver} {words...}")
        .quiet()
        .ignore_status()
        .output()
        .context("running GitHub's parser")?;
    if !matches!(ended.status.code(), Some(0 | 1)) {
        bail!(
            "GitHub's parser could not look: {}",
            String::from_utf8_lossy(&ended.stderr).trim()
        );
    }
    let mut findings: Vec<Finding> = Vec::new();
    let found: Vec<Value> =
        serde_json::from_slice(&ended.stdout).context("reading what GitHub's parser found")?;
    for error in found {
        let number = |name: &str| error[name].as_u64().and_then(|n| u32::try_from(n).ok());
        findings.push(Finding {
            check: "workflow-syntax".into(),
            rule: "syntax".into(),
            level: Level::Error,
            message: error["message"].as_str().unwrap_or_default().to_owned(),
            file: context.relative(error["file"].as_str().unwrap_or_default()),
            line: number("line").unwrap_or(1),
            column: number("column").unwrap_or(1),
        });
    }
    Ok(Report {
        findings,
        looked_at: format!("{} files", files.len()),
        unavailable: None,
    })
}

/// The repository's workflows and actions.
fn files(context: &Context) -> Result<Vec<String>> {
    let files = context.files()?.into_iter();
    Ok(files
        .filter(|path| {
            path.starts_with(".github/workflows/") || path.starts_with(".github/actions/")
        })
        .filter(|path| path.ends_with(".yml") || path.ends_with(".yaml"))
        .collect())
}

fn none() -> Report {
    Report {
        looked_at: "no workflow".to_owned(),
        ..Report::default()
    }
}

/// zizmor counts from zero.
fn from_zero(value: &Value) -> u32 {
    value
        .as_u64()
        .and_then(|n| u32::try_from(n + 1).ok())
        .unwrap_or(1)
}
