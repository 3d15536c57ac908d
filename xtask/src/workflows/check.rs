//! The rules for workflows and actions, whoever wrote them.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use clap::Parser;
use saphyr::{LoadableYamlNode, MarkedYaml};

use super::{ALLOWED, finding};
use crate::ci::steps;
use crate::cli::{Cli, Command};
use crate::findings::Finding;
use crate::yaml::{Node, entries, get, items, line, text};

/// The workflow whose jobs must run every step.
const REQUIRED: &str = "workflows/ci.yml";

/// The variables that a command may get, with their values.
const VARIABLES: &[(&str, &str)] = &[
    ("CARGO_ALIAS_XTASK", "${{ steps.xtask.outputs.alias }}"),
    ("NEEDS", "${{ toJSON(needs) }}"),
];

/// Collects what is wrong in one file.
struct File<'t> {
    name: String,
    text: &'t str,
    findings: Vec<Finding>,
}

/// Checks `workflows/*.yml` and `actions/*/action.yml` below `dir`.
pub fn check(dir: &Path) -> Result<Vec<Finding>> {
    let mut findings = Vec::new();
    let mut required = false;
    for name in names(dir)? {
        let path = dir.join(&name);
        let text =
            fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
        required |= name == REQUIRED;
        let mut file = File {
            name,
            text: &text,
            findings: Vec::new(),
        };
        file.check();
        findings.extend(file.findings);
    }
    if !required {
        findings.push(finding(REQUIRED, 1, "missing", "there is no such workflow"));
    }
    Ok(findings)
}

fn names(dir: &Path) -> Result<Vec<String>> {
    let is_yaml = |name: &str| name.ends_with(".yml") || name.ends_with(".yaml");
    let mut names = Vec::new();
    for (below, depth) in [("workflows", 1), ("actions", 2)] {
        let mut open = vec![(below.to_owned(), depth)];
        while let Some((name, depth)) = open.pop() {
            let entries = match fs::read_dir(dir.join(&name)) {
                Ok(entries) => entries,
                Err(_) => continue,
            };
            for entry in entries {
                let entry = entry.with_context(|| format!("reading {name}"))?;
                let inner = format!("{name}/{}", entry.file_name().to_string_lossy());
                if entry.path().is_dir() && depth > 1 {
                    open.push((inner, depth - 1));
                } else if is_yaml(&inner) {
                    names.push(inner);
                }
            }
        }
    }
    names.sort();
    Ok(names)
}

