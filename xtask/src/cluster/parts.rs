//! The processes that a cluster is made of.

use std::fs::File;
use std::path::Path;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::process::WaitOptions;

use super::places::Places;
use crate::files;
use crate::output::Finished;

/// How long a part may take until another part can be started.
const PATIENCE: Duration = Duration::from_secs(120);
const POLL: Duration = Duration::from_millis(50);

/// Those that were started so far; without one of them the cluster is none.
pub struct Parts {
    pub places: Places,
    running: Vec<Part>,
}

struct Part {
    name: &'static str,
    child: Child,
}

impl Parts {
    pub fn of(places: Places) -> Self {
        Self {
            places,
            running: Vec::new(),
        }
    }

    /// Starts a part, with a log of its own.
    pub fn start(&mut self, name: &'static str, command: &mut Command) -> Result<()> {
        let log = self.places.log(name);
        let log = File::create(&log).with_context(|| format!("creating {}", log.display()))?;
        let child = files::log_into(command.current_dir("/"), log)?
            .spawn()
            .with_context(|| format!("starting {name}"))?;
        self.running.push(Part { name, child });
        Ok(())
    }

    /// `--NAME=FILE` for files of the cluster's keys and certificates.
    pub fn pki(&self, command: &mut Command, files: &[(&str, &str)]) {
        for (name, file) in files {
            let path = self.places.pki().join(file);
            command.arg(format!("--{name}={}", path.display()));
        }
    }

    /// Takes the exit codes of whatever has this process for a parent, until a part ends.
    pub fn watch(&self) -> Result<Finished> {
        loop {
            let Ok(Some((pid, status))) = rustix::process::wait(WaitOptions::empty()) else {
                bail!("there is no process left");
            };
            let pid = u32::try_from(pid.as_raw_nonzero().get()).unwrap_or(0);
            if let Some(part) = self.running.iter().find(|part| part.child.id() == pid) {
                bail!("{} ended ({status:?}), and with it the cluster", part.name);
            }
        }
    }

    /// Waits until something is there, which it will never be once a part has ended.
    pub fn wait_for(&mut self, what: &str, mut there: impl FnMut() -> bool) -> Result<()> {
        let mut ended = None;
        wait_for(what, || {
            let ending = self.running.iter_mut().find_map(|part| {
                let status = part.child.try_wait().ok().flatten()?;
                Some(format!("{} ended ({status})", part.name))
            });
            ended = ending;
            ended.is_some() || there()
        })?;
        match ended {
            Some(ended) => bail!("{ended}, before {what} was there"),
            None => Ok(()),
        }
    }
}

/// `program PART`, for the one that is all of Kubernetes.
pub fn kubernetes(program: &Path, part: &str) -> Command {
    let mut command = Command::new(program);
    command.arg(part);
    command
}

pub fn wait_for(what: &str, mut there: impl FnMut() -> bool) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    while !there() {
        if Instant::now() > deadline {
            bail!("{what}: not there within {} s", PATIENCE.as_secs());
        }
        std::thread::sleep(POLL);
    }
    Ok(())
}
