//! What people read about a rollout.

use super::engine::{Action, HoldReason, Kind, Phase, Plan, Reason, State, View};
use super::journal::{Journal, millis};
use super::judge::Judgement;
use super::plan::Forecast;
use super::report::Summary;
use super::windows::{Counts, Window};
use crate::output::Output;
use crate::platform::Status;
use crate::release::ReleaseId;

/// The weights that are reached instead of those that were asked for.
pub fn reachable(plan: &Plan, output: &Output) {
    let weights: Vec<String> = plan
        .stages
        .iter()
        .map(|stage| format!("{} %", stage.weight))
        .collect();
    output.detail(format_args!(
        "the weights that {} pods can make: {}",
        plan.replicas,
        weights.join(", ")
    ));
}

/// What the planner expects, before anything is done.
pub fn forecast(forecast: &Forecast, output: &Output) {
    output.line(format_args!(
        "stable serves {:.1} requests/s with {:.2} % errors; latency is judged {}",
        forecast.rate,
        forecast.errors * 100.0,
        match &forecast.bounds {
            Some(bounds) => {
                let bounds: Vec<String> = bounds
                    .iter()
                    .map(|bound| format!("{:.1} ms", bound * 1000.0))
                    .collect();
                format!("at {}", bounds.join(", "))
            }
            None => "not at all: there are too few requests".to_owned(),
        }
    ));
    if forecast.rate == 0.0 {
        return;
    }
    let rows: Vec<Vec<String>> = forecast
        .stages
        .iter()
        .map(|stage| {
            vec![
                format!("{} %", stage.weight),
                format!("{:.1} s", stage.to_pass),
                format!("{:.1} s", stage.to_see),
            ]
        })
        .collect();
    output.table(
        &["WEIGHT", "PASSES IN", "SEES TEN TIMES THE TOLERANCE IN"],
        &rows,
    );
}

/// One judgement, on one line.
pub fn judgement_line(
    plan: &Plan,
    state: &State,
    judgement: &Judgement,
    window: &Window,
) -> String {
    let rate = |counts: &[Counts]| {
        let sum = Counts::sum(counts);
        format!("{} of {} failed", sum.errors, sum.requests)
    };
    let passed = judgement
        .metrics
        .iter()
        .map(|metric| metric.passed)
        .fold(f64::INFINITY, f64::min);
    format!(
        "{:3} %  {:12}  candidate {}, stable {}; against it {:.2} of {:.0}, for it {:.0} % ({})",
        plan.stages[state.stage].weight,
        judgement.verdict.to_string(),
        rate(&window.candidate),
        rate(&window.baseline),
        judgement.e_value,
        judgement.threshold,
        (passed * 100.0).clamp(0.0, 100.0),
        judgement.metric,
    )
}

pub fn action(action: &Action) -> String {
    match action {
        Action::Scale {
            release,
            replicas: 0,
        } => format!("drain and stop {}", release.short()),
        Action::Scale { release, replicas } => format!("run {replicas} of {}", release.short()),
        Action::Route { weights } if weights.is_empty() => "take all traffic away".to_owned(),
        Action::Route { weights } => {
            let parts: Vec<String> = weights
                .iter()
                .map(|(release, weight)| format!("{weight} % to {}", release.short()))
                .collect();
            parts.join(", ")
        }
        Action::Record { mark } => format!("record: {mark}"),
    }
}

pub fn hold_reason(reason: &HoldReason) -> String {
    match reason {
        HoldReason::Gate(gate) => format!("the gate {gate:?} waits for `canary promote`"),
        HoldReason::NoData => "the candidate gets no requests, so nothing can be judged".to_owned(),
        HoldReason::ProviderDown => "the metrics cannot be had".to_owned(),
        HoldReason::PlatformDown => "the platform does not answer".to_owned(),
        HoldReason::Outage => {
            "both releases fail: an outage, which proves nothing about the candidate".to_owned()
        }
        HoldReason::ShareOff => "the observed share of the traffic is not the weight".to_owned(),
        HoldReason::Undecided => "there is no verdict within rollout.max_stage".to_owned(),
        HoldReason::NoCapacity => "too few processes are ready".to_owned(),
        HoldReason::Refused(why) => format!("the platform refuses: {why}"),
        HoldReason::Foreign(why) => format!("{why}; or `canary promote`, which accepts it"),
        HoldReason::Contested => {
            "somebody else changes the weights or the number of processes each time that they are \
             right: end that, or this rollout by `canary abort`"
                .to_owned()
        }
    }
}

/// Stage, weights asked and observed, the evidence, and what happens next.
pub fn rollout(journal: &Journal, view: Option<&View>, driven: bool, output: &Output) {
    let (started, state) = (journal.started(), journal.state());
    let plan = &started.plan;
    output.step(format_args!(
        "{}: {} to {} (rollout {})",
        plan.environment,
        started.stable_name.as_deref().unwrap_or("(nothing)"),
        started.candidate_name,
        plan.rollout
    ));
    let stage = &plan.stages[state.stage];
    output.line(format_args!("phase      {}", phase(plan, &state)));
    if state.outcome().is_none() {
        // What was judged before this stage began says nothing about its share.
        let newest = journal.judgements().next_back();
        let share = newest
            .filter(|(at, _)| millis(*at) >= state.since)
            .and_then(|(_, judgement)| judgement.share);
        let last = newest.map(|(_, judgement)| judgement);
        let percent = |share: Option<f64>| {
            share.map_or_else(
                || "unknown yet".to_owned(),
                |share| format!("{:.1} %", share * 100.0),
            )
        };
        output.line(format_args!(
            "weights    asked {} %, routed {}, observed {}",
            stage.weight,
            view.map_or_else(
                || "nothing".to_owned(),
                |view| format!("{} %", view.candidate.weight)
            ),
            percent(share),
        ));
        if let Some(judgement) = last {
            evidence(judgement, output);
        }
        output.line(format_args!("next       {}", next(plan, &state, driven)));
    } else {
        if let Some(reason) = journal.turned_back() {
            output.line(format_args!("because    {}", back_reason(reason)));
        }
        totals(&Summary::of(journal), output);
    }
}

