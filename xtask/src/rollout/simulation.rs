//! The judge's rates on simulated rollouts: how often it is wrong, and how soon it is right.

use super::engine::Verdict;
use super::judge::Judge;
use super::torture::started;
use super::windows::{Counts, Histogram, Window};
use crate::config::Judge as Settings;

const ROLLOUTS: u64 = 1000;
const WINDOWS: u64 = 60;

/// SplitMix64 (Steele, Lea, Flood 2014): small, and the same numbers everywhere.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// In (0, 1].
    fn uniform(&mut self) -> f64 {
        ((self.next() >> 11) as f64 + 1.0) / (1u64 << 53) as f64
    }

    /// By multiplication (Knuth), in parts small enough for it.
    fn poisson(&mut self, mean: f64) -> u64 {
        let mut count = 0;
        let mut left = mean;
        while left > 0.0 {
            let limit = (-left.min(20.0)).exp();
            let mut product = self.uniform();
            while product > limit {
                count += 1;
                product *= self.uniform();
            }
            left -= 20.0;
        }
        count
    }

    /// Mean 1 and the coefficient of variation `cv`.
    fn log_normal(&mut self, cv: f64) -> f64 {
        let variance = (1.0 + cv * cv).ln();
        let normal =
            (-2.0 * self.uniform().ln()).sqrt() * (std::f64::consts::TAU * self.uniform()).cos();
        (normal * variance.sqrt() - variance / 2.0).exp()
    }
}

/// A service as a population that windows are drawn from.
#[derive(Clone, Copy)]
struct Traffic {
    /// Requests a minute of the candidate and of the baseline.
    candidate: f64,
    baseline: f64,
    errors: f64,
    /// The candidate's error rate over the baseline's.
    ratio: f64,
    /// How much instances differ from one another from minute to minute.
    variation: f64,
    latency: bool,
}

const ALIKE: Traffic = Traffic {
    candidate: 1200.0,
    baseline: 1200.0,
    errors: 0.005,
    ratio: 1.0,
    variation: 0.0,
    latency: false,
};

/// Instances of each arm.
const INSTANCES: u64 = 4;

impl Traffic {
    fn counts(&self, random: &mut Random, requests: f64, errors: f64) -> Counts {
        let rate = match self.variation {
            0.0 => errors,
            cv => errors * random.log_normal(cv),
        };
        let errors = random.poisson(requests * rate);
        let latency = self.latency.then(|| {
            // Half, 5 %, 1 % and 0.2 % of the requests are above these bounds.
            let shares = [0.5, 0.45, 0.04, 0.008, 0.002];
            Histogram {
                le: vec![0.01, 0.06, 0.1, 0.5],
                count: shares
                    .iter()
                    .map(|share| random.poisson(requests * share))
                    .collect(),
            }
        });
        // The number of requests is fixed: the tests are conditional on it.
        let requests = latency.as_ref().map_or(requests as u64, Histogram::total);
        Counts {
            requests: requests.max(errors),
            errors,
            latency,
        }
    }

    fn window(&self, random: &mut Random, number: u64) -> Window {
        let arm = |random: &mut Random, requests: f64, errors: f64| {
            (0..INSTANCES)
                .map(|_| self.counts(random, requests / INSTANCES as f64, errors))
                .collect()
        };
        Window {
            number,
            seconds: 60.0,
            baseline: arm(random, self.baseline, self.errors),
            candidate: arm(random, self.candidate, self.errors * self.ratio),
        }
    }

    /// For each rollout, the window of the first verdict of this kind.
    fn first(&self, settings: &Settings, wanted: Verdict) -> Vec<Option<u64>> {
        let bounds: &[f64] = if self.latency {
            &[0.01, 0.06, 0.1]
        } else {
            &[]
        };
        (0..ROLLOUTS)
            .map(|seed| {
                let mut random = Random(seed.wrapping_mul(0xD134_2543_DE82_EF95));
                let mut judge = Judge::new(settings, Some(bounds));
                (1..=WINDOWS).find(|number| {
                    judge.window(&self.window(&mut random, *number)).verdict == wanted
                })
            })
            .collect()
    }

