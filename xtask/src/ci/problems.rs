//! Places in files that a failed step's log names: annotations and SARIF are made from them.

use std::path::Path;

use crate::findings::{Finding, Level};

/// The problems in the last lines of a log, in the forms of rustc, rustfmt, a panic and
/// this program itself.
pub fn find(step: &str, lines: &[String], root: &Path) -> Vec<Finding> {
    let mut problems: Vec<Finding> = Vec::new();
    for (at, line) in lines.iter().enumerate() {
        let Some((place, message)) = place(line, &lines[..at], lines.get(at + 1)) else {
            continue;
        };
        let Some((file, row, column)) = position(place, root) else {
            continue;
        };
        let problem = Finding {
            check: step.to_owned(),
            rule: step.to_owned(),
            level: Level::Error,
            message,
            file,
            line: row,
            column,
        };
        if !problems.contains(&problem) {
            problems.push(problem);
        }
    }
    problems
}

/// The place that a line names, and what is said of it.
fn place<'a>(
    line: &'a str,
    before: &[String],
    after: Option<&String>,
) -> Option<(&'a str, String)> {
    let text = line.trim_start();
    if let Some(place) = text.strip_prefix("--> ") {
        // rustc: the message stands in the line before.
        let said = before.last().filter(|line| {
            ["error", "warning"]
                .iter()
                .any(|kind| line.starts_with(kind))
        })?;
        return Some((place, said.clone()));
    }
    if let Some(place) = text.strip_prefix("Diff in ") {
        return Some((place.trim_end_matches(':'), "not formatted".to_owned()));
    }
    if let Some((place, message)) = text
        .strip_prefix("failed ")
        .and_then(|t| t.split_once(": "))
    {
        // This program's own checks.
        return Some((place, message.to_owned()));
    }
    let (_, place) = text.split_once(" panicked at ")?;
    Some((
        place.trim_end_matches(':'),
        after.cloned().unwrap_or_default(),
    ))
}

/// `PATH:LINE[:COLUMN]`, with the path from the root.
fn position(place: &str, root: &Path) -> Option<(String, u32, u32)> {
    let mut parts = place.split(':');
    let path = Path::new(parts.next()?);
    let path = path.strip_prefix(root).unwrap_or(path);
    let line = parts.next()?.parse().ok()?;
    let column = parts.next().and_then(|part| part.parse().ok()).unwrap_or(1);
    // What lies outside has no place in this repository.
    (path.is_relative() && root.join(path).is_file())
        .then(|| (path.to_string_lossy().into_owned(), line, column))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_found_in_what_tools_print() {
        let root = tempfile::tempdir().unwrap();
        std::fs::create_dir(root.path().join("src")).unwrap();
        std::fs::write(root.path().join("src/main.rs"), "").unwrap();
        let absolute = root.path().join("src/main.rs");
        let log = format!(
            "error[E0308]: mismatched types\n  --> src/main.rs:7:3\n   = note: --> elsewhere.rs:1:1\n\
             Diff in {0}:12:\nthread 'a' (7) panicked at src/main.rs:9:5:\nassertion failed\n\
             thread 'b' panicked at /rustc/library/core.rs:1:1:\nno\n\
             failed src/main.rs:3: is stale [workflows]\nfailed b: exit status: 3",
            absolute.display()
        );
        let lines: Vec<String> = log.lines().map(str::to_owned).collect();
        let found: Vec<_> = find("test", &lines, root.path())
            .into_iter()
            .map(|problem| (problem.line, problem.column, problem.message))
            .collect();
        assert_eq!(
            found,
            [
                (7, 3, "error[E0308]: mismatched types".to_owned()),
                (12, 1, "not formatted".to_owned()),
                (9, 5, "assertion failed".to_owned()),
                (3, 1, "is stale [workflows]".to_owned()),
            ]
        );
    }
}
