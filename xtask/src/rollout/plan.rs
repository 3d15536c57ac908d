//! What a rollout is going to do, decided before anything is done. Pure.

use std::time::Duration;

use anyhow::{Result, bail};

use super::engine::{Kind, Limits, Mark, Plan};
use super::evidence::{requests_to_pass, requests_to_see};
use super::judge::latency_bounds;
use super::windows::{Counts, Histogram};
use crate::config::{Judge, Pipeline, Stage};
use crate::platform::{HistoryEntry, Platform, Status};
use crate::release::ReleaseId;

/// Requests from which a latency distribution is worth fixing bounds from.
const ENOUGH_FOR_BOUNDS: u64 = 100;

pub fn plan(
    pipeline: &Pipeline,
    environment: &str,
    kind: Kind,
    platform: &dyn Platform,
    status: &Status,
    candidate: &ReleaseId,
    now: jiff::Timestamp,
) -> Result<Plan> {
    let rollout = &pipeline.rollout;
    // Where an autoscaler has made more of stable, that many carry the traffic.
    let stable = status.stable.as_ref().and_then(|id| status.release(id));
    let replicas = pipeline.environment(environment)?.replicas.0;
    let replicas = replicas.max(stable.map_or(0, |stable| stable.desired));
    let stages = match kind {
        Kind::Canary => platform.stages(&rollout.stages.0, replicas),
        Kind::Deploy | Kind::Rollback => vec![Stage {
            weight: 100,
            gate: None,
        }],
    };
    Ok(Plan {
        rollout: format!(
            "{}-{}",
            now.strftime("%Y%m%dT%H%M%S%.3fZ"),
            candidate.short()
        ),
        environment: environment.to_owned(),
        kind,
        stable: status.stable.clone(),
        candidate: candidate.clone(),
        replicas,
        least: platform.least(),
        by_replicas: platform.by_replicas(),
        traffic: platform.traffic(),
        // What is gone back from was found wanting: nobody returns to it in a hurry.
        // And behind a plain Service every pod gets requests.
        keeps_previous: rollout.keep_previous.is_some()
            && kind != Kind::Rollback
            && !platform.by_replicas(),
        others: status
            .releases
            .iter()
            .filter(|other| other.desired > 0)
            .map(|other| &other.release)
            .filter(|other| *other != candidate && status.stable.as_ref() != Some(*other))
            .cloned()
            .collect(),
        stages,
        limits: Limits {
            min_stage: rollout.min_stage.millis(),
            max_stage: rollout.max_stage.millis(),
            max_hold: rollout.max_hold.millis(),
            ready_within: rollout.ready_within.millis(),
        },
    })
}

/// The releases that run without traffic, to be gone back to quickly, and until when.
pub fn kept(status: &Status, time: Duration) -> Vec<(ReleaseId, jiff::Timestamp)> {
    let replaced = status.history.iter().rev().find(|entry| {
        entry.mark == Mark::Healthy && status.stable.as_ref() == Some(&entry.release)
    });
    let Some(replaced) = replaced else {
        return Vec::new();
    };
    let until = replaced
        .at
        .saturating_add(time)
        .unwrap_or(jiff::Timestamp::MAX);
    status
        .releases
        .iter()
        .filter(|other| other.desired > 0 && other.weight == 0)
        .filter(|other| status.stable.as_ref() != Some(&other.release))
        .map(|other| (other.release.clone(), until))
        .collect()
}

/// The release to go back to: `wanted`, or the last one before stable that earned healthy.
/// Never one whose last rollout was rolled back.
pub fn rollback_target(status: &Status, wanted: Option<&ReleaseId>) -> Result<ReleaseId> {
    let Some(stable) = &status.stable else {
        bail!("nothing is in service here, so there is nothing to roll back");
    };
    let last_mark = |release: &ReleaseId| {
        let entry = status
            .history
            .iter()
            .rev()
            .find(|entry| entry.release == *release);
        entry.map(|entry| entry.mark)
    };
    if let Some(wanted) = wanted {
        return match last_mark(wanted) {
            _ if wanted == stable => bail!("{} is in service already", wanted.short()),
            Some(Mark::Healthy) => Ok(wanted.clone()),
            Some(Mark::RolledBack) => bail!(
                "{} was rolled back here itself; go back to one that earned its place: {}",
                wanted.short(),
                earned(&status.history, stable, &last_mark)
            ),
            None => bail!(
                "{} has never been in service here; `canary start --release` brings it in, or go \
                 back to one that earned its place: {}",
                wanted.short(),
                earned(&status.history, stable, &last_mark)
            ),
        };
    }
    let target =
        status.history.iter().rev().find(|entry| {
            entry.release != *stable && last_mark(&entry.release) == Some(Mark::Healthy)
        });
    match target {
        Some(entry) => Ok(entry.release.clone()),
        None => bail!("no release before {} earned its place here", stable.short()),
    }
}

