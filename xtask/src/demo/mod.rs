//! `cargo xtask demo`: the whole path on this machine, by the very commands a team would type.
//!
//! Every step is a process of its own, as it would be for a user, so one of them can be killed
//! for real. The demo has its own state and ports and leaves a running sandbox alone.

mod ground;
mod load;
mod report;
mod steps;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::cli::{Cli, DemoArgs};
use crate::config::{Demo, Pipeline, PlatformKind, Setting};
use crate::files;
use crate::output::{Exit, Finished, Output, seconds};
use ground::Ground;
use load::Load;
use report::{Expected, Rollout};
use steps::{Ended, Steps};

/// What the demo expects of a platform.
struct Promise {
    /// How long stable may take to get all traffic back after a verdict, in seconds.
    restored_within: f64,
    /// Requests a second that it serves beside its own work on a small machine.
    rate: u32,
}

fn promise(platform: PlatformKind) -> Promise {
    match platform {
        PlatformKind::Sandbox => Promise {
            restored_within: 1.0,
            rate: 300,
        },
        PlatformKind::Kubernetes => Promise {
            restored_within: 5.0,
            rate: 200,
        },
    }
}

pub fn run(args: &DemoArgs, cli: &Cli, output: &Output) -> Result<Finished> {
    let pipeline = Pipeline::load(&cli.pipeline)?;
    let Some(demo) = pipeline.demo.clone() else {
        bail!("{} has no [demo] section", cli.pipeline.display());
    };
    if pipeline.load.is_empty() {
        bail!(
            "{} has no [[load]] section, so the demo has nothing to send",
            cli.pipeline.display()
        );
    }
    let stage = Stage::set(&pipeline, cli, &demo, args.platform)?;
    let ground = Ground::find(&stage)?;
    let mut image = ground.image_arguments();
    image.extend(["--profile".to_owned(), args.profile.clone()]);
    let steps = Steps::new(stage.settings.clone(), image, output)?;
    ground.leave_on_interrupt(&steps)?;
    ground.prepare(&steps, &stage, output)?;

    // The build takes as long as it takes; the show begins after it.
    output.step("building the service into an image");
    let first = steps.release("1.0.0", &stage.plain)?;
    let began = Instant::now();
    let shown = show(args, &pipeline, &stage, &steps, &ground, &first, output);
    let elapsed = began.elapsed();
    if args.keep && shown.is_ok() {
        output.good(format_args!(
            "everything is still running; production is at {}\n   stop it by: cargo xtask --pipeline {} {}",
            stage.address,
            stage.settings.display(),
            ground.stop_words().join(" ")
        ));
    } else {
        ground.leave(&steps)?;
    }
    let finished = shown?;
    output.detail(format_args!("{} after the build", seconds(elapsed)));
    Ok(finished.with("seconds", elapsed.as_secs_f64()))
}

/// The demo's own settings, configurations and ports.
struct Stage {
    platform: PlatformKind,
    dir: PathBuf,
    /// What is in `settings`.
    pipeline: Arc<Pipeline>,
    settings: PathBuf,
    address: String,
    plain: PathBuf,
    changed: PathBuf,
    mistaken: PathBuf,
}

impl Stage {
    fn set(pipeline: &Pipeline, cli: &Cli, demo: &Demo, platform: PlatformKind) -> Result<Self> {
        let dir = pipeline.state_dir().join(match platform {
            PlatformKind::Sandbox => "demo",
            PlatformKind::Kubernetes => "demo-kubernetes",
        });
        let mut ports = Vec::new();
        let mut changes: Vec<(Vec<&str>, toml::Value)> =
            vec![(vec!["state_dir"], text(&dir.join("state")))];
        let mut address = String::new();
        for name in pipeline.environments.keys() {
            let socket =
                std::net::TcpListener::bind(("127.0.0.1", 0)).context("finding a free port")?;
            let port = socket.local_addr().context("asking for the port")?.port();
            // All are held until all are found, so that no two are the same.
            ports.push(socket);
            changes.push((vec!["environments", name, "port"], i64::from(port).into()));
            if name == steps::PRODUCTION {
                address = format!("http://127.0.0.1:{port}");
            }
        }
        if address.is_empty() {
            bail!(
                "the pipeline has no environment {:?} for the demo",
                steps::PRODUCTION
            );
        }
        let manifests = dir.join("manifests");
        if platform == PlatformKind::Kubernetes {
            address = ground::on_cluster(pipeline, &manifests, &mut changes)?;
        }
        for (section, own) in [("rollout", &demo.rollout), ("judge", &demo.judge)] {
            changes.extend(
                own.iter()
                    .map(|(key, value)| (vec![section, key], value.clone())),
            );
        }
        let settings = dir.join("pipeline.toml");
        let content = Pipeline::rewrite(&pipeline.root.join(&cli.pipeline), &changes)?;
        files::write_atomically(&settings, content.as_bytes())?;

        let plain = pipeline.root.join(&pipeline.service.config_dir);
        let changed = dir.join("config-changed");
        let mistaken = dir.join("config-mistaken");
        copy_with(&plain, &changed, &demo.change)?;
        copy_with(&plain, &mistaken, &demo.mistake)?;
        Ok(Self {
            platform,
            dir,
            pipeline: Arc::new(Pipeline::load(&settings)?),
            settings,
            address,
            plain,
            changed,
            mistaken,
        })
    }
}

