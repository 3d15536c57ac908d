//! The judge: anytime-valid tests of a candidate against a baseline. Pure.
//!
//! Each metric is a count of bad events among requests (errors; requests slower than a fixed
//! bound). Four e-processes run on each, and may be looked at after every window:
//!
//! - *worse*: given all bad events of a window, the candidate's part is binomial with
//!   probability `w psi / (w psi + 1 - w)`, where `w` is its share of the requests and `psi` the
//!   relative risk. The likelihood ratio of `psi_k` against 1, mixed over `psi_k`, is a
//!   nonnegative martingale under `psi = 1`; at `1/alpha` the candidate is *regressed*
//!   (Ville's inequality; mixture SPRT: Robbins 1970, Johari et al. 2022).
//! - *within the margin*: the same ratio of 1 against the margin, at `1/beta`.
//! - *tolerable*: a binomial mixture of rates below the tolerance against the tolerance, at
//!   `1/beta`. A service without errors passes by this one, a ratio would never decide.
//! - *worse, alone*: where no request went to the baseline (the last stage), the candidate is
//!   compared with the rate that stable had, or the tolerance if that is more.
//!
//! Evidence is carried across stages. Metrics' e-values are averaged, so `alpha` bounds the
//! whole judge.

use serde::{Deserialize, Serialize};

use super::engine::Verdict;
use super::windows::{Counts, Histogram, Window};
use crate::config::Judge as Settings;

/// Alternatives of relative risk and their prior weights, which sum to 1.
const WORSE: [(f64, f64); 7] = [
    (1.25, 0.05),
    (1.5, 0.2),
    (2.0, 0.3),
    (3.0, 0.2),
    (5.0, 0.1),
    (10.0, 0.1),
    (20.0, 0.05),
];
/// Rates below the tolerance, as parts of it, and their prior weights, which sum to 1.
const TOLERABLE: [(f64, f64); 3] = [(0.02, 0.8), (0.25, 0.1), (0.5, 0.1)];
/// Latency is judged at stable's quantiles.
pub const QUANTILES: [f64; 3] = [0.5, 0.95, 0.99];
/// The part of the average that belongs to errors, where latency is judged too.
const ERRORS_PART: f64 = 0.5;
/// Evidence for the candidate does not pile up beyond the square of what is needed, so that
/// news is not drowned by a long good past. Less evidence is always on the safe side.
const CEILING: f64 = 2.0;
/// Standard errors of the share that are no longer chance.
const SHARE_LIMIT: f64 = 5.0;
/// Requests from which the share can be checked.
const SHARE_MIN: u64 = 200;
/// Requests of an arm from which a window can show an outage.
const OUTAGE_MIN: u64 = 10;

pub struct Judge {
    settings: Settings,
    metrics: Vec<Metric>,
    /// Whether the latency bounds are known.
    fixed: bool,
    regressed: Option<Judgement>,
    /// Requests of baseline and candidate since the stage began, and the weight asked for.
    share: Share,
}

#[derive(Debug, Clone, Default)]
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

struct Metric {
    name: String,
    /// `None` for errors, a bound in seconds for latency.
    above: Option<f64>,
    tolerance: f64,
    log_worse: [f64; WORSE.len()],
    log_margin: f64,
    log_tolerable: [f64; TOLERABLE.len()],
    baseline: Tally,
    candidate: Tally,
    spread: Spread,
}

#[derive(Debug, Clone, Copy, Default)]
struct Tally {
    requests: u64,
    bad: u64,
}