/// Those that can be gone back to, the newest first, for people.
fn earned(
    history: &[HistoryEntry],
    stable: &ReleaseId,
    last_mark: &dyn Fn(&ReleaseId) -> Option<Mark>,
) -> String {
    let mut releases: Vec<&str> = history
        .iter()
        .rev()
        .filter(|entry| entry.release != *stable)
        .filter(|entry| last_mark(&entry.release) == Some(Mark::Healthy))
        .map(|entry| entry.release.short())
        .collect();
    releases.dedup();
    if releases.is_empty() {
        "there is none".to_owned()
    } else {
        releases.join(", ")
    }
}

/// What stable's traffic tells about the rollout to come.
#[derive(Debug, Clone)]
pub struct Forecast {
    /// Requests a second that the environment gets.
    pub rate: f64,
    /// Stable's error rate.
    pub errors: f64,
    /// Bounds in seconds fixed for the judge; `None` where there were too few requests.
    pub bounds: Option<Vec<f64>>,
    /// Seconds at the start of each stage that nothing is counted of.
    unseen: f64,
    pub stages: Vec<StageForecast>,
}

/// What each stage takes, whatever the traffic. Times in seconds.
#[derive(Debug, Clone, Copy)]
pub struct Pace {
    pub min_stage: f64,
    /// From a stage's beginning until what is counted is of it: what the metrics are behind, and
    /// `rollout.warm_up`.
    pub unseen: f64,
    /// How often there is a verdict.
    pub window: f64,
}

/// Times in seconds.
#[derive(Debug, Clone, Copy)]
pub struct StageForecast {
    pub weight: u8,
    /// What it waits for longest.
    pub slowest: MetricForecast,
    /// Until the stage can pass, its evidence and that of the stages before together.
    pub to_pass: f64,
    /// Until a candidate with an error rate ten times the tolerance is likely caught.
    pub to_see: f64,
}

/// What stable was seen to do in one of the judge's metrics.
#[derive(Debug, Clone, Copy)]
pub struct MetricForecast {
    /// Seconds, for latency: a slower request is a bad event. Else errors are.
    pub above: Option<f64>,
    /// The share of bad events that nobody minds.
    tolerance: f64,
    /// Stable's share of bad events.
    pub bad: f64,
    /// Of each way to pass, the part that the stages before bring: the judge carries evidence on.
    earned: [f64; 2],
}

impl MetricForecast {
    /// The candidate requests that are still needed at a candidate's share `w`.
    fn needs(&self, judge: &Judge, w: f64) -> f64 {
        requests_to_pass(judge, self.tolerance, self.bad, w)
            .iter()
            .zip(self.earned)
            .map(|(needed, earned)| {
                // What is missing by rounding is there.
                if earned < 1.0 - 1e-9 {
                    (1.0 - earned) * needed
                } else {
                    0.0
                }
            })
            .fold(f64::INFINITY, f64::min)
    }

    fn earn(&mut self, judge: &Judge, requests: f64, w: f64) {
        let needed = requests_to_pass(judge, self.tolerance, self.bad, w);
        for (earned, needed) in self.earned.iter_mut().zip(needed) {
            *earned += requests / needed;
        }
    }
}

