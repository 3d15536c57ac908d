//! Waiting between tries: longer each time, up to a limit.

use std::time::Duration;

/// No wait is longer.
const LONGEST: Duration = Duration::from_secs(5);

pub struct Pause {
    first: Duration,
    next: Duration,
}

impl Pause {
    pub fn new(first: Duration) -> Self {
        Self { first, next: first }
    }

    pub async fn wait(&mut self) {
        tokio::time::sleep(self.next).await;
        self.next = (self.next * 2).min(LONGEST);
    }

    /// It went well: the next wait is as short as the first.
    pub fn reset(&mut self) {
        self.next = self.first;
    }
}
