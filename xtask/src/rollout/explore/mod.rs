//! Every interleaving of the engine with a world that fails, to a stated depth.
//!
//! The model is the real `decide` over an in-memory platform. What can happen at any moment: the
//! command is killed before or after it wrote or acted, an action fails, its reply is lost, a
//! stalled command wakes up and acts late, processes get ready, die or break, metrics give any
//! verdict or none, the platform is away, time passes, a person promotes or aborts. Budgets make
//! this finite; within them it is exhaustive. (Checker: stateright.)

mod defects;
mod world;

use stateright::{Checker, Model};

use super::engine::{Action, Arm, HoldReason, Kind, Phase, Reason, State, Verdict};
use world::{Fate, Rollout, World};

/// The number of states in which all properties hold, or what was broken and how.
fn explore(model: Rollout) -> Result<usize, String> {
    explore_with(2, model)
}

/// With one thread, what is found first is always the same.
fn explore_with(threads: usize, model: Rollout) -> Result<usize, String> {
    let checker = model.checker().threads(threads).spawn_bfs().join();
    let broken: Vec<String> = checker
        .discoveries()
        .into_iter()
        .filter(|(name, _)| !matches!(*name, "healthy" | "back again"))
        .map(|(name, path)| {
            let end = path.last_state().clone();
            format!(
                "{name}: {:?}\n{:#?}\n{end:#?}",
                end.violated,
                path.into_actions()
            )
        })
        .collect();
    if !broken.is_empty() {
        return Err(broken.join("\n"));
    }
    for name in ["healthy", "back again"] {
        assert!(
            checker.discovery(name).is_some(),
            "the exploration never got {name}"
        );
    }
    Ok(checker.unique_state_count())
}

/// Where the test's output is read by people.
#[expect(
    clippy::print_stderr,
    reason = "the number of states belongs into the test's log"
)]
fn tell(what: &str, states: usize) {
    eprintln!("{what}: {states} states, all invariants hold");
}

#[test]
fn a_canary_keeps_every_invariant() {
    tell("canary with a gate", explore(Rollout::canary()).unwrap());
}

#[test]
fn deployments_and_rollbacks_keep_every_invariant() {
    for (name, kind, stable) in [
        ("first deployment", Kind::Deploy, false),
        ("deployment", Kind::Deploy, true),
        ("rollback", Kind::Rollback, true),
    ] {
        let mut model = Rollout::new(kind, stable, &[(100, None)]);
        model.budget.faults = 3;
        tell(name, explore(model).unwrap());
    }
}

#[test]
fn a_kept_release_keeps_every_invariant() {
    let mut model = Rollout::new(Kind::Canary, true, &[(10, None), (100, None)]);
    model.plan.keeps_previous = true;
    model.plan.others = vec!["older".into()];
    tell("canary that keeps stable", explore(model).unwrap());
}

/// Where one process may be taken away at any time, a release with traffic has two.
#[test]
fn a_release_with_a_spare_process_keeps_every_invariant() {
    let mut model = Rollout::new(Kind::Canary, true, &[(10, None), (100, None)]);
    model.plan.least = 2;
    tell("canary with a spare process", explore(model).unwrap());
}

/// Somebody else changes weights and numbers of processes: it is put right, but not for ever.
#[test]
fn what_others_undo_keeps_every_invariant() {
    let mut model = Rollout::new(Kind::Canary, true, &[(10, None), (60, None), (100, None)]);
    model.budget.faults = 0;
    model.budget.meddling = 4;
    tell("canary that is meddled with", explore(model).unwrap());
}

#[test]
fn what_is_undone_each_time_is_not_fought_over() {
    let model = Rollout::canary();
    let mut world = model.init_states().remove(0);
    let mut shifted = 0;
    for _ in 0..40 {
        (world.candidate.ready, world.stable.ready) =
            (world.candidate.desired, world.stable.desired);
        model.step(&mut world, None, Fate::Done);
        if world.state.phase == Phase::Watch && world.candidate.weight == 10 {
            (world.candidate.weight, world.stable.weight) = (0, 100);
            shifted += 1;
        }
    }
    assert_eq!(shifted, 4, "once, and three times again");
    let hold = world.state.hold.as_ref().unwrap();
    assert_eq!(hold.reason, HoldReason::Contested);
}

/// That an autoscaler makes more of stable, however often, is nobody's fight.
#[test]
fn an_autoscaler_is_followed() {
    let mut model = Rollout::canary();
    model.plan.stages[0].weight = 50;
    let mut world = model.init_states().remove(0);
    for pods in 2..10 {
        (world.stable.desired, world.stable.ready) = (pods, pods);
        for _ in 0..6 {
            world.candidate.ready = world.candidate.desired;
            model.step(&mut world, Some(Verdict::Undecided), Fate::Done);
        }
        assert_eq!(world.candidate.desired, pods.div_ceil(2));
        assert_eq!(
            (&world.state.phase, &world.state.hold),
            (&Phase::Watch, &None)
        );
    }
}

