//! The judge: anytime-valid tests of a candidate against a baseline. Pure.
//!
//! Each metric (errors; requests slower than a fixed bound) has its own [`evidence`](super::evidence).
//! At an e-value of `1/alpha` the candidate is *regressed* (Ville's inequality); with `1/beta` for
//! it on every metric it is *non-inferior*.
//!
//! Evidence is carried across stages. Metrics' e-values are averaged, so `alpha` bounds the
//! whole judge.

use serde::{Deserialize, Serialize};

use super::engine::Verdict;
use super::evidence::Metric;
use super::windows::{Counts, Histogram, Window};
use crate::config::Judge as Settings;

/// Latency is judged at stable's quantiles.
pub const QUANTILES: [f64; 3] = [0.5, 0.95, 0.99];
/// The part of the average that belongs to errors, where latency is judged too.
const ERRORS_PART: f64 = 0.5;
/// Standard errors of the share that are no longer chance.
const SHARE_LIMIT: f64 = 5.0;
/// Requests from which the share can be checked.
const SHARE_MIN: u64 = 200;
/// Requests of an arm from which a window can show an outage.
const OUTAGE_MIN: u64 = 10;

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Judge {
    settings: Settings,
    metrics: Vec<Metric>,
    /// Whether the latency bounds are known.
    fixed: bool,
    regressed: Option<Judgement>,
    /// Requests of baseline and candidate since the stage began, and the weight asked for.
    share: Share,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
struct Share {
    weight: Option<u8>,
    baseline: u64,
    candidate: u64,
}

/// The judge's word after a window.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Judgement {
    pub window: u64,
    pub verdict: Verdict,
    /// The metric that decided, or the one furthest from a decision.
    pub metric: String,
    /// Evidence that the candidate is worse, over all metrics; 1 is none.
    pub e_value: f64,
    /// The `e_value` at which the candidate is regressed.
    pub threshold: f64,
    pub metrics: Vec<MetricEvidence>,
    /// The candidate's observed share of the requests in this stage.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub share: Option<f64>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MetricEvidence {
    pub metric: String,
    /// Evidence that the candidate is worse.
    pub e_value: f64,
    /// Evidence that it is not, as a part of what is needed: 1 is enough.
    pub passed: f64,
    /// Shares of bad events so far.
    pub baseline: f64,
    pub candidate: f64,
    /// Candidate requests so far.
    pub requests: u64,
}

impl Judge {
    /// `bounds` are the latencies in seconds fixed beforehand; `None` takes them from the
    /// baseline of the first window, whose latencies then count only for this.
    pub fn new(settings: &Settings, bounds: Option<&[f64]>) -> Self {
        let mut judge = Self {
            settings: settings.clone(),
            metrics: vec![Metric::new("errors".to_owned(), None, settings.tolerance.0)],
            fixed: false,
            regressed: None,
            share: Share::default(),
        };
        if let Some(bounds) = bounds {
            judge.fix(bounds);
        }
        judge
    }

    fn fix(&mut self, bounds: &[f64]) {
        self.fixed = true;
        for bound in bounds {
            let name = format!("latency > {:.4} s", bound);
            self.metrics.push(Metric::new(
                name,
                Some(*bound),
                self.settings.latency_tolerance.0,
            ));
        }
    }

    /// From now on the candidate is meant to get `weight` percent.
    pub fn stage(&mut self, weight: u8) {
        self.share = Share {
            weight: Some(weight),
            ..Share::default()
        };
    }

    /// Takes a window into account and judges everything so far. *Regressed* is final.
    pub fn window(&mut self, window: &Window) -> Judgement {
        let judgement = self.judge(window);
        if judgement.verdict == Verdict::Regressed && self.regressed.is_none() {
            self.regressed = Some(judgement.clone());
        }
        judgement
    }

