//! Unsafe code: listed, and each block with a comment that says why it is sound.

use std::fs;

use anyhow::{Context as _, Result};

use super::{Context, Report};
use crate::findings::{Finding, Level};

pub fn check(context: &Context) -> Result<Report> {
    let mut findings = Vec::new();
    let mut files = 0;
    for path in context.files()?.iter().filter(|path| path.ends_with(".rs")) {
        files += 1;
        let text = fs::read_to_string(context.root.join(path))
            .with_context(|| format!("reading {path}"))?;
        findings.extend(list(path, &text));
    }
    Ok(Report {
        looked_at: format!("{files} Rust files, {} unsafe places", findings.len()),
        findings,
        unavailable: None,
    })
}

fn list(path: &str, text: &str) -> Vec<Finding> {
    let lines: Vec<&str> = text.lines().collect();
    let mut findings = Vec::new();
    for (at, line) in lines.iter().enumerate() {
        let code = line.split("//").next().unwrap_or_default();
        let Some(column) = find(code) else {
            continue;
        };
        let comments = lines[..at]
            .iter()
            .rev()
            .take_while(|line| {
                let line = line.trim_start();
                line.starts_with("//") || line.starts_with("#[")
            })
            .any(|line| line.contains("SAFETY:"));
        let (level, message) = if comments {
            (Level::Note, "unsafe code, with its reason")
        } else {
            (
                Level::Error,
                "unsafe code without a comment `// SAFETY: why it is sound` above it",
            )
        };
        findings.push(Finding {
            check: "unsafe".into(),
            rule: "unsafe-code".into(),
            level,
            message: message.into(),
            file: path.into(),
            line: u32::try_from(at + 1).unwrap_or(u32::MAX),
            column: u32::try_from(column + 1).unwrap_or(u32::MAX),
        });
    }
    findings
}

/// Where a line begins something unsafe. Text in quotes is no code.
fn find(code: &str) -> Option<usize> {
    ["unsafe {", "unsafe fn ", "unsafe impl ", "unsafe extern "]
        .iter()
        .filter_map(|word| code.find(word))
        .find(|at| code[..*at].matches('"').count().is_multiple_of(2))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_without_a_reason_is_an_error() {
        // Put together here, so that the audit does not find this test.
        let block = format!("let x = {} {{ read() }};", "unsafe");
        let text =
            format!("{block}\n// SAFETY: it is ours\n{block}\nlet s = \"{block}\";\n// {block}\n");
        let found: Vec<_> = list("a.rs", &text)
            .into_iter()
            .map(|finding| (finding.line, finding.level))
            .collect();
        assert_eq!(found, [(1, Level::Error), (3, Level::Note)]);
    }
}
