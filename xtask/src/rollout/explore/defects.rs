//! Engines with one defect each, which the exploration must find.

use super::super::engine::{Action, Decide, Mark, Phase, Reason, Verdict, decide};

/// Takes every process for ready.
pub const NO_READINESS: Decide = |plan, state, seen, now| {
    let mut seen = seen.clone();
    if let Some(view) = &mut seen.platform {
        view.candidate.ready = view.candidate.desired;
    }
    decide(plan, state, &seen, now)
};

/// Takes no data for a pass.
pub const NO_DATA_PASSES: Decide = |plan, state, seen, now| {
    let mut seen = seen.clone();
    if seen.verdict == Some(Verdict::NoData) {
        seen.verdict = Some(Verdict::NonInferior);
    }
    decide(plan, state, &seen, now)
};

/// Rolls back when the metrics are away.
pub const PROVIDER_DOWN_ROLLS_BACK: Decide = |plan, state, seen, now| {
    let mut seen = seen.clone();
    if seen.verdict == Some(Verdict::ProviderDown) {
        seen.verdict = Some(Verdict::Regressed);
    }
    decide(plan, state, &seen, now)
};

/// Removes stable before the record.
pub const STABLE_GOES_FIRST: Decide = |plan, state, seen, now| {
    let (next, action) = decide(plan, state, seen, now);
    match (&plan.stable, action) {
        (
            Some(stable),
            Some(Action::Record {
                mark: Mark::Healthy,
            }),
        ) => (
            next,
            Some(Action::Scale {
                release: stable.clone(),
                replicas: 0,
            }),
        ),
        (_, action) => (next, action),
    }
};

/// Goes forward after an abort.
pub const FORGETS_THE_ABORT: Decide = |plan, state, seen, now| {
    let (mut next, action) = decide(plan, state, seen, now);
    if matches!(
        next.phase,
        Phase::Back {
            reason: Reason::Aborted
        }
    ) && action.is_none()
    {
        next.phase = Phase::Shift;
    }
    (next, action)
};

/// Never leaves a hold.
pub const GIVES_UP_WAITING: Decide = |plan, state, seen, now| match state.phase {
    Phase::Watch if state.hold.is_some() => (state.clone(), None),
    _ => decide(plan, state, seen, now),
};

/// Leaves a failed job where it is.
pub const LEAVES_A_FAILED_JOB: Decide = |plan, state, seen, now| {
    let mut seen = seen.clone();
    if let Some(view) = &mut seen.platform
        && view.candidate.broken.is_some()
        && view.candidate.desired == 0
    {
        view.candidate.unfinished = false;
    }
    decide(plan, state, &seen, now)
};

/// Takes a spare process away where the plan wants one.
pub const GIVES_UP_THE_SPARE: Decide = |plan, state, seen, now| {
    let mut plan = plan.clone();
    plan.least = 1;
    decide(&plan, state, seen, now)
};