    /// The part of the rollouts that ever got this verdict.
    fn rate(&self, settings: &Settings, wanted: Verdict) -> f64 {
        let firsts = self.first(settings, wanted);
        firsts.iter().flatten().count() as f64 / firsts.len() as f64
    }

    /// The median of the window in which a regression is seen.
    fn median(&self, settings: &Settings) -> u64 {
        let mut firsts: Vec<u64> = self
            .first(settings, Verdict::Regressed)
            .into_iter()
            .map(|first| first.unwrap_or(u64::MAX))
            .collect();
        firsts.sort_unstable();
        firsts[firsts.len() / 2]
    }
}

fn settings() -> Settings {
    started().judge
}

/// Where the test's output is read by people.
#[expect(clippy::print_stderr, reason = "the rates belong into the test's log")]
fn tell(what: &str, value: impl std::fmt::Display) {
    eprintln!("{what}: {value}");
}

#[test]
fn equal_releases_are_rarely_rolled_back_at_any_traffic() {
    for errors in [0.0, 0.001, 0.005, 0.02] {
        for requests in [30.0, 120.0, 1200.0, 12_000.0] {
            for baseline in [1.0, 9.0] {
                let traffic = Traffic {
                    candidate: requests,
                    baseline: requests * baseline,
                    errors,
                    ..ALIKE
                };
                let rate = traffic.rate(&settings(), Verdict::Regressed);
                tell(
                    &format!("errors {errors}, {requests} a minute, 1:{baseline}: rolled back"),
                    rate,
                );
                assert!(rate <= 0.03, "{rate}");
            }
        }
    }
}

#[test]
fn equal_latencies_are_rarely_taken_for_a_regression() {
    for requests in [120.0, 1200.0] {
        let traffic = Traffic {
            candidate: requests,
            baseline: requests * 3.0,
            latency: true,
            ..ALIKE
        };
        let rate = traffic.rate(&settings(), Verdict::Regressed);
        tell(
            &format!("with latency, {requests} a minute: rolled back"),
            rate,
        );
        assert!(rate <= 0.03, "{rate}");
    }
}

/// Instances whose error rates differ by half from minute to minute.
#[test]
fn instances_that_differ_do_not_fool_the_judge() {
    for (requests, limit) in [(1200.0, 0.03), (12_000.0, 0.06)] {
        let traffic = Traffic {
            variation: 0.5,
            candidate: requests,
            baseline: requests,
            ..ALIKE
        };
        let rate = traffic.rate(&settings(), Verdict::Regressed);
        tell(
            &format!("instances that vary by half, {requests} a minute: rolled back"),
            rate,
        );
        assert!(rate <= limit, "{rate}");
    }
}

#[test]
fn regressions_are_seen_soon() {
    let doubled = Traffic {
        ratio: 2.0,
        ..ALIKE
    }
    .median(&settings());
    let tenfold = Traffic {
        ratio: 10.0,
        ..ALIKE
    }
    .median(&settings());
    tell(
        "20 requests/s an arm, 0.5 % errors: doubled is seen in window",
        doubled,
    );
    tell("tenfold is seen in window", tenfold);
    assert!(doubled <= 5, "{doubled}");
    assert!(tenfold <= 2, "{tenfold}");
}

#[test]
fn services_without_errors_pass_and_worse_ones_do_not() {
    let flawless = Traffic {
        errors: 0.0,
        ..ALIKE
    };
    assert!((flawless.rate(&settings(), Verdict::NonInferior) - 1.0).abs() < 1e-9);
    assert!(flawless.rate(&settings(), Verdict::Regressed) < 1e-9);

    // At the margin there are two ways to pass, each of which may be wrong with probability beta.
    let worse = Traffic {
        ratio: 1.5,
        ..ALIKE
    }
    .rate(&settings(), Verdict::NonInferior);
    tell("worse by the margin: passed", worse);
    assert!(worse <= 2.0 * settings().beta.0, "{worse}");
    let twice = Traffic {
        ratio: 3.0,
        ..ALIKE
    }
    .rate(&settings(), Verdict::NonInferior);
    tell("three times as bad: passed", twice);
    assert!(twice <= 0.01, "{twice}");
}
