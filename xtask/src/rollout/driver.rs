//! The loop around the engine: observe, decide, write down, act.

use std::time::Duration;

use anyhow::Result;
use async_trait::async_trait;

use super::desk::{Desk, Writer};
use super::engine::{
    Action, Arm, Decide, Hold, HoldReason, Kind, Millis, Observation, Outcome, Phase, Plan,
    RequestKind, State, Verdict, View,
};
use super::journal::{ArmTotals, Entry, Journal, Totals, millis};
use super::judge::{Judge, Judgement};
use super::metrics::{self, Metrics};
use super::windows::{Window, WindowLine};
use crate::platform::{InstanceCounts, Platform, StaleWriter, Status};
use crate::release::ReleaseId;

/// How long to wait after something failed.
const PAUSE: Duration = Duration::from_millis(500);

/// Time, which tests make pass as they like.
#[async_trait]
pub trait Clock: Send + Sync {
    fn now(&self) -> Millis;
    async fn sleep(&self, time: Duration);
}

pub struct WallClock;

#[async_trait]
impl Clock for WallClock {
    fn now(&self) -> Millis {
        millis(jiff::Timestamp::now())
    }

    async fn sleep(&self, time: Duration) {
        tokio::time::sleep(time).await;
    }
}

/// The checks after a deployment; each string is one that failed.
#[async_trait]
pub trait Checks: Send + Sync {
    async fn failures(&self) -> Vec<String>;
}

/// What the driver tells whoever looks on.
pub enum Notice<'a> {
    Entered {
        plan: &'a Plan,
        state: &'a State,
    },
    Acting(&'a Action),
    Judged {
        plan: &'a Plan,
        state: &'a State,
        judgement: &'a Judgement,
        counts: &'a Window,
    },
    Trouble(String),
}

/// How the command ended; the rollout itself may only be held.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum End {
    Outcome(Outcome),
    Held(Hold),
}

/// Times of the judged stages.
#[derive(Debug, Clone, Copy)]
pub struct Pace {
    pub window: Duration,
    pub warm_up: Duration,
    /// How often the world is looked at while there is nothing to do.
    pub tick: Duration,
}

pub struct Driver<'a> {
    pub platform: &'a dyn Platform,
    pub metrics: &'a dyn Metrics,
    pub checks: &'a dyn Checks,
    pub clock: &'a dyn Clock,
    pub decide: Decide,
    pub desk: &'a dyn Desk,
    pub writer: &'a Writer,
    pub pace: Pace,
    pub audience: &'a (dyn Fn(Notice<'_>) + Send + Sync),
}

/// How long a report's counts are waited for: a way back may be in a hurry.
const SEEN_WITHIN: Duration = Duration::from_secs(2);

/// An action that the platform has refused, and since when.
struct Refused {
    action: Action,
    why: String,
    since: Millis,
}

impl Refused {
    /// The hold that this has become, once it has lasted as long as a hold may.
    fn hold(&self, plan: &Plan, now: Millis) -> Option<Hold> {
        let deadline = self.since + plan.limits.max_hold;
        let reason = HoldReason::Refused(self.why.clone());
        (now >= deadline).then_some(Hold {
            reason,
            since: self.since,
            deadline,
        })
    }
}

/// The counting of the stage that is being watched.
struct Counting {
    judge: Judge,
    windows: u64,
    /// When the next window begins or ends.
    due: Millis,
    /// The sample at the beginning of the window, and when it was taken.
    from: Option<(Millis, Vec<InstanceCounts>)>,
    /// The newest verdict on the current stage.
    verdict: Option<Verdict>,
    /// The newest counts of every instance so far: some are gone when they are added up.
    seen: Vec<InstanceCounts>,
}