fn text(path: &Path) -> toml::Value {
    path.to_string_lossy().into_owned().into()
}

/// Copies a configuration, with one key set to another value.
fn copy_with(from: &Path, to: &Path, setting: &Setting) -> Result<()> {
    let entries = std::fs::read_dir(from).with_context(|| format!("reading {}", from.display()))?;
    for entry in entries {
        let path = entry
            .with_context(|| format!("reading {}", from.display()))?
            .path();
        let Some(name) = path.file_name() else {
            continue;
        };
        let content = if name == setting.file.as_str() {
            let keys = setting.key.split('.').collect();
            Pipeline::rewrite(&path, &[(keys, setting.value.clone())])?
        } else {
            std::fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?
        };
        files::write_atomically(&to.join(name), content.as_bytes())?;
    }
    Ok(())
}

/// Everything after the build.
fn show(
    args: &DemoArgs,
    pipeline: &Pipeline,
    stage: &Stage,
    steps: &Steps<'_>,
    ground: &Ground,
    first: &str,
    output: &Output,
) -> Result<Finished> {
    let demo = pipeline
        .demo
        .as_ref()
        .context("the [demo] section is gone")?;
    let canary = ["canary", "start"];
    steps.expect(&["deploy-staging", "--release", first], "healthy")?;
    steps.expect(&canary, "healthy")?;

    let promise = promise(args.platform);
    let rate = args.rate.unwrap_or(promise.rate);
    output.step(format_args!("load: {rate} requests/s to {}", stage.address));
    let load = Load::start(stage.address.clone(), &pipeline.load, rate)?;
    let mut rollouts = Vec::new();
    let mut roll = |ended: Ended, expected: Expected| -> Result<()> {
        let rollout = Rollout::read(&stage.pipeline, ended, expected)?;
        output.event("rollout", rollout.json());
        rollouts.push(rollout);
        Ok(())
    };

    output.step("1.1.0, a good release, all the way");
    let good = steps.release("1.1.0", &stage.changed)?;
    steps.expect(&["deploy-staging", "--release", &good], "healthy")?;
    roll(steps.run(&canary)?, Expected::Healthy)?;

    output.step(format_args!(
        "1.2.0, with an operator's mistake: {} has {} = {}",
        demo.mistake.file, demo.mistake.key, demo.mistake.value
    ));
    let bad = steps.release("1.2.0", &stage.mistaken)?;
    steps.expect(&["deploy-staging", "--release", &bad], "healthy")?;
    roll(steps.run(&canary)?, Expected::RolledBack)?;

    output.step("1.3.0, a good release, whose command is killed on the way");
    let killed = steps.release("1.3.0", &stage.changed)?;
    steps.kill_in_the_middle(&["canary", "start", "--release", &killed])?;
    output.warn("the command was killed with SIGKILL; traffic is served all the same");
    let elsewhere = ground.elsewhere(stage, steps)?;
    let resuming = elsewhere.as_ref().unwrap_or(steps);
    roll(resuming.run(&["canary", "resume"])?, Expected::Healthy)?;

    output.step("back to 1.0.0, on command");
    roll(steps.run(&["rollback", "--to", first])?, Expected::Healthy)?;

    // A little after the last change, to see that nothing failed late.
    std::thread::sleep(Duration::from_millis(500));
    let measured = load.stop()?;
    let problems = report::problems(&rollouts, &measured, promise.restored_within);
    let page = stage.dir.join("report.html");
    files::write_atomically(&page, report::html(&rollouts, &measured, rate).as_bytes())?;
    report::table(&rollouts, &measured, rate, output);
    output.good(format_args!("report: {}", page.display()));
    for problem in &problems {
        output.bad(problem);
    }
    let finished = if problems.is_empty() {
        output.good("every good release lost nothing, the bad one only its own requests");
        Finished::passed()
    } else {
        Finished::new(Exit::No, "failed").with("problems", &problems)
    };
    let rollouts: Vec<Value> = rollouts.iter().map(Rollout::json).collect();
    Ok(finished
        .with("rollouts", rollouts)
        .with("load", report::load_json(&measured))
        .with("report", &page))
}
