//! `cargo xtask`: the whole delivery pipeline as one program. Parse, one match, exit code.

#![cfg_attr(
    not(feature = "kubernetes"),
    expect(
        dead_code,
        reason = "what only rollouts use is compiled, and so checked, in every build"
    )
)]

mod audit;
mod cargo;
mod ci;
mod cli;
mod cluster;
mod config;
#[cfg(feature = "rollout")]
mod demo;
mod files;
mod findings;
#[cfg(feature = "rollout")]
mod http;
mod image;
mod interrupt;
mod output;
#[path = "../servers/src/owner.rs"]
mod owner;
#[cfg(feature = "rollout")]
mod platform;
mod release;
#[cfg(feature = "rollout")]
mod rollout;
#[cfg(feature = "servers")]
mod servers;
mod setup;
mod sources;
mod workflows;
mod yaml;

use std::process::ExitCode;

use anyhow::Result;
use clap::Parser;

use cli::{Cli, Command};
use config::{Pipeline, PlatformKind};
use image::Ahead;
use output::{Finished, Output};

fn main() -> ExitCode {
    let cli = match Cli::try_parse_from(cargo::arguments()) {
        Ok(cli) => cli,
        Err(error) => return output::usage(&error),
    };
    let output = Output::new(&cli);
    let on_kubernetes = || config::on_kubernetes(&cli);
    let finished = match cli.command.missing_feature(on_kubernetes) {
        Some(feature) => run_again_with(feature, &cli, &output),
        None => run(&cli, &output),
    };
    interrupt::check();
    output.finish(finished)
}

/// What the demo builds before anything else is built beside this program.
fn run_again_with(feature: &str, cli: &Cli, output: &Output) -> Result<Finished> {
    let beside = match &cli.command {
        // On Kubernetes it builds a cluster first, and two builds are too much for a small machine.
        Command::Demo(args) if args.platform == PlatformKind::Sandbox => {
            let pipeline = Pipeline::load(&cli.pipeline)?;
            Some(Ahead::begin(&pipeline.service, &args.profile, output)?)
        }
        _ => None,
    };
    cargo::run_again_with(feature, beside, output)
}

fn run(cli: &Cli, output: &Output) -> Result<Finished> {
    match &cli.command {
        Command::Ci(args) => ci::run(args, output),
        Command::Audit(args) => audit::run(args, output),
        Command::Setup(args) => setup::run(args, output),
        Command::Workflows(command) => workflows::run(command, output),
        #[cfg(feature = "servers")]
        Command::Servers(command) => servers::run(command, output),
        Command::Cluster(command) => cluster::run(command, cli, output),
        Command::Image(args) => image::run(args, cli, output),
        Command::Releases => release::list(cli, output),
        #[cfg(feature = "rollout")]
        Command::DeployStaging(args) => rollout::commands::deploy(args, cli, output),
        #[cfg(feature = "rollout")]
        Command::Canary(args) => rollout::commands::canary(args, cli, output),
        #[cfg(feature = "rollout")]
        Command::Rollback(args) => rollout::commands::rollback(args, cli, output),
        #[cfg(feature = "rollout")]
        Command::Sandbox(args) => platform::sandbox::commands::run(args, cli, output),
        #[cfg(feature = "rollout")]
        Command::Demo(args) => demo::run(args, cli, output),
        #[cfg(not(all(feature = "rollout", feature = "servers")))]
        command => anyhow::bail!("{} was built without its feature", command.name()),
    }
}
