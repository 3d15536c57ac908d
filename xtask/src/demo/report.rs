//! What the demo showed: a table, a page, and whether it is what was promised.

use std::fmt::Write;
use std::sync::Arc;

use anyhow::{Result, bail};
use serde_json::{Value, json};

use super::load::Measured;
use super::steps::{Ended, PRODUCTION};
use crate::config::Pipeline;
use crate::output::Output;
use crate::platform;
use crate::rollout::commands::block_on;
use crate::rollout::engine::Outcome;
use crate::rollout::journal::Journal;
use crate::rollout::report::{self, Summary, escape, outcome_name};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Expected {
    Healthy,
    RolledBack,
}

/// A rollout of the demo, with its journal.
pub struct Rollout {
    journal: Journal,
    summary: Summary,
    expected: Expected,
}

impl Rollout {
    /// Reads the journal of the rollout that just ended.
    pub fn read(pipeline: &Arc<Pipeline>, ended: Ended, expected: Expected) -> Result<Self> {
        let journal = block_on(async {
            let desk = platform::desk(pipeline, PRODUCTION).await?;
            desk.newest().await
        })?;
        let Some(journal) =
            journal.filter(|j| ended.finished["rollout"] == j.plan().rollout.as_str())
        else {
            bail!("a rollout that was to happen did not: {}", ended.finished);
        };
        Ok(Self {
            summary: Summary::of(&journal),
            journal,
            expected,
        })
    }

    pub fn json(&self) -> Value {
        json!(self.summary)
    }

    fn row(&self) -> Vec<String> {
        let summary = &self.summary;
        let number =
            |seconds: Option<f64>| seconds.map_or_else(|| "-".to_owned(), |s| format!("{s:.1}"));
        vec![
            summary.name.clone(),
            outcome_name(summary.outcome).to_owned(),
            format!("{:.1}", summary.seconds),
            summary.requests.to_string(),
            summary.failed.stable.to_string(),
            summary.failed.candidate.to_string(),
            format!("{} %", summary.weight),
            number(summary.detection_seconds),
            number(summary.restored_seconds),
            summary
                .evidence
                .map_or_else(|| "-".to_owned(), |e| format!("{e:.2}")),
        ]
    }
}

const HEADING: [&str; 10] = [
    "RELEASE",
    "OUTCOME",
    "SECONDS",
    "REQUESTS",
    "FAILED: STABLE",
    "CANDIDATE",
    "REACHED",
    "SEEN AFTER",
    "RESTORED IN",
    "EVIDENCE",
];

pub fn table(rollouts: &[Rollout], measured: &Measured, rate: u32, output: &Output) {
    let rows: Vec<Vec<String>> = rollouts.iter().map(Rollout::row).collect();
    output.table(&HEADING, &rows);
    output.line(load_line(measured, rate));
}

fn load_line(measured: &Measured, rate: u32) -> String {
    let millis = |quantile| measured.latency.value_at_quantile(quantile) as f64 / 1000.0;
    let failed: u64 = measured.failed.values().sum();
    format!(
        "load: {rate} requests/s asked, {:.0} sent; {} in all, {failed} failed; latency p50 {:.1} ms, \
         p95 {:.1} ms, p99 {:.1} ms, highest {:.1} ms",
        measured.requests as f64 / measured.seconds,
        measured.requests,
        millis(0.5),
        millis(0.95),
        millis(0.99),
        measured.latency.max() as f64 / 1000.0,
    )
}

pub fn load_json(measured: &Measured) -> Value {
    json!({
        "requests": measured.requests,
        "seconds": measured.seconds,
        "failed": measured.failed,
        "p50_ms": measured.latency.value_at_quantile(0.5) as f64 / 1000.0,
        "p99_ms": measured.latency.value_at_quantile(0.99) as f64 / 1000.0,
    })
}

/// Where what happened is not what the demo promises.
pub fn problems(rollouts: &[Rollout], measured: &Measured, restored_within: f64) -> Vec<String> {
    let mut problems = Vec::new();
    let mut bad_releases = Vec::new();
    for Rollout {
        summary, expected, ..
    } in rollouts
    {
        let name = &summary.name;
        let wanted = match expected {
            Expected::Healthy => Outcome::Healthy,
            Expected::RolledBack => Outcome::RolledBack,
        };
        if summary.outcome != Some(wanted) {
            problems.push(format!("{name} ended as {}", outcome_name(summary.outcome)));
        }
        if summary.failed.stable > 0 {
            problems.push(format!(
                "{name}: stable failed {} requests",
                summary.failed.stable
            ));
        }
        if *expected == Expected::Healthy {
            if summary.failed.candidate > 0 {
                problems.push(format!(
                    "{name} failed {} requests",
                    summary.failed.candidate
                ));
            }
            continue;
        }
        bad_releases.push(summary.release.chars().take(12).collect::<String>());
        if summary.weight > 10 {
            problems.push(format!(
                "{name} got up to {} % of the traffic",
                summary.weight
            ));
        }
        if summary
            .restored_seconds
            .is_none_or(|seconds| seconds > restored_within)
        {
            problems.push(format!(
                "{name}: stable did not have all traffic within {restored_within} s"
            ));
        }
    }
    for (release, failed) in &measured.failed {
        if !bad_releases.contains(release) {
            problems.push(format!("{failed} requests failed at release {release}"));
        }
    }
    problems
}

pub fn html(rollouts: &[Rollout], measured: &Measured, rate: u32) -> String {
    let mut heading = format!(
        "<p>{}</p>\n<p>The releases are one executable with different versions and configurations. \
         Failures are counted by the proxy, per release.</p>\n<table><tr>",
        escape(&load_line(measured, rate))
    );
    for cell in HEADING {
        let _ = write!(heading, "<th>{}</th>", cell.to_lowercase());
    }
    heading.push_str("</tr>\n");
    for rollout in rollouts {
        heading.push_str("<tr>");
        for cell in rollout.row() {
            let _ = write!(heading, "<td>{}</td>", escape(&cell));
        }
        heading.push_str("</tr>\n");
    }
    heading.push_str("</table>");
    let journals: Vec<&Journal> = rollouts.iter().map(|rollout| &rollout.journal).collect();
    report::html("Rollouts of the demo", &heading, &journals)
}
