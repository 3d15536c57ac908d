//! What a machine lacks for the steps of `ci`, and how it is put there.

pub mod engine;
pub mod images;
pub mod system;
pub mod target;
pub mod tools;

use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use serde::Serialize;
use xshell::cmd;

use crate::cargo;
use crate::ci::facts::{ADVISORIES, HISTORY, RUST, TODAY, XTASK};
use crate::ci::step::Step;
use crate::ci::{selection, steps};
use crate::cli::SetupArgs;
use crate::cluster;
use crate::files;
use crate::output::{Exit, Finished, Output};
use system::{COMPILER, GIT, Package};
use tools::Tools;

/// The name under which a step asks for a container engine and the servers' images.
pub const CONTAINERS: &str = "containers";

/// The name under which a step asks for a Kubernetes cluster.
pub const CLUSTER: &str = "cluster";

/// The name under which a step asks for what only tests on that cluster need.
pub const CLUSTER_TESTS: &str = "cluster-tests";

/// Something that steps need, and whether it is there.
#[derive(Debug, Serialize)]
struct Requirement {
    name: String,
    needed: String,
    found: Option<String>,
    /// The command that puts it there.
    mend: String,
}

pub fn run(args: &SetupArgs, output: &Output) -> Result<Finished> {
    if args.share {
        return share(output);
    }
    let table = steps::steps();
    for name in &args.only {
        selection::known(&table, name)?;
    }
    let selected: Vec<Step> = table
        .into_iter()
        .filter(|step| args.only.is_empty() || args.only.contains(&step.name))
        .collect();
    if args.check {
        return check(&selected, output);
    }
    install_for(&selected, output)?;
    output.good("nothing is missing");
    Ok(Finished::passed())
}

/// Puts this very program beside cargo, under a name that cargo takes for a command of its own.
fn share(output: &Output) -> Result<Finished> {
    let home = cargo::home()?;
    let place = home.join("bin").join(format!("cargo-{}", cargo::SHARED));
    let program = std::env::current_exe().context("finding this program")?;
    if program == place {
        output.good(format_args!("{} is shared already", place.display()));
        return Ok(Finished::passed().with("program", place));
    }
    let beside = place.with_extension("new");
    std::fs::create_dir_all(home.join("bin")).context("making a place for the program")?;
    std::fs::copy(&program, &beside)
        .and_then(|_| std::fs::rename(&beside, &place))
        .with_context(|| format!("copying {} to {}", program.display(), place.display()))?;
    output.good(format_args!("shared as {}", place.display()));
    Ok(Finished::passed().with("program", place))
}

/// Where tools, logs and downloads are kept: outside the repository, so that no clean-up of it
/// takes them away. `XTASK_CACHE_DIR`, else `cargo-xtask` in the user's cache.
pub fn cache_dir() -> Result<PathBuf> {
    if let Some(dir) = std::env::var_os("XTASK_CACHE_DIR") {
        return std::path::absolute(dir).context("resolving XTASK_CACHE_DIR");
    }
    let base = match std::env::var_os("XDG_CACHE_HOME") {
        Some(dir) => PathBuf::from(dir),
        None => std::env::home_dir()
            .context("there is no home directory; set XTASK_CACHE_DIR")?
            .join(".cache"),
    };
    Ok(base.join("cargo-xtask"))
}

/// Installs and starts what `steps` need and this machine lacks, and nothing else.
pub fn install_for(steps: &[Step], output: &Output) -> Result<()> {
    output.step("setup");
    // One at a time: two package managers, or two starts of an engine, get in each other's way.
    let _lock = wait_for_others(output)?;
    let tools = Tools::open()?;
    for package in packages() {
        system::install(package, output)?;
    }
    let needs = needs(&steps.iter().collect::<Vec<_>>());
    for need in &needs {
        match need.as_str() {
            RUST => components(output)?,
            CONTAINERS => {
                engine::ensure(output)?;
                images::ensure(&tools, output)?;
            }
            CLUSTER => cluster::install(output)?,
            CLUSTER_TESTS => cluster::install_for_tests(output)?,
            ADVISORIES | HISTORY | TODAY | XTASK => {}
            tool => {
                tools.install(tool, output)?;
                output.detail(format_args!("{tool} {} is there", tools.pin(tool)?.version));
            }
        }
    }
    Ok(())
}

fn wait_for_others(output: &Output) -> Result<std::fs::File> {
    let path = cache_dir()?.join("setup.lock");
    if let Some(lock) = files::try_lock(&path)? {
        return Ok(lock);
    }
    output.detail("another setup is at work; waiting for it");
    let lock = std::fs::File::open(&path).context("opening the lock of setups")?;
    lock.lock().context("waiting for another setup")?;
    Ok(lock)
}

/// Refuses to start steps for which something is missing, all of it in one message.
pub fn preflight(steps: &[&Step], tools: &Tools) -> Result<()> {
    let missing: Vec<String> = requirements(steps, tools)?
        .into_iter()
        .filter(|requirement| requirement.found.is_none())
        .map(|r| format!("{} {} is missing: {}", r.name, r.needed, r.mend))
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    bail!(
        "{}\nor let `cargo xtask setup` put all of it there",
        missing.join("\n")
    )
}