    fn judge(&mut self, window: &Window) -> Judgement {
        let (baseline, candidate) = (
            Counts::sum(&window.baseline),
            Counts::sum(&window.candidate),
        );
        if let Some(regressed) = &self.regressed {
            return Judgement {
                window: window.number,
                ..regressed.clone()
            };
        }
        let share_off = self.share.count(baseline.requests, candidate.requests);
        if candidate.requests == 0 {
            return self.word(window.number, Verdict::NoData);
        }
        let down = |counts: &Counts| {
            counts.requests >= OUTAGE_MIN
                && counts.errors as f64 > self.settings.outage.0 * counts.requests as f64
        };
        if down(&baseline) && down(&candidate) {
            return self.word(window.number, Verdict::Outage);
        }
        let first_latency = !self.fixed;
        if first_latency
            && let Some(latency) = baseline
                .latency
                .as_ref()
                .filter(|latency| latency.total() > 0)
        {
            self.fix(&latency_bounds(
                latency,
                self.settings.latency_floor.0.as_secs_f64(),
            ));
        }
        for metric in &mut self.metrics {
            if metric.above.is_none() || !first_latency {
                metric.count(window, &self.settings);
            }
        }
        let verdict = self.verdict();
        let undecided = verdict == Verdict::NonInferior && share_off;
        self.word(
            window.number,
            if undecided {
                Verdict::ShareOff
            } else {
                verdict
            },
        )
    }

    fn verdict(&self) -> Verdict {
        let alarming = self
            .metrics
            .iter()
            .any(|m| m.is_material() && m.e_value() > 1.0);
        if alarming && self.e_value() >= 1.0 / self.settings.alpha.0 {
            Verdict::Regressed
        } else if self
            .metrics
            .iter()
            .all(|metric| metric.passed(&self.settings) >= 1.0)
        {
            Verdict::NonInferior
        } else {
            Verdict::Undecided
        }
    }

    /// The average of the metrics' e-values; a metric whose candidate is below its tolerance
    /// cannot speak against it.
    fn e_value(&self) -> f64 {
        let latencies = self.metrics.len() - 1;
        self.metrics
            .iter()
            .map(|metric| {
                let part = match (latencies, metric.above) {
                    (0, _) => 1.0,
                    (_, None) => ERRORS_PART,
                    (_, Some(_)) => (1.0 - ERRORS_PART) / latencies as f64,
                };
                part * if metric.is_material() {
                    metric.e_value()
                } else {
                    metric.e_value().min(1.0)
                }
            })
            .sum()
    }

    fn word(&self, window: u64, verdict: Verdict) -> Judgement {
        let metrics: Vec<MetricEvidence> = self
            .metrics
            .iter()
            .map(|metric| MetricEvidence {
                metric: metric.name.clone(),
                e_value: metric.e_value(),
                passed: metric.passed(&self.settings),
                baseline: metric.baseline.rate(),
                candidate: metric.candidate.rate(),
                requests: metric.candidate.requests,
            })
            .collect();
        let deciding = if verdict == Verdict::Regressed {
            metrics
                .iter()
                .max_by(|a, b| a.e_value.total_cmp(&b.e_value))
        } else {
            metrics.iter().min_by(|a, b| a.passed.total_cmp(&b.passed))
        };
        Judgement {
            window,
            verdict,
            metric: deciding.map_or_else(String::new, |metric| metric.metric.clone()),
            e_value: self.e_value(),
            threshold: 1.0 / self.settings.alpha.0,
            share: self.share.observed(),
            metrics,
        }
    }
}

/// The bounds at which latency is judged: those nearest above stable's quantiles, none below
/// `floor` seconds, each once.
pub fn latency_bounds(stable: &Histogram, floor: f64) -> Vec<f64> {
    let lowest = stable
        .le
        .iter()
        .copied()
        .find(|bound| *bound >= floor * (1.0 - 1e-9));
    let mut bounds: Vec<f64> = QUANTILES
        .iter()
        .filter_map(|quantile| stable.quantile_bound(*quantile))
        .filter_map(|bound| if bound < floor { lowest } else { Some(bound) })
        .collect();
    bounds.dedup();
    bounds
}

