//! The rollout's state machine: pure, and the only place where a rollout is decided.
//!
//! `decide` compares what should be with what is and names at most one next action. Every action
//! says how things should be afterwards, so repeating one changes nothing; whoever crashed
//! anywhere goes on by calling `decide` again with the journalled state.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::config::{Stage, TrafficKind};
use crate::release::ReleaseId;

/// Milliseconds since the Unix epoch.
pub type Millis = u64;

/// What a rollout was started with; it never changes.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Plan {
    /// The rollout's name: unique in its environment, sorted by start.
    pub rollout: String,
    pub environment: String,
    pub kind: Kind,
    /// The release in service, if there is one.
    pub stable: Option<ReleaseId>,
    pub candidate: ReleaseId,
    /// The processes (pods) that carry all of the traffic.
    pub replicas: u32,
    /// A release with traffic has so many processes, where stable has as many: one may be taken
    /// away at any time.
    #[serde(default = "one")]
    pub least: u32,
    /// Whether the numbers of processes make the split, as behind a plain Service.
    #[serde(default)]
    pub by_replicas: bool,
    /// What splits the traffic, where the settings can say: whoever goes on must have the same.
    #[serde(default)]
    pub traffic: Option<TrafficKind>,
    /// Whether stable goes on running without traffic once the candidate has its place: then a
    /// rollback waits for no process to start.
    #[serde(default)]
    pub keeps_previous: bool,
    /// What earlier rollouts have left running besides the two; it goes once the candidate has its
    /// place.
    #[serde(default)]
    pub others: Vec<ReleaseId>,
    pub stages: Vec<Stage>,
    pub limits: Limits,
}

fn one() -> u32 {
    1
}

/// Times in milliseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Limits {
    pub min_stage: Millis,
    pub max_stage: Millis,
    pub max_hold: Millis,
    pub ready_within: Millis,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// Forward in judged stages.
    Canary,
    /// Forward at once; smoke checks are the judge.
    Deploy,
    /// Back to a release that has been judged before.
    Rollback,
}

/// Where a rollout stands. All of it is journalled before anything is done about it.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct State {
    pub phase: Phase,
    /// Index into the plan's stages.
    pub stage: usize,
    /// When the phase began.
    pub since: Millis,
    pub hold: Option<Hold>,
    /// Since when the candidate has been seen without the capacity for its stage.
    #[serde(default)]
    pub unready_since: Option<Millis>,
    /// Whether the candidate has ever had traffic.
    pub exposed: bool,
    /// The newest request that was taken into account.
    pub request: u64,
    /// How often others have undone what this stage had reached.
    #[serde(default)]
    pub undone: u8,
    /// With how many processes the candidate has been seen in this stage, as it was asked for.
    #[serde(default)]
    pub reached: u32,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "name")]
pub enum Phase {
    /// Bringing first the capacity and then the weight to the stage's.
    Shift,
    /// The stage's weight is in effect; what must hold is being watched.
    Watch,
    /// Everything was passed: the candidate becomes stable, the old release goes.
    Finish,
    /// All traffic goes back to stable, then the candidate goes.
    Back {
        reason: Reason,
    },
    Ended {
        outcome: Outcome,
    },
}

/// Why a rollout turned back.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "name", content = "why")]
pub enum Reason {
    Aborted,
    Regressed,
    NotReady,
    /// It will never get ready by waiting: the platform's words.
    Broken(String),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    Healthy,
    RolledBack,
    Aborted,
    /// The candidate never had traffic; nothing changed.
    Failed,
}

/// A stop that nobody planned, or a gate; it ends by itself, by `promote`, or by `abort`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Hold {
    pub reason: HoldReason,
    pub since: Millis,
    /// When the command stops waiting (exit code 2); the rollout can be resumed.
    pub deadline: Millis,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "name", content = "why")]
pub enum HoldReason {
    /// A planned stop that a person opens.
    Gate(String),
    NoData,
    ProviderDown,
    PlatformDown,
    /// Both arms fail: no proof of anything.
    Outage,
    /// The observed share of traffic is not the weight.
    ShareOff,
    /// No verdict within the stage's time.
    Undecided,
    /// Processes that were ready are not.
    NoCapacity,
    /// The platform refuses what is asked of it: its words.
    Refused(String),
    /// Somebody has changed a release, or stopped it: what, and who.
    Foreign(String),
    /// Somebody undoes again and again what this stage has reached.
    Contested,
}

