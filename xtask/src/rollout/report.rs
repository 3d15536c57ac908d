//! Rollouts in numbers and in pictures: one HTML file that needs no network.

use std::fmt::Write;

use serde::Serialize;

use super::engine::{Action, Outcome, Phase, Reason};
use super::journal::{Entry, Journal, Totals};
use super::windows::{ArmName, Counts, WindowLine};

/// A rollout in a few numbers.
#[derive(Debug, Clone, Serialize)]
pub struct Summary {
    pub rollout: String,
    pub release: String,
    #[serde(skip)]
    pub name: String,
    /// `None` while it has not ended.
    pub outcome: Option<Outcome>,
    /// Why it turned back.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub why: String,
    pub seconds: f64,
    pub requests: u64,
    pub failed: Failed,
    /// From the candidate's first request to the verdict that it is worse.
    pub detection_seconds: Option<f64>,
    /// From that verdict until stable had all traffic.
    pub restored_seconds: Option<f64>,
    /// The highest weight the candidate had.
    pub weight: u8,
    pub evidence: Option<f64>,
    #[serde(skip)]
    pub totals: Option<Totals>,
}

#[derive(Debug, Clone, Copy, Default, Serialize)]
pub struct Failed {
    pub stable: u64,
    pub candidate: u64,
}

impl Summary {
    pub fn of(journal: &Journal) -> Self {
        let started = journal.started();
        let plan = &started.plan;
        let lines = journal.lines();
        let seconds = |line: usize| lines[line].at.duration_since(lines[0].at).as_secs_f64();
        let find =
            |wanted: &dyn Fn(&Entry) -> bool| lines.iter().position(|line| wanted(&line.entry));
        let weight_of = |entry: &Entry| match entry {
            Entry::Done {
                action: Action::Route { weights },
            } => weights
                .iter()
                .find(|(id, _)| *id == plan.candidate)
                .map(|(_, weight)| *weight),
            _ => None,
        };
        let exposed = find(&|entry| weight_of(entry).is_some());
        let mut why = String::new();
        let mut regressed = false;
        let turned = find(
            &|entry| matches!(entry, Entry::State { state } if matches!(state.phase, Phase::Back { .. })),
        );
        if let Some(Entry::State { state }) = turned.map(|line| &lines[line].entry)
            && let Phase::Back { reason } = &state.phase
        {
            regressed = *reason == Reason::Regressed;
            why = match reason {
                Reason::Aborted => "aborted".to_owned(),
                Reason::Regressed => regression(journal),
                Reason::NotReady => "it was not ready within rollout.ready_within".to_owned(),
                Reason::Broken(why) => why.clone(),
            };
        }
        let restored = turned.and_then(|turned| {
            (turned..lines.len()).find(|line| {
                matches!(
                    &lines[*line].entry,
                    Entry::Done {
                        action: Action::Route { .. }
                    }
                )
            })
        });
        let totals = journal.totals();
        let failed = totals.map_or_else(Failed::default, |totals| Failed {
            stable: totals.stable.failed,
            candidate: totals.candidate.failed,
        });
        Self {
            rollout: plan.rollout.clone(),
            release: plan.candidate.to_string(),
            name: started.candidate_name.clone(),
            outcome: journal.state().outcome(),
            why,
            seconds: seconds(lines.len() - 1),
            requests: totals.map_or(0, |t| t.stable.requests + t.candidate.requests),
            failed,
            detection_seconds: exposed
                .zip(turned.filter(|_| regressed))
                .map(|(exposed, turned)| seconds(turned) - seconds(exposed)),
            restored_seconds: turned
                .zip(restored)
                .map(|(turned, restored)| seconds(restored) - seconds(turned)),
            weight: lines
                .iter()
                .filter_map(|line| weight_of(&line.entry))
                .max()
                .unwrap_or(0),
            evidence: journal
                .judgements()
                .next_back()
                .map(|(_, judgement)| judgement.e_value),
            totals,
        }
    }
}

