//! Kubernetes manifests and Dockerfiles against the rules in `config/policy.toml`.

use std::fs;

use anyhow::{Context as _, Result};
use saphyr::{LoadableYamlNode, MarkedYaml};
use serde::Deserialize;
use xshell::cmd;

use super::{Context, Report};
use crate::cargo;
use crate::findings::{Finding, Level};
use crate::yaml::{Node, get, items};

const POLICY: &str = "config/policy.toml";

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Policy {
    manifest: Vec<ManifestRule>,
    dockerfile: Vec<DockerfileRule>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct ManifestRule {
    rule: String,
    why: String,
    each: Each,
    #[serde(default)]
    kinds: Vec<String>,
    /// Keys that lead to the value, `*` for each item of a list: `volumes/*/hostPath`.
    path: String,
    #[serde(flatten)]
    wanted: Wanted,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Each {
    Object,
    Pod,
    Container,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Wanted {
    Equals(toml::Value),
    /// It may be absent, but must not be this.
    Not(toml::Value),
    Contains(String),
    Present(bool),
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct DockerfileRule {
    rule: String,
    why: String,
    instruction: String,
    requires: Option<String>,
    #[serde(default)]
    forbids: Vec<String>,
    /// What the first word must not be.
    #[serde(default)]
    not: Vec<String>,
    #[serde(default)]
    unless: Vec<String>,
    #[serde(default)]
    last: bool,
}

pub fn check(context: &Context) -> Result<Report> {
    let path = context.root.join(POLICY);
    let text = match fs::read_to_string(&path) {
        Ok(text) => text,
        // The rules of this workspace hold for what is looked at elsewhere.
        Err(_) => fs::read_to_string(cargo::root()?.join(POLICY))
            .with_context(|| format!("reading {POLICY}"))?,
    };
    let policy: Policy = toml::from_str(&text).with_context(|| format!("in {POLICY}"))?;
    let mut findings = Vec::new();
    let (mut manifests, mut dockerfiles) = (0, 0);
    for path in context.files()? {
        let name = path.rsplit('/').next().unwrap_or_default();
        let is_manifest =
            path.starts_with("k8s/") && (name.ends_with(".yaml") || name.ends_with(".yml"));
        let is_dockerfile = ["Dockerfile", "Containerfile"]
            .iter()
            .any(|word| name == *word || name.starts_with(&format!("{word}.")));
        if !is_manifest && !is_dockerfile {
            continue;
        }
        let text = fs::read_to_string(context.root.join(&path))
            .with_context(|| format!("reading {path}"))?;
        if is_manifest {
            manifests += 1;
            findings.extend(manifest(&policy.manifest, &path, &text));
        } else {
            dockerfiles += 1;
            findings.extend(dockerfile(&policy.dockerfile, &path, &text));
        }
    }
    let (rendered, unavailable) = overlays(context, &policy.manifest, &mut findings)?;
    Ok(Report {
        findings,
        looked_at: format!(
            "{manifests} manifests, {rendered} overlays rendered, {dockerfiles} Dockerfiles"
        ),
        unavailable,
    })
}

/// What the overlays render must keep the rules too: a patch can take back what its base promises.
/// Returns how many there were, and why they could not be rendered.
fn overlays(
    context: &Context,
    rules: &[ManifestRule],
    findings: &mut Vec<Finding>,
) -> Result<(usize, Option<String>)> {
    let mut overlays = context.files()?;
    overlays
        .retain(|path| path.starts_with("k8s/overlays/") && path.ends_with("/kustomization.yaml"));
    if overlays.is_empty() {
        return Ok((0, None));
    }
    let kubectl = match context.tools.program("kubectl") {
        Ok(kubectl) => kubectl,
        Err(error) => return Ok((0, Some(format!("{error:#}")))),
    };
    let shell = cargo::shell()?;
    shell.change_dir(&context.root);
    for path in &overlays {
        let dir = path.trim_end_matches("/kustomization.yaml");
        let rendered = cmd!(shell, "{kubectl} kustomize {dir}")
            .quiet()
            .ignore_status()
            .output()?;
        if !rendered.status.success() {
            let said = String::from_utf8_lossy(&rendered.stderr);
            findings.push(finding("kustomize", path, 1, 1, said.trim().to_owned()));
            continue;
        }
        let text = String::from_utf8_lossy(&rendered.stdout);
        findings.extend(
            manifest(rules, path, &text)
                .into_iter()
                .map(|found| Finding {
                    // Lines of what is rendered are nobody's.
                    line: 1,
                    column: 1,
                    message: format!("as rendered: {}", found.message),
                    ..found
                }),
        );
    }
    Ok((overlays.len(), None))
}

fn manifest(rules: &[ManifestRule], path: &str, text: &str) -> Vec<Finding> {
    let documents = match MarkedYaml::load_from_str(text) {
        Ok(documents) => documents,
        Err(error) => {
            let line = error.marker().line();
            return vec![finding("yaml", path, line, 1, error.info().to_owned())];
        }
    };
    // A list of objects is as good as a file with each of them.
    let objects = documents.iter().flat_map(|document| {
        let is_list = get(document, "kind").and_then(|kind| kind.data.as_str()) == Some("List");
        let inner = get(document, "items").filter(|_| is_list);
        let inner: Vec<&Node<'_>> = inner.into_iter().flat_map(items).collect();
        if is_list { inner } else { vec![document] }
    });
    let mut findings = Vec::new();
    for document in objects {
        let Some(kind) = get(document, "kind").and_then(|kind| kind.data.as_str()) else {
            continue;
        };
        let pod = pod(document, kind);
        let containers: Vec<&Node<'_>> = pod.map_or_else(Vec::new, |pod| {
            let lists = ["containers", "initContainers", "ephemeralContainers"];
            lists
                .iter()
                .filter_map(|list| get(pod, list))
                .flat_map(items)
                .collect()
        });
        for rule in rules {
            if !rule.kinds.is_empty() && !rule.kinds.iter().any(|wanted| wanted == kind) {
                continue;
            }
            let subjects: Vec<&Node<'_>> = match rule.each {
                Each::Object => vec![document],
                Each::Pod => pod.into_iter().collect(),
                Each::Container => containers.clone(),
            };
            for subject in subjects {
                if let Some((node, problem)) = broken(rule, subject) {
                    let start = node.span.start;
                    let message = format!("{kind}: {} {problem}: {}", rule.path, rule.why);
                    let column = start.col() + 1;
                    findings.push(finding(&rule.rule, path, start.line(), column, message));
                }
            }
        }
    }
    findings
}

/// Where and how a rule is broken.
fn broken<'n, 'a>(rule: &ManifestRule, subject: &'n Node<'a>) -> Option<(&'n Node<'a>, String)> {
    let values = follow(subject, &rule.path);
    match &rule.wanted {
        Wanted::Present(false) => {
            let value = values.first()?;
            // A switch that is off is as good as none.
            (value.data.as_bool() != Some(false)).then(|| (*value, "must not be there".to_owned()))
        }
        Wanted::Present(true) if values.is_empty() => Some((subject, "is missing".to_owned())),
        Wanted::Present(true) => None,
        Wanted::Equals(wanted) => match values.first() {
            None => Some((subject, format!("is missing, and must be {wanted}"))),
            Some(value) => (!equals(value, wanted)).then(|| (*value, format!("must be {wanted}"))),
        },
        Wanted::Not(refused) => {
            let value = values.into_iter().find(|value| equals(value, refused))?;
            Some((value, format!("must not be {refused}")))
        }
        Wanted::Contains(text) => match values.first() {
            None => Some((subject, format!("is missing, and must contain {text}"))),
            Some(value) => {
                let there = match value.data.as_str() {
                    Some(string) => string.contains(text),
                    None => items(value).any(|item| item.data.as_str() == Some(text)),
                };
                (!there).then(|| (*value, format!("must contain {text}")))
            }
        },
    }
}

fn equals(node: &Node<'_>, wanted: &toml::Value) -> bool {
    match wanted {
        toml::Value::Boolean(wanted) => node.data.as_bool() == Some(*wanted),
        toml::Value::String(wanted) => node.data.as_str() == Some(wanted),
        toml::Value::Integer(wanted) => node.data.as_integer() == Some(*wanted),
        _ => false,
    }
}

/// The values that a path leads to.
fn follow<'n, 'a>(node: &'n Node<'a>, path: &str) -> Vec<&'n Node<'a>> {
    let mut nodes = vec![node];
    for key in path.split('/') {
        nodes = match key {
            "*" => nodes.into_iter().flat_map(items).collect(),
            key => nodes
                .into_iter()
                .filter_map(|node| get(node, key))
                .collect(),
        };
    }
    nodes
}

/// The specification of the pods that an object makes.
fn pod<'n, 'a>(document: &'n Node<'a>, kind: &str) -> Option<&'n Node<'a>> {
    let path = match kind {
        "Pod" => "spec",
        "Deployment" | "StatefulSet" | "DaemonSet" | "ReplicaSet" | "Job" => "spec/template/spec",
        "CronJob" => "spec/jobTemplate/spec/template/spec",
        _ => return None,
    };
    follow(document, path).into_iter().next()
}

fn dockerfile(rules: &[DockerfileRule], path: &str, text: &str) -> Vec<Finding> {
    let instructions = instructions(text);
    // Only what is named further up can be meant by a name.
    let stages_above = |line: usize| {
        let above = instructions
            .iter()
            .filter(move |(at, name, _)| *at < line && name == "FROM");
        above.filter_map(|(_, _, rest)| {
            let (_, name) = rest.rsplit_once(char::is_whitespace)?;
            let named = rest.to_lowercase().contains(" as ");
            named.then(|| name.to_lowercase())
        })
    };
    let last_stage = instructions
        .iter()
        .rev()
        .find(|(_, name, _)| name == "FROM");
    let last_stage = last_stage.map_or(0, |(line, _, _)| *line);
    let mut findings = Vec::new();
    for rule in rules {
        let mut uses: Vec<_> = instructions
            .iter()
            .filter(|(_, name, _)| *name == rule.instruction)
            .filter(|(line, _, _)| !rule.last || *line > last_stage)
            .collect();
        if rule.last {
            let Some(last) = uses.pop() else {
                let message = format!("the last stage has no {}: {}", rule.instruction, rule.why);
                findings.push(finding(&rule.rule, path, last_stage.max(1), 1, message));
                continue;
            };
            uses = vec![last];
        }
        for (line, _, rest) in uses {
            let first = rest.split_whitespace().find(|word| !word.starts_with("--"));
            let excepted = first.is_some_and(|word| {
                rule.unless.iter().any(|other| other == word)
                    || stages_above(*line).any(|stage| stage == word.to_lowercase())
            });
            let lacks = rule.requires.as_ref().filter(|text| !rest.contains(*text));
            let has = rule.forbids.iter().find(|text| rest.contains(*text));
            let is = rule.not.iter().find(|text| first == Some(text.as_str()));
            let problem = match (lacks, has, is) {
                _ if excepted => continue,
                (Some(text), _, _) => format!("must contain {text:?}"),
                (None, Some(text), _) => format!("must not contain {text:?}"),
                (None, None, Some(text)) => format!("must not be {text:?}"),
                (None, None, None) => continue,
            };
            let message = format!("{} {problem}: {}", rule.instruction, rule.why);
            findings.push(finding(&rule.rule, path, *line, 1, message));
        }
    }
    findings
}

/// The instructions of a Dockerfile with their lines; continued lines are one.
fn instructions(text: &str) -> Vec<(usize, String, String)> {
    let mut found: Vec<(usize, String, String)> = Vec::new();
    let mut continues = false;
    for (at, line) in text.lines().enumerate() {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let content = line.strip_suffix('\\').unwrap_or(line).trim_end();
        match found.last_mut() {
            Some((_, _, rest)) if continues => {
                rest.push(' ');
                rest.push_str(content);
            }
            _ => {
                let (name, rest) = content
                    .split_once(char::is_whitespace)
                    .unwrap_or((content, ""));
                found.push((at + 1, name.to_uppercase(), rest.trim().to_owned()));
            }
        }
        continues = line.ends_with('\\');
    }
    found
}

fn finding(rule: &str, path: &str, line: usize, column: usize, message: String) -> Finding {
    let number = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
    Finding {
        check: "manifests".into(),
        rule: rule.to_owned(),
        level: Level::Error,
        message,
        file: path.to_owned(),
        line: number(line),
        column: number(column),
    }
}
