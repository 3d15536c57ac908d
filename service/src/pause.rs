//! Waiting between tries: longer each time, up to a limit, and never as long as others wait who began
//! together.

use std::time::Duration;

/// No wait is longer.
const LONGEST: Duration = Duration::from_secs(5);

pub struct Pause {
    first: Duration,
    next: Duration,
}

/// Between half and all of it.
/// <https://aws.amazon.com/builders-library/timeouts-retries-and-backoff-with-jitter/>
pub fn jittered(wait: Duration) -> Duration {
    wait.mul_f64(0.5 + fastrand::f64() / 2.0)
}

impl Pause {
    pub fn new(first: Duration) -> Self {
        Self { first, next: first }
    }

    pub async fn wait(&mut self) {
        tokio::time::sleep(jittered(self.next)).await;
        self.next = (self.next * 2).min(LONGEST);
    }

    /// It went well: the next wait is as short as the first.
    pub fn reset(&mut self) {
        self.next = self.first;
    }
}
