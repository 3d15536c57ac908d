//! What a run shows while it goes on, and what it remembers of each pass.

use std::collections::BTreeMap;
use std::path::Path;

use super::cache::Cache;
use super::facts;
use super::fingerprint::{Fingerprint, Situation};
use super::receipt::Outcome;
use super::scheduler::{End, Job, Watcher, Work};
use super::tree::Tree;
use crate::output::{Output, seconds};
use crate::setup::tools::Tools;

/// Shows each step as it ends, and puts its pass into the cache.
pub struct View<'a> {
    pub output: &'a Output,
    pub root: &'a Path,
    /// What steps are remembered with; `None` where nothing is.
    pub cache: Option<&'a Cache>,
    /// The state of the workspace when the fingerprints were taken.
    pub before: &'a Situation,
    pub tools: &'a Tools,
    pub arguments: &'a [String],
    /// Why each cached step needs no run, by name.
    pub reasons: &'a dyn Fn(&str) -> String,
    /// Passes that are not remembered, by name, and why.
    pub refused: BTreeMap<String, String>,
}

impl Watcher for View<'_> {
    fn started(&mut self, job: &Job) {
        if self.output.is_log() {
            self.output.step(format_args!("{} starts", job.step.name));
        }
        self.output
            .event("started", serde_json::json!({ "step": job.step.name }));
    }

    fn ended(&mut self, job: &Job, end: &End) {
        let step = &job.step;
        let ran = matches!(job.work, Work::Run(_)) && end.outcome != Outcome::NotRun;
        // Where nobody looks on, the log is all there will ever be to read.
        if ran && self.output.is_log() {
            self.output
                .log(format_args!("{}: {}", step.name, step.proves), &job.log);
        }
        let odd = match end.reason.as_str() {
            "" => String::new(),
            reason => format!(": {reason}"),
        };
        let took = seconds(end.took);
        match end.outcome {
            Outcome::Passed => self
                .output
                .good(format_args!("{} in {took}{odd}", step.name)),
            Outcome::Cached => self.output.detail(format_args!(
                "{} cached: {}",
                step.name,
                (self.reasons)(&step.name)
            )),
            Outcome::Failed => self
                .output
                .bad(format_args!("{} after {took}{odd}", step.name)),
            Outcome::NotRun => self.output.warn(format_args!("{} not run{odd}", step.name)),
        }
        if end.outcome == Outcome::Passed
            && let Err(error) = self.remember(job, end)
        {
            self.output.warn(format_args!(
                "the pass of {} is not remembered: {error:#}",
                step.name
            ));
            self.refused.insert(step.name.clone(), format!("{error:#}"));
        }
    }

    fn status(&mut self, lines: &[String]) {
        self.output.view(lines);
    }
}

impl View<'_> {
    /// Remembers a pass, unless an input was touched since the run began.
    fn remember(&self, job: &Job, end: &End) -> anyhow::Result<()> {
        let (Some(cache), Some(inputs)) = (self.cache, job.step.inputs()) else {
            return Ok(());
        };
        let fingerprint = Fingerprint::take(&job.step, inputs, self.arguments, self.before)?;
        if !end.reason.is_empty() {
            anyhow::bail!("{}", end.reason);
        }
        let facts = facts::gather(job.step.facts(), self.tools)?;
        if let Some((name, now)) = facts
            .iter()
            .find(|(name, now)| fingerprint.tools.get(*name) != Some(now))
        {
            anyhow::bail!("{name} is another one now: {now}");
        }
        let now = Tree::read(self.root)?;
        let files = now.select(inputs, &self.before.packages)?;
        if let Some(path) = now.touched_since(&self.before.tree, files.keys()) {
            anyhow::bail!("{path} was touched meanwhile");
        }
        if files.len() != fingerprint.files.len() {
            anyhow::bail!("files were removed meanwhile");
        }
        cache.remember(
            &job.step.name,
            &fingerprint,
            inputs,
            end.took.as_secs_f64(),
            self.root,
        )
    }
}
