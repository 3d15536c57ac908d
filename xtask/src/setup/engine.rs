//! The container engine: whether one answers, and how an installed one is started.

use std::fs::{self, File};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use xshell::cmd;

use super::system::{self, Package};
use crate::cargo;
use crate::files;
use crate::output::Output;

const ENGINE: Package = Package {
    program: "dockerd",
    debian: &["docker.io"],
    brew: &["colima"],
};
/// Its own package from Debian 13 on; before, the engine's brings it.
const CLIENT: Package = Package {
    program: "docker",
    debian: &["docker-cli"],
    brew: &["docker"],
};

const SOCKET: &str = "/var/run/docker.sock";
const PID_FILE: &str = "/var/run/docker.pid";
const PATIENCE: Duration = Duration::from_secs(30);

/// The version of the engine that answers, where one does.
pub fn answering() -> Option<String> {
    let shell = cargo::shell().ok()?;
    let format = "{{.Server.Version}}";
    let version = cmd!(shell, "docker version --format {format}")
        .quiet()
        .ignore_stderr()
        .read()
        .ok()?;
    (!version.trim().is_empty()).then(|| version.trim().to_owned())
}

/// What a person does where no engine answers.
pub fn advice() -> String {
    match std::env::var("DOCKER_HOST") {
        Ok(host) => format!("DOCKER_HOST = {host} does not answer; start that engine or unset it"),
        Err(_) if cfg!(target_os = "macos") => "start Docker Desktop or `colima start`".to_owned(),
        Err(_) => "cargo xtask setup".to_owned(),
    }
}

/// Installs an engine where there is none and starts it where it does not run. Never a second one:
/// two in one network namespace take each other's networks away.
pub fn ensure(output: &Output) -> Result<()> {
    if let Some(version) = answering() {
        output.detail(format_args!("a container engine answers: Docker {version}"));
        return Ok(());
    }
    if cfg!(target_os = "macos") {
        system::install(CLIENT, output)?;
        system::install(
            Package {
                program: "colima",
                ..ENGINE
            },
            output,
        )?;
    }
    if std::env::var_os("DOCKER_HOST").is_some() || cfg!(target_os = "macos") {
        bail!("no container engine answers: {}", advice());
    }
    // Whatever runs already is not joined by a second one, however it was installed.
    if running().is_none() {
        system::install(ENGINE, output)?;
    }
    system::install(CLIENT, output)?;
    if let Some(version) = answering() {
        // Its package started it, or only the client was missing.
        output.detail(format_args!("a container engine answers: Docker {version}"));
        return Ok(());
    }
    if let Some(pid) = running() {
        bail!(
            "a container engine runs (process {pid}) but does not answer this user on {SOCKET}; \
             for the right to use it: `sudo usermod -aG docker $USER`, then log in again; \
             where it listens elsewhere, DOCKER_HOST says so"
        );
    }
    if Path::new("/run/systemd/system").is_dir() {
        return by_systemd(output);
    }
    if !system::is_root() {
        bail!("only root can start a container engine here: run `sudo dockerd` once");
    }
    by_hand(output)
}

fn by_systemd(output: &Output) -> Result<()> {
    let shell = cargo::shell()?;
    let sudo: &[&str] = if system::is_root() {
        &[]
    } else {
        &["sudo", "-n"]
    };
    let words: Vec<&str> = sudo
        .iter()
        .chain(&["systemctl", "start", "docker"])
        .copied()
        .collect();
    let (program, words) = (words[0], words[1..].to_vec());
    let start = cmd!(shell, "{program} {words...}");
    output.command(&start);
    start.quiet().run().context("starting Docker")?;
    wait(None)
}

fn by_hand(output: &Output) -> Result<()> {
    let log = super::cache_dir()?.join("dockerd.log");
    fs::create_dir_all(super::cache_dir()?).context("making a place for the engine's log")?;
    let file = File::create(&log).with_context(|| format!("creating {}", log.display()))?;
    let shell = cargo::shell()?;
    let start = cmd!(shell, "dockerd --host unix://{SOCKET} --pidfile {PID_FILE}");
    output.command(&start);
    // It stays when this command ends, for the next one.
    files::log_into(Command::from(start).process_group(0), file)?
        .spawn()
        .context("starting dockerd")?;
    wait(Some(&log))?;
    output.detail("a container engine was started and stays");
    Ok(())
}

fn wait(log: Option<&Path>) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    while answering().is_none() {
        if Instant::now() > deadline {
            let lines = log.map_or_else(Vec::new, |log| files::last_lines(log, 20));
            bail!(
                "the container engine did not answer within {} s\n{}",
                PATIENCE.as_secs(),
                lines.join("\n")
            );
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    Ok(())
}

/// The process id of an engine on this machine.
fn running() -> Option<u32> {
    let processes = fs::read_dir("/proc").ok()?.filter_map(Result::ok);
    let mut engines = processes.filter_map(|entry| {
        let pid: u32 = entry.file_name().to_str()?.parse().ok()?;
        let name = fs::read_to_string(entry.path().join("comm")).ok()?;
        (name.trim() == "dockerd").then_some(pid)
    });
    engines.next()
}
