//! A receipt in the forms that other programs read: JUnit, Markdown, SARIF, Chrome's trace.

use std::io::Write;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use quick_junit::{NonSuccessKind, Report, TestCase, TestCaseStatus, TestSuite};
use serde_json::{Value, json};

use super::receipt::{Outcome, Receipt, StepReceipt};
use crate::files;
use crate::findings::{self, Finding};

/// How many of a failed step's last lines a report has.
const LAST_LINES: usize = 200;

/// Writes `run.json`, `junit.xml`, `summary.md`, `run.sarif` and `trace.json` into `dir`, and the
/// summary where Actions wants one.
pub fn write(receipt: &Receipt, problems: &[Finding], dir: &Path) -> Result<()> {
    let json = |value: &Value| serde_json::to_vec(value).context("writing JSON");
    let junit = junit(receipt).to_string().context("writing JUnit")?;
    let summary = markdown(receipt);
    let sarif = findings::sarif("cargo xtask ci", problems);
    for (name, content) in [
        ("junit.xml", junit.into_bytes()),
        ("summary.md", summary.clone().into_bytes()),
        ("run.sarif", json(&sarif)?),
        ("trace.json", json(&trace(receipt))?),
    ] {
        files::replace(&dir.join(name), &content)?;
    }
    // Last, so that what lies beside a receipt belongs to it.
    files::write_json(&dir.join("run.json"), receipt)?;
    if let Some(path) = std::env::var_os("GITHUB_STEP_SUMMARY") {
        std::fs::OpenOptions::new()
            .append(true)
            .create(true)
            .open(&path)
            .and_then(|mut file| file.write_all(summary.as_bytes()))
            .with_context(|| format!("writing the summary to {}", path.display()))?;
    }
    Ok(())
}

fn junit(receipt: &Receipt) -> Report {
    let mut suite = TestSuite::new("cargo xtask ci");
    for step in &receipt.steps {
        let mut status = match step.outcome {
            Outcome::Passed | Outcome::Cached => TestCaseStatus::success(),
            Outcome::Failed => TestCaseStatus::non_success(NonSuccessKind::Failure),
            Outcome::NotRun => TestCaseStatus::skipped(),
        };
        if !step.reason.is_empty() && step.outcome != Outcome::Passed {
            status.set_message(step.reason.clone());
        }
        if step.outcome == Outcome::Failed {
            status.set_description(files::last_lines(&step.log, LAST_LINES).join("\n"));
        }
        let mut case = TestCase::new(step.name.clone(), status);
        case.set_classname("ci").set_time(time(step));
        suite.add_test_case(case);
    }
    let mut report = Report::new("ci");
    report.add_test_suite(suite);
    report
}

/// What was not run now took no time now.
fn time(step: &StepReceipt) -> Duration {
    match step.outcome {
        Outcome::Passed | Outcome::Failed => Duration::from_secs_f64(step.seconds.max(0.0)),
        Outcome::Cached | Outcome::NotRun => Duration::ZERO,
    }
}

fn markdown(receipt: &Receipt) -> String {
    let mut text = format!(
        "### `cargo xtask ci`: {}\n\n| step | outcome | seconds |\n|---|---|---:|\n",
        receipt.tally()
    );
    for step in &receipt.steps {
        let reason = match step.reason.as_str() {
            "" => String::new(),
            reason => format!(": {}", reason.replace('|', "\\|").replace('\n', " ")),
        };
        text.push_str(&format!(
            "| {} | {}{reason} | {:.1} |\n",
            step.name,
            step.outcome,
            time(step).as_secs_f64()
        ));
    }
    for step in receipt.failures() {
        let lines = files::last_lines(&step.log, 30).join("\n");
        // A fence longer than any in the log.
        text.push_str(&format!(
            "\n**{}** failed ({}); repeat it: `cargo xtask ci --only {}`\n\n``````text\n{lines}\n``````\n",
            step.name, step.reason, step.name
        ));
    }
    text
}

/// The Trace Event Format of Chrome and Perfetto: complete events, times in microseconds.
/// <https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU>
fn trace(receipt: &Receipt) -> Value {
    let micros = |seconds: f64| (seconds * 1e6).round();
    let mut lanes: Vec<f64> = Vec::new();
    let mut ran: Vec<&StepReceipt> = receipt
        .steps
        .iter()
        .filter(|step| matches!(step.outcome, Outcome::Passed | Outcome::Failed))
        .collect();
    ran.sort_by(|a, b| a.started.total_cmp(&b.started));
    let events: Vec<Value> = ran
        .into_iter()
        .map(|step| {
            // Steps that ran side by side get a lane each.
            let lane = lanes
                .iter()
                .position(|end| *end <= step.started)
                .unwrap_or_else(|| {
                    lanes.push(0.0);
                    lanes.len() - 1
                });
            lanes[lane] = step.started + step.seconds;
            json!({
                "name": step.name, "cat": "step", "ph": "X", "pid": 1, "tid": lane + 1,
                "ts": micros(step.started), "dur": micros(step.seconds),
                "args": { "outcome": step.outcome, "command": step.command },
            })
        })
        .collect();
    json!({ "traceEvents": events, "displayTimeUnit": "ms" })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_that_overlap_have_lanes_of_their_own() {
        let step = |name: &str, started: f64, seconds: f64| StepReceipt {
            name: name.to_owned(),
            command: String::new(),
            outcome: Outcome::Passed,
            reason: String::new(),
            seconds,
            started,
            log: std::path::PathBuf::new(),
            key: None,
            inputs: None,
        };
        let now = jiff::Timestamp::UNIX_EPOCH;
        let receipt = Receipt {
            started_at: now,
            ended_at: now,
            revision: String::new(),
            interrupted: false,
            steps: vec![
                step("a", 0.0, 2.0),
                step("b", 1.0, 2.0),
                step("c", 2.0, 1.0),
            ],
            files: std::collections::BTreeMap::new(),
        };
        let trace = trace(&receipt);
        let lanes = trace["traceEvents"].as_array().unwrap().iter();
        let lanes: Vec<_> = lanes.map(|event| event["tid"].as_u64().unwrap()).collect();
        assert_eq!(lanes, [1, 2, 1]);
    }
}