/// What is known at the moment of a decision.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Observation {
    /// `None` where the platform does not answer.
    pub platform: Option<View>,
    /// The verdict on everything counted, once something has been since the phase began.
    pub verdict: Option<Verdict>,
    /// What a person asked for.
    pub request: Option<Request>,
}

/// The environment as the platform sees it.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct View {
    pub stable: Arm,
    pub candidate: Arm,
    /// Whether the weights are what the router was given, and nobody has seen it follow.
    pub unseen: bool,
    /// What the platform has on record of this rollout.
    pub recorded: Option<Mark>,
    /// The plan's other releases that still run something.
    pub others: Vec<ReleaseId>,
}

/// One release's processes and traffic.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub struct Arm {
    pub desired: u32,
    pub ready: u32,
    /// Percent.
    pub weight: u8,
    /// Why it will not get ready by waiting.
    pub broken: Option<String>,
    /// What somebody else has done to it that a canary must not go on from.
    pub foreign: Option<String>,
    /// Whether there may be something to take away though nothing runs.
    pub unfinished: bool,
}

/// The judge's words, with the cases that are not about the candidate apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    Regressed,
    NonInferior,
    Undecided,
    NoData,
    ProviderDown,
    /// Undecided, because both arms are above the outage rate.
    Outage,
    /// Undecided, because the arms' shares of traffic are not their weights.
    ShareOff,
}

/// A person's word, numbered so that it counts once.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Request {
    pub number: u64,
    pub kind: RequestKind,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RequestKind {
    /// Move on from this stage; heard at another one it means nothing.
    Promote {
        stage: usize,
    },
    Abort,
}

/// How things should be. Applying one twice is the same as once.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "name")]
pub enum Action {
    /// Run so many processes of the release; surplus ones are drained, then stopped.
    Scale { release: ReleaseId, replicas: u32 },
    /// Split the traffic: percents that sum to 100, or nothing at all.
    Route { weights: Vec<(ReleaseId, u8)> },
    /// Keep on record how this rollout ended, in place of what it had on record before, and with
    /// it the environment's stable release.
    Record { mark: Mark },
}

/// What a rollout earned its candidate.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mark {
    /// It is the stable release now, and one that can be rolled back to later.
    Healthy,
    RolledBack,
}

pub type Decide = fn(&Plan, &State, &Observation, Millis) -> (State, Option<Action>);

/// What others have undone is done again so often in each stage.
const MOST_UNDONE: u8 = 3;

impl State {
    pub fn start(now: Millis) -> Self {
        Self {
            phase: Phase::Shift,
            stage: 0,
            since: now,
            hold: None,
            unready_since: None,
            exposed: false,
            request: 0,
            undone: 0,
            reached: 0,
        }
    }

    /// The same state for a command that goes on with it: what waits gets its whole time again.
    #[must_use]
    pub fn resumed(self) -> Self {
        Self {
            hold: None,
            unready_since: None,
            undone: 0,
            ..self
        }
    }

    pub fn outcome(&self) -> Option<Outcome> {
        match self.phase {
            Phase::Ended { outcome } => Some(outcome),
            _ => None,
        }
    }

    fn enter(&mut self, phase: Phase, now: Millis) {
        self.phase = phase;
        self.since = now;
        self.hold = None;
        self.unready_since = None;
    }

    fn turn_back(&mut self, reason: Reason, now: Millis) {
        self.enter(Phase::Back { reason }, now);
    }

    /// Whether the candidate has been unready for as long as it may be; it counts from the first time on that
    /// this is asked.
    fn is_late(&mut self, plan: &Plan, now: Millis) -> bool {
        let since = *self.unready_since.get_or_insert(now);
        now.saturating_sub(since) >= plan.limits.ready_within
    }

    /// Does again what others have undone, but does not fight over it: one who has undone it so often
    /// will do so again, and a person has to say which of the two is right.
    fn do_again(&mut self, plan: &Plan, now: Millis) {
        if self.undone == MOST_UNDONE {
            self.hold(HoldReason::Contested, plan, now);
            return;
        }
        self.undone += 1;
        self.reached = 0;
        self.enter(Phase::Shift, now);
    }

