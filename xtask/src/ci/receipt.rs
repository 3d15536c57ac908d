//! What a run proved: `run.json` for programs, JUnit for test reporters, a summary for Actions.

use std::fmt;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use quick_junit::{NonSuccessKind, Report, TestCase, TestCaseStatus, TestSuite};
use serde::Serialize;

use crate::files;

#[derive(Debug, Serialize)]
pub struct Receipt {
    pub started_at: jiff::Timestamp,
    pub ended_at: Option<jiff::Timestamp>,
    pub steps: Vec<StepReceipt>,
}

#[derive(Debug, Serialize)]
pub struct StepReceipt {
    pub name: String,
    pub command: String,
    pub outcome: Outcome,
    /// Why it failed.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub reason: String,
    pub seconds: f64,
    pub log: PathBuf,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    Passed,
    Failed,
}

impl Receipt {
    pub fn begin() -> Self {
        Self {
            started_at: jiff::Timestamp::now(),
            ended_at: None,
            steps: Vec::new(),
        }
    }

    pub fn end(&mut self) {
        self.ended_at = Some(jiff::Timestamp::now());
    }

    pub fn passed(&self) -> bool {
        self.failures().next().is_none()
    }

    pub fn failures(&self) -> impl Iterator<Item = &StepReceipt> {
        self.steps
            .iter()
            .filter(|step| step.outcome == Outcome::Failed)
    }

    /// Writes `run.json` and `junit.xml` into `dir`, and the summary where Actions wants one.
    pub fn write(&self, dir: &Path) -> Result<()> {
        files::write_json(&dir.join("run.json"), self)?;
        let junit = self.junit().to_string().context("writing JUnit")?;
        files::write_atomically(&dir.join("junit.xml"), junit.as_bytes())?;
        if let Some(path) = std::env::var_os("GITHUB_STEP_SUMMARY") {
            std::fs::OpenOptions::new()
                .append(true)
                .create(true)
                .open(&path)
                .and_then(|mut file| file.write_all(self.markdown().as_bytes()))
                .with_context(|| format!("writing the summary to {}", path.display()))?;
        }
        Ok(())
    }

    fn junit(&self) -> Report {
        let mut suite = TestSuite::new("cargo xtask ci");
        for step in &self.steps {
            let status = match step.outcome {
                Outcome::Passed => TestCaseStatus::success(),
                Outcome::Failed => {
                    let mut status = TestCaseStatus::non_success(NonSuccessKind::Failure);
                    status.set_message(step.reason.clone());
                    status.set_description(files::last_lines(&step.log, 200).join("\n"));
                    status
                }
            };
            let mut case = TestCase::new(step.name.clone(), status);
            case.set_classname("ci")
                .set_time(Duration::from_secs_f64(step.seconds));
            suite.add_test_case(case);
        }
        let mut report = Report::new("ci");
        report.add_test_suite(suite);
        report
    }

    fn markdown(&self) -> String {
        let mut text = String::from("| step | outcome | seconds |\n|---|---|---:|\n");
        for step in &self.steps {
            text.push_str(&format!(
                "| {} | {} | {:.1} |\n",
                step.name, step.outcome, step.seconds
            ));
        }
        text
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Passed => "passed",
            Self::Failed => "failed",
        })
    }
}
