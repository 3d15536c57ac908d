//! The model: an environment, the journal of its rollout, and what can happen to both.

use std::hash::Hash;

use stateright::{Model, Property};

use super::super::engine::{
    Action, Arm, Decide, HoldReason, Kind, Limits, Mark, Observation, Outcome, Phase, Plan, Reason,
    Request, RequestKind, State, Verdict, View, decide,
};
use crate::config::Stage;
use crate::release::ReleaseId;

/// Steps after which a rollout in a world that works again must have ended.
const FAIR_STEPS: usize = 60;

#[derive(Clone)]
pub struct Rollout {
    pub plan: Plan,
    pub decide: Decide,
    /// Whether the platform refuses a writer whose token is old.
    pub fenced: bool,
    pub budget: Budget,
}

/// How often each kind of trouble may happen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Budget {
    pub faults: u8,
    elapses: u8,
    aborts: u8,
    promotes: u8,
    /// Changes by somebody who does not know of the rollout.
    pub meddling: u8,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct World {
    /// The environment.
    pub stable: Arm,
    pub candidate: Arm,
    /// Whether the weights were only written down.
    unseen: bool,
    recorded: Option<Mark>,
    /// What an earlier rollout has left running.
    others: Vec<ReleaseId>,
    /// The journal.
    pub state: State,
    request: Option<Request>,
    /// What a stalled command is still going to do.
    stalled: Option<Action>,
    pub now: u64,
    left: Budget,
    /// Whether anything happened that may end a rollout of a good release badly.
    excused: bool,
    pub violated: Option<&'static str>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// The driver goes once around its loop; what became of the action it chose.
    Step {
        verdict: Option<Verdict>,
        fate: Fate,
    },
    PlatformAway,
    StalledActs,
    Ready {
        candidate: bool,
    },
    Dies {
        candidate: bool,
    },
    Breaks,
    /// Somebody takes traffic or processes away.
    Meddles(Meddling),
    Elapse,
    Ask(RequestKind),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Meddling {
    Weights,
    Candidate,
    Stable,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    Done,
    /// Killed before the state was written: nothing happened at all.
    KilledBefore,
    /// Killed after the state was written, or the action failed: the same to the world.
    NotDone,
    /// Done, and then killed, or the reply was lost: done again at the next turn if need be.
    DoneUnheard,
    /// Killed in the middle: what the candidate needs was begun to be made, and nothing runs; or the weights
    /// were written, and the router does not follow.
    Half,
    /// What is run before the candidate's first process, such as a migration, fails for good.
    JobFails,
    /// The command stalls before the action; another one takes over.
    Stalled,
}

const VERDICTS: [Option<Verdict>; 8] = [
    None,
    Some(Verdict::NonInferior),
    Some(Verdict::Regressed),
    Some(Verdict::Undecided),
    Some(Verdict::NoData),
    Some(Verdict::ProviderDown),
    Some(Verdict::Outage),
    Some(Verdict::ShareOff),
];

impl Rollout {
    pub fn new(kind: Kind, stable: bool, stages: &[(u8, Option<&str>)]) -> Self {
        let stage = |(weight, gate): &(u8, Option<&str>)| Stage {
            weight: *weight,
            gate: gate.map(str::to_owned),
        };
        Self {
            plan: Plan {
                rollout: "r1".to_owned(),
                environment: "production".to_owned(),
                kind,
                stable: stable.then(|| "stable".into()),
                candidate: "candidate".into(),
                replicas: 2,
                least: 1,
                by_replicas: false,
                traffic: None,
                keeps_previous: false,
                others: Vec::new(),
                stages: stages.iter().map(stage).collect(),
                limits: Limits {
                    min_stage: 1,
                    max_stage: 2,
                    max_hold: 2,
                    ready_within: 2,
                },
            },
            decide,
            fenced: true,
            budget: Budget {
                faults: 2,
                elapses: 3,
                aborts: 1,
                promotes: 1,
                meddling: 0,
            },
        }
    }

    pub fn canary() -> Self {
        Self::new(
            Kind::Canary,
            true,
            &[(10, None), (60, Some("sign-off")), (100, None)],
        )
    }

    pub fn observe(&self, world: &World, platform: bool, verdict: Option<Verdict>) -> Observation {
        Observation {
            platform: platform.then(|| View {
                stable: world.stable.clone(),
                candidate: world.candidate.clone(),
                unseen: world.unseen,
                recorded: world.recorded,
                others: world.others.clone(),
            }),
            verdict,
            request: world.request,
        }
    }

    /// Journals the next state and checks what the change may be founded on.
    fn journal(&self, world: &mut World, next: State, verdict: Option<Verdict>) {
        let before = &world.state;
        let moved_on = next.stage > before.stage
            || (next.phase == Phase::Finish && before.phase == Phase::Watch);
        let promoted = next.request > before.request && next.request == 2;
        let weight = self.plan.stages[before.stage].weight;
        if moved_on {
            let passed = verdict == Some(Verdict::NonInferior) || self.plan.kind == Kind::Rollback;
            let gated = self.plan.stages[before.stage].gate.is_some();
            if !promoted && (!passed || gated) {
                world.violated = Some("3: only non-inferior or a promote moves a stage on");
            }
            if world.candidate.weight != weight {
                world.violated = Some("10: a stage was passed at another weight than its own");
            }
            if world.unseen {
                world.violated = Some("10: a stage was passed before its weight was in effect");
            }
            if world.candidate.ready < self.plan.capacity(weight, self.plan.replicas) {
                world.violated = Some("10: a stage was passed with too few processes");
            }
        }
        let turned = |state: &State| matches!(state.phase, Phase::Back { .. });
        if turned(&next) && !turned(before) {
            let Phase::Back { reason } = &next.phase else {
                return;
            };
            let founded = match reason {
                Reason::Regressed => verdict == Some(Verdict::Regressed),
                Reason::Aborted => next.request > before.request,
                Reason::Broken(_) => world.candidate.broken.is_some(),
                Reason::NotReady => {
                    world.candidate.ready < self.plan.capacity(weight, self.plan.replicas)
                        && before
                            .unready_since
                            .is_some_and(|since| world.now - since >= self.plan.limits.ready_within)
                }
            };
            if !founded {
                world.violated = Some("3: turned back without a reason (no data, provider down?)");
            }
        }
        if turned(before) && !turned(&next) && next.outcome().is_none() {
            world.violated = Some("4: what turned back goes forward again");
        }
        world.state = next;
    }

    /// The platform carries out an action, and the invariants are checked on its effect.
    fn apply(&self, world: &mut World, action: &Action) {
        let candidate = &self.plan.candidate;
        let turned = matches!(world.state.phase, Phase::Back { .. } | Phase::Ended { .. });
        match action {
            Action::Scale { release, .. } if self.plan.others.contains(release) => {
                if world.recorded != Some(Mark::Healthy) {
                    world.violated = Some("8: what can be gone back to went before its successor");
                }
                world.others.retain(|other| other != release);
            }
            Action::Scale { release, replicas } => {
                let is_candidate = release == candidate;
                if !is_candidate && *replicas < self.plan.replicas {
                    let replaced = world.recorded == Some(Mark::Healthy)
                        && world.candidate.weight == 100
                        && world.candidate.ready >= self.plan.replicas;
                    if !replaced {
                        world.violated = Some("2: stable lost capacity before it was replaced");
                    }
                }
                let arm = if is_candidate {
                    &mut world.candidate
                } else {
                    &mut world.stable
                };
                if *replicas < arm.desired && (arm.weight > 0 || world.unseen) && *replicas == 0 {
                    world.violated = Some("1: a release with traffic was scaled to nothing");
                }
                arm.desired = *replicas;
                arm.unfinished = false;
                arm.ready = arm.ready.min(*replicas);
                if *replicas == 0 {
                    arm.broken = None;
                }
            }
            Action::Route { weights } => {
                let of = |id| {
                    weights
                        .iter()
                        .find(|(other, _)| other == id)
                        .map_or(0, |w| w.1)
                };
                let sum: u32 = weights.iter().map(|(_, weight)| u32::from(*weight)).sum();
                if sum != 100 && !(weights.is_empty() && self.plan.stable.is_none()) {
                    world.violated = Some("1: the weights do not sum to 100");
                }
                let (new, stable) = (of(candidate), self.plan.stable.as_ref().map_or(0, &of));
                if new > world.candidate.weight {
                    if world.candidate.ready < self.plan.capacity(new, self.plan.replicas) {
                        world.violated = Some("1: weight without ready capacity");
                    }
                    // Spelled out, as the plan's own arithmetic is what is asked about.
                    if world.candidate.ready < self.plan.least {
                        world.violated = Some("1: traffic to a release without a spare process");
                    }
                    if turned {
                        world.violated = Some("4: the candidate's weight rose after turning back");
                    }
                }
                if stable > world.stable.weight && world.stable.ready == 0 {
                    world.violated = Some("1: traffic to a stable release that is not there");
                }
                (world.candidate.weight, world.stable.weight) = (new, stable);
                world.unseen = false;
            }
            Action::Record { mark } => {
                if *mark == Mark::Healthy && world.state.phase != Phase::Finish {
                    world.violated = Some("8: healthy without having passed");
                }
                world.recorded = Some(*mark);
            }
        }
    }

    pub fn step(&self, world: &mut World, verdict: Option<Verdict>, fate: Fate) {
        if fate == Fate::KilledBefore {
            return;
        }
        let seen = self.observe(world, true, verdict);
        let (next, action) = (self.decide)(&self.plan, &world.state, &seen, world.now);
        self.journal(world, next, verdict);
        match (action, fate) {
            (Some(action), Fate::Done | Fate::DoneUnheard) => self.apply(world, &action),
            (Some(action), Fate::Stalled) => world.stalled = Some(action),
            (
                Some(Action::Scale {
                    release,
                    replicas: 1..,
                }),
                Fate::Half | Fate::JobFails,
            ) if release == self.plan.candidate && world.candidate.desired == 0 => {
                world.candidate.unfinished = true;
                if fate == Fate::JobFails {
                    world.candidate.broken = Some("the migration failed".to_owned());
                    world.excused = true;
                }
            }
            (Some(action @ Action::Route { .. }), Fate::Half) => {
                self.apply(world, &action);
                world.unseen = true;
            }
            _ => {}
        }
    }

    /// The rollout's end where everything works from now on, and nobody interferes.
    fn fair_end(&self, world: &World) -> Option<World> {
        let mut world = world.clone();
        for _ in 0..FAIR_STEPS {
            if world.state.outcome().is_some() {
                return Some(world);
            }
            if let Some(hold) = &world.state.hold
                && hold.reason == HoldReason::Contested
                && hold.deadline <= world.now
            {
                // The command has ended, and a person who has ended the contest resumes.
                world.state = world.state.resumed();
            }
            if matches!(&world.state.hold, Some(hold) if matches!(hold.reason, HoldReason::Gate(_)))
            {
                world.request = Some(Request {
                    number: 2,
                    kind: RequestKind::Promote {
                        stage: world.state.stage,
                    },
                });
                if world.state.request >= 2 {
                    // The one promote of the model was used at another stage.
                    world.state.request = 1;
                }
            }
            world.stable.ready = world.stable.desired;
            if world.candidate.broken.is_none() {
                world.candidate.ready = world.candidate.desired;
            }
            world.now += 1;
            let watching = world.state.phase == Phase::Watch;
            self.step(
                &mut world,
                watching.then_some(Verdict::NonInferior),
                Fate::Done,
            );
            if world.violated.is_some() {
                return None;
            }
        }
        None
    }

    /// Whether the environment is as an ended rollout must leave it.
    fn is_settled(&self, world: &World) -> bool {
        let (stable, candidate) = (&world.stable, &world.candidate);
        let full = self.plan.stable.is_some();
        match world.state.outcome() {
            Some(Outcome::Healthy) => {
                candidate.weight == 100
                    && candidate.desired == self.plan.replicas
                    && world.others.is_empty()
                    && match self.plan.keeps_previous {
                        // It can be gone back to at once.
                        true => !full || stable.desired == self.plan.replicas && stable.weight == 0,
                        false => stable.desired == 0,
                    }
                    && world.recorded == Some(Mark::Healthy)
            }
            Some(_) => {
                candidate.weight == 0
                    && candidate.desired == 0
                    && !candidate.unfinished
                    && (!full || stable.weight == 100 && stable.desired == self.plan.replicas)
                    && world.recorded == world.state.exposed.then_some(Mark::RolledBack)
            }
            None => false,
        }
    }
}

/// One process fewer is wanted; one stays.
fn take_one(arm: &mut Arm) {
    arm.desired = arm.desired.saturating_sub(1).max(1);
    arm.ready = arm.ready.min(arm.desired);
}

impl Model for Rollout {
    type State = World;
    type Action = Event;

    fn init_states(&self) -> Vec<World> {
        let full = Arm {
            desired: 2,
            ready: 2,
            weight: 100,
            ..Arm::default()
        };
        vec![World {
            stable: if self.plan.stable.is_some() {
                full
            } else {
                Arm::default()
            },
            candidate: Arm::default(),
            unseen: false,
            recorded: None,
            others: self.plan.others.clone(),
            state: State::start(0),
            request: None,
            stalled: None,
            now: 0,
            left: self.budget,
            excused: false,
            violated: None,
        }]
    }

    fn actions(&self, world: &World, events: &mut Vec<Event>) {
        if world.state.outcome().is_some() || world.violated.is_some() {
            if world.stalled.is_some() {
                events.push(Event::StalledActs);
            }
            return;
        }
        let watching = world.state.phase == Phase::Watch;
        let shifting = world.state.phase == Phase::Shift && world.candidate.weight > 0;
        let verdicts = match watching {
            true => &VERDICTS[..],
            false if shifting => &VERDICTS[..4],
            false => &VERDICTS[..1],
        };
        for verdict in verdicts {
            events.push(Event::Step {
                verdict: *verdict,
                fate: Fate::Done,
            });
        }
        if world.left.faults > 0 {
            let fates = [
                Fate::KilledBefore,
                Fate::NotDone,
                Fate::DoneUnheard,
                Fate::Half,
                Fate::JobFails,
                Fate::Stalled,
            ];
            for fate in fates {
                let verdict = watching.then_some(Verdict::NonInferior);
                events.push(Event::Step { verdict, fate });
            }
            events.push(Event::PlatformAway);
            for candidate in [false, true] {
                let arm = if candidate {
                    &world.candidate
                } else {
                    &world.stable
                };
                if arm.ready > 0 {
                    events.push(Event::Dies { candidate });
                }
            }
            if world.candidate.desired > 0 && world.candidate.broken.is_none() {
                events.push(Event::Breaks);
            }
        }
        for candidate in [false, true] {
            let arm = if candidate {
                &world.candidate
            } else {
                &world.stable
            };
            if arm.ready < arm.desired && arm.broken.is_none() {
                events.push(Event::Ready { candidate });
            }
        }
        if world.stalled.is_some() {
            events.push(Event::StalledActs);
        }
        if world.left.meddling > 0
            && matches!(world.state.phase, Phase::Shift | Phase::Watch)
            && world.candidate.weight > 0
            && world.stable.weight > 0
        {
            let meddling = [Meddling::Weights, Meddling::Candidate, Meddling::Stable];
            events.extend(meddling.map(Event::Meddles));
        }
        if world.left.elapses > 0 {
            events.push(Event::Elapse);
        }
        if world.left.aborts > 0 {
            events.push(Event::Ask(RequestKind::Abort));
        }
        if world.left.promotes > 0 && world.request.is_none() {
            events.push(Event::Ask(RequestKind::Promote {
                stage: world.state.stage,
            }));
        }
    }

    fn next_state(&self, world: &World, event: Event) -> Option<World> {
        let mut world = world.clone();
        match event {
            Event::Step { verdict, fate } => {
                if fate != Fate::Done {
                    world.left.faults -= 1;
                }
                world.excused |= verdict == Some(Verdict::Regressed);
                self.step(&mut world, verdict, fate);
            }
            Event::PlatformAway => {
                world.left.faults -= 1;
                let seen = self.observe(&world, false, None);
                let (next, action) = (self.decide)(&self.plan, &world.state, &seen, world.now);
                if action.is_some() {
                    world.violated = Some("an action without knowing what is there");
                }
                self.journal(&mut world, next, None);
            }
            Event::StalledActs => {
                let action = world.stalled.take()?;
                // Whoever took over claimed the environment first.
                if !self.fenced {
                    self.apply(&mut world, &action);
                }
            }
            Event::Ready { candidate } => {
                let arm = if candidate {
                    &mut world.candidate
                } else {
                    &mut world.stable
                };
                arm.ready += 1;
            }
            Event::Dies { candidate } => {
                world.left.faults -= 1;
                let arm = if candidate {
                    &mut world.candidate
                } else {
                    &mut world.stable
                };
                arm.ready -= 1;
            }
            Event::Breaks => {
                world.left.faults -= 1;
                world.excused = true;
                world.candidate.broken = Some("exit status: 1".to_owned());
                world.candidate.ready = 0;
            }
            Event::Meddles(what) => {
                world.left.meddling -= 1;
                match what {
                    Meddling::Weights => (world.stable.weight, world.candidate.weight) = (95, 5),
                    Meddling::Candidate => take_one(&mut world.candidate),
                    Meddling::Stable => take_one(&mut world.stable),
                }
            }
            Event::Elapse => {
                world.left.elapses -= 1;
                // A candidate that is slow to get ready may be given up for it.
                world.excused |= world.candidate.ready < self.plan.replicas
                    || world.state.unready_since.is_some();
                world.now += 1;
            }
            Event::Ask(kind) => {
                let number = match kind {
                    RequestKind::Promote { .. } => 2,
                    RequestKind::Abort => 3,
                };
                match kind {
                    RequestKind::Promote { .. } => world.left.promotes -= 1,
                    RequestKind::Abort => {
                        world.left.aborts -= 1;
                        world.excused = true;
                    }
                }
                world.request = Some(Request { number, kind });
            }
        }
        Some(world)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always("invariants", |_, world: &World| world.violated.is_none()),
            Property::always(
                "7: it ends when all works again",
                |model: &Self, world: &World| {
                    world.violated.is_some() || model.fair_end(world).is_some()
                },
            ),
            Property::always(
                "5: it ends as the undisturbed one does",
                |model: &Self, world: &World| {
                    let Some(end) = model.fair_end(world) else {
                        return true;
                    };
                    let good = end.state.outcome() == Some(Outcome::Healthy);
                    model.is_settled(&end) && (good || world.excused)
                },
            ),
            Property::sometimes("healthy", |_, world: &World| {
                world.state.outcome() == Some(Outcome::Healthy)
            }),
            Property::sometimes("back again", |_, world: &World| {
                matches!(
                    world.state.outcome(),
                    Some(Outcome::Aborted | Outcome::Failed)
                )
            }),
        ]
    }
}
