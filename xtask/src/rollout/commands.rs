//! `deploy-staging`, `canary …` and `rollback`: preflight, plan, then drive.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::json;

use super::checks::SmokeChecks;
use super::desk::{Desk, Writer};
use super::driver::{Driver, End, Pace, WallClock, view};
use super::engine::{self, Kind, Outcome, Request, RequestKind, State};
use super::journal::{Entry, Journal, Started, millis};
use super::judge_file;
use super::metrics::{self, Metrics};
use super::narrator::Narrator;
use super::plan::{self, Forecast};
use super::report::Summary;
use super::status;
use super::windows::Counts;
use crate::cli::{CanaryCommand, CanaryStartArgs, Cli, DeployArgs, EnvironmentArgs, RollbackArgs};
use crate::config::{Environment, Pipeline};
use crate::output::{Exit, Finished, Output};
use crate::platform::{self, Platform};
use crate::release::{Recorded, ReleaseId, Store};

/// How often a journal that another command writes is read.
const POLL: Duration = Duration::from_millis(200);
/// How long what is only reported may keep a rollback from beginning.
const COUNTED_WITHIN: Duration = Duration::from_millis(500);
/// How long `promote` waits to be heard.
const HEARD_WITHIN: Duration = Duration::from_secs(10);

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

/// One command on one environment.
struct Session<'a> {
    pipeline: Arc<Pipeline>,
    name: String,
    settings: Environment,
    store: Store,
    desk: Box<dyn Desk>,
    output: &'a Output,
}

impl<'a> Session<'a> {
    async fn open(cli: &Cli, name: &str, output: &'a Output) -> Result<Self> {
        let pipeline = Arc::new(Pipeline::load(&cli.pipeline)?);
        let settings = pipeline.environment(name)?.clone();
        let store = Store::open(&pipeline);
        let desk = platform::desk(&pipeline, name).await?;
        Ok(Self {
            pipeline,
            name: name.to_owned(),
            settings,
            store,
            desk,
            output,
        })
    }

    /// Starts a rollout and drives it to its end.
    async fn begin(&self, kind: Kind, candidate: Recorded) -> Result<Finished> {
        let writer = self.become_writer().await?;
        let ended = self.begin_as(&writer, kind, candidate).await;
        writer.release().await;
        ended
    }

    async fn begin_as(&self, writer: &Writer, kind: Kind, candidate: Recorded) -> Result<Finished> {
        self.check_idle().await?;
        let mut platform = platform::open(&self.pipeline, &self.name).await?;
        let status = platform.status().await?;
        if status.stable.as_ref() == Some(&candidate.id) {
            self.output.good(format_args!(
                "{candidate} is in service in {} already",
                self.name
            ));
            return Ok(Finished::new(Exit::Yes, "healthy").with("release", &candidate.id));
        }
        let kind = match (kind, &status.stable) {
            (Kind::Canary, None) => {
                self.output.warn(format_args!(
                    "nothing is in service in {}: the first release is deployed without a judge",
                    self.name
                ));
                Kind::Deploy
            }
            _ => kind,
        };
        // What they lack must show before anything is done.
        let checks = self.smoke_checks(&*platform, kind)?;
        platform.prepare(&candidate).await?;
        let stable = match &status.stable {
            Some(id) => Some(self.release(&*platform, id).await?),
            None => None,
        };
        let now = jiff::Timestamp::now();
        let plan = plan::plan(
            &self.pipeline,
            &self.name,
            kind,
            &*platform,
            &status,
            &candidate.id,
            now,
        )?;
        self.prepare(&mut *platform, &plan).await?;
        self.output.step(format_args!(
            "{}: {} {} (rollout {})",
            self.name,
            match &stable {
                Some(stable) => format!("{stable} to"),
                None => "first release,".to_owned(),
            },
            candidate,
            plan.rollout
        ));
        for line in platform.changes(plan.stable.as_ref(), &plan.candidate) {
            self.output.detail(line);
        }
        if kind == Kind::Canary && plan.stages != self.pipeline.rollout.stages.0 {
            status::reachable(&plan, self.output);
        }
        let bounds = match kind {
            Kind::Canary => self.forecast(&*platform, &plan).await?.bounds,
            Kind::Deploy | Kind::Rollback => None,
        };
        // A request of a time before this rollout is none for this one.
        let request = self
            .desk
            .request()
            .await?
            .map_or(0, |request| request.number);
        let metrics = metrics::open(&self.pipeline, &self.name, &*platform)?;
        let started = Started {
            judge: self.pipeline.judge.clone(),
            bounds,
            counts: match kind {
                Kind::Canary => metrics.totals().await?,
                // Where nothing is judged, nothing waits for metrics.
                Kind::Deploy | Kind::Rollback => {
                    let counted = tokio::time::timeout(COUNTED_WITHIN, metrics.totals()).await;
                    counted.ok().and_then(Result::ok).unwrap_or_default()
                }
            },
            stable_name: stable.as_ref().map(ToString::to_string),
            candidate_name: candidate.to_string(),
            token: writer.token,
            plan,
        };
        let state = State {
            request,
            ..State::start(millis(jiff::Timestamp::now()))
        };
        let mut journal = self.desk.create(writer, started, state).await?;
        self.drive(&*platform, &checks, writer, &mut journal).await
    }

