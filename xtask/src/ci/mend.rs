//! `ci --fix`: the steps that can mend the tree do.

use std::collections::BTreeMap;
use std::fs;

use anyhow::Result;

use super::fingerprint::{Situation, files_changed};
use super::process::{Invocation, Surroundings};
use super::run::{last_words, link_this_program, run_name};
use super::scheduler::{self, End, Job, Work};
use super::step::Step;
use super::tree::{Packages, Tree};
use super::{Plan, view};
use crate::output::{Exit, Finished};
use crate::setup;
use crate::setup::tools::Tools;

impl Plan<'_> {
    /// Lets the steps that can mend the tree, one after the other.
    pub(super) fn mend(&self, steps: &[Step]) -> Result<Finished> {
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
        let changed = files_changed(Tree::read(self.root)?.files(), before.files());
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