    /// One trouble that follows another is one hold, with one deadline. A gate has its own.
    fn hold(&mut self, reason: HoldReason, plan: &Plan, now: Millis) {
        let gate = |reason: &HoldReason| matches!(reason, HoldReason::Gate(_));
        match &mut self.hold {
            Some(hold) if gate(&hold.reason) == gate(&reason) => hold.reason = reason,
            _ => {
                let deadline = now + plan.limits.max_hold;
                self.hold = Some(Hold {
                    reason,
                    since: now,
                    deadline,
                });
            }
        }
    }
}

impl Plan {
    /// What the releases have earned once the rollout has earned its candidate `mark`.
    pub fn marks(&self, mark: Mark) -> Vec<(ReleaseId, Mark)> {
        let replaced = self.stable.iter().filter(|_| {
            // Whoever goes back has found the release in service wanting.
            self.kind == Kind::Rollback && mark == Mark::Healthy
        });
        replaced
            .map(|stable| (stable.clone(), Mark::RolledBack))
            .chain([(self.candidate.clone(), mark)])
            .collect()
    }

    /// The release in service after that.
    pub fn stable_after(&self, mark: Mark) -> Option<&ReleaseId> {
        match mark {
            Mark::Healthy => Some(&self.candidate),
            Mark::RolledBack => self.stable.as_ref(),
        }
    }

    /// The processes that carry all of the traffic now: an autoscaler may have made more of stable
    /// than were asked for.
    fn full(&self, view: &View) -> u32 {
        self.replicas.max(view.stable.desired)
    }

    /// The processes that `weight` percent of the traffic need, where `full` carry all of it.
    pub fn capacity(&self, weight: u8, full: u32) -> u32 {
        let weight = u32::from(weight);
        if self.by_replicas && weight < 100 {
            // c of (full + c) processes get c / (full + c) of the traffic.
            let rest = 100 - weight;
            return ((full * weight + rest / 2) / rest).max(1);
        }
        (full * weight).div_ceil(100).max(self.least.min(full))
    }

    /// The split of a stage.
    fn weights(&self, weight: u8) -> Vec<(ReleaseId, u8)> {
        match &self.stable {
            Some(stable) if weight < 100 => {
                vec![
                    (stable.clone(), 100 - weight),
                    (self.candidate.clone(), weight),
                ]
            }
            _ => vec![(self.candidate.clone(), 100)],
        }
    }

    fn scale(release: &ReleaseId, replicas: u32) -> Option<Action> {
        Some(Action::Scale {
            release: release.clone(),
            replicas,
        })
    }
}

/// The next state, to be journalled, and then the next action, if there is one.
pub fn decide(
    plan: &Plan,
    state: &State,
    seen: &Observation,
    now: Millis,
) -> (State, Option<Action>) {
    let mut next = state.clone();
    let request = seen
        .request
        .filter(|request| request.number > state.request);

    // Abort wins over everything but an end: from the moment that stable's processes go, the way
    // back is a rollback. Whether they have gone must be known before an abort is heard.
    if let Some(Request {
        number,
        kind: RequestKind::Abort,
    }) = request
        && (next.phase != Phase::Finish || seen.platform.is_some())
    {
        next.request = number;
        let replaced = seen.platform.as_ref().is_some_and(|view| {
            view.recorded == Some(Mark::Healthy)
                && (plan.stable.is_none() || view.stable.desired == 0)
        });
        if !replaced && !matches!(next.phase, Phase::Back { .. } | Phase::Ended { .. }) {
            next.turn_back(Reason::Aborted, now);
        }
    }
    let Some(view) = &seen.platform else {
        if next.outcome().is_none() {
            next.hold(HoldReason::PlatformDown, plan, now);
        }
        return (next, None);
    };
    if matches!(
        &next.hold,
        Some(Hold {
            reason: HoldReason::PlatformDown,
            ..
        })
    ) {
        next.hold = None;
    }
    let promote =
        request.filter(|request| request.kind == RequestKind::Promote { stage: state.stage });

    let action = match next.phase.clone() {
        Phase::Shift => shift(plan, &mut next, view, seen.verdict, now),
        Phase::Watch => watch(plan, &mut next, view, seen.verdict, promote, now),
        Phase::Finish => finish(plan, &mut next, view, now),
        Phase::Back { reason } => back(plan, &mut next, view, &reason, now),
        Phase::Ended { .. } => None,
    };
    (next, action)
}