    /// Makes the platform know every release that the rollout names.
    async fn prepare(&self, platform: &mut dyn Platform, plan: &engine::Plan) -> Result<()> {
        for id in plan.stable.iter().chain([&plan.candidate]) {
            let recorded = self.release(platform, id).await?;
            platform.prepare(&recorded).await?;
        }
        for id in &plan.others {
            self.prepare_to_stop(platform, id).await;
        }
        Ok(())
    }

    /// What is known of a release that only has to be stopped; less must not keep that from being
    /// done.
    async fn prepare_to_stop(&self, platform: &mut dyn Platform, id: &ReleaseId) {
        let prepared = match self.release(platform, id).await {
            Ok(recorded) => platform.prepare(&recorded).await,
            Err(error) => Err(error),
        };
        if let Err(error) = prepared {
            let short = id.short();
            self.output.warn(format_args!(
                "objects around what is stopped stay, because {short} is not known: {error:#}"
            ));
        }
    }

    /// A release of this environment, from this machine or from the platform, which keeps it.
    async fn release(&self, platform: &dyn Platform, id: &ReleaseId) -> Result<Recorded> {
        match self.store.get(id) {
            Ok(recorded) => Ok(recorded),
            Err(error) => platform.recall(id).await?.ok_or(error),
        }
    }

    /// Refuses to begin while a rollout has not ended.
    async fn check_idle(&self) -> Result<()> {
        if let Some(journal) = self.desk.unfinished().await? {
            bail!(
                "the rollout {} has not ended; go on with it by `cargo xtask canary resume \
                 --environment {1}`, or give it up by `cargo xtask canary abort --environment {1}`",
                journal.plan().rollout,
                self.name
            );
        }
        Ok(())
    }

    /// The right to change the environment, or a word on who has it.
    async fn become_writer(&self) -> Result<Writer> {
        match self.desk.lock().await? {
            Some(writer) => Ok(writer),
            None => bail!(
                "another command is at work on {0}; `cargo xtask canary status --environment {0}` \
                 shows it, `cargo xtask canary abort --environment {0}` ends it",
                self.name
            ),
        }
    }

    /// Measures stable, prints what is to be expected, and refuses what cannot be decided.
    async fn forecast(&self, platform: &dyn Platform, plan: &engine::Plan) -> Result<Forecast> {
        let metrics = metrics::open(&self.pipeline, &self.name, platform)?;
        let time = (self.pipeline.rollout.window.0 * 2).max(Duration::from_secs(1));
        self.output.progress("measuring stable's traffic");
        let (counts, time) = measure(&*metrics, plan, time).await?;
        let rollout = &self.pipeline.rollout;
        let forecast = plan::forecast(
            &plan.stages,
            plan::Pace {
                min_stage: rollout.min_stage.0.as_secs_f64(),
                unseen: self.unseen(&*metrics).as_secs_f64(),
                window: rollout.window.0.as_secs_f64(),
            },
            &self.pipeline.judge,
            &counts,
            time.as_secs_f64(),
        );
        status::forecast(&forecast, self.output);
        let max_stage = rollout.max_stage.0.as_secs_f64();
        forecast.check(max_stage, &self.name, &platform.address())?;
        Ok(forecast)
    }

    /// How long a stage lasts before anything is counted of it: what was counted before its weight
    /// took effect says nothing about it.
    fn unseen(&self, metrics: &dyn Metrics) -> Duration {
        self.pipeline.rollout.warm_up.0 + metrics.lag()
    }