impl Share {
    /// Counts a window; whether the shares are too far from the weight to be chance.
    fn count(&mut self, baseline: u64, candidate: u64) -> bool {
        self.baseline += baseline;
        self.candidate += candidate;
        let total = self.baseline + self.candidate;
        let Some(weight) = self.weight.filter(|_| total >= SHARE_MIN) else {
            return false;
        };
        let (n, w) = (total as f64, f64::from(weight) / 100.0);
        // Half a percent of slack: at the edges of a window a request may be counted by one
        // side only.
        let slack = SHARE_LIMIT * (n * w * (1.0 - w)).sqrt() + 0.005 * n;
        (self.candidate as f64 - n * w).abs() > slack
    }

    fn observed(&self) -> Option<f64> {
        let total = self.baseline + self.candidate;
        (total > 0).then(|| self.candidate as f64 / total as f64)
    }
}

#[cfg(test)]
mod tests {
    use super::super::evidence::{TOLERABLE, WORSE, requests_to_pass, requests_to_see};
    use super::*;

    fn settings() -> Settings {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../config/pipeline.toml");
        let text = std::fs::read_to_string(path).unwrap();
        let table: toml::Table = text.parse().unwrap();
        table["judge"].clone().try_into().unwrap()
    }

    fn window(number: u64, baseline: (u64, u64), candidate: (u64, u64)) -> Window {
        let counts = |(requests, errors)| {
            vec![Counts {
                requests,
                errors,
                latency: None,
            }]
        };
        Window {
            number,
            seconds: 60.0,
            baseline: counts(baseline),
            candidate: counts(candidate),
        }
    }

    /// Requests and errors.
    type Pair = (u64, u64);

    fn verdicts(windows: &[(Pair, Pair)]) -> Vec<Verdict> {
        let mut judge = Judge::new(&settings(), Some(&[]));
        (1..)
            .zip(windows)
            .map(|(i, (b, c))| judge.window(&window(i, *b, *c)).verdict)
            .collect()
    }

    /// A journal that has grown long keeps the judge itself instead of what it was told.
    #[test]
    fn a_judge_that_was_written_down_judges_the_same() {
        let mut judge = Judge::new(&settings(), Some(&[0.1]));
        judge.stage(10);
        for number in 1..30 {
            judge.window(&window(number, (900, number % 2), (100, 0)));
            let text = serde_json::to_string(&judge).unwrap();
            let mut again: Judge = serde_json::from_str(&text).unwrap();
            assert_eq!(again, judge);
            let next = window(number + 1, (900, 3), (100, 1));
            assert_eq!(again.window(&next), judge.clone().window(&next));
        }
    }

    #[test]
    fn verdicts_on_plain_cases() {
        use Verdict::{NoData, NonInferior, Outage, Regressed, Undecided};
        // A service without errors passes after some 600 candidate requests.
        assert_eq!(
            verdicts(&[((5400, 0), (500, 0)), ((5400, 0), (150, 0))]),
            [Undecided, NonInferior]
        );
        // A flood of errors is seen at once, and stays seen.
        assert_eq!(
            verdicts(&[((900, 0), (100, 30)), ((900, 0), (100, 0))]),
            [Regressed, Regressed]
        );
        // A ratio of 4 on a rate below the tolerance is nobody's incident.
        assert_eq!(verdicts(&[((100_000, 10), (100_000, 40))]), [NonInferior]);
        // Both arms failing is an outage and proves nothing.
        assert_eq!(
            verdicts(&[((900, 90), (100, 12)), ((900, 0), (0, 0))]),
            [Outage, NoData]
        );
        // Alone at 100 %, a collapse is compared with what stable had.
        assert_eq!(
            verdicts(&[((5000, 5), (5000, 5)), ((0, 0), (1000, 300))]),
            [NonInferior, Regressed]
        );
        // Good news does not pile up so high that bad news drowns.
        let mut windows = vec![((50_000, 0), (50_000, 0)); 20];
        windows.push(((50_000, 0), (50_000, 400)));
        assert_ne!(verdicts(&windows).last(), Some(&NonInferior));
    }

