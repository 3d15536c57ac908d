//! Exceptions in deny.toml: each has a reason and a day on which it ends, `until 2027-01-31: why`,
//! in its `reason` or in a comment on its line or the one above.

use std::fs;

use anyhow::{Context as _, Result};
use jiff::civil::Date;
use serde::Deserialize;
use toml::Spanned;

use super::{Context, Report, position};
use crate::findings::{Finding, Level};

/// The parts of cargo-deny's settings that let something through.
/// <https://embarkstudios.github.io/cargo-deny/checks/cfg.html>
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Settings {
    advisories: Advisories,
    bans: Bans,
    licenses: Licenses,
    sources: Sources,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Advisories {
    ignore: Vec<Spanned<toml::Value>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
struct Bans {
    skip: Vec<Spanned<toml::Value>>,
    skip_tree: Vec<Spanned<toml::Value>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Licenses {
    exceptions: Vec<Spanned<toml::Value>>,
    clarify: Vec<Spanned<toml::Value>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
struct Sources {
    allow_git: Vec<Spanned<toml::Value>>,
}

pub fn check(context: &Context) -> Result<Report> {
    let path = context.root.join("deny.toml");
    let text = fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
    let today = crate::audit::today();
    let (findings, number) =
        judge(&text, today).with_context(|| format!("in {}", path.display()))?;
    Ok(Report {
        findings,
        looked_at: format!("{number} exceptions in deny.toml"),
        unavailable: None,
    })
}

fn judge(text: &str, today: Date) -> Result<(Vec<Finding>, usize)> {
    let settings: Settings = toml::from_str(text)?;
    let lists = [
        ("advisories.ignore", settings.advisories.ignore),
        ("bans.skip", settings.bans.skip),
        ("bans.skip-tree", settings.bans.skip_tree),
        ("licenses.exceptions", settings.licenses.exceptions),
        ("licenses.clarify", settings.licenses.clarify),
        ("sources.allow-git", settings.sources.allow_git),
    ];
    let mut findings = Vec::new();
    let mut number = 0;
    for (list, entries) in lists {
        let spans: Vec<_> = entries.iter().map(Spanned::span).collect();
        for (at, span) in spans.iter().enumerate() {
            number += 1;
            // What a neighbour on the same line says is its own.
            let from = at.checked_sub(1).map_or(0, |before| spans[before].end);
            let to = spans.get(at + 1).map_or(text.len(), |after| after.start);
            let said = around(&text[from..to], span.start - from, span.end - from);
            if let Some((rule, message)) = wrong(&said, today) {
                let (line, column) = position(text, span.start);
                findings.push(Finding {
                    check: "exceptions".into(),
                    rule: rule.into(),
                    level: Level::Error,
                    message: format!("{list}: {message}"),
                    file: "deny.toml".into(),
                    line,
                    column,
                });
            }
        }
    }
    Ok((findings, number))
}

/// The entry with the rest of its lines, and the line above where that is a comment.
fn around(text: &str, start: usize, end: usize) -> String {
    let begin = text[..start].rfind('\n').map_or(0, |at| at + 1);
    let finish = text[end..].find('\n').map_or(text.len(), |at| end + at);
    let above = text[..begin]
        .trim_end()
        .rsplit('\n')
        .next()
        .unwrap_or_default();
    let above = if above.trim_start().starts_with('#') {
        above
    } else {
        ""
    };
    format!("{above}\n{}", &text[begin..finish])
}

fn wrong(text: &str, today: Date) -> Option<(&'static str, String)> {
    const FORM: &str = "say `until 2027-01-31: why` in its reason or in a comment";
    let Some((_, rest)) = text.split_once("until ") else {
        return Some(("no-expiry", format!("the exception has no end; {FORM}")));
    };
    let (date, reason) = rest.split_once(':').unwrap_or((rest, ""));
    let Ok(date) = date.trim().parse::<Date>() else {
        return Some(("no-expiry", format!("{:?} is no date; {FORM}", date.trim())));
    };
    if reason.chars().filter(|c| c.is_alphabetic()).count() < 5 {
        return Some(("no-reason", format!("the exception has no reason; {FORM}")));
    }
    (today > date).then(|| {
        let message = format!("the exception expired on {date}: mend the cause or renew it");
        ("expired", message)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_exception_needs_a_reason_and_an_end() {
        let text = r#"
[advisories]
ignore = [
    { id = "RUSTSEC-2024-0001", reason = "until 2030-01-01: no fixed version yet" },
    { id = "RUSTSEC-2024-0002", reason = "until 2020-01-01: no fixed version yet" },
    "RUSTSEC-2024-0003",
    # until 2030-01-01: only in a build script
    "RUSTSEC-2024-0004",
    "RUSTSEC-2024-0005", # until 2030-01-01: x
    { id = "RUSTSEC-2024-0006", reason = "until 2030-01-01: not ours" }, "RUSTSEC-2024-0007",
]
[licenses]
exceptions = [
    { allow = ["MPL-2.0"], crate = "a" }, # until soon: it will be replaced
]
"#;
        let today = "2026-11-24".parse().unwrap();
        let (findings, number) = judge(text, today).unwrap();
        let found: Vec<_> = findings.iter().map(|f| (f.rule.as_str(), f.line)).collect();
        let wanted = [
            ("expired", 5),
            ("no-expiry", 6),
            ("no-reason", 9),
            ("no-expiry", 10),
            ("no-expiry", 14),
        ];
        assert_eq!((found, number), (wanted.to_vec(), 8));
    }
}