/// Pearson's statistic of bad events between baseline instances, pooled over windows.
#[derive(Debug, Clone, Copy, Default)]
struct Spread {
    chi_squared: f64,
    freedom: f64,
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
        if first_latency && let Some(latency) = &baseline.latency {
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

/// The candidate requests that a stage of share `w` needs before it can pass, at best and
/// where both arms have the rate `rate`; infinite where the settings can never pass it.
pub fn requests_to_pass(settings: &Settings, tolerance: f64, rate: f64, w: f64) -> f64 {
    let needed = (1.0 / settings.beta.0).ln();
    let margin = settings.margin.0;
    let per_bad = if w < 1.0 {
        -margin.ln() + (w * margin + 1.0 - w).ln() / w
    } else {
        0.0
    };
    let by_margin = needed / (rate * per_bad);
    let by_tolerance = TOLERABLE
        .iter()
        .map(|(part, prior)| {
            let (good, bad) = tolerable_steps(part * tolerance, tolerance);
            let drift = rate * bad + (1.0 - rate) * good;
            if drift > 0.0 {
                (needed - prior.ln()) / drift
            } else {
                f64::INFINITY
            }
        })
        .fold(f64::INFINITY, f64::min);
    by_tolerance.min(if by_margin > 0.0 {
        by_margin
    } else {
        f64::INFINITY
    })
}

/// The candidate requests after which a regression from `rate` to `rate * ratio` is likely seen,
/// at a candidate's share `w` of the requests; at 1 there is nothing beside it.
pub fn requests_to_see(settings: &Settings, rate: f64, ratio: f64, w: f64) -> f64 {
    let needed = (1.0 / settings.alpha.0).ln();
    let bad = (rate * ratio).min(1.0);
    let usual = settings.tolerance.0.max(settings.margin.0 * rate).min(0.9);
    let drift = |psi: f64| {
        if w < 1.0 {
            bad * psi.ln() - (bad + rate * (1.0 - w) / w) * (w * psi + 1.0 - w).ln()
        } else {
            let (if_good, if_bad) = tolerable_steps((psi * usual).min(0.99), usual);
            bad * if_bad + (1.0 - bad) * if_good
        }
    };
    WORSE
        .iter()
        .map(|(psi, prior)| (drift(*psi), prior))
        .map(|(drift, prior)| {
            if drift > 0.0 {
                (needed - prior.ln()) / drift
            } else {
                f64::INFINITY
            }
        })
        .fold(f64::INFINITY, f64::min)
}

/// The change of log evidence for rate `q` against the tolerance `t`, by a good and a bad event.
fn tolerable_steps(q: f64, t: f64) -> (f64, f64) {
    (((1.0 - q) / (1.0 - t)).ln(), (q / t).ln())
}

impl Metric {
    fn new(name: String, above: Option<f64>, tolerance: f64) -> Self {
        Self {
            name,
            above,
            tolerance,
            log_worse: [0.0; WORSE.len()],
            log_margin: 0.0,
            log_tolerable: [0.0; TOLERABLE.len()],
            baseline: Tally::default(),
            candidate: Tally::default(),
            spread: Spread::default(),
        }
    }

    /// Requests and bad events of these counts, where they have this metric.
    fn tally(&self, counts: &[Counts]) -> Vec<Tally> {
        counts
            .iter()
            .filter_map(|counts| match self.above {
                None => Some(Tally {
                    requests: counts.requests,
                    bad: counts.errors,
                }),
                Some(bound) => {
                    let latency = counts.latency.as_ref()?;
                    Some(Tally {
                        requests: latency.total(),
                        bad: latency.above(bound)?,
                    })
                }
            })
            .collect()
    }

    fn count(&mut self, window: &Window, settings: &Settings) {
        let instances = self.tally(&window.baseline);
        self.spread.count(&instances);
        let baseline = Tally::sum(&instances);
        let candidate = Tally::sum(&self.tally(&window.candidate));
        if candidate.requests == 0 {
            return;
        }
        let (good, bad) = (
            (candidate.requests - candidate.bad) as f64,
            candidate.bad as f64,
        );
        if baseline.requests > 0 {
            let w = candidate.requests as f64 / (candidate.requests + baseline.requests) as f64;
            let all = bad + baseline.bad as f64;
            for ((psi, _), log) in WORSE.iter().zip(&mut self.log_worse) {
                *log += bad * psi.ln() - all * (w * psi + 1.0 - w).ln();
            }
            let margin = settings.margin.0;
            self.log_margin += -bad * margin.ln() + all * (w * margin + 1.0 - w).ln();
        } else {
            let usual = self
                .tolerance
                .max(settings.margin.0 * self.baseline.rate())
                .min(0.9);
            for ((psi, _), log) in WORSE.iter().zip(&mut self.log_worse) {
                let (if_good, if_bad) = tolerable_steps((psi * usual).min(0.99), usual);
                *log += good * if_good + bad * if_bad;
            }
        }
        for ((part, _), log) in TOLERABLE.iter().zip(&mut self.log_tolerable) {
            let (if_good, if_bad) = tolerable_steps(part * self.tolerance, self.tolerance);
            *log += good * if_good + bad * if_bad;
        }
        let ceiling = CEILING * (1.0 / settings.beta.0).ln();
        for log in self.log_tolerable.iter_mut().chain([&mut self.log_margin]) {
            *log = log.min(ceiling * self.spread.phi());
        }
        self.baseline.add(baseline);
        self.candidate.add(candidate);
    }

    fn e_value(&self) -> f64 {
        mixture(
            &self.log_worse,
            &WORSE.map(|(_, prior)| prior),
            self.spread.phi(),
        )
    }

    /// Whether the candidate's rate is one that anybody would mind.
    fn is_material(&self) -> bool {
        self.candidate.rate() > self.tolerance
    }

    /// Log evidence that the candidate is good enough, as a part of what is needed.
    fn passed(&self, settings: &Settings) -> f64 {
        let phi = self.spread.phi();
        let tolerable = mixture(&self.log_tolerable, &TOLERABLE.map(|(_, prior)| prior), phi).ln();
        (self.log_margin / phi).max(tolerable) / (1.0 / settings.beta.0).ln()
    }
}

/// The weighted mean of `exp(log / phi)`: evidence is tempered by the overdispersion `phi`.
fn mixture(logs: &[f64], priors: &[f64], phi: f64) -> f64 {
    logs.iter()
        .zip(priors)
        .map(|(log, prior)| prior * (log / phi).min(700.0).exp())
        .sum()
}

impl Tally {
    fn sum(tallies: &[Self]) -> Self {
        let mut total = Self::default();
        for tally in tallies {
            total.add(*tally);
        }
        total
    }

    fn add(&mut self, other: Self) {
        self.requests += other.requests;
        self.bad += other.bad;
    }

    fn rate(&self) -> f64 {
        if self.requests == 0 {
            0.0
        } else {
            self.bad as f64 / self.requests as f64
        }
    }
}

impl Spread {
    fn count(&mut self, instances: &[Tally]) {
        let total = Tally::sum(instances);
        let active: Vec<&Tally> = instances
            .iter()
            .filter(|tally| tally.requests > 0)
            .collect();
        if active.len() < 2 || total.bad == 0 {
            return;
        }
        for tally in &active {
            let expected = total.bad as f64 * tally.requests as f64 / total.requests as f64;
            self.chi_squared += (tally.bad as f64 - expected).powi(2) / expected;
        }
        self.freedom += (active.len() - 1) as f64;
    }

    /// Variance over mean of the counts; 1 for independent requests, never less. An estimate
    /// above 1 is raised by its standard error (chi-squared has variance `2 df`): early, with few
    /// windows, it would otherwise be too low as often as not.
    fn phi(&self) -> f64 {
        if self.chi_squared <= self.freedom {
            return 1.0;
        }
        self.chi_squared / self.freedom * (1.0 + (2.0 / self.freedom).sqrt())
    }
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
        let needed = requests_to_pass(&settings, settings.tolerance.0, 0.0, 0.1).ceil() as u64;
        assert!((550..700).contains(&needed), "{needed}");
        let mut judge = Judge::new(&settings, Some(&[]));
        let verdict = judge
            .window(&window(1, (needed * 9, 0), (needed, 0)))
            .verdict;
        assert_eq!(verdict, Verdict::NonInferior);
        assert!(requests_to_pass(&settings, settings.tolerance.0, 0.004, 0.1).is_finite());
        assert!(
            requests_to_see(&settings, 0.005, 10.0, 0.5)
                < requests_to_see(&settings, 0.005, 2.0, 0.5)
        );
    }
}
