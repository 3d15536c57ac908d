//! What the proxy counts for one process: a few atomic additions for each request.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::rollout::windows::{Counts, Histogram};

/// Bounds grow by the fourth root of 2, from half a millisecond to a minute.
const BUCKETS: usize = 68;

/// Upper bounds in microseconds.
const BOUNDS: [u64; BUCKETS] = bounds();

const fn bounds() -> [u64; BUCKETS] {
    let mut bounds = [0; BUCKETS];
    (bounds[0], bounds[1], bounds[2], bounds[3]) = (500, 595, 707, 841);
    let mut i = 4;
    while i < BUCKETS {
        bounds[i] = 2 * bounds[i - 4];
        i += 1;
    }
    bounds
}

#[derive(Debug)]
pub struct Counters {
    requests: AtomicU64,
    errors: AtomicU64,
    /// Requests whose client went away first; they are neither good nor bad.
    aborted: AtomicU64,
    /// One more than bounds.
    latency: [AtomicU64; BUCKETS + 1],
}

impl Default for Counters {
    fn default() -> Self {
        Self {
            requests: AtomicU64::new(0),
            errors: AtomicU64::new(0),
            aborted: AtomicU64::new(0),
            latency: [const { AtomicU64::new(0) }; BUCKETS + 1],
        }
    }
}

impl Counters {
    /// A response head arrived, `time` after the request did.
    pub fn answered(&self, time: Duration, error: bool) {
        let micros = u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        let bucket = BOUNDS.partition_point(|bound| *bound < micros);
        self.latency[bucket].fetch_add(1, Ordering::Relaxed);
        self.requests.fetch_add(1, Ordering::Relaxed);
        if error {
            self.errors.fetch_add(1, Ordering::Release);
        }
    }

    /// The process took a request and gave no answer, or broke off one that was counted already.
    pub fn lost(&self) {
        self.requests.fetch_add(1, Ordering::Relaxed);
        self.errors.fetch_add(1, Ordering::Release);
    }

    /// The client went away after this time, before there was an answer: no error of the
    /// process's, but it took at least so long.
    pub fn abandoned(&self, time: Duration) {
        self.aborted();
        self.answered(time, false);
    }

    pub fn aborted(&self) {
        self.aborted.fetch_add(1, Ordering::Relaxed);
    }

    pub fn read(&self) -> Counts {
        // Errors first: a request is counted before its error, so errors never exceed requests.
        let errors = self.errors.load(Ordering::Acquire);
        Counts {
            requests: self.requests.load(Ordering::Acquire),
            errors,
            latency: Some(Histogram {
                le: BOUNDS.iter().map(|micros| *micros as f64 / 1e6).collect(),
                count: self
                    .latency
                    .iter()
                    .map(|count| count.load(Ordering::Relaxed))
                    .collect(),
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_land_in_their_bucket() {
        let counters = Counters::default();
        for (millis, error) in [(1, false), (100, true), (200_000, false)] {
            counters.answered(Duration::from_millis(millis), error);
        }
        let counts = counters.read();
        assert_eq!((counts.requests, counts.errors), (3, 1));
        let latency = counts.latency.unwrap();
        assert_eq!(latency.count.last(), Some(&1), "above every bound");
        assert_eq!(latency.quantile_bound(0.3), Some(0.001));
        let bound = latency.quantile_bound(0.6).unwrap();
        assert!((0.1..0.12).contains(&bound), "{bound}");
    }
}
