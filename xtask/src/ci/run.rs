//! A run of steps: what is cached, what is started, what is written down and shown of it.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde_json::json;

use super::cache::Pass;
use super::fingerprint::{Fingerprint, Situation};
use super::process::{Invocation, Surroundings};
use super::receipt::{Inputs, Receipt, StepReceipt};
use super::scheduler::{self, Job, Ran, Work};
use super::step::{self, Step};
use super::tree::Packages;
use super::{Plan, leftovers, problems, reason, reports, view};
use crate::cargo;
use crate::files;
use crate::findings::{self, Finding};
use crate::output::{Exit, Finished, Output, seconds};
use crate::setup;
use crate::setup::tools::Tools;

/// How many of a failed step's last lines stand at the end.
const LAST_LINES: usize = 40;
/// Runs whose logs are kept.
const KEPT_RUNS: usize = 10;

impl Plan<'_> {
    pub(super) fn run(&self, selected: Vec<Step>, packages: Packages) -> Result<Finished> {
        if selected.is_empty() {
            self.output.good("nothing to do: no step is concerned");
            return Ok(Finished::passed().with("steps", [(); 0]));
        }
        let tools = Tools::open()?;
        let before = self.situation(&selected, packages, &tools)?;
        let run_dir = self.dir.join("runs").join(run_name());
        let around = Surroundings {
            root: self.root.to_owned(),
            program: run_dir.join("xtask"),
            path: tools.path(),
        };
        let mut passes: BTreeMap<String, Pass> = BTreeMap::new();
        let mut jobs = Vec::new();
        for step in selected {
            let pass = self.pass(&step, &before)?;
            let log = run_dir.join(format!("{}.log", step.name));
            let work = if let Some(pass) = pass {
                passes.insert(step.name.clone(), pass);
                Work::Cached
            } else {
                let arguments = &self.args.arguments;
                let invocation = Invocation::of(&step, &step.argv, arguments, &around)
                    .with_warning_file(&log.with_extension("warning"));
                Work::Run(Box::new(invocation))
            };
            jobs.push(Job { step, work, log });
        }
        if self.args.dry_run {
            return Ok(self.show_plan(&jobs));
        }
        let to_run = |job: &&Job| matches!(job.work, Work::Run(_));
        let runs: Vec<&Step> = jobs.iter().filter(to_run).map(|job| &job.step).collect();
        setup::preflight(&runs, &tools)?;
        // Held until the run is over: nobody clears its logs away meanwhile.
        let _lock = self.make_run_dir(&run_dir)?;
        if !runs.is_empty() {
            link_this_program(&around.program)?;
            let killed = leftovers::sweep(self.dir);
            if killed > 0 {
                self.output.warn(format_args!(
                    "{killed} commands of a run that was killed were still running; they were stopped"
                ));
            }
        }
        let any_ran = !runs.is_empty();
        let reasons = |name: &str| passes.get(name).map_or_else(String::new, reason);
        let mut view = view::View {
            output: self.output,
            root: self.root,
            cache: (!self.args.no_cache && self.git_is_there(&before)).then_some(&self.cache),
            before: &before,
            tools: &tools,
            arguments: &self.args.arguments,
            reasons: &reasons,
            refused: BTreeMap::new(),
        };
        let settings = scheduler::Settings {
            cores: self.cores(),
            fail_fast: self.args.fail_fast,
            dir: self.dir,
        };
        let started_at = jiff::Timestamp::now();
        let ran = scheduler::run(&jobs, &settings, &mut view)?;
        // The name was for this run's steps alone.
        let _ = fs::remove_file(&around.program);
        let refused = view.refused;
        let receipt = self.receipt(started_at, &jobs, &ran, &passes, &before, &refused)?;
        self.finish(&receipt, &jobs, &ran, &run_dir, any_ran)
    }

    /// A directory for the logs of this run; those of the oldest runs go.
    pub(super) fn make_run_dir(&self, dir: &Path) -> Result<fs::File> {
        let lock = files::try_lock(&dir.join("lock"))?;
        let lock = lock.context("another process has taken the name of this run")?;
        let runs = self.dir.join("runs");
        let entries = fs::read_dir(&runs).with_context(|| format!("reading {}", runs.display()))?;
        let mut old: Vec<PathBuf> = entries
            .filter_map(|entry| Some(entry.ok()?.path()))
            .collect();
        old.sort();
        for dir in &old[..old.len().saturating_sub(KEPT_RUNS)] {
            // One that still goes on has its lock.
            if let Ok(Some(_lock)) = files::try_lock(&dir.join("lock")) {
                let _ = fs::remove_dir_all(dir);
            }
        }
        Ok(lock)
    }

    pub(super) fn show_plan(&self, jobs: &[Job]) -> Finished {
        for job in jobs {
            let why = match job.work {
                Work::Cached => "cached",
                Work::Run(_) => "runs",
            };
            self.output.line(format_args!(
                "{why:6}  {:12} $ {}",
                job.step.name,
                job.step.command_line()
            ));
            self.output
                .event("planned", json!({ "step": job.step, "would": why }));
        }
        Finished::passed().with("steps", jobs.len())
    }

    pub(super) fn receipt(
        &self,
        started_at: jiff::Timestamp,
        jobs: &[Job],
        ran: &Ran,
        passes: &BTreeMap<String, Pass>,
        before: &Situation,
        refused: &BTreeMap<String, String>,
    ) -> Result<Receipt> {
        let mut steps = Vec::new();
        for (job, end) in jobs.iter().zip(&ran.ends) {
            let step = &job.step;
            let fingerprint = match step.inputs() {
                Some(inputs) => Some(Fingerprint::take(
                    step,
                    inputs,
                    &self.args.arguments,
                    before,
                )?),
                None => None,
            };
            let pass = passes.get(&step.name);
            // A pass of something else than what stands there now proves nothing of it.
            let refused = refused.get(&step.name);
            let fingerprint = fingerprint.filter(|_| refused.is_none());
            let why = refused.unwrap_or(&end.reason);
            steps.push(StepReceipt {
                name: step.name.clone(),
                command: step.command_line(),
                outcome: end.outcome,
                reason: pass.map_or_else(|| why.clone(), reason),
                seconds: pass.map_or(end.took.as_secs_f64(), |pass| pass.seconds),
                started: end.started.as_secs_f64(),
                log: job.log.clone(),
                key: fingerprint.as_ref().map(Fingerprint::key),
                inputs: fingerprint.as_ref().map(Inputs::of),
            });
        }
        Ok(Receipt {
            started_at,
            ended_at: jiff::Timestamp::now(),
            revision: cargo::revision()?,
            interrupted: ran.interrupted,
            steps,
            files: before.tree.files().clone(),
        })
    }

    pub(super) fn finish(
        &self,
        receipt: &Receipt,
        jobs: &[Job],
        ran: &Ran,
        run_dir: &Path,
        any_ran: bool,
    ) -> Result<Finished> {
        let mut problems: Vec<Finding> = Vec::new();
        for step in receipt.failures() {
            let lines = files::last_lines(&step.log, 2000);
            problems.extend(problems::find(&step.name, &lines, self.root));
        }
        // What was found is shown whether or not it could be written down.
        let written = reports::write(receipt, &problems, self.dir)
            .and_then(|()| files::write_json(&run_dir.join("run.json"), receipt))
            .and_then(|()| self.standing.update(receipt));
        for step in &receipt.steps {
            self.output.event("step", brief(step));
        }
        for problem in &problems {
            self.output.annotate(&findings::annotation(problem));
        }
        if any_ran {
            table(receipt, self.output);
            setup::target::keep_small(self.output)?;
        }
        let took = receipt.ended_at.duration_since(receipt.started_at);
        let took = took.unsigned_abs();
        let path = scheduler::critical_path(jobs, &ran.ends);
        self.output.detail(format_args!(
            "{} in {} (longest chain {}); receipt: {}",
            receipt.tally(),
            seconds(took),
            seconds(path),
            self.dir.join("run.json").display()
        ));
        failures(receipt, &self.args.arguments, self.output);
        written?;
        let finished = if receipt.passed() {
            Finished::passed()
        } else if receipt.interrupted {
            self.output
                .ended("interrupted", "the receipt says what had passed");
            Finished::new(Exit::Unknown, "failed").with("interrupted", true)
        } else {
            Finished::new(Exit::No, "failed")
        };
        let steps: Vec<_> = receipt.steps.iter().map(brief).collect();
        Ok(finished
            .with("steps", steps)
            .with("seconds", took.as_secs_f64())
            .with("critical_path_seconds", path.as_secs_f64()))
    }
}