impl File<'_> {
    fn check(&mut self) {
        let documents = match MarkedYaml::load_from_str(self.text) {
            Ok(documents) => documents,
            Err(error) => {
                return self.wrong(error.marker().line(), "yaml", error.info().to_owned());
            }
        };
        let Some(document) = documents.first() else {
            return self.wrong(1, "yaml", "the file is empty");
        };
        if self.name.starts_with("actions/") {
            for step in get(document, "runs")
                .and_then(|r| get(r, "steps"))
                .into_iter()
                .flat_map(items)
            {
                self.step(step);
            }
            return;
        }
        self.workflow(document);
    }

    fn workflow(&mut self, document: &Node<'_>) {
        match get(document, "permissions") {
            Some(permissions)
                if entries(permissions).next().is_none() && permissions.data.is_mapping() => {}
            Some(permissions) => self.wrong(
                line(permissions),
                "permissions",
                "the workflow's permissions must be `{}`; a job asks for its own",
            ),
            None => self.wrong(1, "permissions", "`permissions: {}` is missing"),
        }
        if get(document, "concurrency").is_none() {
            self.wrong(1, "concurrency", "`concurrency` is missing");
        }
        let triggers = get(document, "on");
        let trigger = |name: &str| triggers.and_then(|on| key(on, name));
        for name in ["pull_request_target", "workflow_run"] {
            if let Some(node) = trigger(name) {
                let message = format!("{name} gives a fork's code the rights of this repository");
                self.wrong(line(node), "trigger", message);
            }
        }
        let for_forks = trigger("pull_request").is_some();
        if for_forks {
            self.secrets();
        }
        for name in ["defaults", "env"] {
            if let Some(node) = get(document, name) {
                let message = format!("`{name}` could change what every command means");
                self.wrong(line(node), "meaning", message);
            }
        }
        let Some(jobs) = get(document, "jobs") else {
            return self.wrong(1, "jobs", "there are no jobs");
        };
        let mut run: BTreeMap<String, usize> = BTreeMap::new();
        for (name, job) in entries(jobs) {
            self.job(name.data.as_str().unwrap_or_default(), job, for_forks);
            for step in get(job, "steps").into_iter().flat_map(items) {
                for step in self.step(step) {
                    *run.entry(step).or_default() += 1;
                }
            }
        }
        if self.name == REQUIRED {
            self.each_step_once(&run, line(jobs));
            self.conclusion(jobs);
        }
    }

    /// Expressions that speak of secrets, in whatever spelling.
    fn secrets(&mut self) {
        for (at, text) in self.text.lines().enumerate() {
            let expressions = text.split("${{").skip(1);
            let mut inner = expressions.filter_map(|rest| rest.split("}}").next());
            if inner.any(|expression| expression.to_lowercase().contains("secrets")) {
                self.wrong(
                    at + 1,
                    "secret",
                    "a fork's pull request must not get a secret",
                );
            }
        }
    }

    fn job(&mut self, name: &str, job: &Node<'_>, for_forks: bool) {
        self.meaning(job);
        if let Some(when) = get(job, "if").filter(|when| text(when) != Some("always()")) {
            let message = format!("job {name} may be skipped, and a skipped job proves nothing");
            self.wrong(line(when), "condition", message);
        }
        if get(job, "timeout-minutes").is_none() {
            let message = format!("job {name} has no `timeout-minutes`");
            self.wrong(line(job), "time-out", message);
        }
        match get(job, "permissions") {
            None => {
                let message = format!("job {name} does not say its permissions");
                self.wrong(line(job), "permissions", message);
            }
            Some(permissions) if !permissions.data.is_mapping() => {
                let message = format!("job {name} takes all permissions of a kind at once");
                self.wrong(line(permissions), "permissions", message);
            }
            Some(permissions) => {
                for (what, right) in entries(permissions) {
                    if for_forks && right.data.as_str() == Some("write") {
                        let what = what.data.as_str().unwrap_or_default();
                        let message = format!("job {name} may write {what} for a pull request");
                        self.wrong(line(right), "permissions", message);
                    }
                }
            }
        }
    }

    /// Keys that make a failure look like a success, or a command mean something else.
    fn meaning(&mut self, node: &Node<'_>) {
        for name in [
            "continue-on-error",
            "shell",
            "defaults",
            "working-directory",
        ] {
            if let Some(value) = get(node, name) {
                let message = format!("`{name}` changes what the commands here mean or prove");
                self.wrong(line(value), "meaning", message);
            }
        }
        for (name, value) in get(node, "env").into_iter().flat_map(entries) {
            let pair = (
                text(name).unwrap_or_default(),
                text(value).unwrap_or_default(),
            );
            if !VARIABLES.contains(&pair) {
                let message = format!("`{}` is no variable that a command here needs", pair.0);
                self.wrong(line(name), "meaning", message);
            }
        }
    }

    /// Checks one step and returns the steps of `ci` that it runs.
    fn step(&mut self, step: &Node<'_>) -> Vec<String> {
        self.meaning(step);
        if let (Some(when), Some(_)) = (get(step, "if"), get(step, "run")) {
            self.wrong(
                line(when),
                "condition",
                "a command that may be skipped proves nothing",
            );
        }
        if let Some(uses) = get(step, "uses") {
            self.uses(uses, step);
        }
        match get(step, "run") {
            Some(run) => self.run(run),
            None => Vec::new(),
        }
    }

    fn uses(&mut self, uses: &Node<'_>, step: &Node<'_>) {
        let Some(text) = uses.data.as_str() else {
            return self.wrong(line(uses), "uses", "`uses` must be text");
        };
        if let Some(path) = text.strip_prefix("./").or(text.strip_prefix("$/")) {
            // Only what lies where this check looks has been checked.
            let below = path.strip_prefix(".github/actions/");
            if below.is_none_or(|name| name.contains(['/', '.'])) {
                self.wrong(
                    line(uses),
                    "allow-list",
                    format!("{text} is not in .github/actions/"),
                );
            }
            return;
        }
        let (name, commit) = text.split_once('@').unwrap_or((text, ""));
        if commit.len() != 40 || !commit.bytes().all(|b| b.is_ascii_hexdigit()) {
            let message = format!("{text} is not pinned to a full commit");
            return self.wrong(line(uses), "pin", message);
        }
        let Some(allowed) = ALLOWED.iter().find(|action| action.name == name) else {
            let message = format!("{name} is not on the list of actions that may be used");
            return self.wrong(line(uses), "allow-list", message);
        };
        if allowed.commit != commit {
            let message = format!("{name} must be at {} ({})", allowed.commit, allowed.version);
            self.wrong(line(uses), "pin", message);
        }
        let written = self.text.lines().nth(line(uses) - 1).unwrap_or_default();
        if !written
            .trim_end()
            .ends_with(&format!("# {}", allowed.version))
        {
            let message = format!("the comment `# {}` is missing", allowed.version);
            self.wrong(line(uses), "version", message);
        }
        if name == "actions/checkout" {
            let persists = get(step, "with").and_then(|with| get(with, "persist-credentials"));
            if persists.and_then(|value| value.data.as_bool()) != Some(false) {
                self.wrong(
                    line(uses),
                    "credentials",
                    "`persist-credentials: false` is missing: later steps could use the token",
                );
            }
        }
    }

    /// A `run:` is one command of this program, with arguments that it knows.
    fn run(&mut self, run: &Node<'_>) -> Vec<String> {
        let at = line(run);
        let text = run.data.as_str().unwrap_or_default().trim();
        if text.contains("${{") {
            self.wrong(
                at,
                "expression",
                "`${{ }}` in a command lets whoever controls the value write commands; pass it in `env`",
            );
            return Vec::new();
        }
        let words: Vec<&str> = text.split_whitespace().collect();
        let simple =
            |word: &&str| !word.contains([';', '&', '|', '`', '$', '<', '>', '"', '\'', '\\', '(']);
        if !words.iter().all(simple) || text.contains('\n') {
            self.wrong(
                at,
                "command",
                format!("{text:?} is more than one plain command"),
            );
            return Vec::new();
        }
        let ["cargo", "xtask", arguments @ ..] = words.as_slice() else {
            self.wrong(
                at,
                "command",
                format!("{text:?} is no `cargo xtask` command"),
            );
            return Vec::new();
        };
        let parsed = Cli::try_parse_from(std::iter::once(&"cargo xtask").chain(arguments));
        match parsed {
            Ok(cli) => match cli.command {
                Command::Ci(args) => self.steps_of(&args, at),
                _ => Vec::new(),
            },
            Err(error) => {
                let said = error.to_string();
                let first = said.lines().next().unwrap_or_default().to_owned();
                self.wrong(at, "arguments", format!("{text:?}: {first}"));
                Vec::new()
            }
        }
    }

    fn steps_of(&mut self, args: &crate::cli::CiArgs, at: usize) -> Vec<String> {
        let table = steps::steps();
        let names = || table.iter().map(|step| step.name.clone());
        for name in args.only.iter().chain(&args.skip) {
            if !names().any(|known| known == *name) {
                self.wrong(at, "unknown-step", format!("there is no step {name:?}"));
            }
        }
        let looks = args.dry_run || args.list || args.graph || args.fix;
        let asks = args.explain.is_some() || args.why.is_some() || !args.compare.is_empty();
        let narrows = args.failed || args.affected || args.profile != crate::cli::Profile::All;
        if looks || asks || narrows || args.steps.is_some() || !args.arguments.is_empty() {
            self.wrong(
                at,
                "narrowed",
                "a required job runs its steps whatever changed",
            );
        }
        names()
            .filter(|name| args.only.is_empty() || args.only.contains(name))
            .filter(|name| !args.skip.contains(name))
            .collect()
    }

    fn each_step_once(&mut self, run: &BTreeMap<String, usize>, at: usize) {
        for step in steps::steps() {
            match run.get(&step.name) {
                Some(1) => {}
                Some(times) => {
                    let message = format!("step {step} runs {times} times");
                    self.wrong(at, "repeated-step", message);
                }
                None => self.wrong(at, "missing-step", format!("no job runs step {step}")),
            }
        }
    }

    /// The last job always runs, needs all others and judges them.
    fn conclusion(&mut self, jobs: &Node<'_>) {
        let all: Vec<(&Node<'_>, &Node<'_>)> = entries(jobs).collect();
        let Some(((_, last), others)) = all.split_last() else {
            return;
        };
        let mut needs: Vec<&str> = get(last, "needs").map_or_else(Vec::new, |needs| {
            items(needs).filter_map(|item| item.data.as_str()).collect()
        });
        needs.extend(get(last, "needs").and_then(|needs| needs.data.as_str()));
        let at = line(last);
        for (name, _) in others {
            let name = name.data.as_str().unwrap_or_default();
            if !needs.contains(&name) {
                self.wrong(
                    at,
                    "conclusion",
                    format!("the last job does not need job {name}"),
                );
            }
        }
        if get(last, "if").and_then(|when| when.data.as_str()) != Some("always()") {
            self.wrong(at, "conclusion", "the last job must run `if: always()`");
        }
        let concludes = |step: &Node<'_>| {
            get(step, "run").and_then(|run| run.data.as_str())
                == Some("cargo xtask workflows conclude")
        };
        if !get(last, "steps")
            .into_iter()
            .flat_map(items)
            .any(concludes)
        {
            self.wrong(
                at,
                "conclusion",
                "the last job must run `cargo xtask workflows conclude`",
            );
        }
    }

    fn wrong(&mut self, line: usize, rule: &str, message: impl Into<String>) {
        self.findings.push(finding(&self.name, line, rule, message));
    }
}

/// A key of a mapping, an item of a list, or the text itself: the ways to name a trigger.
fn key<'n, 'a>(node: &'n Node<'a>, name: &str) -> Option<&'n Node<'a>> {
    let is = |node: &&'n Node<'a>| node.data.as_str() == Some(name);
    entries(node)
        .map(|(key, _)| key)
        .find(is)
        .or_else(|| items(node).find(is))
        .or_else(|| Some(node).filter(is))
}