impl Driver<'_> {
    /// Drives the rollout in `journal` to its end, or to a hold that outlasts its deadline.
    pub async fn run(&self, journal: &mut Journal) -> Result<End> {
        let plan = journal.plan().clone();
        let mut state = journal.state().resumed();
        if state != journal.state() {
            journal
                .append([Entry::State {
                    state: state.clone(),
                }])
                .await?;
        }
        let mut counting = self.replay(journal);
        if state.exposed {
            // What the command before has seen is not known, and the candidate may be about to go.
            let seen = tokio::time::timeout(SEEN_WITHIN, self.metrics.totals()).await;
            remember(
                &mut counting.seen,
                &seen.ok().and_then(Result::ok).unwrap_or_default(),
            );
        }
        let mut claimed = false;
        let mut refused: Option<Refused> = None;
        loop {
            journal.compact(&counting.judge, counting.windows).await?;
            let status = self.status(&mut claimed).await;
            let platform = match &status {
                Ok(status) => Some(view(&plan, status)),
                Err(error) if error.is::<StaleWriter>() => return Err(StaleWriter.into()),
                Err(error) => {
                    (self.audience)(Notice::Trouble(format!("the platform: {error:#}")));
                    None
                }
            };
            if let Some(view) = &platform
                && is_judged(&plan, &state, view)
            {
                self.count(&plan, &state, &mut counting, journal).await?;
            }
            let (platform, request) = match self.desk.request().await {
                Ok(request) => (platform, request),
                Err(error) => {
                    (self.audience)(Notice::Trouble(format!("requests: {error:#}")));
                    (None, None)
                }
            };
            let now = self.clock.now();
            let seen = Observation {
                platform,
                verdict: counting.verdict,
                request,
            };
            let (next, action) = (self.decide)(&plan, &state, &seen, now);
            if next != state {
                journal
                    .append([Entry::State {
                        state: next.clone(),
                    }])
                    .await?;
                if (&next.phase, next.stage) != (&state.phase, state.stage) {
                    counting.enter(&plan, &next, now, self.pace.warm_up);
                }
                state = next;
                (self.audience)(Notice::Entered {
                    plan: &plan,
                    state: &state,
                });
            }
            if let Some(outcome) = state.outcome() {
                let totals = self.totals(journal, &plan, &counting.seen).await;
                journal.append([Entry::Ended { totals }]).await?;
                return Ok(End::Outcome(outcome));
            }
            if let Some(hold) = state.hold.as_ref().filter(|hold| hold.deadline <= now) {
                return Ok(End::Held(hold.clone()));
            }
            match action {
                Some(action) => {
                    refused = self.act(&plan, &state, action, refused, journal).await?;
                    if let Some(hold) = refused.as_ref().and_then(|r| r.hold(&plan, now)) {
                        return Ok(End::Held(hold));
                    }
                }
                None if status.is_err() => self.clock.sleep(PAUSE).await,
                None => {
                    // A window that ends earlier is not kept waiting.
                    let due = match state.phase {
                        Phase::Watch => counting.due.saturating_sub(self.clock.now()),
                        _ => u64::MAX,
                    };
                    let tick = self.pace.tick.min(Duration::from_millis(due.max(1)));
                    self.clock.sleep(tick).await;
                }
            }
        }
    }

    /// The platform's status, once it has agreed to hear no older writer any more.
    async fn status(&self, claimed: &mut bool) -> Result<Status> {
        if !*claimed {
            self.platform.claim(self.writer.token).await?;
            *claimed = true;
        }
        self.platform.status().await
    }

    /// Does an action. What is refused is tried again, and written down once.
    async fn act(
        &self,
        plan: &Plan,
        state: &State,
        action: Action,
        refused: Option<Refused>,
        journal: &mut Journal,
    ) -> Result<Option<Refused>> {
        let again = refused.filter(|refused| refused.action == action);
        if again.is_none() {
            (self.audience)(Notice::Acting(&action));
            journal
                .append([Entry::Intent {
                    action: action.clone(),
                }])
                .await?;
        }
        // A candidate's jobs may take minutes: an abort ends the wait, as a crash would.
        let may_wait = state.phase == Phase::Shift
            && matches!(&action, Action::Scale { release, .. } if *release == plan.candidate);
        let applied = tokio::select! {
            biased;
            applied = self.platform.apply(plan, &action, self.writer.token) => applied,
            () = self.aborted(state.request), if may_wait => return Ok(None),
        };
        match applied {
            Ok(()) => {
                journal.append([Entry::Done { action }]).await?;
                Ok(None)
            }
            Err(error) if error.is::<StaleWriter>() => Err(error),
            Err(error) => {
                let why = format!("{error:#}");
                let refused = match again {
                    Some(again) => Refused { why, ..again },
                    None => {
                        (self.audience)(Notice::Trouble(why.clone()));
                        let error = why.clone();
                        journal
                            .append([Entry::Failed {
                                action: action.clone(),
                                error,
                            }])
                            .await?;
                        Refused {
                            action,
                            why,
                            since: self.clock.now(),
                        }
                    }
                };
                self.clock.sleep(PAUSE).await;
                Ok(Some(refused))
            }
        }
    }

    /// Ends when somebody asks for an abort that has not been heard yet.
    async fn aborted(&self, heard: u64) {
        loop {
            self.clock.sleep(PAUSE).await;
            if let Ok(Some(asked)) = self.desk.request().await
                && asked.number > heard
                && asked.kind == RequestKind::Abort
            {
                return;
            }
        }
    }

    /// Takes a sample where one is due, and judges the window that it ends.
    async fn count(
        &self,
        plan: &Plan,
        state: &State,
        counting: &mut Counting,
        journal: &mut Journal,
    ) -> Result<()> {
        let now = self.clock.now();
        if now < counting.due {
            return Ok(());
        }
        match plan.kind {
            Kind::Rollback => return Ok(()),
            Kind::Deploy => {
                let failures = self.checks.failures().await;
                for failure in &failures {
                    (self.audience)(Notice::Trouble(failure.clone()));
                }
                let passed = failures.is_empty();
                counting.verdict = Some(if passed {
                    Verdict::NonInferior
                } else {
                    Verdict::Regressed
                });
                return Ok(());
            }
            Kind::Canary => {}
        }
        let interval = u64::try_from(self.pace.window.as_millis()).unwrap_or(u64::MAX);
        counting.due = now + interval;
        let later = match self.metrics.sample().await {
            Ok(later) => later,
            Err(error) => {
                (self.audience)(Notice::Trouble(format!("the metrics: {error:#}")));
                counting.verdict = Some(Verdict::ProviderDown);
                return Ok(());
            }
        };
        remember(&mut counting.seen, &later);
        let Some((began, earlier)) = counting.from.replace((now, later.clone())) else {
            return Ok(());
        };
        let seconds = (now - began) as f64 / 1000.0;
        counting.windows += 1;
        let window = metrics::window(plan, counting.windows, seconds, &earlier, &later);
        let judgement = counting.judge.window(&window);
        counting.verdict = Some(judgement.verdict);
        let lines = window.lines(|arm, i| Some(format!("{arm:?}-{i}").to_lowercase()));
        let mut entries: Vec<Entry> = lines.into_iter().map(Entry::Window).collect();
        entries.push(Entry::Judged(judgement.clone()));
        journal.append(entries).await?;
        (self.audience)(Notice::Judged {
            plan,
            state,
            judgement: &judgement,
            counts: &window,
        });
        Ok(())
    }

    /// The judge as the journal's windows made it.
    fn replay(&self, journal: &Journal) -> Counting {
        let state = journal.state();
        let now = self.clock.now();
        let (judge, windows) = replay(journal);
        let warm_up = self.pace.warm_up;
        let mut counting = Counting {
            judge,
            windows,
            due: now,
            from: None,
            verdict: None,
            seen: Vec::new(),
        };
        counting.enter(journal.plan(), &state, now, warm_up);
        counting
    }

    /// Requests and failures of both arms since the start; zeros where nobody can tell.
    async fn totals(&self, journal: &Journal, plan: &Plan, seen: &[InstanceCounts]) -> Totals {
        // What instances that are gone meanwhile had counted is part of it.
        let mut counts = seen.to_vec();
        remember(
            &mut counts,
            &self.metrics.totals().await.unwrap_or_default(),
        );
        let before = &journal.started().counts;
        if before.is_empty() && plan.stable.is_some() {
            // Nobody could tell what had been counted by then.
            return Totals::default();
        }
        let arm = |release: Option<&ReleaseId>| {
            let mut totals = ArmTotals::default();
            for now in counts.iter().filter(|now| Some(&now.release) == release) {
                let then = before
                    .iter()
                    .find(|then| then.release == now.release && then.instance == now.instance);
                let counts =
                    then.map_or_else(|| now.counts.clone(), |then| now.counts.since(&then.counts));
                totals.requests += counts.requests;
                totals.failed += counts.errors;
            }
            totals
        };
        Totals {
            stable: arm(plan.stable.as_ref()),
            candidate: arm(Some(&plan.candidate)),
        }
    }
}