fn regression(journal: &Journal) -> String {
    match journal.judgements().next_back() {
        None => "its smoke checks failed".to_owned(),
        Some((_, judgement)) => {
            let metric = judgement
                .metrics
                .iter()
                .find(|metric| metric.metric == judgement.metric);
            let rates = metric.map_or_else(String::new, |metric| {
                format!(
                    " ({:.2} % against {:.2} %)",
                    metric.candidate * 100.0,
                    metric.baseline * 100.0
                )
            });
            format!("{} regressed{rates}", judgement.metric)
        }
    }
}

/// One line of a plot.
struct Series<'a> {
    name: &'a str,
    color: &'a str,
    points: Vec<(f64, f64)>,
    steps: bool,
    dashed: bool,
}

const STABLE: &str = "#2b6cb0";
const CANDIDATE: &str = "#c05621";
const LIMIT: &str = "#718096";

/// The whole report: `heading` in front, then each rollout with its plots.
pub fn html(title: &str, heading: &str, journals: &[&Journal]) -> String {
    let mut page = format!(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><title>{title}</title>\n\
         <style>{STYLE}</style></head>\n<body><main>\n<h1>{title}</h1>\n{heading}\n",
        title = escape(title)
    );
    for journal in journals {
        section(&mut page, journal);
    }
    page.push_str("</main></body></html>\n");
    page
}

const STYLE: &str = "body{font:15px/1.5 system-ui,sans-serif;color:#1a202c;background:#fff;margin:0}\
main{max-width:1080px;margin:2rem auto;padding:0 1rem}h1{font-size:1.6rem}h2{font-size:1.15rem;\
margin:2.2rem 0 .2rem;border-top:1px solid #e2e8f0;padding-top:1.2rem}p{margin:.2rem 0 .8rem;\
color:#4a5568}table{border-collapse:collapse;margin:1rem 0}th,td{padding:.25rem .8rem;\
text-align:right;border-bottom:1px solid #e2e8f0}th{color:#4a5568;font-weight:600}\
td{white-space:nowrap}td:first-child,th:first-child,td.text,th.text{text-align:left}.plots{display:grid;\
grid-template-columns:repeat(auto-fit,minmax(480px,1fr));gap:.6rem}svg{width:100%;height:auto}\
.healthy{color:#276749;font-weight:600}.rolled-back,.aborted,.failed{color:#9b2c2c;font-weight:600}";

fn section(page: &mut String, journal: &Journal) {
    let started = journal.started();
    let summary = Summary::of(journal);
    let outcome = outcome_name(summary.outcome);
    let _ = write!(
        page,
        "<h2>{} in {}: <span class=\"{outcome}\">{outcome}</span></h2>\n<p>{} from {}; {:.1} s{}</p>\n",
        escape(&started.candidate_name),
        escape(&started.plan.environment),
        started.plan.kind,
        escape(started.stable_name.as_deref().unwrap_or("nothing")),
        summary.seconds,
        if summary.why.is_empty() {
            String::new()
        } else {
            format!("; {}", escape(&summary.why))
        },
    );
    if journal.judgements().next().is_none() {
        return;
    }
    page.push_str("<div class=\"plots\">\n");
    page.push_str(&weights(journal));
    page.push_str(&rates(journal));
    page.push_str(&latencies(journal));
    page.push_str(&evidence(journal));
    page.push_str("</div>\n");
}

pub fn outcome_name(outcome: Option<Outcome>) -> &'static str {
    match outcome {
        Some(Outcome::Healthy) => "healthy",
        Some(Outcome::RolledBack) => "rolled-back",
        Some(Outcome::Aborted) => "aborted",
        Some(Outcome::Failed) => "failed",
        None => "unfinished",
    }
}

fn time(journal: &Journal, at: jiff::Timestamp) -> f64 {
    at.duration_since(journal.lines()[0].at).as_secs_f64()
}