    /// Nothing else than a deployment must fail for what they lack.
    fn smoke_checks(&self, platform: &dyn Platform, kind: Kind) -> Result<SmokeChecks> {
        let checks = match kind {
            Kind::Deploy => &self.pipeline.smoke[..],
            Kind::Canary | Kind::Rollback => &[],
        };
        SmokeChecks::new(platform.address(), checks)
    }

    async fn drive(
        &self,
        platform: &dyn Platform,
        checks: &SmokeChecks,
        writer: &Writer,
        journal: &mut Journal,
    ) -> Result<Finished> {
        let metrics = metrics::open(&self.pipeline, &self.name, platform)?;
        let narrator = Narrator::new(self.output);
        let rollout = &self.pipeline.rollout;
        let driver = Driver {
            platform,
            metrics: &*metrics,
            checks,
            clock: &WallClock,
            decide: engine::decide,
            desk: &*self.desk,
            writer,
            pace: Pace {
                window: rollout.window.0,
                warm_up: self.unseen(&*metrics),
                tick: platform.tick(),
            },
            audience: &|notice| narrator.tell(notice),
        };
        let end = tokio::select! {
            end = driver.run(journal) => end?,
            _ = tokio::signal::ctrl_c() => return Ok(self.interrupted()),
        };
        let finished = self.conclude(&end, journal);
        if matches!(end, End::Outcome(Outcome::Failed | Outcome::RolledBack)) {
            for line in platform.explain(&journal.plan().candidate) {
                self.output.detail(line);
            }
        }
        if journal.plan().kind == Kind::Deploy && end == End::Outcome(Outcome::Healthy) {
            let status = platform.status().await?;
            let kept = plan::kept(&status, self.keep_previous());
            status::running(&status, &kept, &platform.address(), self.output);
        }
        Ok(finished)
    }

    /// Ctrl-C leaves everything as it is: the journal knows how to go on.
    fn interrupted(&self) -> Finished {
        self.output.warn(format_args!(
            "stopped following; traffic stays as it is and nothing drives the rollout. `cargo \
             xtask canary resume` or `abort --environment {}` goes on",
            self.name
        ));
        Finished::new(Exit::Unknown, "interrupted").with("environment", &self.name)
    }

    /// The last words on a rollout.
    fn conclude(&self, end: &End, journal: &Journal) -> Finished {
        let summary = Summary::of(journal);
        let candidate = &journal.started().candidate_name;
        let name = &self.name;
        let (exit, outcome) = match end {
            End::Held(hold) => {
                self.output.warn(format_args!(
                    "held: {}; traffic stays as it is. `cargo xtask canary resume`, `promote` or \
                     `abort --environment {name}` goes on",
                    status::hold_reason(&hold.reason)
                ));
                (Exit::Unknown, "held")
            }
            End::Outcome(Outcome::Healthy) => {
                self.output
                    .good(format_args!("{candidate} is in service in {name}"));
                (Exit::Yes, "healthy")
            }
            End::Outcome(Outcome::RolledBack) => {
                self.output.ended(
                    "rolled back",
                    format_args!("{candidate} in {name}: {}", summary.why),
                );
                (Exit::No, "rolled-back")
            }
            End::Outcome(Outcome::Aborted) => {
                self.output
                    .ended("aborted", format_args!("{candidate} in {name}"));
                (Exit::No, "aborted")
            }
            End::Outcome(Outcome::Failed) => {
                self.output.bad(format_args!(
                    "{candidate} never got ready, so nothing has changed in {name}: {}",
                    summary.why
                ));
                (Exit::Unknown, "failed")
            }
        };
        status::totals(&summary, self.output);
        self.output
            .detail(format_args!("journal: {}", journal.place()));
        let mut finished = Finished::new(exit, outcome).with("environment", name);
        if let serde_json::Value::Object(fields) = json!(summary) {
            finished.fields.extend(fields);
        }
        finished.with("outcome", outcome)
    }

    async fn resume(&self) -> Result<Finished> {
        let writer = self.become_writer().await?;
        let resumed = self.resume_as(&writer).await;
        writer.release().await;
        resumed
    }

    async fn resume_as(&self, writer: &Writer) -> Result<Finished> {
        let Some(mut journal) = self.desk.unfinished_to_write(writer).await? else {
            bail!(
                "there is nothing to resume in {}: no rollout is unfinished",
                self.name
            );
        };
        let kind = journal.plan().kind;
        self.take_over(writer, &mut journal, kind).await
    }

