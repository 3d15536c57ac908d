//! The service's executable: statically linked, and the same bytes from any directory.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, bail};
use cargo_metadata::MetadataCommand;
use xshell::{Cmd, Shell, cmd};

use crate::cargo;
use crate::config::Service;
use crate::output::Output;

/// Where the code comes from.
pub struct Source {
    pub version: semver::Version,
    /// The git commit, with `-dirty` where the tree differs from it; `unknown` without git.
    pub revision: String,
    /// Seconds since the Unix epoch: `SOURCE_DATE_EPOCH`, else the commit's date, else 0.
    /// <https://reproducible-builds.org/specs/source-date-epoch/>
    pub date: i64,
    /// Where cargo puts what it builds.
    target_dir: PathBuf,
}

impl Source {
    pub fn describe(package: &str) -> Result<Self> {
        let metadata = MetadataCommand::new()
            .no_deps()
            .current_dir(cargo::root()?)
            .exec()
            .context("asking cargo for the workspace's packages")?;
        let Some(found) = metadata
            .packages
            .iter()
            .find(|p| p.name.as_str() == package)
        else {
            let known: Vec<&str> = metadata.packages.iter().map(|p| p.name.as_str()).collect();
            bail!(
                "service.package = {package:?}: the workspace has only {}",
                known.join(", ")
            );
        };
        let shell = cargo::shell()?;
        let date = match std::env::var("SOURCE_DATE_EPOCH") {
            Ok(text) => text.parse().with_context(|| {
                format!("SOURCE_DATE_EPOCH = {text:?} is not a number of seconds")
            })?,
            Err(_) => cargo::git(&shell, &["log", "-1", "--format=%ct"])
                .and_then(|text| text.parse().ok())
                .unwrap_or(0),
        };
        Ok(Self {
            version: found.version.clone(),
            revision: cargo::revision()?,
            date,
            target_dir: metadata.target_directory.clone().into(),
        })
    }
}

/// Builds the service by one of cargo's profiles and returns its executable.
pub fn binary(
    service: &Service,
    source: &Source,
    profile: &str,
    output: &Output,
) -> Result<PathBuf> {
    let shell = cargo::shell()?;
    let triple = host_triple()?;
    let build = command(&shell, service, source, profile, &triple)?;
    output.command(&build);
    let binary = &service.binary;
    build.quiet().run().with_context(|| {
        format!("building {binary}; a C compiler is needed (Debian: apt-get install gcc libc6-dev)")
    })?;
    let dir = source.target_dir.join(triple).join(folder(profile));
    Ok(dir.join(binary))
}

/// A build of the service that goes on beside other work; unless it is left alone it ends with this.
pub struct Ahead(Child);

impl Ahead {
    /// What [`binary`] will find done, or go on with.
    pub fn begin(service: &Service, profile: &str, output: &Output) -> Result<Self> {
        let source = Source::describe(&service.package)?;
        let shell = cargo::shell()?;
        let build = command(&shell, service, &source, profile, &host_triple()?)?;
        output.command(&build);
        let mut build = Command::from(build);
        // What a program of ours prints is its own.
        build.stdin(Stdio::null()).stdout(Stdio::null());
        Ok(Self(build.spawn().context("starting cargo")?))
    }
}

impl Drop for Ahead {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Cargo's call, with all that makes the same bytes of the same source.
fn command<'a>(
    shell: &'a Shell,
    service: &Service,
    source: &Source,
    profile: &str,
    triple: &str,
) -> Result<Cmd<'a>> {
    let (package, binary) = (&service.package, &service.binary);
    let target_dir = &source.target_dir;
    // An explicit target keeps these flags away from build scripts and macros.
    shell.set_var(
        "CARGO_ENCODED_RUSTFLAGS",
        flags(triple, target_dir)?.join("\x1f"),
    );
    shell.set_var("CARGO_INCREMENTAL", "0");
    // C compilers write it where a source asks for its __DATE__. Always the same one: cargo compiles C
    // anew for another, or keeps what it has, as each build script sees fit.
    shell.set_var("SOURCE_DATE_EPOCH", "0");
    let prefix_maps: Vec<String> = prefix_maps(target_dir)?
        .iter()
        .map(|(from, to)| format!("-ffile-prefix-map={from}={to}"))
        .collect();
    shell.set_var("CFLAGS", prefix_maps.join(" "));
    let build = cmd!(
        shell,
        "cargo build --locked --profile {profile} --package {package} --bin {binary} --target {triple}"
    );
    Ok(cargo::isolated(build))
}

/// Where cargo puts what it builds by a profile.
/// <https://doc.rust-lang.org/cargo/reference/build-cache.html>
fn folder(profile: &str) -> &str {
    match profile {
        "dev" | "test" => "debug",
        "bench" => "release",
        own => own,
    }
}

fn flags(triple: &str, target_dir: &Path) -> Result<Vec<String>> {
    let mut flags: Vec<String> = prefix_maps(target_dir)?
        .iter()
        .map(|(from, to)| format!("--remap-path-prefix={from}={to}"))
        .collect();
    // macOS has no static libc; there the sandbox runs the natively linked executable.
    if triple.contains("linux") {
        flags.push("-Ctarget-feature=+crt-static".to_owned());
    }
    Ok(flags)
}

/// Directories of this machine and what stands for them in the executable.
fn prefix_maps(target_dir: &Path) -> Result<Vec<(String, &'static str)>> {
    let text = |path: PathBuf| path.to_string_lossy().into_owned();
    let mut maps = vec![
        (text(target_dir.to_owned()), "/target"),
        (text(cargo::root()?), "/source"),
    ];
    let home = std::env::var_os("CARGO_HOME")
        .map(PathBuf::from)
        .or_else(|| std::env::home_dir().map(|home| home.join(".cargo")));
    maps.extend(home.map(|home| (text(home), "/cargo")));
    // rustc applies the last map that fits, so the most particular one goes last.
    maps.sort_by_key(|(from, _)| from.len());
    Ok(maps)
}

fn host_triple() -> Result<String> {
    let shell = cargo::shell()?;
    let version = cmd!(shell, "rustc -vV")
        .quiet()
        .read()
        .context("asking rustc for its target")?;
    let triple = version.lines().find_map(|line| line.strip_prefix("host: "));
    triple.map(str::to_owned).context("rustc -vV names no host")
}