    #[test]
    fn evidence_is_what_the_formula_says() {
        let mut judge = Judge::new(&settings(), Some(&[]));
        let said = judge.window(&window(1, (1000, 5), (1000, 10)));
        let expected: f64 = WORSE
            .iter()
            .map(|(psi, prior)| prior * (10.0 * psi.ln() - 15.0 * (0.5 * psi + 0.5).ln()).exp())
            .sum();
        assert!(
            (said.e_value / expected - 1.0).abs() < 1e-12,
            "{} {expected}",
            said.e_value
        );
        let priors: f64 = WORSE.iter().map(|(_, prior)| prior).sum();
        let tolerable: f64 = TOLERABLE.iter().map(|(_, prior)| prior).sum();
        assert!((priors - 1.0).abs() < 1e-12 && (tolerable - 1.0).abs() < 1e-12);
    }

    #[test]
    fn latency_bounds_are_stables_quantiles_above_the_floor() {
        let histogram = Histogram {
            le: vec![0.01, 0.05, 0.1, 0.5],
            count: vec![50, 44, 5, 1, 0],
        };
        assert_eq!(latency_bounds(&histogram, 0.001), [0.01, 0.1]);
        assert_eq!(latency_bounds(&histogram, 0.05), [0.05, 0.1]);
        assert_eq!(histogram.above(0.05), Some(6));
        assert_eq!(histogram.above(0.06), None);
    }

    /// One pause of one process is no regression; slow requests in every window are.
    #[test]
    fn a_burst_of_slow_requests_is_forgiven_once() {
        let slow = |requests: u64, slow: u64| Counts {
            requests,
            errors: 0,
            latency: Some(Histogram {
                le: vec![0.1],
                count: vec![requests - slow, slow],
            }),
        };
        let window = |number, candidate| Window {
            number,
            seconds: 1.0,
            baseline: vec![slow(900, 1)],
            candidate: vec![slow(100, candidate)],
        };
        let mut judge = Judge::new(&settings(), Some(&[0.1]));
        assert_ne!(judge.window(&window(1, 60)).verdict, Verdict::Regressed);
        for number in 2..5 {
            assert_ne!(judge.window(&window(number, 0)).verdict, Verdict::Regressed);
        }
        assert_eq!(judge.window(&window(5, 60)).verdict, Verdict::Regressed);
    }

    #[test]
    fn a_share_that_is_not_the_weight_is_no_proof() {
        let mut judge = Judge::new(&settings(), Some(&[]));
        judge.stage(50);
        assert_eq!(
            judge.window(&window(1, (9000, 0), (1000, 0))).verdict,
            Verdict::ShareOff
        );
        judge.stage(10);
        assert_eq!(
            judge.window(&window(2, (9000, 0), (1000, 0))).verdict,
            Verdict::NonInferior
        );
    }

    #[test]
    fn the_planner_agrees_with_the_judge() {
        let settings = settings();
        let to_pass = |rate| {
            let [by_margin, by_tolerance] =
                requests_to_pass(&settings, settings.tolerance.0, rate, 0.1);
            by_margin.min(by_tolerance)
        };
        let needed = to_pass(0.0).ceil() as u64;
        assert!((550..700).contains(&needed), "{needed}");
        let mut judge = Judge::new(&settings, Some(&[]));
        let verdict = judge
            .window(&window(1, (needed * 9, 0), (needed, 0)))
            .verdict;
        assert_eq!(verdict, Verdict::NonInferior);
        assert!(to_pass(0.004).is_finite());
        assert!(
            requests_to_see(&settings, 0.005, 10.0, 0.5)
                < requests_to_see(&settings, 0.005, 2.0, 0.5)
        );
    }
}