/// How long each stage will take, from what stable was seen to do in `seconds`.
pub fn forecast(
    stages: &[Stage],
    pace: Pace,
    judge: &Judge,
    stable: &Counts,
    seconds: f64,
) -> Forecast {
    let rate = stable.requests as f64 / seconds;
    let share = |bad: u64, of: u64| if of == 0 { 0.0 } else { bad as f64 / of as f64 };
    let errors = share(stable.errors, stable.requests);
    let enough = |latency: &&Histogram| latency.total() >= ENOUGH_FOR_BOUNDS;
    let latency = stable.latency.as_ref().filter(enough);
    let floor = judge.latency_floor.0.as_secs_f64();
    let bounds = latency.map(|latency| latency_bounds(latency, floor));

    let of_errors = MetricForecast {
        above: None,
        tolerance: judge.tolerance.0,
        bad: errors,
        earned: [0.0; 2],
    };
    let mut metrics = vec![of_errors];
    if let (Some(latency), Some(bounds)) = (latency, &bounds) {
        metrics.extend(bounds.iter().map(|bound| MetricForecast {
            above: Some(*bound),
            tolerance: judge.latency_tolerance.0,
            bad: share(latency.above(*bound).unwrap_or(0), latency.total()),
            ..of_errors
        }));
    }
    let stages = stages
        .iter()
        .map(|stage| {
            let w = f64::from(stage.weight) / 100.0;
            let (slowest, needed) = metrics
                .iter()
                .map(|metric| (*metric, metric.needs(judge, w)))
                .reduce(|most, other| if other.1 > most.1 { other } else { most })
                .unwrap_or((of_errors, 0.0));
            let counted = (needed / (rate * w))
                .max(pace.window)
                .max(pace.min_stage - pace.unseen);
            // What takes for ever brings nothing to what comes after.
            let requests = if counted.is_finite() {
                counted * rate * w
            } else {
                0.0
            };
            for metric in &mut metrics {
                metric.earn(judge, requests, w);
            }
            let base = errors.max(judge.tolerance.0 / 10.0);
            let ratio = judge.tolerance.0 * 10.0 / base;
            let to_see = requests_to_see(judge, base, ratio, w) / (rate * w);
            StageForecast {
                weight: stage.weight,
                slowest,
                to_pass: pace.unseen + counted,
                to_see: pace.unseen + to_see,
            }
        })
        .collect();
    Forecast {
        rate,
        errors,
        bounds,
        unseen: pace.unseen,
        stages,
    }
}