fn weights(journal: &Journal) -> String {
    let candidate = &journal.plan().candidate;
    let mut asked = vec![(0.0, 0.0)];
    for line in journal.lines() {
        if let Entry::Done {
            action: Action::Route { weights },
        } = &line.entry
        {
            let weight = weights
                .iter()
                .find(|(id, _)| id == candidate)
                .map_or(0, |(_, w)| *w);
            asked.push((time(journal, line.at), f64::from(weight)));
        }
    }
    let end = journal
        .lines()
        .last()
        .map_or(0.0, |line| time(journal, line.at));
    asked.push((end, asked.last().map_or(0.0, |point| point.1)));
    let observed = journal
        .judgements()
        .filter_map(|(at, judgement)| Some((time(journal, at), judgement.share? * 100.0)))
        .collect();
    plot(
        "Candidate's share of the traffic, %",
        &[
            Series {
                name: "asked",
                color: LIMIT,
                points: asked,
                steps: true,
                dashed: false,
            },
            Series {
                name: "observed",
                color: CANDIDATE,
                points: observed,
                steps: false,
                dashed: false,
            },
        ],
        Some(100.0),
        end,
    )
}

/// A number for each window and arm, over time.
fn by_arm(journal: &Journal, value: impl Fn(&Counts) -> Option<f64>) -> [Vec<(f64, f64)>; 2] {
    let mut points = [Vec::new(), Vec::new()];
    let mut open: Vec<&WindowLine> = Vec::new();
    for line in journal.lines() {
        match &line.entry {
            Entry::Window(window) => open.push(window),
            Entry::Judged(_) => {
                let arms = [ArmName::Baseline, ArmName::Candidate];
                for (arm, points) in arms.into_iter().zip(&mut points) {
                    let counts: Vec<Counts> = open
                        .iter()
                        .filter(|w| w.arm == arm)
                        .map(|w| w.counts.clone())
                        .collect();
                    let sum = Counts::sum(&counts);
                    if let Some(value) = value(&sum).filter(|_| sum.requests > 0) {
                        points.push((time(journal, line.at), value));
                    }
                }
                open.clear();
            }
            _ => {}
        }
    }
    points
}

fn rates(journal: &Journal) -> String {
    let [stable, candidate] = by_arm(journal, |counts| {
        Some(100.0 * counts.errors as f64 / counts.requests as f64)
    });
    let top = stable
        .iter()
        .chain(&candidate)
        .map(|point| point.1)
        .fold(1.0, f64::max);
    arms(
        "Failed requests, % of a window",
        stable,
        candidate,
        Some(top),
        journal,
    )
}

fn latencies(journal: &Journal) -> String {
    let [stable, candidate] = by_arm(journal, |counts| {
        Some(counts.latency.as_ref()?.quantile_bound(0.95)? * 1000.0)
    });
    arms(
        "95th percentile of latency, ms",
        stable,
        candidate,
        None,
        journal,
    )
}

fn arms(
    title: &str,
    stable: Vec<(f64, f64)>,
    candidate: Vec<(f64, f64)>,
    top: Option<f64>,
    journal: &Journal,
) -> String {
    let end = journal
        .lines()
        .last()
        .map_or(0.0, |line| time(journal, line.at));
    plot(
        title,
        &[
            Series {
                name: "stable",
                color: STABLE,
                points: stable,
                steps: false,
                dashed: false,
            },
            Series {
                name: "candidate",
                color: CANDIDATE,
                points: candidate,
                steps: false,
                dashed: true,
            },
        ],
        top,
        end,
    )
}

/// Both kinds of evidence as a part of what is needed: at 100 a decision is made.
fn evidence(journal: &Journal) -> String {
    let end = journal
        .lines()
        .last()
        .map_or(0.0, |line| time(journal, line.at));
    let part = |part: f64| (part * 100.0).clamp(0.0, 120.0);
    let (mut against, mut passed) = (Vec::new(), Vec::new());
    for (at, judgement) in journal.judgements() {
        let at = time(journal, at);
        against.push((
            at,
            part(judgement.e_value.max(1.0).ln() / judgement.threshold.ln()),
        ));
        let least = judgement
            .metrics
            .iter()
            .map(|m| m.passed)
            .fold(f64::INFINITY, f64::min);
        passed.push((at, part(least)));
    }
    plot(
        "Evidence (logarithm), % of what decides",
        &[
            Series {
                name: "worse",
                color: "#9b2c2c",
                points: against,
                steps: false,
                dashed: false,
            },
            Series {
                name: "good enough",
                color: "#276749",
                points: passed,
                steps: false,
                dashed: false,
            },
            Series {
                name: "decides",
                color: LIMIT,
                points: vec![(0.0, 100.0), (end, 100.0)],
                steps: false,
                dashed: true,
            },
        ],
        Some(120.0),
        end,
    )
}

