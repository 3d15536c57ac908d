//! `cargo xtask sandbox`: look at it, read its logs, stop it.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::protocol::{Places, Reply, Request, SandboxStatus};
use super::proxy::Workers;
use super::routing::{Backend, Router, Table, Target};
use super::{ask, daemon, is_alive, places, start};
use crate::cli::{Cli, DaemonArgs, LogsArgs, ProxyArgs, SandboxCommand};
use crate::config::Pipeline;
use crate::output::{Exit, Finished, Output};
use crate::platform::ReleaseStatus;
use crate::release::Store;

/// Beyond this a sandbox that was told to stop is stuck.
const STOP_TIMEOUT: Duration = Duration::from_secs(60);

pub fn run(command: &SandboxCommand, cli: &Cli, output: &Output) -> Result<Finished> {
    match command {
        SandboxCommand::Daemon(args) => return run_daemon(args),
        SandboxCommand::Proxy(args) => return run_proxy(args, output),
        _ => {}
    }
    let pipeline = Pipeline::load(&cli.pipeline)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    runtime.context("starting the runtime")?.block_on(async {
        match command {
            SandboxCommand::Status => status(&places(&pipeline), output).await,
            SandboxCommand::Logs(args) => logs(&pipeline, args, output),
            _ => stop(&places(&pipeline), output).await,
        }
    })
}

fn run_daemon(args: &DaemonArgs) -> Result<Finished> {
    let places = Places::new(args.dir.clone());
    match daemon::run(&places) {
        Ok(true) => Ok(Finished::passed()),
        Ok(false) => std::process::exit(i32::from(daemon::ALREADY_RUNNING)),
        Err(error) => {
            daemon::log_failure(&places, &error);
            Err(error)
        }
    }
}

async fn status(places: &Places, output: &Output) -> Result<Finished> {
    // One that was killed leaves its pid behind: it should be running.
    if places.pid().exists() {
        start(places).await?;
    }
    if !is_alive(places).await? {
        output.line(if places.exists() {
            "the sandbox is stopped; the next deployment or rollout starts it again"
        } else {
            "there is no sandbox yet; `cargo xtask deploy-staging` starts one"
        });
        return Ok(Finished::new(Exit::Yes, "stopped"));
    }
    let Reply::Sandbox(status) = ask(places, &Request::Status).await? else {
        bail!("the sandbox does not tell its status");
    };
    show(&status, output);
    output.event("sandbox", &status);
    Ok(Finished::new(Exit::Yes, "running"))
}

fn show(status: &SandboxStatus, output: &Output) {
    output.line(format_args!("the sandbox is running (pid {})", status.pid));
    for (name, environment) in &status.environments {
        output.step(format_args!(
            "{name}: http://127.0.0.1:{}",
            environment.port
        ));
        if let Some(problem) = &environment.problem {
            output.warn(problem);
        }
        let rows: Vec<Vec<String>> = environment.status.releases.iter().flat_map(rows).collect();
        output.table(
            &[
                "RELEASE", "VERSION", "WEIGHT", "PROCESS", "PID", "RESTARTS", "STATE",
            ],
            &rows,
        );
    }
}

fn rows(release: &ReleaseStatus) -> Vec<Vec<String>> {
    release
        .instances
        .iter()
        .map(|instance| {
            vec![
                release.release.short().to_owned(),
                release.version.clone(),
                format!("{} %", release.weight),
                instance.name.clone(),
                instance
                    .pid
                    .map_or_else(|| "-".to_owned(), |pid| pid.to_string()),
                instance.restarts.to_string(),
                instance.state.clone(),
            ]
        })
        .collect()
}

fn logs(pipeline: &Pipeline, args: &LogsArgs, output: &Output) -> Result<Finished> {
    let places = places(pipeline);
    let environments: Vec<String> = match &args.environment {
        Some(name) => {
            pipeline.environment(name)?;
            vec![name.clone()]
        }
        None => pipeline.environments.keys().cloned().collect(),
    };
    let release = args
        .release
        .as_ref()
        .map(|text| Store::open(pipeline).resolve(text))
        .transpose()?;
    let wanted = release.map_or_else(String::new, |recorded| recorded.id.short().to_owned());
    let mut found = 0;
    for environment in environments {
        let Ok(entries) = std::fs::read_dir(places.logs(&environment)) else {
            continue;
        };
        let mut paths: Vec<_> = entries.flatten().map(|entry| entry.path()).collect();
        paths.sort();
        for path in paths {
            let name = path
                .file_stem()
                .unwrap_or_default()
                .to_string_lossy()
                .into_owned();
            if !name.starts_with(&wanted) || path.extension().is_none_or(|e| e != "log") {
                continue;
            }
            found += 1;
            let text =
                std::fs::read(&path).with_context(|| format!("reading {}", path.display()))?;
            let text = String::from_utf8_lossy(&text);
            let lines: Vec<&str> = text.lines().collect();
            output.step(format_args!("{environment} {name}: {}", path.display()));
            for line in &lines[lines.len().saturating_sub(args.lines)..] {
                output.line(line);
                output.event("log", serde_json::json!({ "environment": environment, "instance": name, "line": line }));
            }
        }
    }
    if found == 0 {
        output.line("there is no log yet");
    }
    Ok(Finished::passed().with("logs", found))
}

async fn stop(places: &Places, output: &Output) -> Result<Finished> {
    // Not `is_alive`: one of another version must be stopped too.
    if ask(places, &Request::Hello).await.is_err() {
        let _ = std::fs::remove_file(places.pid());
        output.line("the sandbox is not running");
        return Ok(Finished::new(Exit::Yes, "stopped"));
    }
    ask(places, &Request::Stop).await?;
    let deadline = Instant::now() + STOP_TIMEOUT;
    while places.pid().exists() {
        if Instant::now() > deadline {
            bail!(
                "the sandbox is still draining after a minute; see {}",
                places.log().display()
            );
        }
        output.progress("draining");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    output.good("the sandbox has stopped; what it had is kept for the next start");
    Ok(Finished::new(Exit::Yes, "stopped"))
}

/// The proxy alone, on fixed upstreams, for benchmarks. Runs until it is killed.
fn run_proxy(args: &ProxyArgs, output: &Output) -> Result<Finished> {
    let workers = Workers::start()?;
    let router = Arc::new(Router::default());
    let mut targets = Vec::new();
    for upstream in &args.upstream {
        let (address, weight) = upstream
            .split_once('=')
            .with_context(|| format!("--upstream {upstream:?} is not ADDRESS=WEIGHT"))?;
        let address: SocketAddr = address
            .parse()
            .with_context(|| format!("--upstream {upstream:?}: no address"))?;
        let weight: u8 = weight
            .parse()
            .with_context(|| format!("--upstream {upstream:?}: no weight"))?;
        let backend = Backend::new(address, Arc::default(), workers.count());
        targets.push(Target::for_benchmark(weight, backend));
    }
    if targets
        .iter()
        .map(|target| u32::from(target.weight))
        .sum::<u32>()
        != 100
    {
        bail!("the weights of --upstream must sum to 100");
    }
    router.set(Table { targets });
    let front = workers.serve(args.listen, &router).context("listening")?;
    output.line(format_args!("proxy on {}", front.address));
    loop {
        std::thread::park();
    }
}
