//! One command: an environment that is known, a log of its own, and an end that leaves nothing.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rustix::process::{Pid, Signal, kill_process_group, test_kill_process_group};
use xshell::cmd;

use super::step::{Inputs, Step, quote};
use crate::cargo;

/// Variables that say where things are and how to reach them, not what a check should find. They
/// are passed on and are no part of a key.
const PASSED: &[&str] = &[
    "ALL_PROXY",
    "CARGO_HOME",
    "CARGO_TARGET_DIR",
    "GITHUB_ACTIONS",
    "GOPROXY",
    "GOSUMDB",
    "HOME",
    "HTTPS_PROXY",
    "HTTP_PROXY",
    "JAVA_HOME",
    "LOGNAME",
    "NO_PROXY",
    "PATH",
    "RUSTUP_HOME",
    "RUSTUP_TOOLCHAIN",
    "SHELL",
    "SSL_CERT_DIR",
    "SSL_CERT_FILE",
    "TMPDIR",
    "USER",
    "XTASK_ADVISORY_DB",
    "XTASK_CACHE_DIR",
    "all_proxy",
    "http_proxy",
    "https_proxy",
    "no_proxy",
];
const PASSED_PREFIXES: &[&str] = &[
    "CARGO_HTTP_",
    "CARGO_NET_",
    "CARGO_REGISTRIES_",
    "DOCKER_",
    "MAVEN_",
    "NPM_CONFIG_",
    "PIP_",
    "RUSTUP_DIST_",
    "TESTCONTAINERS_",
    "XDG_",
    "npm_config_",
];
/// Never passed on, whatever it begins with: a check needs no credentials.
const CREDENTIALS: &[&str] = &["AUTH", "CREDENTIAL", "PASSWORD", "SECRET", "TOKEN"];
/// Not a credential, but the name of the program that has it.
const CREDENTIAL_PROVIDER: &str = "CREDENTIAL_PROVIDER";
/// The variable that names a file for a step that passes although it could not do all it should:
/// what it writes there is shown, and such a pass is not remembered.
pub const WARNING_FILE: &str = "XTASK_STEP_WARNING";
/// What is the same for every step, here and in Actions.
const FIXED: &[(&str, &str)] = &[
    // A build that is done once leaves no incremental state behind.
    ("CARGO_INCREMENTAL", "0"),
    ("CARGO_TERM_COLOR", "never"),
    ("CI", "true"),
    ("LC_ALL", "C.UTF-8"),
    ("NO_COLOR", "1"),
    ("TZ", "UTC"),
];

/// A command, ready to be started.
#[derive(Debug, Clone)]
pub struct Invocation {
    pub program: PathBuf,
    pub arguments: Vec<String>,
    pub directory: PathBuf,
    /// The whole environment.
    pub environment: BTreeMap<OsString, OsString>,
}

/// What steps are started with.
pub struct Surroundings {
    pub root: PathBuf,
    /// This very program, under a name that no build replaces.
    pub program: PathBuf,
    /// Directories that stand before those of `PATH`.
    pub path: Vec<PathBuf>,
}

impl Invocation {
    pub fn of(step: &Step, argv: &[String], arguments: &[String], around: &Surroundings) -> Self {
        let (program, words) = match argv {
            [cargo, xtask, words @ ..] if cargo == "cargo" && xtask == "xtask" => {
                (around.program.clone(), words)
            }
            [program, words @ ..] => (program.into(), words),
            [] => (PathBuf::new(), &[][..]),
        };
        Self {
            program,
            arguments: words.iter().chain(arguments).cloned().collect(),
            directory: around.root.clone(),
            environment: environment(step, around),
        }
    }

    /// The command with its directory and its whole environment, for a shell.
    pub fn script(&self) -> String {
        let text = |value: &OsString| quote(&without_password(&value.to_string_lossy()));
        let mut lines = vec![
            format!("cd {} &&", quote(&self.directory.to_string_lossy())),
            "env -i \\".to_owned(),
        ];
        for (name, value) in &self.environment {
            lines.push(format!("  {}={} \\", name.to_string_lossy(), text(value)));
        }
        let words = std::iter::once(quote(&self.program.to_string_lossy()))
            .chain(self.arguments.iter().map(|word| quote(word)));
        lines.push(format!("  {}", words.collect::<Vec<_>>().join(" ")));
        lines.join("\n")
    }

    /// Lets the step say what it could not do, in a file.
    #[must_use]
    pub fn with_warning_file(mut self, file: &Path) -> Self {
        self.environment.insert(WARNING_FILE.into(), file.into());
        self
    }

    /// What it said it could not do.
    pub fn warning(&self) -> Option<String> {
        let file = self.environment.get(OsStr::new(WARNING_FILE))?;
        let text = std::fs::read_to_string(file).ok()?;
        Some(text.trim().to_owned()).filter(|text| !text.is_empty())
    }

