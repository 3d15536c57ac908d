//! `cargo xtask audit`: what must not be in the repository or in what it is built from.

pub mod advisories;
mod dependencies;
mod exceptions;
mod manifests;
mod secrets;
mod unsafe_code;
mod workflows;

use std::path::PathBuf;

use anyhow::{Context as _, Result, bail};
use serde::Serialize;
use xshell::Shell;

use crate::cargo;
use crate::ci::process::WARNING_FILE;
use crate::cli::AuditArgs;
use crate::config::unknown;
use crate::files;
use crate::findings::{self, Finding, Level};
use crate::output::{Exit, Finished, Output};
use crate::setup::tools::Tools;

/// One thing to look for. To add a check, add a row.
struct Check {
    name: &'static str,
    proves: &'static str,
    /// The tool of `config/tools.toml` that looks.
    tool: Option<&'static str>,
    run: fn(&Context) -> Result<Report>,
}

const CHECKS: &[Check] = &[
    Check {
        name: "advisories",
        proves: "no dependency has a known vulnerability",
        tool: Some("cargo-deny"),
        run: dependencies::advisories,
    },
    Check {
        name: "dependencies",
        proves: "no dependency is banned, badly licensed or from an unknown source",
        tool: Some("cargo-deny"),
        run: dependencies::policy,
    },
    Check {
        name: "exceptions",
        proves: "each exception in deny.toml has a reason and has not expired",
        tool: None,
        run: exceptions::check,
    },
    Check {
        name: "unused",
        proves: "each dependency is used",
        tool: Some("cargo-shear"),
        run: dependencies::unused,
    },
    Check {
        name: "secrets",
        proves: "no credential is in a file or in the history",
        tool: Some("kingfisher"),
        run: secrets::check,
    },
    Check {
        name: "workflows",
        proves: "the workflows are safe (zizmor, pedantic)",
        tool: Some("zizmor"),
        run: workflows::zizmor,
    },
    Check {
        name: "workflow-syntax",
        proves: "GitHub's own parser accepts the workflows and their expressions",
        tool: Some("workflow-parser"),
        run: workflows::syntax,
    },
    Check {
        name: "manifests",
        proves: "manifests and Dockerfiles keep to config/policy.toml",
        tool: None,
        run: manifests::check,
    },
    Check {
        name: "unsafe",
        proves: "each unsafe block says why it is sound",
        tool: None,
        run: unsafe_code::check,
    },
];

/// What checks look at.
pub struct Context {
    pub root: PathBuf,
    /// For what tools leave.
    pub dir: PathBuf,
    pub tools: Tools,
    pub advisory_db: Option<String>,
}

/// What a check found.
#[derive(Debug, Default)]
pub struct Report {
    pub findings: Vec<Finding>,
    /// What was looked at, for people.
    pub looked_at: String,
    /// Why it could not look, if so.
    pub unavailable: Option<String>,
}

#[derive(Debug, Serialize)]
struct Line {
    check: &'static str,
    outcome: &'static str,
    detail: String,
}

pub fn run(args: &AuditArgs, output: &Output) -> Result<Finished> {
    let checks = select(&args.only)?;
    let workspace = cargo::root()?;
    let context = Context {
        root: match &args.root {
            Some(root) => std::path::absolute(root).context("resolving --root")?,
            None => workspace,
        },
        dir: cargo::target_dir()?.join("xtask").join("audit"),
        tools: Tools::open()?,
        advisory_db: args.advisory_db.clone(),
    };
    preflight(&checks, &context.tools)?;
    std::fs::create_dir_all(&context.dir)
        .with_context(|| format!("creating {}", context.dir.display()))?;
    // Each is a program of its own that waits for little else than the disk.
    let reports: Vec<Result<Report>> = std::thread::scope(|scope| {
        let start = |check: &&Check| {
            let (run, context) = (check.run, &context);
            scope.spawn(move || run(context))
        };
        let threads: Vec<_> = checks.iter().map(start).collect();
        let wait = |thread: std::thread::ScopedJoinHandle<'_, Result<Report>>| {
            thread
                .join()
                .unwrap_or_else(|_| bail!("the check broke off"))
        };
        threads.into_iter().map(wait).collect()
    });
    finish(&checks, reports, args, &context, output)
}

