//! The evidence on one metric: a count of bad events among requests. Pure.
//!
//! Four e-processes run on each and may be looked at after every window:
//!
//! - *worse*: given all bad events of a window, the candidate's part is binomial with
//!   probability `w psi / (w psi + 1 - w)`, where `w` is its share of the requests and `psi` the
//!   relative risk. The likelihood ratio of `psi_k` against 1, mixed over `psi_k`, is a
//!   nonnegative martingale under `psi = 1` (mixture SPRT: Robbins 1970, Johari et al. 2022).
//! - *within the margin*: the same ratio of 1 against the margin.
//! - *tolerable*: a binomial mixture of rates below the tolerance against the tolerance. A
//!   service without errors passes by this one; a ratio would never decide.
//! - *worse, alone*: where no request went to the baseline (the last stage), the candidate is
//!   compared with the rate that stable had, or the tolerance if that is more.

use serde::{Deserialize, Serialize};

use super::windows::{Counts, Window};
use crate::config::Judge as Settings;

/// Alternatives of relative risk and their prior weights, which sum to 1.
pub const WORSE: [(f64, f64); 7] = [
    (1.25, 0.05),
    (1.5, 0.2),
    (2.0, 0.3),
    (3.0, 0.2),
    (5.0, 0.1),
    (10.0, 0.1),
    (20.0, 0.05),
];
/// Rates below the tolerance, as parts of it, and their prior weights, which sum to 1.
pub const TOLERABLE: [(f64, f64); 3] = [(0.02, 0.8), (0.25, 0.1), (0.5, 0.1)];
/// Evidence for the candidate does not pile up beyond the square of what is needed, so that
/// news is not drowned by a long good past. Less evidence is always on the safe side.
const CEILING: f64 = 2.0;
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Metric {
    pub name: String,
    /// `None` for errors, a bound in seconds for latency.
    pub above: Option<f64>,
    tolerance: f64,
    log_worse: [f64; WORSE.len()],
    /// The most that any one window added to each of these.
    strongest: [f64; WORSE.len()],
    log_margin: f64,
    log_tolerable: [f64; TOLERABLE.len()],
    pub baseline: Tally,
    pub candidate: Tally,
    spread: Spread,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Tally {
    pub requests: u64,
    bad: u64,
}

/// Pearson's statistic of bad events between baseline instances, pooled over windows.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
struct Spread {
    chi_squared: f64,
    freedom: f64,
}

/// The candidate requests that a metric needs before it can pass, at best and where both arms have
/// the rate `rate`, at a candidate's share `w`: in comparison, and because the rate is tolerable.
/// Infinite where it can never pass that way; at a share of 1 there is nothing to compare with.
pub fn requests_to_pass(settings: &Settings, tolerance: f64, rate: f64, w: f64) -> [f64; 2] {
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
    let by_margin = if by_margin > 0.0 {
        by_margin
    } else {
        f64::INFINITY
    };
    [by_margin, by_tolerance]
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
    pub fn new(name: String, above: Option<f64>, tolerance: f64) -> Self {
        Self {
            name,
            above,
            tolerance,
            log_worse: [0.0; WORSE.len()],
            strongest: [0.0; WORSE.len()],
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

    pub fn count(&mut self, window: &Window, settings: &Settings) {
        let instances = self.tally(&window.baseline);
        self.spread.count(&instances);
        let baseline = Tally::sum(&instances);
        let candidate = Tally::sum(&self.tally(&window.candidate));
        if candidate.requests == 0 {
            return;
        }
        let (good, bad) = (
            candidate.requests.saturating_sub(candidate.bad) as f64,
            candidate.bad as f64,
        );
        let mut steps = [0.0; WORSE.len()];
        if baseline.requests > 0 {
            let w = candidate.requests as f64 / (candidate.requests + baseline.requests) as f64;
            let all = bad + baseline.bad as f64;
            for ((psi, _), step) in WORSE.iter().zip(&mut steps) {
                *step = bad * psi.ln() - all * (w * psi + 1.0 - w).ln();
            }
            let margin = settings.margin.0;
            self.log_margin += -bad * margin.ln() + all * (w * margin + 1.0 - w).ln();
        } else {
            let usual = self
                .tolerance
                .max(settings.margin.0 * self.baseline.rate())
                .min(0.9);
            for ((psi, _), step) in WORSE.iter().zip(&mut steps) {
                let (if_good, if_bad) = tolerable_steps((psi * usual).min(0.99), usual);
                *step = good * if_good + bad * if_bad;
            }
        }
        for (step, (log, strongest)) in steps
            .iter()
            .zip(self.log_worse.iter_mut().zip(&mut self.strongest))
        {
            *log += step;
            *strongest = strongest.max(*step);
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

    /// Evidence that the candidate is worse; 1 is none. Slow requests come in bursts (one pause
    /// delays all that a process has at that moment), so for latency the strongest window does
    /// not count: less evidence is always on the safe side, and a regression stays.
    pub fn e_value(&self) -> f64 {
        let mut logs = self.log_worse;
        if self.above.is_some() {
            for (log, strongest) in logs.iter_mut().zip(&self.strongest) {
                *log -= strongest;
            }
        }
        mixture(&logs, &WORSE.map(|(_, prior)| prior), self.spread.phi())
    }

    /// Whether the candidate's rate is one that anybody would mind.
    pub fn is_material(&self) -> bool {
        self.candidate.rate() > self.tolerance
    }

    /// Log evidence that the candidate is good enough, as a part of what is needed.
    pub fn passed(&self, settings: &Settings) -> f64 {
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

    pub fn rate(&self) -> f64 {
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