/// A paused or edited release is not gone on from by itself; a rollback does not ask.
#[test]
fn what_others_have_stopped_waits_for_a_person() {
    let foreign = Some("kubectl has paused it".to_owned());
    for (kind, waits) in [(Kind::Canary, true), (Kind::Rollback, false)] {
        let model = Rollout::new(kind, true, &[(100, None)]);
        let mut world = model.init_states().remove(0);
        world.stable.foreign.clone_from(&foreign);
        let step = |world: &mut World| {
            world.candidate.ready = world.candidate.desired;
            world.now += 1;
            model.step(world, Some(Verdict::NonInferior), Fate::Done);
        };
        for _ in 0..6 {
            step(&mut world);
        }
        assert_eq!(world.state.hold.is_some(), waits, "{kind}");
        assert_eq!(world.state.phase == Phase::Watch, waits, "{kind}");
        world.stable.foreign = None;
        step(&mut world);
        assert!(world.state.hold.is_none() && world.state.phase != Phase::Watch);
    }
}

/// Whose processes get unready under traffic is gone back from; but not where both releases' do.
#[test]
fn a_candidate_that_stays_unready_is_gone_back_from() {
    for (stable_ready, phase) in [
        (
            2,
            Phase::Back {
                reason: Reason::NotReady,
            },
        ),
        (0, Phase::Watch),
    ] {
        let model = Rollout::canary();
        let mut world = watching(&model);
        world.candidate.ready = 0;
        world.stable.ready = stable_ready;
        for now in 1..4 {
            assert_eq!(world.state.phase, Phase::Watch);
            world.now = now;
            model.step(&mut world, Some(Verdict::NoData), Fate::Done);
        }
        assert_eq!(world.state.phase, phase);
    }
}

/// What has traffic is judged also while the next weight is made, which may take as long as pods do.
#[test]
fn a_candidate_that_gets_worse_between_stages_is_gone_back_from() {
    let model = Rollout::canary();
    let mut world = watching(&model);
    world.state.stage = 1;
    world.state.phase = Phase::Shift;
    model.step(&mut world, Some(Verdict::Regressed), Fate::Done);
    let reason = Reason::Regressed;
    assert_eq!(world.state.phase, Phase::Back { reason });
}

/// Where each process gets its share, those of earlier rollouts go before the candidate gets any.
#[test]
fn leftovers_get_no_traffic_behind_a_plain_service() {
    let mut model = Rollout::new(Kind::Canary, true, &[(50, None), (100, None)]);
    model.plan.by_replicas = true;
    model.plan.others = vec!["older".into()];
    let world = model.init_states().remove(0);
    let seen = model.observe(&world, true, None);
    let (_, action) = (model.decide)(&model.plan, &world.state, &seen, 0);
    let stops_it = Action::Scale {
        release: "older".into(),
        replicas: 0,
    };
    assert_eq!(action, Some(stops_it));
}

/// At the first stage, with all that it needs.
fn watching(model: &Rollout) -> World {
    let mut world = model.init_states().remove(0);
    world.candidate = Arm {
        desired: 1,
        ready: 1,
        weight: 10,
        ..Arm::default()
    };
    world.stable.weight = 90;
    world.state = State {
        phase: Phase::Watch,
        exposed: true,
        ..State::start(0)
    };
    world
}

/// Engines and platforms with one defect each: the exploration must find it.
#[test]
fn defects_are_found() {
    for (name, decide) in [
        (
            "leaves a failed job where it is",
            defects::LEAVES_A_FAILED_JOB,
        ),
        ("does not wait for readiness", defects::NO_READINESS),
        ("takes no data for a pass", defects::NO_DATA_PASSES),
        (
            "rolls back when the metrics are away",
            defects::PROVIDER_DOWN_ROLLS_BACK,
        ),
        (
            "removes stable before the record",
            defects::STABLE_GOES_FIRST,
        ),
        ("goes forward after an abort", defects::FORGETS_THE_ABORT),
        ("never leaves a hold", defects::GIVES_UP_WAITING),
    ] {
        let model = Rollout {
            decide,
            ..Rollout::canary()
        };
        assert!(
            explore(model).is_err(),
            "an engine that {name} was not found out"
        );
    }
    let mut without_spare = Rollout::canary();
    without_spare.plan.least = 2;
    without_spare.decide = defects::GIVES_UP_THE_SPARE;
    assert!(explore(without_spare).is_err());
    let unfenced = Rollout {
        fenced: false,
        ..Rollout::canary()
    };
    let found = explore_with(1, unfenced).unwrap_err();
    assert!(found.contains("4: the candidate's weight rose"), "{found}");
}

/// Traffic that comes and goes must not keep a hold from ever ending.
#[test]
fn troubles_that_alternate_are_one_hold() {
    let model = Rollout::canary();
    let mut world = watching(&model);
    for now in 2..6 {
        world.now = now;
        let verdict = if now % 2 == 0 {
            Verdict::NoData
        } else {
            Verdict::Undecided
        };
        model.step(&mut world, Some(verdict), Fate::Done);
        let hold = world.state.hold.as_ref().unwrap();
        assert_eq!((hold.since, hold.deadline), (2, 4), "{hold:?}");
    }
}