/// A line plot as SVG: seconds to the right, `top` (or the highest value) above.
fn plot(title: &str, series: &[Series<'_>], top: Option<f64>, end: f64) -> String {
    const WIDTH: f64 = 520.0;
    const HEIGHT: f64 = 220.0;
    const LEFT: f64 = 44.0;
    const RIGHT: f64 = 22.0;
    const ABOVE: f64 = 44.0;
    const BELOW: f64 = 24.0;
    let highest = series
        .iter()
        .flat_map(|s| &s.points)
        .map(|p| p.1)
        .fold(0.0, f64::max);
    let top = top.unwrap_or(highest * 1.1).max(1e-9);
    let end = end.max(1e-3);
    let x = |seconds: f64| LEFT + (WIDTH - LEFT - RIGHT) * (seconds / end).clamp(0.0, 1.0);
    let y = |value: f64| HEIGHT - BELOW - (HEIGHT - ABOVE - BELOW) * (value / top).clamp(0.0, 1.0);
    let mut svg = format!(
        "<svg viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\" aria-label=\"{0}\" font-size=\"11\" \
         font-family=\"system-ui,sans-serif\" fill=\"#4a5568\">\n\
         <text x=\"{LEFT}\" y=\"16\" font-size=\"13\" fill=\"#1a202c\">{0}</text>\n",
        escape(title)
    );
    for i in 0..=4 {
        let value = top * f64::from(i) / 4.0;
        let _ = write!(
            svg,
            "<line x1=\"{LEFT}\" x2=\"{}\" y1=\"{1:.1}\" y2=\"{1:.1}\" stroke=\"#e2e8f0\"/>\
             <text x=\"{2}\" y=\"{3:.1}\" text-anchor=\"end\">{4}</text>",
            WIDTH - RIGHT,
            y(value),
            LEFT - 6.0,
            y(value) + 4.0,
            tick(value)
        );
        let seconds = end * f64::from(i) / 4.0;
        let _ = write!(
            svg,
            "<text x=\"{:.1}\" y=\"{}\" text-anchor=\"middle\">{} s</text>",
            x(seconds),
            HEIGHT - 8.0,
            tick(seconds)
        );
    }
    let mut legend = LEFT;
    for Series {
        name,
        color,
        points,
        steps,
        dashed,
    } in series
    {
        let mut path = String::new();
        let mut last = None;
        for (seconds, value) in points {
            if let (true, Some(before)) = (*steps, last) {
                let _ = write!(path, "{:.1},{:.1} ", x(*seconds), y(before));
            }
            let _ = write!(path, "{:.1},{:.1} ", x(*seconds), y(*value));
            last = Some(*value);
        }
        let dash = if *dashed {
            " stroke-dasharray=\"5 4\""
        } else {
            ""
        };
        if let [(seconds, value)] = points[..] {
            // A line through one point cannot be seen.
            let _ = write!(
                svg,
                "<circle cx=\"{:.1}\" cy=\"{:.1}\" r=\"3.5\" fill=\"{color}\"/>",
                x(seconds),
                y(value)
            );
        }
        let _ = write!(
            svg,
            "<polyline points=\"{path}\" fill=\"none\" stroke=\"{color}\" stroke-width=\"1.8\"{dash}/>\
             <line x1=\"{legend}\" x2=\"{}\" y1=\"30\" y2=\"30\" stroke=\"{color}\" stroke-width=\"3\"{dash}/>\
             <text x=\"{}\" y=\"34\">{}</text>",
            legend + 16.0,
            legend + 20.0,
            escape(name)
        );
        legend += 44.0 + 6.5 * name.len() as f64;
    }
    svg.push_str("</svg>\n");
    svg
}

fn tick(value: f64) -> String {
    if value >= 10.0 || value == 0.0 {
        format!("{value:.0}")
    } else {
        format!("{value:.1}")
    }
}

pub fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
        .replace('"', "&quot;")
}