    /// Goes on with a rollout that another command began; `kind` says which checks it needs.
    async fn take_over(
        &self,
        writer: &Writer,
        journal: &mut Journal,
        kind: Kind,
    ) -> Result<Finished> {
        let plan = journal.plan().clone();
        let mut platform = platform::open(&self.pipeline, &self.name).await?;
        let checks = self.smoke_checks(&*platform, kind)?;
        self.prepare(&mut *platform, &plan).await?;
        self.output.step(format_args!(
            "{}: going on with rollout {}",
            self.name, plan.rollout
        ));
        journal
            .append([Entry::Resumed {
                token: writer.token,
            }])
            .await?;
        self.drive(&*platform, &checks, writer, journal).await
    }

    async fn promote(&self) -> Result<Finished> {
        let Some(journal) = self.desk.unfinished().await? else {
            bail!(
                "there is nothing to promote in {}: no rollout is unfinished",
                self.name
            );
        };
        let asked = self
            .desk
            .request()
            .await?
            .filter(|asked| asked.number > journal.state().request);
        if asked.is_some_and(|asked| asked.kind == RequestKind::Abort) {
            bail!("the rollout is being given up: abort was asked for, and wins");
        }
        let number = self
            .ask(RequestKind::Promote {
                stage: journal.state().stage,
            })
            .await?;
        if let Some(writer) = self.desk.lock().await? {
            let mut journal = self.desk.for_writing(&writer, journal).await?;
            let kind = journal.plan().kind;
            let moved = self.take_over(&writer, &mut journal, kind).await;
            writer.release().await;
            return moved;
        }
        let deadline = Instant::now() + HEARD_WITHIN;
        let rollout = &journal.plan().rollout;
        while self.desk.read(rollout).await?.state().request < number {
            if Instant::now() > deadline {
                bail!("asked for, but not yet heard: the candidate is not ready for its weight");
            }
            tokio::time::sleep(POLL).await;
        }
        self.output
            .good(format_args!("{} moves on", journal.plan().rollout));
        Ok(Finished::passed().with("rollout", &journal.plan().rollout))
    }

    async fn abort(&self) -> Result<Finished> {
        let Some(journal) = self.desk.unfinished().await? else {
            self.output
                .line(format_args!("there is nothing to abort in {}", self.name));
            return Ok(Finished::new(Exit::Yes, "idle"));
        };
        self.ask(RequestKind::Abort).await?;
        let rollout = journal.plan().rollout.clone();
        let ended = loop {
            if let Some(writer) = self.desk.lock().await? {
                let journal = self.desk.read(&rollout).await?;
                let mut journal = self.desk.for_writing(&writer, journal).await?;
                let given_up = match journal.state().outcome() {
                    // It only goes back, and nothing is checked for that.
                    None => self
                        .take_over(&writer, &mut journal, Kind::Rollback)
                        .await
                        .map(|_| ()),
                    Some(_) => Ok(()),
                };
                writer.release().await;
                given_up?;
                break journal;
            }
            let journal = self.desk.read(&rollout).await?;
            if journal.state().outcome().is_some() {
                break journal;
            }
            self.output
                .progress("waiting for the command that drives the rollout");
            tokio::time::sleep(POLL).await;
        };
        let outcome = match ended.state().outcome() {
            Some(Outcome::Healthy) => {
                self.output.warn(
                    "too late: the release had its place already; `cargo xtask rollback` goes back",
                );
                return Ok(Finished::new(Exit::No, "healthy"));
            }
            Some(Outcome::Aborted) => "aborted",
            Some(Outcome::RolledBack) => "rolled-back",
            Some(Outcome::Failed) => "failed",
            None => bail!("the rollout is held; see `cargo xtask canary status`"),
        };
        self.output.good(match &ended.started().stable_name {
            Some(stable) => format!("all traffic of {} is on {stable}", self.name),
            None => format!("nothing is in service in {}", self.name),
        });
        Ok(Finished::new(Exit::Yes, outcome).with("rollout", &ended.plan().rollout))
    }

    /// Ends what was kept to go back to, once its time is over or at once.
    async fn retire(&self, at_once: bool) -> Result<Finished> {
        let writer = self.become_writer().await?;
        let retired = self.retire_as(&writer, at_once).await;
        writer.release().await;
        retired
    }

