//! `cargo xtask ci`: the checks a change must pass, run in order and written down.

mod receipt;
mod runner;
mod steps;

use anyhow::{Result, bail};

use crate::cargo;
use crate::cli::CiArgs;
use crate::config::nearest;
use crate::files;
use crate::output::{Exit, Finished, Output};
use crate::setup;
use receipt::Receipt;
use steps::{STEPS, Step};

/// How many of a failed step's last lines stand at the end.
const LAST_LINES: usize = 40;

pub fn run(args: &CiArgs, output: &Output) -> Result<Finished> {
    let steps = select(&args.only)?;
    if args.list {
        let rows: Vec<Vec<String>> = steps
            .iter()
            .map(|step| vec![step.name.to_owned(), step.proves.to_owned()])
            .collect();
        output.table(&["STEP", "PROVES"], &rows);
        for step in &steps {
            output.event("step", step);
        }
        return Ok(Finished::passed().with("steps", steps.len()));
    }
    if args.dry_run {
        for step in &steps {
            output.line(format_args!("{:10} $ {}", step.name, step.command_line()));
            output.event("step", step);
        }
        return Ok(Finished::passed().with("steps", steps.len()));
    }
    if args.setup {
        setup::install_missing(output)?;
    }
    preflight(&steps)?;

    let dir = cargo::target_dir()?.join("xtask").join("ci");
    let receipt = runner::run(&steps, &dir, output)?;
    receipt.write(&dir)?;
    report(&receipt, output);
    output.detail(format_args!("receipt: {}", dir.join("run.json").display()));
    let finished = if receipt.passed() {
        Finished::passed()
    } else {
        Finished::new(Exit::No, "failed")
    };
    Ok(finished.with("steps", &receipt.steps))
}

fn select(only: &[String]) -> Result<Vec<&'static Step>> {
    let known = || STEPS.iter().map(|step| step.name);
    for name in only {
        if !known().any(|known| known == name) {
            let hint = nearest(name, known()).map_or_else(String::new, |nearest| {
                format!("; did you mean {nearest:?}?")
            });
            let all: Vec<&str> = known().collect();
            bail!(
                "there is no step {name:?}; there is {}{hint}",
                all.join(", ")
            );
        }
    }
    Ok(STEPS
        .iter()
        .filter(|step| only.is_empty() || only.iter().any(|n| n == step.name))
        .collect())
}

/// Every tool that the steps need and the machine lacks, in one message.
fn preflight(steps: &[&Step]) -> Result<()> {
    let missing: Vec<String> = setup::missing_tools()?
        .into_iter()
        .filter(|(tool, _)| steps.iter().any(|step| step.tool == Some(tool.as_str())))
        .map(|(tool, install)| format!("{tool} is missing or too old: {install}"))
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    bail!(
        "{}\nor let `cargo xtask ci --setup` install what is missing",
        missing.join("\n")
    )
}

/// The table of all steps, then each failure with its last lines and the command to repeat it.
fn report(receipt: &Receipt, output: &Output) {
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
    for step in receipt.failures() {
        output.bad(format_args!("{}: {}", step.name, step.reason));
        for line in files::last_lines(&step.log, LAST_LINES) {
            output.line(format_args!("    {line}"));
        }
        output.line(format_args!("    the whole log: {}", step.log.display()));
        output.line(format_args!(
            "    repeat it:     cargo xtask ci --only {}",
            step.name
        ));
    }
}
