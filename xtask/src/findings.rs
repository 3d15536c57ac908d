//! What checks find wrong, each at its place; as a table, annotations for Actions, and SARIF.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Finding {
    /// Which check found it.
    pub check: String,
    /// The rule that is broken, as the check's tool calls it.
    pub rule: String,
    pub level: Level,
    pub message: String,
    /// From the workspace's root.
    pub file: String,
    /// From 1.
    pub line: u32,
    /// From 1.
    pub column: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    /// It fails the check.
    Error,
    Warning,
    /// For reading; nothing is wrong.
    Note,
}

impl Level {
    /// The name that SARIF 2.1.0 and Actions' workflow commands both use, save for notes.
    pub fn name(self) -> &'static str {
        match self {
            Self::Error => "error",
            Self::Warning => "warning",
            Self::Note => "note",
        }
    }
}

/// SARIF 2.1.0 with one result for each finding. GitHub's code scanning refuses results without
/// a location, so each has one.
/// <https://docs.oasis-open.org/sarif/sarif/v2.1.0/sarif-v2.1.0.html>
pub fn sarif(tool: &str, findings: &[Finding]) -> Value {
    let rule = |finding: &Finding| format!("{}/{}", finding.check, finding.rule);
    let rules: BTreeSet<String> = findings.iter().map(rule).collect();
    let results: Vec<Value> = findings
        .iter()
        .map(|finding| {
            json!({
                "ruleId": rule(finding),
                "level": finding.level.name(),
                "message": { "text": finding.message },
                "locations": [{
                    "physicalLocation": {
                        "artifactLocation": { "uri": finding.file, "uriBaseId": "%SRCROOT%" },
                        "region": {
                            "startLine": finding.line.max(1),
                            "startColumn": finding.column.max(1),
                        },
                    },
                }],
            })
        })
        .collect();
    let rules: Vec<Value> = rules.iter().map(|id| json!({ "id": id })).collect();
    json!({
        "$schema": "https://json.schemastore.org/sarif-2.1.0.json",
        "version": "2.1.0",
        "runs": [{
            "tool": { "driver": {
                "name": tool,
                "version": env!("CARGO_PKG_VERSION"),
                "rules": rules,
            } },
            "results": results,
        }],
    })
}

/// The workflow command that marks the place in a pull request.
/// <https://docs.github.com/en/actions/reference/workflow-commands-for-github-actions>
pub fn annotation(finding: &Finding) -> String {
    let kind = match finding.level {
        Level::Note => "notice",
        level => level.name(),
    };
    let property = |text: &str| escape(text).replace(':', "%3A").replace(',', "%2C");
    format!(
        "::{kind} file={},line={},col={},title={}::{}",
        property(&finding.file),
        finding.line,
        finding.column,
        property(&format!("{} {}", finding.check, finding.rule)),
        escape(&finding.message)
    )
}

fn escape(text: &str) -> String {
    text.replace('%', "%25")
        .replace('\r', "%0D")
        .replace('\n', "%0A")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_would_end_an_annotation_is_escaped() {
        let finding = Finding {
            check: "test".into(),
            rule: "x".into(),
            level: Level::Error,
            message: "100 %\n::error::forged".into(),
            file: "a,b:c.rs".into(),
            line: 3,
            column: 4,
        };
        assert_eq!(
            annotation(&finding),
            "::error file=a%2Cb%3Ac.rs,line=3,col=4,title=test x::100 %25%0A::error::forged"
        );
    }
}
