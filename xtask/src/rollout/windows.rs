//! Counts of one interval, per arm and instance: what the judge reads, live or from a file.

use serde::{Deserialize, Serialize};

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ArmName {
    Baseline,
    Candidate,
}

/// One line of the format that `canary judge` reads; a journal holds the same lines.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct WindowLine {
    pub window: u64,
    pub seconds: f64,
    pub arm: ArmName,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub instance: Option<String>,
    #[serde(flatten)]
    pub counts: Counts,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Counts {
    pub requests: u64,
    pub errors: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub latency: Option<Histogram>,
}

/// Requests by latency.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Histogram {
    /// Upper bounds in seconds, rising.
    pub le: Vec<f64>,
    /// Requests in each bucket, one more than `le`: the last holds what is above all bounds.
    pub count: Vec<u64>,
}

/// Everything counted in one interval.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Window {
    pub number: u64,
    pub seconds: f64,
    /// One entry for each instance.
    pub baseline: Vec<Counts>,
    pub candidate: Vec<Counts>,
}

impl Counts {
    pub fn sum(parts: &[Self]) -> Self {
        let mut total = Self::default();
        for part in parts {
            total.requests += part.requests;
            total.errors += part.errors;
            if let Some(latency) = &part.latency {
                match &mut total.latency {
                    None => total.latency = Some(latency.clone()),
                    Some(sum) if sum.le == latency.le => {
                        for (a, b) in sum.count.iter_mut().zip(&latency.count) {
                            *a += b;
                        }
                    }
                    // Instances with other bounds cannot be added up.
                    Some(_) => {}
                }
            }
        }
        total
    }

    /// What was counted since `earlier`. Counters that fell were restarted from 0.
    pub fn since(&self, earlier: &Self) -> Self {
        if self.requests < earlier.requests || self.errors < earlier.errors {
            return self.clone();
        }
        let latency = self.latency.as_ref().map(|now| match &earlier.latency {
            Some(then) if then.le == now.le => Histogram {
                le: now.le.clone(),
                count: now
                    .count
                    .iter()
                    .zip(&then.count)
                    .map(|(a, b)| a.saturating_sub(*b))
                    .collect(),
            },
            _ => now.clone(),
        });
        Self {
            requests: self.requests - earlier.requests,
            // The counters are not read in one instant.
            errors: (self.errors - earlier.errors).min(self.requests - earlier.requests),
            latency,
        }
    }
}

impl Histogram {
    pub fn total(&self) -> u64 {
        self.count.iter().sum()
    }

    /// Requests slower than the bound `le`, where that is one of the bounds.
    pub fn above(&self, le: f64) -> Option<u64> {
        let index = self
            .le
            .iter()
            .position(|bound| (bound - le).abs() <= le.abs() * 1e-9)?;
        Some(self.count.iter().skip(index + 1).sum())
    }

    /// The bound under which the share `quantile` of the requests lies; the highest bound where
    /// it lies above all of them.
    pub fn quantile_bound(&self, quantile: f64) -> Option<f64> {
        let wanted = quantile * self.total() as f64;
        let mut seen = 0;
        for (bound, count) in self.le.iter().zip(&self.count) {
            seen += count;
            if seen as f64 >= wanted {
                return Some(*bound);
            }
        }
        self.le.last().copied()
    }
}

impl Window {
    /// The lines of this window, as they stand in a file.
    pub fn lines(&self, names: impl Fn(ArmName, usize) -> Option<String>) -> Vec<WindowLine> {
        let arm = |arm: ArmName, counts: &[Counts]| -> Vec<WindowLine> {
            counts
                .iter()
                .enumerate()
                .map(|(i, counts)| WindowLine {
                    window: self.number,
                    seconds: self.seconds,
                    arm,
                    instance: names(arm, i),
                    counts: counts.clone(),
                })
                .collect()
        };
        [
            arm(ArmName::Baseline, &self.baseline),
            arm(ArmName::Candidate, &self.candidate),
        ]
        .concat()
    }

    /// Puts lines of one window together.
    pub fn from_lines(lines: &[WindowLine]) -> Self {
        let mut window = Self::default();
        for line in lines {
            window.number = line.window;
            window.seconds = window.seconds.max(line.seconds);
            match line.arm {
                ArmName::Baseline => window.baseline.push(line.counts.clone()),
                ArmName::Candidate => window.candidate.push(line.counts.clone()),
            }
        }
        window
    }
}

impl WindowLine {
    /// What is impossible in this line, if anything is.
    pub fn problem(&self) -> Option<String> {
        let counts = &self.counts;
        if counts.errors > counts.requests {
            return Some(format!(
                "{} errors of {} requests",
                counts.errors, counts.requests
            ));
        }
        if !(self.seconds > 0.0 && self.seconds.is_finite()) {
            return Some(format!("seconds = {} is no length of time", self.seconds));
        }
        let latency = counts.latency.as_ref()?;
        if latency.count.len() != latency.le.len() + 1 {
            return Some(format!(
                "latency has {} bounds and {} counts; there is one count more than bounds",
                latency.le.len(),
                latency.count.len()
            ));
        }
        if !latency.le.is_sorted_by(|a, b| a < b) {
            return Some("the bounds of latency do not rise".to_owned());
        }
        None
    }
}
