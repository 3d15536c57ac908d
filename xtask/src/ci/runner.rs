//! Runs steps one after the other; each has a log of its own, and all of them run.

use std::fs::{self, File};
use std::path::Path;
use std::process::{Command, ExitStatus};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use xshell::cmd;

use super::receipt::{Outcome, Receipt, StepReceipt};
use super::steps::Step;
use crate::cargo;
use crate::output::{Output, seconds};

/// How often the progress line moves.
const TICK: Duration = Duration::from_millis(250);

pub fn run(steps: &[&Step], dir: &Path, output: &Output) -> Result<Receipt> {
    let logs = dir.join("logs");
    fs::create_dir_all(&logs).with_context(|| format!("creating {}", logs.display()))?;
    let mut receipt = Receipt::begin();
    for step in steps {
        let log = logs.join(step.name).with_extension("log");
        let done = run_one(step, &log, output)?;
        output.event("step", &done);
        receipt.steps.push(done);
    }
    receipt.end();
    Ok(receipt)
}

fn run_one(step: &Step, log: &Path, output: &Output) -> Result<StepReceipt> {
    let group = output.group(format_args!("{}: {}", step.name, step.proves));
    output.command(step.command_line());
    let started = Instant::now();
    let ended = spawn(step, log).and_then(|ended| wait(step, &ended, started, output));
    let seconds_taken = started.elapsed().as_secs_f64();
    let (outcome, reason) = match ended {
        Ok(status) if status.success() => (Outcome::Passed, String::new()),
        Ok(status) => (Outcome::Failed, status.to_string()),
        Err(error) => (Outcome::Failed, format!("{error:#}")),
    };
    // Where nobody looks on, the log is all there will ever be to read.
    if output.is_log() {
        let text = fs::read(log).with_context(|| format!("reading {}", log.display()))?;
        output.line(String::from_utf8_lossy(&text).trim_end());
    }
    drop(group);
    match outcome {
        Outcome::Passed => output.good(format_args!(
            "{} in {}",
            step.name,
            seconds(started.elapsed())
        )),
        Outcome::Failed => output.bad(format_args!("{}: {reason}", step.name)),
    }
    Ok(StepReceipt {
        name: step.name.to_owned(),
        command: step.command_line(),
        outcome,
        reason,
        seconds: seconds_taken,
        log: log.to_owned(),
    })
}

/// Starts the command with its output in `log`; its end arrives on the channel.
fn spawn(step: &Step, log: &Path) -> Result<mpsc::Receiver<std::io::Result<ExitStatus>>> {
    let shell = cargo::shell()?;
    let (program, arguments) = step.argv.split_first().context("the step has no command")?;
    let command = cargo::isolated(cmd!(shell, "{program} {arguments...}"))
        .envs(step.variables.iter().copied())
        .env("CARGO_INCREMENTAL", "0");
    let file = File::create(log).with_context(|| format!("creating {}", log.display()))?;
    let mut command = Command::from(command);
    command.stdin(std::process::Stdio::null());
    command
        .stdout(file.try_clone().context("sharing the log")?)
        .stderr(file);
    let mut child = command
        .spawn()
        .with_context(|| format!("starting {program}"))?;
    let (sender, ended) = mpsc::channel();
    std::thread::spawn(move || {
        // The receiver is gone only when the whole program ends.
        let _ = sender.send(child.wait());
    });
    Ok(ended)
}

fn wait(
    step: &Step,
    ended: &mpsc::Receiver<std::io::Result<ExitStatus>>,
    started: Instant,
    output: &Output,
) -> Result<ExitStatus> {
    loop {
        match ended.recv_timeout(TICK) {
            Ok(status) => return status.context("waiting for the command"),
            Err(mpsc::RecvTimeoutError::Timeout) => {
                output.progress(format_args!("{} {}", step.name, seconds(started.elapsed())));
            }
            Err(mpsc::RecvTimeoutError::Disconnected) => {
                anyhow::bail!("the thread that waits for the command is gone");
            }
        }
    }
}