/// Gives this very program a name that no build replaces while steps start it.
pub(super) fn link_this_program(link: &Path) -> Result<()> {
    let program = std::env::current_exe().context("finding this program")?;
    fs::hard_link(&program, link)
        .or_else(|_| fs::copy(&program, link).map(|_| ()))
        // Where a build has replaced it already, Linux still has its content.
        .or_else(|_| fs::copy("/proc/self/exe", link).map(|_| ()))
        .with_context(|| format!("linking {} to {}", link.display(), program.display()))
}

/// Sorts by time.
pub(super) fn run_name() -> String {
    let now = jiff::Timestamp::now().strftime("%Y%m%dT%H%M%S%.3f");
    format!("{now}-{}", std::process::id())
}

fn brief(step: &StepReceipt) -> serde_json::Value {
    json!({
        "name": step.name, "outcome": step.outcome, "seconds": step.seconds,
        "reason": step.reason, "key": step.key, "log": step.log,
    })
}

fn table(receipt: &Receipt, output: &Output) {
    let rows: Vec<Vec<String>> = receipt
        .steps
        .iter()
        .map(|step| {
            vec![
                step.name.clone(),
                step.outcome.to_string(),
                format!("{:.1} s", step.seconds),
            ]
        })
        .collect();
    output.table(&["STEP", "OUTCOME", "TIME"], &rows);
}

/// Each failure with its last lines and the command to repeat it, where the eye ends.
fn failures(receipt: &Receipt, arguments: &[String], output: &Output) {
    for step in receipt.failures() {
        let mut repeat = format!("cargo xtask ci --only {}", step.name);
        if !arguments.is_empty() {
            let words = arguments.iter().map(|word| step::quote(word));
            repeat.push_str(&format!(" -- {}", words.collect::<Vec<_>>().join(" ")));
        }
        last_words(&step.name, &step.reason, &step.log, &repeat, output);
    }
}

pub(super) fn last_words(name: &str, reason: &str, log: &Path, repeat: &str, output: &Output) {
    output.bad(format_args!("{name}: {reason}"));
    output.quote(&files::last_lines(log, LAST_LINES));
    output.line(format_args!("    the whole log: {}", log.display()));
    output.line(format_args!("    repeat it:     {repeat}"));
}