/// Capacity first, then weight.
fn shift(
    plan: &Plan,
    next: &mut State,
    view: &View,
    verdict: Option<Verdict>,
    now: Millis,
) -> Option<Action> {
    // What has traffic already is judged, however long the next weight takes.
    if is_regressed(plan, verdict) {
        next.turn_back(Reason::Regressed, now);
        return None;
    }
    let weight = plan.stages[next.stage].weight;
    let needed = plan.capacity(weight, plan.full(view));
    if let Some(why) = view
        .candidate
        .broken
        .clone()
        .filter(|_| view.candidate.ready < needed)
    {
        next.turn_back(Reason::Broken(why), now);
        return None;
    }
    if let Some(stable) = &plan.stable
        && view.stable.desired < plan.replicas
    {
        return Plan::scale(stable, plan.replicas);
    }
    if let Some(other) = view.others.first()
        && plan.by_replicas
    {
        // Every pod gets requests there.
        return Plan::scale(other, 0);
    }
    if view.candidate.desired < needed {
        if view.candidate.desired < next.reached {
            next.do_again(plan, now);
            return None;
        }
        return Plan::scale(&plan.candidate, needed);
    }
    next.reached = needed;
    if view.candidate.ready < needed {
        if next.is_late(plan, now) {
            next.turn_back(Reason::NotReady, now);
        }
        return None;
    }
    next.unready_since = None;
    if view.candidate.weight != weight || view.unseen {
        next.exposed = true;
        return Some(Action::Route {
            weights: plan.weights(weight),
        });
    }
    next.exposed = true;
    next.enter(Phase::Watch, now);
    None
}

fn watch(
    plan: &Plan,
    next: &mut State,
    view: &View,
    verdict: Option<Verdict>,
    promote: Option<Request>,
    now: Millis,
) -> Option<Action> {
    let stage = &plan.stages[next.stage];
    let needed = plan.capacity(stage.weight, plan.full(view));
    if let Some(why) = view.candidate.broken.clone() {
        next.turn_back(Reason::Broken(why), now);
        return None;
    }
    if is_regressed(plan, verdict) {
        next.turn_back(Reason::Regressed, now);
        return None;
    }
    // Stable must be able to take everything back.
    let is_stable_short = plan.stable.is_some() && view.stable.desired < plan.replicas;
    let is_short = view.candidate.desired < needed.min(next.reached);
    if view.candidate.weight != stage.weight || is_short || is_stable_short {
        next.do_again(plan, now);
        return None;
    }
    if view.candidate.desired < needed {
        // An autoscaler has made more of stable.
        next.enter(Phase::Shift, now);
        return None;
    }
    if view.candidate.ready < needed {
        // What ails both is no fault of the candidate's.
        let may_return = plan.stable.is_some() && view.stable.ready >= plan.replicas;
        if next.is_late(plan, now) && may_return {
            next.turn_back(Reason::NotReady, now);
            return None;
        }
        next.hold(HoldReason::NoCapacity, plan, now);
        return None;
    }
    next.unready_since = None;
    if let Some(Request { number, .. }) = promote {
        next.request = number;
        advance(plan, next, now);
        return None;
    }
    if let Some(why) = foreign(plan, view) {
        next.hold(HoldReason::Foreign(why), plan, now);
        return None;
    }
    let elapsed = now.saturating_sub(next.since);
    let passed = match plan.kind {
        Kind::Rollback => true,
        Kind::Deploy => verdict == Some(Verdict::NonInferior),
        Kind::Canary => verdict == Some(Verdict::NonInferior) && elapsed >= plan.limits.min_stage,
    };
    if passed {
        match &stage.gate {
            Some(gate) => next.hold(HoldReason::Gate(gate.clone()), plan, now),
            None => advance(plan, next, now),
        }
        return None;
    }
    let reason = match verdict {
        Some(Verdict::NoData) => Some(HoldReason::NoData),
        Some(Verdict::ProviderDown) => Some(HoldReason::ProviderDown),
        Some(Verdict::Outage) => Some(HoldReason::Outage),
        Some(Verdict::ShareOff) => Some(HoldReason::ShareOff),
        Some(Verdict::Undecided) if elapsed >= plan.limits.max_stage => Some(HoldReason::Undecided),
        _ => None,
    };
    match reason {
        Some(reason) => next.hold(reason, plan, now),
        None => next.hold = None,
    }
    None
}

