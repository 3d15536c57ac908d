//! How a cluster is asked, and waited for.

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use xshell::{Cmd, Shell, cmd};

use super::build::Programs;
use super::places::{Init, Places};
use super::{PATIENCE, POLL};
use crate::output::Output;

/// kubectl, with a certain user's rights.
pub struct Kubectl<'a> {
    shell: &'a Shell,
    program: &'a Path,
    kubeconfig: PathBuf,
}

impl<'a> Kubectl<'a> {
    pub fn administrator(shell: &'a Shell, places: &Places, programs: &'a Programs) -> Self {
        Self {
            shell,
            program: &programs.kubernetes,
            kubeconfig: places.kubeconfig(),
        }
    }

    pub fn command(&self) -> Cmd<'_> {
        let (program, kubeconfig) = (self.program, &self.kubeconfig);
        cmd!(self.shell, "{program} kubectl --kubeconfig {kubeconfig}").quiet()
    }

    /// What it prints; `None` where it fails.
    pub fn read(&self, words: &[&str]) -> Option<String> {
        self.command().args(words).ignore_stderr().read().ok()
    }

    pub fn apply(&self, manifests: &str) -> Result<()> {
        self.command()
            .args(["apply", "--server-side", "--filename", "-"])
            .stdin(manifests)
            .ignore_stdout()
            .run()
            .context("applying what the cluster needs")
    }
}

/// A cluster on its way.
pub struct Starting<'a> {
    pub init: Init,
    pub kubectl: &'a Kubectl<'a>,
    pub deadline: Instant,
    pub output: &'a Output,
}

impl Starting<'_> {
    /// Asks by kubectl's `words` until it says what is `wanted`.
    pub fn wait_for(&self, what: &str, words: &[&str], wanted: &str) -> Result<()> {
        self.output.progress(format_args!("waiting for {what}"));
        let is_there = || {
            let said = self.kubectl.read(words);
            said.is_some_and(|said| said.contains(wanted))
        };
        while !is_there() {
            if !self.init.is_alive() {
                bail!("the cluster ended while it was starting");
            }
            if Instant::now() > self.deadline {
                bail!("{what}: not there within {} s", PATIENCE.as_secs());
            }
            std::thread::sleep(POLL);
        }
        Ok(())
    }
}
