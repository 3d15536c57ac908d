//! Packages of the operating system: what there is, and how to get more.

use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use xshell::{Shell, cmd};

use crate::cargo;
use crate::output::Output;

/// A program that the system's package manager has.
#[derive(Debug, Clone, Copy)]
pub struct Package {
    /// The program to look for.
    pub program: &'static str,
    pub debian: &'static [&'static str],
    pub brew: &'static [&'static str],
}

pub const GIT: Package = Package {
    program: "git",
    debian: &["git", "ca-certificates"],
    brew: &["git"],
};
pub const COMPILER: Package = Package {
    program: "cc",
    debian: &["gcc", "libc6-dev"],
    brew: &["llvm"],
};
pub const PIP: Package = Package {
    program: "pip3",
    debian: &["python3-pip"],
    brew: &["python"],
};

/// How packages come onto this machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Manager {
    Apt { sudo: bool },
    Brew,
}

/// The first program of that name in `PATH`, or where the system keeps what only root calls.
pub fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    let root_only = ["/usr/local/sbin", "/usr/sbin", "/sbin"].map(PathBuf::from);
    std::env::split_paths(&path)
        .chain(root_only)
        .map(|dir| dir.join(program))
        .find(|path| is_executable(path))
}

fn is_executable(path: &std::path::Path) -> bool {
    use std::os::unix::fs::PermissionsExt;
    std::fs::metadata(path)
        .is_ok_and(|metadata| metadata.is_file() && metadata.permissions().mode() & 0o111 != 0)
}

/// Whether `cargo xtask` is root, which apt and container engines ask for.
pub fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// Whether root can be had without a password.
pub fn has_sudo() -> bool {
    let ask = |shell: Shell| cmd!(shell, "sudo -n true").quiet().ignore_stderr().run();
    cargo::shell().is_ok_and(|shell| ask(shell).is_ok())
}

/// The command that installs the package here, for people.
pub fn advice(package: Package) -> String {
    match manager() {
        Some(Manager::Brew) => format!("brew install {}", package.brew.join(" ")),
        _ => format!("apt-get install {}", package.debian.join(" ")),
    }
}

/// Installs the package, unless its program is there.
pub fn install(package: Package, output: &Output) -> Result<()> {
    if find(package.program).is_some() {
        return Ok(());
    }
    install_anyway(package, output)
}

/// Installs the package, whose program is not where others' are.
pub fn install_anyway(package: Package, output: &Output) -> Result<()> {
    let shell = cargo::shell()?;
    match manager() {
        Some(Manager::Apt { sudo }) => apt(&shell, sudo, package.debian, output),
        Some(Manager::Brew) => {
            let names = package.brew;
            let install = cmd!(shell, "brew install {names...}");
            output.command(&install);
            install.quiet().run().context("installing with brew")
        }
        None => bail!(
            "{} is missing, and this machine has neither apt-get (as root, or with sudo without a \
             password) nor brew; install it by hand (Debian calls it {})",
            package.program,
            package.debian.join(" ")
        ),
    }
}

/// Reads the lists of packages anew.
pub fn refresh(output: &Output) -> Result<()> {
    let shell = cargo::shell()?;
    let sudo = matches!(manager(), Some(Manager::Apt { sudo: true }));
    apt_get(&shell, sudo, &["update"], output).context("reading the lists of packages")
}

fn apt(shell: &Shell, sudo: bool, names: &[&str], output: &Output) -> Result<()> {
    let mut install = vec!["install", "--yes", "--no-install-recommends"];
    install.extend(names);
    // The lists of a fresh machine are empty, and those of an old one name what is gone.
    if apt_get(shell, sudo, &install, output).is_err() {
        refresh(output)?;
        apt_get(shell, sudo, &install, output)
            .with_context(|| format!("installing {}", names.join(" ")))?;
    }
    Ok(())
}

fn apt_get(shell: &Shell, sudo: bool, words: &[&str], output: &Output) -> Result<()> {
    let sudo: &[&str] = if sudo { &["sudo", "-n"] } else { &[] };
    let words: Vec<&str> = sudo
        .iter()
        .chain(&["env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "-q"])
        // A fresh machine may be at its updates.
        .chain(&["-o", "DPkg::Lock::Timeout=300"])
        .chain(words)
        .copied()
        .collect();
    let (program, words) = (words[0], words[1..].to_vec());
    let command = cmd!(shell, "{program} {words...}");
    output.command(&command);
    command.quiet().ignore_stdout().run()?;
    Ok(())
}

fn manager() -> Option<Manager> {
    if find("apt-get").is_some() {
        if is_root() {
            return Some(Manager::Apt { sudo: false });
        }
        return has_sudo().then_some(Manager::Apt { sudo: true });
    }
    find("brew").map(|_| Manager::Brew)
}
