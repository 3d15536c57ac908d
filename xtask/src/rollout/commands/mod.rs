//! `deploy-staging`, `canary …` and `rollback`.

mod requests;
mod session;

use anyhow::{Context, Result, bail};

use super::engine::Kind;
use super::{judge_file, plan};
use crate::cli::{CanaryCommand, CanaryStartArgs, Cli, DeployArgs, EnvironmentArgs, RollbackArgs};
use crate::output::{Finished, Output};
use crate::platform;
use session::Session;

/// `cargo xtask deploy-staging`
pub fn deploy(args: &DeployArgs, cli: &Cli, output: &Output) -> Result<Finished> {
    block_on(async {
        let session = Session::open(cli, &args.environment, output).await?;
        let release = session.store.resolve(&args.release)?;
        if session.settings.promotes_from.is_some() {
            let status = platform::open(&session.pipeline, &session.name)
                .await?
                .status()
                .await?;
            if status.stable.is_some_and(|stable| stable != release.id) {
                bail!(
                    "{0} is moved in judged stages: `cargo xtask canary start --environment {0} \
                     --release {1}`",
                    session.name,
                    release.id.short()
                );
            }
        }
        session.begin(Kind::Deploy, release).await
    })
}

/// `cargo xtask rollback`
pub fn rollback(args: &RollbackArgs, cli: &Cli, output: &Output) -> Result<Finished> {
    block_on(async {
        let session = Session::open(cli, &args.environment.environment, output).await?;
        session.check_idle().await?;
        let wanted = args
            .to
            .as_ref()
            .map(|text| session.store.resolve(text))
            .transpose()?;
        let platform = platform::open(&session.pipeline, &session.name).await?;
        let status = platform.status().await?;
        let target = plan::rollback_target(&status, wanted.as_ref().map(|recorded| &recorded.id))?;
        let target = session.release(&*platform, &target).await?;
        session.begin(Kind::Rollback, target).await
    })
}

/// `cargo xtask canary …`
pub fn canary(command: &CanaryCommand, cli: &Cli, output: &Output) -> Result<Finished> {
    match command {
        CanaryCommand::Start(args) => block_on(start(args, cli, output)),
        CanaryCommand::Resume(args) => in_session(args, cli, output, Session::resume),
        CanaryCommand::Promote(args) => in_session(args, cli, output, Session::promote),
        CanaryCommand::Abort(args) => in_session(args, cli, output, Session::abort),
        CanaryCommand::Status(args) => in_session(args, cli, output, Session::status),
        CanaryCommand::Retire(args) => {
            in_session(&args.environment, cli, output, async |session| {
                session.retire(args.now).await
            })
        }
        CanaryCommand::Judge(args) => judge_file::run(args, cli, output),
    }
}

/// Does one thing in the environment that was named.
fn in_session<'a>(
    args: &EnvironmentArgs,
    cli: &Cli,
    output: &'a Output,
    work: impl AsyncFnOnce(&Session<'a>) -> Result<Finished>,
) -> Result<Finished> {
    block_on(async {
        let session = Session::open(cli, &args.environment, output).await?;
        work(&session).await
    })
}

async fn start(args: &CanaryStartArgs, cli: &Cli, output: &Output) -> Result<Finished> {
    let session = Session::open(cli, &args.environment.environment, output).await?;
    let release = match (&args.release, &session.settings.promotes_from) {
        (Some(text), _) => session.store.resolve(text)?,
        (None, Some(from)) => {
            let platform = platform::open(&session.pipeline, from).await?;
            let status = platform.status().await?;
            let Some(stable) = status.stable else {
                bail!(
                    "nothing is in service in {from}, which {} is promoted from; deploy there \
                     first (`cargo xtask deploy-staging`), or name a release with --release",
                    session.name
                );
            };
            session.release(&*platform, &stable).await?
        }
        (None, None) => session.store.resolve("latest")?,
    };
    session.begin(Kind::Canary, release).await
}

/// Runs what waits for others on this thread.
pub fn block_on<T>(work: impl Future<Output = Result<T>>) -> Result<T> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    runtime.context("starting the runtime")?.block_on(work)
}