fn phase(plan: &Plan, state: &State) -> String {
    let stage = format!("stage {} of {}", state.stage + 1, plan.stages.len());
    match &state.phase {
        Phase::Shift => format!(
            "{stage}: getting {} % ready",
            plan.stages[state.stage].weight
        ),
        Phase::Watch => format!("{stage}: watching {} %", plan.stages[state.stage].weight),
        Phase::Finish => "passed: removing the old release".to_owned(),
        Phase::Back { reason } => format!("going back ({reason:?})"),
        Phase::Ended { outcome } => format!("ended: {outcome}"),
    }
}

/// Each metric against the threshold on either side.
fn evidence(judgement: &Judgement, output: &Output) {
    output.line(format_args!(
        "verdict    {} after window {}; against it {:.2} of {:.0}",
        judgement.verdict, judgement.window, judgement.e_value, judgement.threshold
    ));
    let rows: Vec<Vec<String>> = judgement
        .metrics
        .iter()
        .map(|metric| {
            vec![
                metric.metric.clone(),
                format!("{:.3} %", metric.baseline * 100.0),
                format!("{:.3} %", metric.candidate * 100.0),
                metric.requests.to_string(),
                format!("{:.2}", metric.e_value),
                format!("{:.0} %", (metric.passed * 100.0).clamp(0.0, 100.0)),
            ]
        })
        .collect();
    output.table(
        &[
            "METRIC",
            "STABLE",
            "CANDIDATE",
            "REQUESTS",
            "AGAINST IT",
            "FOR IT",
        ],
        &rows,
    );
}

fn next(plan: &Plan, state: &State, driven: bool) -> String {
    if !driven {
        return "nothing by itself: its command was killed or held; `cargo xtask canary resume`, \
                `promote` or `abort` goes on"
            .to_owned();
    }
    let now = millis(jiff::Timestamp::now());
    let seconds = |deadline: u64| deadline.saturating_sub(now) as f64 / 1000.0;
    if let Some(hold) = &state.hold {
        return format!(
            "held: {}; the command gives up in {:.0} s",
            hold_reason(&hold.reason),
            seconds(hold.deadline)
        );
    }
    match &state.phase {
        Phase::Shift => format!(
            "the weight follows when enough processes are ready, at most {:.0} s from now",
            seconds(state.since + plan.limits.ready_within)
        ),
        Phase::Watch if plan.kind == Kind::Canary => format!(
            "{} when it is non-inferior, not before {:.0} s from now; held if undecided in {:.0} s",
            match plan.stages.get(state.stage + 1) {
                Some(stage) => format!("{} %", stage.weight),
                None => "the end".to_owned(),
            },
            seconds(state.since + plan.limits.min_stage),
            seconds(state.since + plan.limits.max_stage)
        ),
        _ => "it ends in a moment".to_owned(),
    }
}

/// What is in service, and on which processes.
pub fn running(
    status: &Status,
    kept: &[(ReleaseId, jiff::Timestamp)],
    address: &str,
    output: &Output,
) {
    output.line(format_args!("running at {address}"));
    let rows: Vec<Vec<String>> = status
        .releases
        .iter()
        .map(|release| {
            vec![
                release.release.short().to_owned(),
                release.version.clone(),
                format!("{} %", release.weight),
                format!("{} of {}", release.ready(), release.desired),
                match kept.iter().find(|(kept, _)| *kept == release.release) {
                    _ if status.stable.as_ref() == Some(&release.release) => "stable".to_owned(),
                    Some((_, until)) => format!("kept until {until:.0}"),
                    None => String::new(),
                },
            ]
        })
        .collect();
    output.table(&["RELEASE", "VERSION", "WEIGHT", "READY", ""], &rows);
}

pub fn totals(summary: &Summary, output: &Output) {
    let Some(totals) = &summary.totals else {
        return;
    };
    output.detail(format_args!(
        "{:.1} s; stable {} requests, {} failed; candidate {} requests, {} failed{}",
        summary.seconds,
        totals.stable.requests,
        totals.stable.failed,
        totals.candidate.requests,
        totals.candidate.failed,
        match summary.detection_seconds {
            Some(seconds) => format!("; seen after {seconds:.1} s"),
            None => String::new(),
        }
    ));
}

/// Why a rollout has turned back, for people.
pub fn back_reason(reason: &Reason) -> String {
    match reason {
        Reason::Aborted => "aborted".to_owned(),
        Reason::Regressed => "the candidate is worse than stable".to_owned(),
        Reason::NotReady => "the candidate did not get ready in time".to_owned(),
        // Its last lines follow at the end.
        Reason::Broken(why) => why
            .split("; its last lines")
            .next()
            .unwrap_or_default()
            .to_owned(),
    }
}