    async fn retire_as(&self, writer: &Writer, at_once: bool) -> Result<Finished> {
        self.check_idle().await?;
        let mut platform = platform::open(&self.pipeline, &self.name).await?;
        let status = platform.status().await?;
        let now = jiff::Timestamp::now();
        let named = |id: &ReleaseId| {
            let version = status.release(id).map_or("", |release| &release.version);
            format!("{version} ({})", id.short())
        };
        let mut retired = Vec::new();
        for (id, until) in plan::kept(&status, self.keep_previous()) {
            if until > now && !at_once {
                self.output.line(format_args!(
                    "{} is kept until {until:.0}; --now ends it",
                    named(&id)
                ));
            } else {
                retired.push(id);
            }
        }
        if retired.is_empty() {
            let name = &self.name;
            self.output
                .line(format_args!("nothing is to be stopped in {name}"));
        } else {
            for id in status.stable.iter().chain(&retired) {
                self.prepare_to_stop(&mut *platform, id).await;
            }
            platform.claim(writer.token).await?;
        }
        for id in &retired {
            platform.stop(id, writer.token).await?;
            self.output.good(format_args!(
                "{} is stopped; a rollback to it starts it again",
                named(id)
            ));
        }
        Ok(Finished::passed()
            .with("environment", &self.name)
            .with("retired", retired))
    }

    /// How long a replaced release is kept; without the setting its time is over at once.
    fn keep_previous(&self) -> Duration {
        let time = self.pipeline.rollout.keep_previous;
        time.map_or(Duration::ZERO, |time| time.0)
    }

    async fn ask(&self, kind: RequestKind) -> Result<u64> {
        // Clocks differ: whoever asks later has the higher number all the same.
        let last = self.desk.request().await?.map_or(0, |asked| asked.number);
        let now = u64::try_from(jiff::Timestamp::now().as_microsecond()).unwrap_or(0);
        let number = now.max(last + 1);
        self.desk.ask(Request { number, kind }).await?;
        Ok(number)
    }

    async fn status(&self) -> Result<Finished> {
        let Some(journal) = self.desk.newest().await? else {
            self.output
                .line(format_args!("there has been no rollout in {}", self.name));
            return Ok(Finished::new(Exit::Yes, "idle"));
        };
        let looked = platform::look(&self.pipeline, &self.name).await?;
        let driven = self.desk.is_busy().await?;
        let now = looked.as_ref().map(|(now, _)| now);
        let seen = now.map(|now| view(journal.plan(), now));
        status::rollout(&journal, seen.as_ref(), driven, self.output);
        match &looked {
            Some((now, address)) => {
                let mut kept = plan::kept(now, self.keep_previous());
                // One that is on its way up is not kept.
                if journal.state().outcome().is_none() {
                    kept.retain(|(id, _)| *id != journal.plan().candidate);
                }
                status::running(now, &kept, address, self.output);
            }
            None => self
                .output
                .line("the sandbox is stopped; what it had is kept for its next start"),
        }
        let state = journal.state();
        let judgement = journal
            .judgements()
            .next_back()
            .map(|(_, judgement)| judgement);
        self.output.event(
            "status",
            json!({ "plan": journal.plan(), "state": state, "judgement": judgement, "platform": now, "driven": driven }),
        );
        let outcome = match (state.outcome(), &state.hold) {
            (Some(Outcome::Healthy), _) => "healthy",
            (Some(Outcome::RolledBack), _) => "rolled-back",
            (Some(Outcome::Aborted), _) => "aborted",
            (Some(Outcome::Failed), _) => "failed",
            (None, Some(_)) => "held",
            (None, None) if driven => "running",
            (None, None) => "interrupted",
        };
        Ok(Finished::new(Exit::Yes, outcome).with("rollout", &journal.plan().rollout))
    }
}

/// Stable's counts over `time`, or over as long as it took.
async fn measure(
    metrics: &dyn Metrics,
    plan: &engine::Plan,
    time: Duration,
) -> Result<(Counts, Duration)> {
    let before = metrics
        .sample()
        .await
        .context("measuring stable's traffic")?;
    let began = Instant::now();
    tokio::time::sleep(time).await;
    let after = metrics
        .sample()
        .await
        .context("measuring stable's traffic")?;
    let time = began.elapsed();
    let window = metrics::window(plan, 0, time.as_secs_f64(), &before, &after);
    Ok((Counts::sum(&window.baseline), time))
}
