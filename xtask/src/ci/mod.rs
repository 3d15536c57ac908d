//! `cargo xtask ci`: the checks a change must pass. Plan, preflight, run, write down, show.

mod cache;
mod compare;
pub mod facts;
mod fingerprint;
mod leftovers;
mod problems;
pub mod process;
mod receipt;
mod reports;
mod scheduler;
pub mod selection;
mod standing;
pub mod step;
pub mod steps;
mod tree;
mod view;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde_json::json;

use crate::cargo;
use crate::cli::CiArgs;
use crate::files;
use crate::findings::{self, Finding};
use crate::output::{Exit, Finished, Output, seconds};
use crate::setup;
use crate::setup::tools::Tools;
use cache::{Cache, Pass};
use fingerprint::{Fingerprint, Situation};
use process::{Invocation, Surroundings};
use receipt::{Inputs, Receipt, StepReceipt};
use scheduler::{End, Job, Ran, Work};
use standing::Standing;
use step::Step;
use tree::{Packages, Tree};

/// How many of a failed step's last lines stand at the end.
const LAST_LINES: usize = 40;
/// Runs whose logs are kept.
const KEPT_RUNS: usize = 10;

pub fn run(args: &CiArgs, output: &Output) -> Result<Finished> {
    if let [first, others @ ..] = args.compare.as_slice() {
        return compare(first, others, output);
    }
    let root = cargo::root()?;
    let dir = cargo::target_dir()?.join("xtask").join("ci");
    let table = match &args.steps {
        Some(path) => step::read(path)?,
        None => steps::steps(),
    };
    step::verify(&table)?;
    let packages = match table
        .iter()
        .filter_map(Step::inputs)
        .any(|inputs| !inputs.packages.is_empty())
    {
        true => Packages::read(&root)?,
        false => Packages::default(),
    };
    let plan = Plan {
        args,
        output,
        root: &root,
        dir: &dir,
        cache: Cache::open(dir.join("cache")),
        standing: Standing::at(dir.join("outcomes.json")),
    };
    if let Some(name) = &args.why {
        return plan.why(selection::known(&table, name)?, packages);
    }
    if let Some(name) = &args.explain {
        return plan.explain(selection::known(&table, name)?);
    }
    let selected = selection::select(table, args, &plan.standing, &packages, output)?;
    if !args.arguments.is_empty() && selected.len() != 1 {
        bail!("arguments after `--` go to one step; name it with --only");
    }
    if args.list {
        return list(&selected, output);
    }
    if args.graph {
        output.line(graph(&selected));
        return Ok(Finished::passed().with("steps", selected.len()));
    }
    if args.setup {
        setup::install_for(&selected, output)?;
    }
    if args.fix {
        return plan.mend(&selected);
    }
    plan.run(selected, packages)
}

/// What all ways of looking at or running steps share.
struct Plan<'a> {
    args: &'a CiArgs,
    output: &'a Output,
    root: &'a Path,
    dir: &'a Path,
    cache: Cache,
    standing: Standing,
}

