//! Calls of cargo from within cargo.

use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use cargo_metadata::Message;
use xshell::{Cmd, Shell, cmd};

use crate::image::Ahead;
use crate::output::{Finished, Output};

/// The cargo command under which jobs of Actions share one build of this program.
pub const SHARED: &str = "ready-xtask";

/// Set where the whole workspace has been built with all features: in the steps of `ci`.
pub const WHOLE_BUILD: &str = "XTASK_WHOLE_BUILD";

/// This program's arguments. Cargo puts the command's name first where it calls the shared one.
pub fn arguments() -> Vec<std::ffi::OsString> {
    let mut arguments: Vec<_> = std::env::args_os().collect();
    if arguments.get(1).is_some_and(|first| first == SHARED) {
        arguments.remove(1);
    }
    arguments
}

/// A shell in the workspace's root.
pub fn shell() -> Result<Shell> {
    let shell = Shell::new().context("finding the current directory")?;
    shell.change_dir(root()?);
    Ok(shell)
}

/// `command` without the variables that the outer `cargo run` set for this program: build
/// scripts that watch them would run again each time.
pub fn isolated(command: Cmd<'_>) -> Cmd<'_> {
    std::env::vars_os()
        .map(|(name, _)| name)
        .filter(|name| {
            let name = name.to_string_lossy();
            name.starts_with("CARGO_PKG_")
                || name.starts_with("CARGO_MANIFEST_")
                || ["CARGO", "CARGO_BIN_NAME", "CARGO_CRATE_NAME"].contains(&name.as_ref())
        })
        .fold(command, |command, name| command.env_remove(name))
}

/// The workspace's root: the closest directory upwards with a `Cargo.lock`.
pub fn root() -> Result<PathBuf> {
    let here = std::env::current_dir().context("finding the current directory")?;
    match here
        .ancestors()
        .find(|dir| dir.join("Cargo.lock").is_file())
    {
        Some(root) => Ok(root.to_owned()),
        None => bail!(
            "{} is not inside a Cargo workspace; run this in the repository",
            here.display()
        ),
    }
}

/// Where cargo puts what it builds.
pub fn target_dir() -> Result<PathBuf> {
    match std::env::var_os("CARGO_TARGET_DIR") {
        Some(dir) => std::path::absolute(dir).context("resolving CARGO_TARGET_DIR"),
        None => Ok(root()?.join("target")),
    }
}

/// Cargo's own directory, with its settings and what it has downloaded.
pub fn home() -> Result<PathBuf> {
    match std::env::var_os("CARGO_HOME") {
        Some(home) => Ok(PathBuf::from(home)),
        None => Ok(std::env::home_dir()
            .context("there is no home directory; set CARGO_HOME")?
            .join(".cargo")),
    }
}

/// The commit that is checked out, with `-dirty` where the tree differs from it; `unknown` without git.
pub fn revision() -> Result<String> {
    let shell = shell()?;
    let Some(commit) = git(&shell, &["rev-parse", "HEAD"]) else {
        return Ok("unknown".to_owned());
    };
    let dirty = git(&shell, &["status", "--porcelain"]).is_some_and(|changes| !changes.is_empty());
    Ok(if dirty {
        format!("{commit}-dirty")
    } else {
        commit
    })
}

/// What git prints; `None` where it fails or is not there.
pub fn git(shell: &Shell, arguments: &[&str]) -> Option<String> {
    cmd!(shell, "git {arguments...}")
        .quiet()
        .ignore_stderr()
        .read()
        .ok()
}

/// Builds this program with `feature` and becomes it, with the same arguments. `beside` goes on meanwhile and
/// afterwards, and has the processors where it can use them: it is what takes longer.
pub fn run_again_with(feature: &str, beside: Option<Ahead>, output: &Output) -> Result<Finished> {
    let given = arguments();
    let arguments: Vec<String> = given[1..]
        .iter()
        .map(|word| word.to_string_lossy().into_owned())
        .collect();
    let selection = selection(feature);
    output.command(format_args!(
        "cargo build {} && xtask {}",
        selection.join(" "),
        arguments.join(" ")
    ));
    let shell = shell()?;
    let words = &selection;
    let (first, cargo): (_, &[_]) = match beside {
        Some(_) => ("nice", &["-n", "19", "cargo"]),
        None => ("cargo", &[]),
    };
    let build = cmd!(
        shell,
        "{first} {cargo...} build {words...} --message-format json-render-diagnostics"
    );
    let built = isolated(build)
        .quiet()
        .read()
        .with_context(|| format!("building xtask with feature {feature}"))?;
    let program = program(&built).context("cargo named no program")?;
    let mut command = std::process::Command::new(program);
    command.args(&given[1..]);
    Err(replace(command)).context("starting xtask again")
}

/// What cargo builds for a command that needs `feature`. Packages that are selected together share
/// the features of their dependencies, so where the whole workspace has been built anyway, taking
/// xtask from that build compiles nothing.
fn selection(feature: &str) -> Vec<&str> {
    match std::env::var_os(WHOLE_BUILD) {
        // With tests, which bring features of their own into what is built.
        Some(_) => vec!["--workspace", "--all-features", "--bins", "--tests"],
        None => vec!["--package", "xtask", "--features", feature],
    }
}

/// The program that cargo says it has built.
fn program(messages: &str) -> Option<PathBuf> {
    let messages = Message::parse_stream(messages.as_bytes()).filter_map(Result::ok);
    let mut programs = messages.filter_map(|message| match message {
        // The tests of the program have its name, too.
        Message::CompilerArtifact(artifact)
            if artifact.target.name == "xtask"
                && artifact.target.is_bin()
                && !artifact.profile.test =>
        {
            artifact.executable.map(PathBuf::from)
        }
        _ => None,
    });
    programs.next()
}

/// Becomes `command`; returns only when that fails.
fn replace(mut command: std::process::Command) -> std::io::Error {
    use std::os::unix::process::CommandExt;
    command.exec()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Taken for the program, the tests would run with the command as a filter, and pass.
    #[test]
    fn the_program_is_not_its_tests() {
        let artifact = |kind: &str, test: bool, path: &str| {
            let target = format!(
                r#"{{"kind":["{kind}"],"crate_types":["bin"],"name":"xtask","src_path":"/s","edition":"2024","doc":true,"doctest":false,"test":true}}"#
            );
            let profile = format!(
                r#"{{"opt_level":"0","debuginfo":0,"debug_assertions":true,"overflow_checks":true,"test":{test}}}"#
            );
            format!(
                r#"{{"reason":"compiler-artifact","package_id":"x","manifest_path":"/m","target":{target},"profile":{profile},"features":[],"filenames":["{path}"],"executable":"{path}","fresh":true}}"#
            )
        };
        let messages = [
            artifact("custom-build", false, "/build-script"),
            artifact("bin", true, "/tests"),
            artifact("bin", false, "/program"),
        ];
        assert_eq!(program(&messages.join("\n")), Some("/program".into()));
        assert_eq!(program(&messages[..2].join("\n")), None);
    }
}