impl Counting {
    /// A new phase: what was counted stays evidence, but the stage's own count starts anew.
    fn enter(&mut self, plan: &Plan, state: &State, now: Millis, warm_up: Duration) {
        self.verdict = None;
        self.from = None;
        self.due = now;
        if state.phase == Phase::Watch && plan.kind == Kind::Canary {
            self.judge.stage(plan.stages[state.stage].weight);
            self.due = now + u64::try_from(warm_up.as_millis()).unwrap_or(0);
        }
    }
}

/// Whether there is something to judge: a stage, or what has traffic already while the next is prepared.
fn is_judged(plan: &Plan, state: &State, view: &View) -> bool {
    match state.phase {
        Phase::Watch => true,
        Phase::Shift => plan.kind == Kind::Canary && view.candidate.weight > 0,
        _ => false,
    }
}

/// Keeps the newest counts of each instance.
fn remember(seen: &mut Vec<InstanceCounts>, newest: &[InstanceCounts]) {
    for new in newest {
        let same =
            |old: &&mut InstanceCounts| old.release == new.release && old.instance == new.instance;
        match seen.iter_mut().find(same) {
            Some(old) => old.counts.clone_from(&new.counts),
            None => seen.push(new.clone()),
        }
    }
}

/// The judge after every window of a journal, and their number: the same code that judges live.
pub fn replay(journal: &Journal) -> (Judge, u64) {
    let started = journal.started();
    let mut judge = Judge::new(
        &started.judge,
        Some(started.bounds.as_deref().unwrap_or(&[])),
    );
    let mut open: Vec<WindowLine> = Vec::new();
    let mut windows = 0;
    for line in journal.lines() {
        match &line.entry {
            Entry::State { state } if state.phase == Phase::Watch && state.hold.is_none() => {
                judge.stage(started.plan.stages[state.stage].weight);
            }
            Entry::Window(window) => open.push(window.clone()),
            Entry::Snapshot {
                judge: then,
                windows: number,
            } => {
                judge = Judge::clone(then);
                windows = *number;
            }
            Entry::Judged(_) => {
                windows += 1;
                judge.window(&Window::from_lines(&std::mem::take(&mut open)));
            }
            _ => {}
        }
    }
    (judge, windows)
}

/// The two releases of a rollout as the platform has them.
pub fn view(plan: &Plan, status: &Status) -> View {
    let arm = |id| {
        status.release(id).map_or_else(Arm::default, |release| Arm {
            desired: release.desired,
            ready: release.ready(),
            weight: release.weight,
            broken: release.broken.clone(),
            foreign: release.paused.clone(),
            unfinished: release.unfinished,
        })
    };
    let (mut stable, mut candidate) = (
        plan.stable.as_ref().map_or_else(Arm::default, arm),
        arm(&plan.candidate),
    );
    // One that was judged as another is no candidate any more; of stable a person may know better.
    let edited = |id| status.release(id)?.edited.clone();
    candidate.broken = edited(&plan.candidate).or(candidate.broken);
    stable.foreign = plan.stable.as_ref().and_then(edited).or(stable.foreign);
    View {
        stable,
        candidate,
        unseen: status.unseen,
        recorded: status
            .history
            .iter()
            .rev()
            .find(|entry| entry.rollout == plan.rollout && entry.release == plan.candidate)
            .map(|entry| entry.mark),
        others: plan
            .others
            .iter()
            .filter(|id| status.release(id).is_some_and(|other| other.desired > 0))
            .cloned()
            .collect(),
    }
}