fn finish(
    checks: &[&Check],
    reports: Vec<Result<Report>>,
    args: &AuditArgs,
    context: &Context,
    output: &Output,
) -> Result<Finished> {
    let mut lines = Vec::new();
    let mut findings = Vec::new();
    let mut unavailable = Vec::new();
    // A tool that breaks off is not the same as a network that is away: nobody expects it.
    let mut broken = false;
    for (check, report) in checks.iter().zip(reports) {
        let report = report.unwrap_or_else(|error| {
            broken = true;
            Report {
                unavailable: Some(format!("{error:#}")),
                ..Report::default()
            }
        });
        lines.push(line(check, &report));
        if let Some(why) = report.unavailable {
            unavailable.push((check.name, why));
        }
        findings.extend(report.findings);
    }
    findings.sort();
    for finding in findings.iter().filter(|f| f.level != Level::Note) {
        let Finding {
            check,
            rule,
            file,
            line,
            column,
            message,
            level,
        } = finding;
        let place = format!("{file}:{line}:{column}");
        output.bad_or_warn(
            *level == Level::Error,
            format_args!("{place}: {message} [{check}: {rule}]"),
        );
        output.annotate(&findings::annotation(finding));
    }
    let rows: Vec<Vec<String>> = lines
        .iter()
        .map(|line| {
            let cells = [line.check, line.outcome, &line.detail];
            cells.map(str::to_owned).to_vec()
        })
        .collect();
    output.table(&["CHECK", "OUTCOME", "LOOKED AT"], &rows);
    for line in &lines {
        output.event("check", line);
    }
    for finding in &findings {
        output.event("finding", finding);
    }
    let sarif = findings::sarif("cargo xtask audit", &findings);
    files::write_json(&context.dir.join("audit.sarif"), &sarif)?;
    files::write_json(&context.dir.join("audit.json"), &findings)?;
    output.detail(format_args!(
        "reports: {} and audit.sarif beside it",
        context.dir.join("audit.json").display()
    ));

    for (check, why) in &unavailable {
        output.warn(format_args!("{check} was NOT checked: {why}"));
    }
    if let Some(file) = std::env::var_os(WARNING_FILE).filter(|_| !unavailable.is_empty()) {
        let names: Vec<&str> = unavailable.iter().map(|(check, _)| *check).collect();
        let text = format!("NOT checked: {}", names.join(", "));
        std::fs::write(&file, text).context("saying what was not checked")?;
    }
    let strict = args.strict || output.is_actions();
    let finished = if findings.iter().any(|f| f.level == Level::Error) {
        Finished::new(Exit::No, "failed")
    } else if broken || !unavailable.is_empty() && strict {
        Finished::new(Exit::Unknown, "unavailable")
    } else if !unavailable.is_empty() {
        Finished::new(Exit::Yes, "incomplete")
    } else {
        Finished::passed()
    };
    Ok(finished
        .with("checks", lines)
        .with("findings", findings.len()))
}

fn line(check: &Check, report: &Report) -> Line {
    let errors = report
        .findings
        .iter()
        .filter(|f| f.level == Level::Error)
        .count();
    let (outcome, detail) = match &report.unavailable {
        _ if errors > 0 => ("failed", report.looked_at.clone()),
        Some(why) => ("UNAVAILABLE", why.clone()),
        None => ("passed", report.looked_at.clone()),
    };
    // The rest of a long reason stands below the table.
    let detail = detail.lines().next().unwrap_or_default().to_owned();
    Line {
        check: check.name,
        outcome,
        detail: if detail.is_empty() {
            check.proves.to_owned()
        } else {
            detail
        },
    }
}

fn select(only: &[String]) -> Result<Vec<&'static Check>> {
    let names = CHECKS.iter().map(|check| check.name);
    if let Some(name) = only
        .iter()
        .find(|name| !names.clone().any(|known| known == *name))
    {
        return Err(unknown("check", name, names));
    }
    let wanted = |check: &&Check| only.is_empty() || only.iter().any(|name| name == check.name);
    Ok(CHECKS.iter().filter(wanted).collect())
}

fn preflight(checks: &[&Check], tools: &Tools) -> Result<()> {
    let mut missing = Vec::new();
    for tool in checks.iter().filter_map(|check| check.tool) {
        if tools.version(tool)?.is_none() && !missing.contains(&tool) {
            missing.push(tool);
        }
    }
    if missing.is_empty() {
        return Ok(());
    }
    bail!(
        "{} missing: `cargo xtask setup --only audit` puts what is missing there",
        missing.join(", ")
    )
}

impl Context {
    /// A shell in the directory that is looked at.
    pub fn shell(&self) -> Result<Shell> {
        let shell = Shell::new().context("finding the current directory")?;
        shell.change_dir(&self.root);
        Ok(shell)
    }

    /// A finding's path from the root.
    pub fn relative(&self, path: &str) -> String {
        let path = std::path::Path::new(path);
        let path = path.strip_prefix(&self.root).unwrap_or(path);
        path.to_string_lossy().trim_start_matches("./").to_owned()
    }

    /// The files below the root, tracked or not, that git does not ignore.
    pub fn files(&self) -> Result<Vec<String>> {
        let shell = self.shell()?;
        let listed = cargo::git(
            &shell,
            &[
                "ls-files",
                "-z",
                "--cached",
                "--others",
                "--exclude-standard",
            ],
        )
        .context("asking git for the files; the audit looks at a git repository")?;
        let there = |path: &&str| !path.is_empty() && self.root.join(path).is_file();
        Ok(listed
            .split('\0')
            .filter(there)
            .map(str::to_owned)
            .collect())
    }
}

/// The day that exceptions and advisories are measured by, in UTC.
pub fn today() -> jiff::civil::Date {
    jiff::tz::Offset::UTC
        .to_datetime(jiff::Timestamp::now())
        .date()
}

/// The line and column, from 1, of a byte in a text.
pub fn position(text: &str, offset: usize) -> (u32, u32) {
    let before = text.get(..offset).unwrap_or(text);
    let line = before.matches('\n').count() + 1;
    let column = before.len() - before.rfind('\n').map_or(0, |at| at + 1) + 1;
    let number = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
    (number(line), number(column))
}