impl Plan<'_> {
    fn run(&self, selected: Vec<Step>, packages: Packages) -> Result<Finished> {
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

    /// Where there is no git, what a step reads is not known, and so nothing is remembered.
    fn git_is_there(&self, situation: &Situation) -> bool {
        !situation.tree.files().is_empty()
    }

    fn situation(&self, steps: &[Step], packages: Packages, tools: &Tools) -> Result<Situation> {
        let tree = Tree::read(self.root)?;
        if tree.files().is_empty() {
            self.output
                .warn("this is no git repository, so what changed cannot be told: every step runs");
        }
        let names = steps.iter().flat_map(Step::facts);
        Ok(Situation {
            tree,
            packages,
            facts: facts::gather(names, tools)?,
        })
    }

    /// The remembered pass of a step on what is there now.
    fn pass(&self, step: &Step, now: &Situation) -> Result<Option<Pass>> {
        let Some(inputs) = step.inputs() else {
            return Ok(None);
        };
        if self.args.no_cache || !self.git_is_there(now) {
            return Ok(None);
        }
        let fingerprint = Fingerprint::take(step, inputs, &self.args.arguments, now)?;
        Ok(self.cache.find(&step.name, &fingerprint, inputs, self.root))
    }

    fn cores(&self) -> usize {
        self.args.jobs.unwrap_or_else(|| {
            std::thread::available_parallelism().map_or(1, std::num::NonZero::get)
        })
    }

    /// A directory for the logs of this run; those of the oldest runs go.
    fn make_run_dir(&self, dir: &Path) -> Result<fs::File> {
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

    fn show_plan(&self, jobs: &[Job]) -> Finished {
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

    fn receipt(
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

    fn finish(
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

    /// Says what is different since the step last passed.
    fn why(&self, step: &Step, packages: Packages) -> Result<Finished> {
        let Some(inputs) = step.inputs() else {
            self.output.line(format_args!(
                "{step} changes something outside, so it always runs"
            ));
            return Ok(Finished::passed());
        };
        let tools = Tools::open()?;
        let now = self.situation(std::slice::from_ref(step), packages, &tools)?;
        let fingerprint = Fingerprint::take(step, inputs, &self.args.arguments, &now)?;
        let cached = self.cache.find(&step.name, &fingerprint, inputs, self.root);
        let lines = match (&cached, self.cache.last(&step.name, &fingerprint.argv)) {
            (Some(pass), _) => {
                self.output.line(format_args!("{step} {}", reason(pass)));
                Vec::new()
            }
            (None, None) => vec!["it has never passed here".to_owned()],
            (None, Some(last)) => {
                let mut lines = fingerprint.differences(&last.fingerprint);
                if lines.is_empty() {
                    lines.push(format!(
                        "what it wrote is not there any more, or changed: {}",
                        inputs.writes.join(", ")
                    ));
                }
                self.output.line(format_args!(
                    "{step} runs; since it passed at {}:",
                    last.passed_at.strftime("%F %T UTC")
                ));
                lines
            }
        };
        for line in &lines {
            self.output.line(format_args!("  {line}"));
        }
        Ok(Finished::passed()
            .with("step", &step.name)
            .with("cached", cached.is_some())
            .with("key", fingerprint.key())
            .with("changes", lines))
    }

    /// The command of a step with all there is around it, ready to be pasted.
    fn explain(&self, step: &Step) -> Result<Finished> {
        let around = Surroundings {
            root: self.root.to_owned(),
            program: std::env::current_exe().context("finding this program")?,
            path: Tools::open()?.path(),
        };
        let invocation = Invocation::of(step, &step.argv, &self.args.arguments, &around);
        self.output.line(format_args!("# {step}: {}", step.proves));
        self.output.line(invocation.script());
        Ok(Finished::passed()
            .with("step", step)
            .with("directory", &invocation.directory)
            .with("script", invocation.script()))
    }

    /// Lets the steps that can mend the tree, one after the other.
    fn mend(&self, steps: &[Step]) -> Result<Finished> {
        let tools = Tools::open()?;
        let run_dir = self.dir.join("runs").join(run_name());
        let around = Surroundings {
            root: self.root.to_owned(),
            program: run_dir.join("xtask"),
            path: tools.path(),
        };
        let before = Tree::read(self.root)?;
        let mut jobs: Vec<Job> = Vec::new();
        // The quickest stands first in the table, and mends last: what others change may need it.
        for step in steps.iter().rev().filter(|step| !step.mend.is_empty()) {
            let mut step = step.clone();
            step.argv = step.mend.clone();
            step.needs = Vec::new();
            // Two that mend one file would undo each other's work.
            step.locks = vec!["the tree".to_owned()];
            let invocation = Invocation::of(&step, &step.argv, &[], &around);
            jobs.push(Job {
                log: run_dir.join(format!("{}.log", step.name)),
                work: Work::Run(Box::new(invocation)),
                step,
            });
        }
        let steps: Vec<&Step> = jobs.iter().map(|job| &job.step).collect();
        setup::preflight(&steps, &tools)?;
        let _lock = self.make_run_dir(&run_dir)?;
        link_this_program(&around.program)?;
        let situation = Situation {
            tree: Tree::default(),
            packages: Packages::default(),
            facts: BTreeMap::new(),
        };
        let mut view = view::View {
            output: self.output,
            root: self.root,
            cache: None,
            before: &situation,
            tools: &tools,
            arguments: &[],
            reasons: &|_| String::new(),
            refused: BTreeMap::new(),
        };
        let settings = scheduler::Settings {
            cores: self.cores(),
            fail_fast: false,
            dir: self.dir,
        };
        let ran = scheduler::run(&jobs, &settings, &mut view)?;
        let _ = fs::remove_file(&around.program);
        let changed = fingerprint::files_changed(Tree::read(self.root)?.files(), before.files());
        for (job, end) in jobs.iter().zip(&ran.ends) {
            if !end.outcome.is_pass() {
                let repeat = format!("cargo xtask ci --fix --only {}", job.step.name);
                last_words(&job.step.name, &end.reason, &job.log, &repeat, self.output);
            }
        }
        for line in &changed {
            self.output.line(format_args!("  {line}"));
        }
        self.output
            .detail(format_args!("{} files were mended", changed.len()));
        let passed = ran.ends.iter().all(|end: &End| end.outcome.is_pass());
        let finished = if passed {
            Finished::passed()
        } else if ran.interrupted {
            Finished::new(Exit::Unknown, "failed").with("interrupted", true)
        } else {
            Finished::new(Exit::No, "failed")
        };
        Ok(finished.with("changed", changed))
    }
}

fn compare(first: &Path, others: &[PathBuf], output: &Output) -> Result<Finished> {
    let others = others.iter().map(|path| Receipt::read(path));
    let second = compare::merged(others.collect::<Result<_>>()?);
    let second = second.context("--compare takes two receipts or more")?;
    let differences = compare::differences(&Receipt::read(first)?, &second);
    for line in &differences {
        output.line(format_args!("  {line}"));
    }
    let finished = if differences.is_empty() {
        output.good("both runs proved the same things of the same inputs");
        Finished::passed()
    } else {
        output.bad(format_args!(
            "the runs differ in {} points",
            differences.len()
        ));
        Finished::new(Exit::No, "failed")
    };
    Ok(finished.with("differences", differences))
}

fn list(steps: &[Step], output: &Output) -> Result<Finished> {
    let rows: Vec<Vec<String>> = steps
        .iter()
        .map(|step| {
            let fast = if step.fast { "fast" } else { "" };
            vec![step.name.clone(), fast.to_owned(), step.proves.clone()]
        })
        .collect();
    output.table(&["STEP", "", "PROVES"], &rows);
    for step in steps {
        output.event("step", step);
    }
    Ok(Finished::passed().with("steps", steps.len()))
}

/// The steps and what they need, in Mermaid's language. <https://mermaid.js.org/syntax/flowchart.html>
fn graph(steps: &[Step]) -> String {
    let mut lines = vec!["flowchart LR".to_owned()];
    for step in steps {
        lines.push(format!("    {step}[\"{step}\"]"));
    }
    for step in steps {
        for need in step
            .needs
            .iter()
            .filter(|n| steps.iter().any(|s| s.name == **n))
        {
            lines.push(format!("    {need} --> {step}"));
        }
    }
    lines.join("\n")
}

/// Gives this very program a name that no build replaces while steps start it.
fn link_this_program(link: &Path) -> Result<()> {
    let program = std::env::current_exe().context("finding this program")?;
    fs::hard_link(&program, link)
        .or_else(|_| fs::copy(&program, link).map(|_| ()))
        // Where a build has replaced it already, Linux still has its content.
        .or_else(|_| fs::copy("/proc/self/exe", link).map(|_| ()))
        .with_context(|| format!("linking {} to {}", link.display(), program.display()))
}

/// Sorts by time.
fn run_name() -> String {
    let now = jiff::Timestamp::now().strftime("%Y%m%dT%H%M%S%.3f");
    format!("{now}-{}", std::process::id())
}

fn reason(pass: &Pass) -> String {
    format!(
        "passed at {} on the same {} files, tools and command",
        pass.passed_at.strftime("%F %T UTC"),
        pass.fingerprint.files.len()
    )
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

fn last_words(name: &str, reason: &str, log: &Path, repeat: &str, output: &Output) {
    output.bad(format_args!("{name}: {reason}"));
    output.quote(&files::last_lines(log, LAST_LINES));
    output.line(format_args!("    the whole log: {}", log.display()));
    output.line(format_args!("    repeat it:     {repeat}"));
}
