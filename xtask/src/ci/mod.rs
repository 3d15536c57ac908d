//! `cargo xtask ci`: the checks a change must pass. Plan, preflight, run, write down, show.

mod cache;
mod compare;
pub mod facts;
mod fingerprint;
mod leftovers;
mod mend;
mod problems;
pub mod process;
mod receipt;
mod reports;
mod run;
mod scheduler;
pub mod selection;
mod standing;
pub mod step;
pub mod steps;
mod tree;
mod view;

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::cargo;
use crate::cli::CiArgs;
use crate::output::{Exit, Finished, Output};
use crate::setup;
use crate::setup::tools::Tools;
use cache::{Cache, Pass};
use fingerprint::{Fingerprint, Situation};
use process::{Invocation, Surroundings};
use receipt::Receipt;
use standing::Standing;
use step::Step;
use tree::{Packages, Tree};

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

fn reason(pass: &Pass) -> String {
    format!(
        "passed at {} on the same {} files, tools and command",
        pass.passed_at.strftime("%F %T UTC"),
        pass.fingerprint.files.len()
    )
}
