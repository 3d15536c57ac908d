//! `cargo xtask servers`: real servers for tests, started once for many of them.

use std::os::fd::AsFd;
use std::process::Command;

use anyhow::{Context, Result, bail};
use test_servers::{Image, Images, Running, Server};
use xshell::cmd;

use crate::cargo;
use crate::cli::{ServersCommand, ServersRunArgs};
use crate::config::unknown;
use crate::output::{Exit, Finished, Output, seconds};
use crate::setup::tools::Tools;

pub fn run(command: &ServersCommand, output: &Output) -> Result<Finished> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("starting a runtime")?;
    match command {
        ServersCommand::Sweep => {
            let removed = runtime.block_on(test_servers::sweep())?;
            output.good(format_args!("{removed} containers removed"));
            Ok(Finished::passed().with("removed", removed))
        }
        ServersCommand::Run(args) => run_with(args, &runtime, output),
    }
}

fn run_with(
    args: &ServersRunArgs,
    runtime: &tokio::runtime::Runtime,
    output: &Output,
) -> Result<Finished> {
    let servers = select(&args.only)?;
    let pins = Tools::open()?;
    let images = pins.images().iter().map(|(name, image)| {
        let image = Image {
            ordinary: image.ordinary.clone(),
            offline: image.offline.clone(),
        };
        (name.clone(), image)
    });
    let images = Images(images.collect());
    // Whatever the end, containers are removed within the runtime.
    let _entered = runtime.enter();
    let removed = runtime.block_on(test_servers::sweep())?;
    if removed > 0 {
        output.warn(format_args!(
            "{removed} containers of a run that was killed were removed"
        ));
    }
    let began = std::time::Instant::now();
    let running = runtime.block_on(test_servers::start_all(&servers, &images))?;
    for server in &running {
        output.detail(format_args!(
            "{:9} {} from {}",
            server.server.name(),
            server.address,
            server.image
        ));
    }
    output.good(format_args!(
        "{} servers in {}",
        running.len(),
        seconds(began.elapsed())
    ));
    let passed = command(&args.command, &running, output)?;
    let images: Vec<&str> = running.iter().map(|server| server.image.as_str()).collect();
    let finished = if passed {
        Finished::passed()
    } else {
        Finished::new(Exit::No, "failed")
    };
    Ok(finished.with("images", images))
}

/// Runs the command with the servers' addresses; whether it succeeded.
fn command(words: &[String], servers: &[Running], output: &Output) -> Result<bool> {
    let shell = cargo::shell()?;
    let Some((program, arguments)) = words.split_first() else {
        bail!("there is no command to run");
    };
    let command = cmd!(shell, "{program} {arguments...}");
    output.command(&command);
    let addresses = servers
        .iter()
        .map(|server| (server.server.variable(), server.address.as_str()));
    let mut command = Command::from(cargo::isolated(command).envs(addresses));
    if output.is_json() {
        // Standard output is for our own events.
        let stderr = std::io::stderr().as_fd().try_clone_to_owned();
        command.stdout(stderr.context("sharing standard error")?);
    }
    let ended = command
        .status()
        .with_context(|| format!("starting {program}"))?;
    Ok(ended.success())
}

fn select(only: &[String]) -> Result<Vec<Server>> {
    let names = Server::ALL.iter().map(|server| server.name());
    if let Some(name) = only
        .iter()
        .find(|name| !names.clone().any(|known| known == *name))
    {
        return Err(unknown("server", name, names));
    }
    let wanted = |server: &Server| only.is_empty() || only.iter().any(|n| n == server.name());
    Ok(Server::ALL.into_iter().filter(wanted).collect())
}