    /// Starts it with its output in `log`; `ended` is called, on another thread, at its end.
    pub fn start(
        &self,
        log: &Path,
        ended: impl FnOnce(std::io::Result<Ended>) + Send + 'static,
    ) -> Result<Running> {
        let shell = cargo::shell()?;
        let (program, arguments) = (&self.program, &self.arguments);
        let command = cmd!(shell, "{program} {arguments...}")
            .env_clear()
            .envs(&self.environment);
        let output = File::create(log).with_context(|| format!("creating {}", log.display()))?;
        let mut command = Command::from(command);
        command
            .current_dir(&self.directory)
            .stdin(Stdio::null())
            .stdout(output.try_clone().context("sharing the log")?)
            .stderr(output)
            // A group of its own, so that all it starts can be stopped together.
            .process_group(0);
        let mut child = command
            .spawn()
            .with_context(|| format!("starting {}", self.program.display()))?;
        let group = Pid::from_child(&child);
        let running = Running { group };
        std::thread::spawn(move || {
            let status = child.wait();
            ended(status.map(|status| Ended {
                status,
                left_processes: !running.is_gone_soon(),
            }));
        });
        Ok(running)
    }
}

fn environment(step: &Step, around: &Surroundings) -> BTreeMap<OsString, OsString> {
    let declared = step.inputs().map(|inputs: &Inputs| &inputs.environment);
    let mut environment: BTreeMap<OsString, OsString> = std::env::vars_os()
        .filter(|(name, _)| {
            let name = name.to_string_lossy();
            let upper = name.to_uppercase();
            let credential = CREDENTIALS.iter().any(|word| upper.contains(word))
                && !upper.ends_with(CREDENTIAL_PROVIDER);
            let passed = PASSED.contains(&name.as_ref())
                || PASSED_PREFIXES
                    .iter()
                    .any(|prefix| name.starts_with(prefix));
            passed && !credential
                || declared.is_some_and(|declared| declared.iter().any(|d| *d == name))
        })
        .collect();
    let path = std::env::var_os("PATH").unwrap_or_default();
    let dirs = around
        .path
        .iter()
        .cloned()
        .chain(std::env::split_paths(&path));
    if let Ok(path) = std::env::join_paths(dirs) {
        environment.insert("PATH".into(), path);
    }
    for (name, value) in FIXED {
        environment.insert(name.into(), value.into());
    }
    for (name, value) in &step.variables {
        environment.insert(name.into(), value.into());
    }
    environment
}

/// How many processes of the group still run; `None` where the system does not tell.
fn members(group: i32) -> Option<usize> {
    let processes = std::fs::read_dir("/proc").ok()?;
    let runs = |entry: &std::fs::DirEntry| {
        // proc_pid_stat(5): after the name, in parentheses, come state, parent and group.
        let stat = std::fs::read_to_string(entry.path().join("stat")).ok()?;
        let mut fields = stat.rsplit_once(") ")?.1.split(' ');
        let state = fields.next()?;
        let its: i32 = fields.nth(1)?.parse().ok()?;
        Some(its == group && !["Z", "X"].contains(&state))
    };
    Some(
        processes
            .flatten()
            .filter(|entry| runs(entry) == Some(true))
            .count(),
    )
}

/// `scheme://user:password@host` with stars for the password.
fn without_password(text: &str) -> String {
    let masked = text.split_once("://").and_then(|(scheme, rest)| {
        let (user, host) = rest.split_once('@')?;
        let (name, _) = user.split_once(':')?;
        Some(format!("{scheme}://{name}:***@{host}"))
    });
    masked.unwrap_or_else(|| text.to_owned())
}

/// How a command ended.
#[derive(Debug, Clone, Copy)]
pub struct Ended {
    pub status: ExitStatus,
    /// Whether processes that it started are still there.
    pub left_processes: bool,
}

/// A command that was started, and all that it has started since.
#[derive(Debug, Clone, Copy)]
pub struct Running {
    group: Pid,
}

impl Running {
    /// The process group, which is the command's process id.
    pub fn group(self) -> i32 {
        self.group.as_raw_nonzero().get()
    }

    pub fn ask_to_end(self) {
        self.send(Signal::TERM);
    }

    pub fn kill(self) {
        self.send(Signal::KILL);
    }

    /// Whether a process of its group is still there.
    pub fn is_alive(self) -> bool {
        // The call counts what has ended and was not yet waited for by whoever inherited it.
        test_kill_process_group(self.group).is_ok() && members(self.group()) != Some(0)
    }

    /// Whether all of its group end within a moment, as those that were about to will.
    fn is_gone_soon(self) -> bool {
        let patience = Instant::now() + Duration::from_secs(1);
        while self.is_alive() {
            if Instant::now() > patience {
                return false;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        true
    }

    fn send(self, signal: Signal) {
        // A group that is gone has ended already.
        let _ = kill_process_group(self.group, signal);
    }
}
