//! One command on one environment: preflight, plan, then drive.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::json;

use crate::cli::Cli;
use crate::config::{Environment, Pipeline};
use crate::interrupt;
use crate::output::{Exit, Finished, Output};
use crate::platform::{self, Platform, Status};
use crate::release::{Recorded, ReleaseId, Store};
use crate::rollout::checks::SmokeChecks;
use crate::rollout::desk::{Desk, Writer};
use crate::rollout::driver::{Driver, End, Pace, WallClock};
use crate::rollout::engine::{self, Kind, Outcome, State};
use crate::rollout::journal::{Entry, Journal, Started, millis};
use crate::rollout::metrics::{self, Metrics};
use crate::rollout::narrator::Narrator;
use crate::rollout::plan::{self, Forecast};
use crate::rollout::report::Summary;
use crate::rollout::status;
use crate::rollout::windows::Counts;

/// How long what is only reported may keep a rollback from beginning.
const COUNTED_WITHIN: Duration = Duration::from_millis(500);
pub struct Session<'a> {
    pub pipeline: Arc<Pipeline>,
    pub name: String,
    pub settings: Environment,
    pub store: Store,
    pub desk: Box<dyn Desk>,
    pub output: &'a Output,
}

impl<'a> Session<'a> {
    pub async fn open(cli: &Cli, name: &str, output: &'a Output) -> Result<Self> {
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
    pub async fn begin(&self, kind: Kind, candidate: Recorded) -> Result<Finished> {
        let writer = self.become_writer().await?;
        let ended = self.begin_as(&writer, kind, candidate).await;
        writer.release().await;
        ended
    }

    async fn begin_as(&self, writer: &Writer, kind: Kind, candidate: Recorded) -> Result<Finished> {
        self.check_idle().await?;
        let mut platform = platform::open(&self.pipeline, &self.name).await?;
        let mut status = platform.status().await?;
        let lost = status.lost();
        match &lost {
            None if status.stable.as_ref() == Some(&candidate.id) => {
                self.output.good(format_args!(
                    "{candidate} is in service in {} already",
                    self.name
                ));
                return Ok(Finished::new(Exit::Yes, "healthy").with("release", &candidate.id));
            }
            Some(why) if status.stable.as_ref() == Some(&candidate.id) => {
                self.output.warn(format_args!("{why}: it is put back"));
                // There is nothing to compare it with, nor to go back to.
                status.stable = None;
            }
            Some(why) if kind == Kind::Canary => bail!(
                "{why}, so there is nothing to compare {candidate} with; {}",
                self.puts_back(&status)
            ),
            _ => {}
        }
        let kind = match (kind, &status.stable) {
            (Kind::Canary, None) => {
                if lost.is_none() {
                    self.output.warn(format_args!(
                        "nothing is in service in {}: the first release is deployed without a judge",
                        self.name
                    ));
                }
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
        let changes = platform
            .changes(plan.stable.as_ref(), &plan.candidate)
            .await;
        for line in changes {
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

    /// What helps where the release in service is lost.
    pub fn puts_back(&self, status: &Status) -> String {
        format!(
            "`cargo xtask canary start --environment {} --release {}` puts it back",
            self.name,
            status.stable.as_ref().map_or("", ReleaseId::short)
        )
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
    pub async fn prepare_to_stop(&self, platform: &mut dyn Platform, id: &ReleaseId) {
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
    pub async fn release(&self, platform: &dyn Platform, id: &ReleaseId) -> Result<Recorded> {
        match self.store.get(id) {
            Ok(recorded) => Ok(recorded),
            Err(error) => platform.recall(id).await?.ok_or(error),
        }
    }

    /// Refuses to begin while a rollout has not ended.
    pub async fn check_idle(&self) -> Result<()> {
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
    pub async fn become_writer(&self) -> Result<Writer> {
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
            asked = interrupt::asked() => {
                asked?;
                return Ok(self.interrupted());
            }
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

    /// Ctrl-C, or a machine that is shut down, leaves everything as it is: the journal knows how to go on.
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

    pub async fn resume(&self) -> Result<Finished> {
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
    pub async fn take_over(
        &self,
        writer: &Writer,
        journal: &mut Journal,
        kind: Kind,
    ) -> Result<Finished> {
        let plan = journal.plan().clone();
        let mut platform = platform::open(&self.pipeline, &self.name).await?;
        if let (Some(then), Some(now)) = (plan.traffic, platform.traffic())
            && then != now
        {
            bail!(
                "{}: the rollout {} was begun with kubernetes.traffic = {}, and it is {} here: go on with the \
                 settings that it was begun with",
                self.name,
                plan.rollout,
                json!(then),
                json!(now)
            );
        }
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