/// Whether what the candidate does with its traffic shows that it is worse; whoever goes back asks nobody.
fn is_regressed(plan: &Plan, verdict: Option<Verdict>) -> bool {
    plan.kind != Kind::Rollback && verdict == Some(Verdict::Regressed)
}

/// Why a canary does not go on by itself: somebody has stopped a release, or has changed the one that
/// the candidate is compared with. Whoever goes back has no time for that.
fn foreign(plan: &Plan, view: &View) -> Option<String> {
    let arms = [&view.stable, &view.candidate];
    let mut foreign = arms.into_iter().filter_map(|arm| arm.foreign.clone());
    foreign.next().filter(|_| plan.kind == Kind::Canary)
}

fn advance(plan: &Plan, next: &mut State, now: Millis) {
    (next.undone, next.reached) = (0, 0);
    if next.stage + 1 < plan.stages.len() {
        next.stage += 1;
        next.enter(Phase::Shift, now);
    } else {
        next.enter(Phase::Finish, now);
    }
}

/// On record first, then the old release goes; until it does, there is a way back.
fn finish(plan: &Plan, next: &mut State, view: &View, now: Millis) -> Option<Action> {
    let is_recorded = view.recorded == Some(Mark::Healthy);
    // Once it is on record, an autoscaler may say how many are enough.
    let enough = match is_recorded {
        true => plan.full(view).min(view.candidate.desired).max(1),
        false => plan.full(view),
    };
    let carries_all = view.candidate.weight == 100 && view.candidate.ready >= enough;
    if !is_recorded {
        if !carries_all {
            match view.candidate.weight {
                100 => next.enter(Phase::Shift, now),
                _ => next.do_again(plan, now),
            }
            return None;
        }
        return Some(Action::Record {
            mark: Mark::Healthy,
        });
    }
    if let Some(stable) = &plan.stable
        && view.stable.desired > 0
    {
        if let Some(why) = view.candidate.broken.clone() {
            next.turn_back(Reason::Broken(why), now);
            return None;
        }
        if !carries_all {
            next.hold(HoldReason::NoCapacity, plan, now);
            return None;
        }
        if !plan.keeps_previous {
            return Plan::scale(stable, 0);
        }
    }
    if let Some(other) = view.others.first() {
        return Plan::scale(other, 0);
    }
    next.enter(
        Phase::Ended {
            outcome: Outcome::Healthy,
        },
        now,
    );
    None
}

/// Traffic first: stable kept its full capacity, so this waits for nothing.
fn back(
    plan: &Plan,
    next: &mut State,
    view: &View,
    reason: &Reason,
    now: Millis,
) -> Option<Action> {
    match &plan.stable {
        Some(stable) => {
            if view.stable.weight != 100 || view.unseen {
                if view.stable.ready > 0 {
                    return Some(Action::Route {
                        weights: vec![(stable.clone(), 100)],
                    });
                }
                if view.stable.desired >= plan.replicas {
                    next.hold(HoldReason::NoCapacity, plan, now);
                    return None;
                }
            }
            if view.stable.desired < plan.replicas {
                return Plan::scale(stable, plan.replicas);
            }
        }
        None if view.candidate.weight > 0 || view.unseen => {
            return Some(Action::Route {
                weights: Vec::new(),
            });
        }
        None => {}
    }
    next.hold = None;
    if next.exposed && view.recorded != Some(Mark::RolledBack) {
        return Some(Action::Record {
            mark: Mark::RolledBack,
        });
    }
    if view.candidate.desired > 0 || view.candidate.unfinished {
        return Plan::scale(&plan.candidate, 0);
    }
    let outcome = match reason {
        Reason::Aborted => Outcome::Aborted,
        Reason::Regressed => Outcome::RolledBack,
        Reason::NotReady | Reason::Broken(_) if next.exposed => Outcome::RolledBack,
        Reason::NotReady | Reason::Broken(_) => Outcome::Failed,
    };
    next.enter(Phase::Ended { outcome }, now);
    None
}

/// Names for people: those of the journal.
macro_rules! display_as_journalled {
    ($($name:ty),*) => {$(
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                Serialize::serialize(self, f)
            }
        }
    )*};
}
display_as_journalled!(Verdict, Mark, Outcome, Kind);
