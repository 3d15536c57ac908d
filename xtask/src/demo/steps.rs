//! The demo's steps: this program again, each time as a process of its own.

use std::io::{BufRead, BufReader, Lines};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::interrupt;
use crate::output::Output;

pub const PRODUCTION: &str = "production";

pub struct Steps<'a> {
    program: PathBuf,
    settings: PathBuf,
    /// What `image` is told besides.
    image: Vec<String>,
    /// The process of the step that goes on.
    current: Arc<Mutex<Option<Child>>>,
    output: &'a Output,
}

/// The last line of a command, for programs.
#[derive(Debug)]
pub struct Ended {
    pub finished: Value,
}

impl Ended {
    pub fn outcome(&self) -> &str {
        self.finished["outcome"].as_str().unwrap_or_default()
    }
}

impl<'a> Steps<'a> {
    pub fn new(settings: PathBuf, image: Vec<String>, output: &'a Output) -> Result<Self> {
        let program = std::env::current_exe().context("finding this program")?;
        Ok(Self {
            program,
            settings,
            image,
            current: Arc::default(),
            output,
        })
    }

    /// The same steps by other settings.
    pub fn by(&self, settings: PathBuf) -> Self {
        Self {
            program: self.program.clone(),
            settings,
            image: self.image.clone(),
            current: Arc::clone(&self.current),
            output: self.output,
        }
    }

    /// Whoever is interrupted ends the step that goes on, and then what goes on by itself, by that command.
    pub fn end_on_interrupt(&self, stop: Option<Command>) -> Result<()> {
        let current = Arc::clone(&self.current);
        interrupt::end_by(move || {
            if let Some(child) = &mut *current.lock().unwrap_or_else(PoisonError::into_inner) {
                // One that has ended needs no more.
                let _ = child.kill();
            }
            if let Some(stop) = stop {
                interrupt::put_away(stop);
            }
        })
    }

    /// Makes a release and returns its id.
    pub fn release(&self, version: &str, config: &Path) -> Result<String> {
        let config = config.to_string_lossy();
        let mut words = vec!["image", "--version", version, "--config", &config];
        words.extend(self.image.iter().map(String::as_str));
        let ended = self.expect(&words, "passed")?;
        let id = ended.finished["release"]
            .as_str()
            .context("`image` names no release")?;
        Ok(id.to_owned())
    }

    /// Runs a command that must end like this.
    pub fn expect(&self, arguments: &[&str], outcome: &str) -> Result<Ended> {
        let ended = self.run(arguments)?;
        if ended.outcome() != outcome {
            bail!(
                "`cargo xtask {}` ended as {:?}, not as {outcome:?}: {}",
                arguments.join(" "),
                ended.outcome(),
                ended.finished
            );
        }
        Ok(ended)
    }

    /// Runs a command to its end.
    pub fn run(&self, arguments: &[&str]) -> Result<Ended> {
        self.output
            .command(format_args!("cargo xtask {}", arguments.join(" ")));
        let mut last = Value::Null;
        for line in self.start(arguments)? {
            last = self.relay(&line.context("reading the command's output")?)?;
        }
        let status = self.current()?.wait().context("waiting for the command")?;
        if last["event"] != "finished" {
            bail!("`cargo xtask {}` broke off ({status})", arguments.join(" "));
        }
        Ok(Ended { finished: last })
    }

    /// Runs a command and says nothing of it.
    pub fn quiet(&self, arguments: &[&str]) -> Result<()> {
        let output = self.command(arguments).output();
        let output = output.context("running a command")?;
        if output.status.success() {
            return Ok(());
        }
        bail!(
            "`cargo xtask {}` failed ({}): {}",
            arguments.join(" "),
            output.status,
            String::from_utf8_lossy(&output.stderr).trim()
        )
    }

    /// Starts a rollout and kills its command in its second stage, after an action was announced
    /// and before anybody knows whether it was done.
    pub fn kill_in_the_middle(&self, arguments: &[&str]) -> Result<()> {
        self.output
            .command(format_args!("cargo xtask {}", arguments.join(" ")));
        let mut second_stage = false;
        for line in self.start(arguments)? {
            let event = self.relay(&line.context("reading the command's output")?)?;
            second_stage |= event["event"] == "state" && event["stage"].as_u64() >= Some(1);
            if second_stage && event["event"] == "action" {
                let mut child = self.current()?;
                child.kill().context("killing the command")?;
                child.wait().context("waiting for the command")?;
                return Ok(());
            }
        }
        bail!("the rollout ended before its command could be killed")
    }

    /// Starts a step, and reads what it says.
    fn start(&self, arguments: &[&str]) -> Result<Lines<BufReader<ChildStdout>>> {
        let mut child = self
            .command(arguments)
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("starting {}", self.program.display()))?;
        let stdout = child.stdout.take().context("the command has no output")?;
        *self.current.lock().unwrap_or_else(PoisonError::into_inner) = Some(child);
        Ok(BufReader::new(stdout).lines())
    }

    /// The step that was started, to be ended.
    fn current(&self) -> Result<Child> {
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        current.take().context("no step goes on")
    }

    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(&self.program);
        command
            .args(["--message-format", "json", "--pipeline"])
            .arg(&self.settings);
        command.args(arguments).stdin(Stdio::null());
        command
    }

    /// Passes a command's event on; what it says at its end is not the end of the demo.
    fn relay(&self, line: &str) -> Result<Value> {
        let event: Value =
            serde_json::from_str(line).with_context(|| format!("reading {line:?}"))?;
        match event["event"].as_str() {
            Some("finished") | None => {}
            Some(name) => self.output.event(name, &event),
        }
        Ok(event)
    }
}