fn check(steps: &[Step], output: &Output) -> Result<Finished> {
    let tools = Tools::open()?;
    let requirements = requirements(&steps.iter().collect::<Vec<_>>(), &tools)?;
    let rows: Vec<Vec<String>> = requirements
        .iter()
        .map(|requirement| {
            let mend = match requirement.found {
                Some(_) => "",
                None => &requirement.mend,
            };
            vec![
                requirement.name.clone(),
                requirement.needed.clone(),
                requirement.found.clone().unwrap_or("missing".to_owned()),
                mend.to_owned(),
            ]
        })
        .collect();
    output.table(&["TOOL", "NEEDED", "FOUND", "HOW TO MEND"], &rows);
    let size = target::size()?;
    output.detail(format_args!(
        "{} has {} (ci keeps it below {})",
        cargo::target_dir()?.display(),
        target::gibibytes(size),
        target::gibibytes(target::LIMIT)
    ));
    for requirement in &requirements {
        output.event("requirement", requirement);
    }
    let missing = requirements.iter().filter(|r| r.found.is_none()).count();
    let finished = if missing == 0 {
        Finished::passed()
    } else {
        output.bad(format_args!(
            "{missing} things are missing; `cargo xtask setup` puts them there"
        ));
        Finished::new(Exit::No, "failed")
    };
    Ok(finished
        .with("requirements", requirements)
        .with("target_bytes", size))
}

/// Each thing that the steps need, once, in the order in which it is asked for.
fn needs(steps: &[&Step]) -> Vec<String> {
    let mut needs: Vec<String> = Vec::new();
    for need in steps.iter().flat_map(|step| &step.tools) {
        if !needs.contains(need) {
            needs.push(need.clone());
        }
    }
    needs
}

fn requirements(steps: &[&Step], tools: &Tools) -> Result<Vec<Requirement>> {
    if steps.is_empty() {
        return Ok(Vec::new());
    }
    let mut requirements = Vec::new();
    for package in packages() {
        requirements.push(Requirement {
            name: package.program.to_owned(),
            needed: "any version".to_owned(),
            found: system::find(package.program).map(|path| path.display().to_string()),
            mend: system::advice(package),
        });
    }
    for need in needs(steps) {
        match need.as_str() {
            RUST => {
                for component in ["rustfmt", "clippy"] {
                    requirements.push(Requirement {
                        name: component.to_owned(),
                        needed: "of the toolchain".to_owned(),
                        found: component_version(component),
                        mend: format!("rustup component add {component}"),
                    });
                }
            }
            CONTAINERS => {
                let answering = engine::answering();
                let there = answering.is_some();
                requirements.push(Requirement {
                    name: "container engine".to_owned(),
                    needed: "that answers".to_owned(),
                    found: answering.map(|version| format!("Docker {version}")),
                    mend: engine::advice(),
                });
                if there {
                    let missing = images::missing(tools)?;
                    let names: Vec<&str> = missing.iter().map(|(n, _)| n.as_str()).collect();
                    let found = match names.is_empty() {
                        true => Some(images::in_use(tools)?.join(" ")),
                        false => None,
                    };
                    requirements.push(Requirement {
                        name: "images".to_owned(),
                        needed: match names.is_empty() {
                            true => "of the tests' servers".to_owned(),
                            false => names.join(" "),
                        },
                        found,
                        mend: "cargo xtask setup".to_owned(),
                    });
                }
            }
            CLUSTER => requirements.push(Requirement {
                name: "Kubernetes".to_owned(),
                needed: cluster::missing().unwrap_or_else(|| "a cluster to start".to_owned()),
                found: cluster::version(),
                mend: "cargo xtask setup".to_owned(),
            }),
            CLUSTER_TESTS => requirements.push(Requirement {
                name: "tests of Kubernetes".to_owned(),
                needed: cluster::missing_for_tests().unwrap_or_else(|| "all of them".to_owned()),
                found: cluster::for_tests(),
                mend: "cargo xtask setup".to_owned(),
            }),
            ADVISORIES | HISTORY | TODAY | XTASK => {}
            tool => requirements.push(Requirement {
                name: tool.to_owned(),
                needed: tools.pin(tool)?.version.to_string(),
                found: tools.version(tool)?,
                mend: "cargo xtask setup".to_owned(),
            }),
        }
    }
    Ok(requirements)
}

fn packages() -> [Package; 2] {
    [GIT, COMPILER]
}

fn components(output: &Output) -> Result<()> {
    let shell = cargo::shell()?;
    for component in ["rustfmt", "clippy"] {
        if component_version(component).is_some() {
            output.detail(format_args!("{component} is there"));
            continue;
        }
        let add = cmd!(shell, "rustup component add {component}");
        output.command(&add);
        add.quiet()
            .run()
            .with_context(|| format!("installing the Rust component {component}"))?;
    }
    Ok(())
}

fn component_version(component: &str) -> Option<String> {
    let probe = match component {
        "rustfmt" => "fmt",
        other => other,
    };
    let shell = cargo::shell().ok()?;
    let version = cmd!(shell, "cargo {probe} --version")
        .quiet()
        .ignore_stderr()
        .read()
        .ok()?;
    version.split_whitespace().nth(1).map(str::to_owned)
}