impl Forecast {
    /// Refuses a rollout that cannot decide within its stages' time.
    pub fn check(&self, max_stage: f64, environment: &str, address: &str) -> Result<()> {
        if self.rate == 0.0 {
            bail!(
                "{environment} gets no requests, so nothing could be judged and no stage could \
                 end; send traffic to {address} and start again"
            );
        }
        if let Some(stage) = self.stages.iter().find(|stage| stage.to_pass > max_stage) {
            if self.unseen > max_stage / 2.0 && stage.to_pass.is_finite() {
                bail!(
                    "the stage of {} % would need {:.0} s to decide, but rollout.max_stage is \
                     {max_stage:.0} s: nothing is counted in the first {:.0} s of each stage, which is \
                     rollout.warm_up and what the metrics are behind; set rollout.max_stage to more, or \
                     have them scraped more often (prometheus.interval)",
                    stage.weight,
                    stage.to_pass,
                    self.unseen,
                );
            }
            let needs = if stage.to_pass.is_finite() {
                format!("{:.0} s", stage.to_pass)
            } else {
                "for ever".to_owned()
            };
            let bad = stage.slowest.bad * 100.0;
            let (seen, setting) = match stage.slowest.above {
                None => (
                    format!("{bad:.2} % errors"),
                    "judge.tolerance to an error rate",
                ),
                Some(above) => (
                    format!("{bad:.2} % slower than {:.0} ms", above * 1000.0),
                    "judge.latency_tolerance to a share of slow requests, or \
                     judge.latency_floor to a latency,",
                ),
            };
            let compares = if stage.weight == 100 {
                "add a stage below 100 %, where there is stable to compare with"
            } else {
                "start with a higher weight"
            };
            bail!(
                "at {:.1} requests/s and {seen}, the stage of {} % would need {needs} to decide, \
                 but rollout.max_stage is {max_stage:.0} s; wait for more traffic, {compares}, or \
                 set {setting} you can live with",
                self.rate,
                stage.weight,
            );
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Probability, Ratio, Time};

    fn status(stable: &str, history: &[(&str, Mark)]) -> Status {
        let entry = |(release, mark): &(&str, Mark)| HistoryEntry {
            release: (*release).into(),
            rollout: "r".into(),
            mark: *mark,
            at: jiff::Timestamp::UNIX_EPOCH,
        };
        Status {
            releases: Vec::new(),
            unseen: false,
            stable: Some(stable.into()),
            history: history.iter().map(entry).collect(),
        }
    }

    #[test]
    fn rollback_goes_to_the_last_release_that_earned_it() {
        use Mark::{Healthy, RolledBack};
        let history = [
            ("one", Healthy),
            ("two", Healthy),
            ("bad", RolledBack),
            ("three", Healthy),
        ];
        let status_three = status("three", &history);
        assert_eq!(rollback_target(&status_three, None).unwrap(), "two".into());
        assert_eq!(
            rollback_target(&status_three, Some(&"one".into())).unwrap(),
            "one".into()
        );
        let refused = |wanted: &str| {
            rollback_target(&status_three, Some(&wanted.into()))
                .unwrap_err()
                .to_string()
        };
        assert!(refused("bad").contains("rolled back here itself"));
        assert!(refused("never").contains("never been in service"));
        assert!(refused("three").contains("already"));
        // A release that was rolled back after it had earned its place is not a target.
        let history = [
            ("one", Healthy),
            ("two", Healthy),
            ("one", Healthy),
            ("two", RolledBack),
        ];
        let status_one = status("one", &history);
        assert!(rollback_target(&status_one, None).is_err());
        let refused = rollback_target(&status_one, Some(&"two".into())).unwrap_err();
        assert!(refused.to_string().ends_with("there is none"), "{refused}");
    }

    fn judge() -> Judge {
        Judge {
            alpha: Probability(0.03),
            beta: Probability(0.05),
            margin: Ratio(1.5),
            tolerance: Probability(0.005),
            outage: Probability(0.05),
            latency_floor: Time(Duration::from_millis(50)),
            latency_tolerance: Probability(0.02),
        }
    }

    fn weighing(weights: &[u8]) -> Vec<Stage> {
        let stage = |weight: &u8| Stage {
            weight: *weight,
            gate: None,
        };
        weights.iter().map(stage).collect()
    }

    fn pace(unseen: f64) -> Pace {
        Pace {
            min_stage: 2.0,
            unseen,
            window: 1.0,
        }
    }

    /// Metrics that are behind make each stage longer, and one that is shorter than that sees nothing.
    #[test]
    fn metrics_that_are_behind_are_waited_for() {
        let counts = Counts {
            requests: 20_000,
            errors: 0,
            latency: None,
        };
        let behind =
            |unseen| forecast(&weighing(&[10, 100]), pace(unseen), &judge(), &counts, 10.0);
        for (at_once, late) in behind(0.0).stages.iter().zip(behind(30.0).stages) {
            assert!(late.to_pass >= at_once.to_pass + 28.0, "{late:?}");
            assert_eq!(late.to_see, at_once.to_see + 30.0);
        }
        let check = |unseen| behind(unseen).check(60.0, "production", "http://localhost");
        check(30.0).unwrap();
        let blind = check(60.0).unwrap_err().to_string();
        assert!(blind.contains("the first 60 s of each stage"), "{blind}");
        assert!(blind.contains("prometheus.interval"), "{blind}");
    }

    #[test]
    fn a_rollout_that_cannot_decide_is_refused() {
        let (judge, stages) = (judge(), weighing(&[10, 100]));
        let seen = |requests, errors| {
            let counts = Counts {
                requests,
                errors,
                latency: None,
            };
            forecast(&stages, pace(0.0), &judge, &counts, 10.0).check(
                60.0,
                "production",
                "http://localhost",
            )
        };
        seen(2000, 0).unwrap();
        // Most of stable's requests are slow: what is found by comparison still counts at 100 %.
        let slow = |weights: &[u8]| {
            let stages = weighing(weights);
            let counts = Counts {
                requests: 5000,
                errors: 0,
                latency: Some(Histogram {
                    le: vec![0.1, 0.5, 1.0],
                    count: vec![1000, 3800, 180, 20],
                }),
            };
            forecast(&stages, pace(0.0), &judge, &counts, 10.0)
        };
        let forecast = slow(&[25, 50, 100]);
        forecast
            .check(60.0, "production", "http://localhost")
            .unwrap();
        assert!(forecast.stages[0].to_pass > 2.0, "{forecast:?}");
        assert_eq!(forecast.stages[2].to_pass, 2.0);
        for weight in 1..100 {
            let forecast = slow(&[weight, 100]);
            assert_eq!(forecast.stages[1].to_pass, 2.0, "{weight} %");
        }
        let refused = slow(&[100]).check(60.0, "production", "http://localhost");
        let refused = refused.unwrap_err().to_string();
        assert!(refused.contains("4.00 % slower than 500 ms"), "{refused}");
        assert!(refused.contains("add a stage below 100 %"), "{refused}");
        assert!(seen(0, 0).unwrap_err().to_string().contains("no requests"));
        assert!(
            seen(100, 0)
                .unwrap_err()
                .to_string()
                .contains("rollout.max_stage")
        );
        assert!(
            seen(2000, 10)
                .unwrap_err()
                .to_string()
                .contains("0.50 % errors")
        );
    }
}
