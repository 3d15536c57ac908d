//! A circuit breaker: a dependency that has failed several times in a row is left alone for a while,
//! then one call tries whether it is back. Nobody waits for what does not answer.
//! <https://learn.microsoft.com/azure/architecture/patterns/circuit-breaker>

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::config::CircuitBreaker;
use crate::metrics::METRICS;

pub struct Breaker {
    dependency: &'static str,
    settings: CircuitBreaker,
    state: Mutex<State>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Closed {
        failed: u32,
    },
    Open {
        until: Instant,
    },
    /// One call, which began at this time, is trying.
    HalfOpen {
        since: Instant,
    },
}

/// Why a call came to nothing.
#[derive(Debug, thiserror::Error)]
pub enum Broken<E> {
    #[error("it is left alone for a while after it has failed again and again")]
    Open,
    #[error("no answer within {0:?}")]
    Late(Duration),
    #[error(transparent)]
    Failed(E),
}

impl Breaker {
    pub fn new(dependency: &'static str, settings: &CircuitBreaker) -> Self {
        METRICS
            .circuit_open
            .get_or_create(&[("dependency", dependency)])
            .set(0);
        Self {
            dependency,
            settings: settings.clone(),
            state: Mutex::new(State::Closed { failed: 0 }),
        }
    }

    /// The outcome of `work`, unless the circuit is open or it takes longer than `limit`.
    pub async fn call<T, E>(
        &self,
        limit: Duration,
        work: impl Future<Output = Result<T, E>>,
    ) -> Result<T, Broken<E>> {
        let work = tokio::time::timeout(limit, work);
        match self
            .watch(work, |outcome| matches!(outcome, Ok(Ok(_))))
            .await
        {
            Some(Ok(outcome)) => outcome.map_err(Broken::Failed),
            Some(Err(_)) => Err(Broken::Late(limit)),
            None => Err(Broken::Open),
        }
    }

    /// The outcome of `work`, of which `went_well` says what it shows of the dependency; `None` where the
    /// circuit is open.
    pub async fn watch<T>(
        &self,
        work: impl Future<Output = T>,
        went_well: impl FnOnce(&T) -> bool,
    ) -> Option<T> {
        let began = Instant::now();
        let Some(tries) = self.pass(began) else {
            let dependency = [("dependency", self.dependency)];
            METRICS.circuit_refused.get_or_create(&dependency).inc();
            return None;
        };
        // A call that is dropped has not shown that the dependency is back.
        let attempt = Attempt {
            breaker: self,
            tries: tries.then_some(began),
        };
        let outcome = work.await;
        attempt.ended(went_well(&outcome));
        Some(outcome)
    }

    /// Whether a call that passes is the one that tries; `None` where it does not pass.
    fn pass(&self, now: Instant) -> Option<bool> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        match *state {
            State::Closed { .. } => Some(false),
            State::Open { until } if now >= until => {
                *state = State::HalfOpen { since: now };
                Some(true)
            }
            State::Open { .. } | State::HalfOpen { .. } => None,
        }
    }

    /// Counts how a call ended; `tries` says that it was the one, and when it began.
    fn count(&self, tries: Option<Instant>, went_well: bool) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let open = State::Open {
            until: Instant::now() + self.settings.rest.0,
        };
        let next = match (*state, tries) {
            (State::Closed { .. }, _) if went_well => State::Closed { failed: 0 },
            (State::Closed { failed }, _) if failed + 1 < self.settings.failures.get() => {
                State::Closed { failed: failed + 1 }
            }
            (State::Closed { .. }, _) => open,
            (State::HalfOpen { since }, Some(began)) if since == began => match went_well {
                true => State::Closed { failed: 0 },
                false => open,
            },
            // Calls from before it opened say nothing of now.
            (state, _) => state,
        };
        self.becomes(&mut state, next);
    }

    /// It has been seen to work, by somebody.
    pub fn works(&self) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        self.becomes(&mut state, State::Closed { failed: 0 });
    }

    fn becomes(&self, state: &mut State, next: State) {
        let is_open = |state| !matches!(state, State::Closed { .. });
        let (dependency, has_changed) = (self.dependency, is_open(*state) != is_open(next));
        if has_changed {
            tracing::warn!(dependency, open = is_open(next), "the circuit has changed");
        }
        if has_changed || is_open(next) {
            let circuit = METRICS
                .circuit_open
                .get_or_create(&[("dependency", dependency)]);
            circuit.set(is_open(next).into());
        }
        *state = next;
    }
}

/// A call that passed, until it is known how it ended.
struct Attempt<'a> {
    breaker: &'a Breaker,
    /// When it began, where it is the one that tries.
    tries: Option<Instant>,
}

impl Attempt<'_> {
    fn ended(mut self, went_well: bool) {
        self.breaker.count(self.tries.take(), went_well);
    }
}

impl Drop for Attempt<'_> {
    fn drop(&mut self) {
        let Some(since) = self.tries else { return };
        let state = &self.breaker.state;
        let mut state = state.lock().unwrap_or_else(PoisonError::into_inner);
        if *state == (State::HalfOpen { since }) {
            // The next one may try.
            let until = Instant::now();
            *state = State::Open { until };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Timeout;

    const LIMIT: Duration = Duration::from_secs(1);
    const REST: Duration = Duration::from_millis(50);

    async fn fails(breaker: &Breaker) -> Result<(), Broken<()>> {
        breaker.call(LIMIT, async { Err(()) }).await
    }

    async fn works(breaker: &Breaker) -> Result<(), Broken<()>> {
        breaker.call(LIMIT, async { Ok(()) }).await
    }

    fn breaker(failures: u32) -> Breaker {
        let settings = CircuitBreaker {
            failures: failures.try_into().unwrap(),
            rest: Timeout(REST),
        };
        Breaker::new("test", &settings)
    }

    #[tokio::test]
    async fn it_opens_rests_tries_once_and_closes() {
        let breaker = breaker(2);
        for _ in 0..2 {
            assert!(matches!(fails(&breaker).await, Err(Broken::Failed(()))));
        }
        assert!(matches!(works(&breaker).await, Err(Broken::Open)));
        tokio::time::sleep(REST).await;
        // One tries, and the others are told no meanwhile.
        let (first, second) = tokio::join!(
            breaker.call(LIMIT, async {
                tokio::task::yield_now().await;
                Err::<(), _>(())
            }),
            works(&breaker)
        );
        assert!(matches!(first, Err(Broken::Failed(()))));
        assert!(matches!(second, Err(Broken::Open)));
        assert!(matches!(works(&breaker).await, Err(Broken::Open)));
        tokio::time::sleep(REST).await;
        works(&breaker).await.unwrap();
        works(&breaker).await.unwrap();
    }

    #[tokio::test]
    async fn it_closes_when_somebody_has_seen_it_work() {
        let breaker = breaker(1);
        assert!(fails(&breaker).await.is_err());
        assert!(matches!(works(&breaker).await, Err(Broken::Open)));
        breaker.works();
        works(&breaker).await.unwrap();
    }

    #[tokio::test]
    async fn successes_between_failures_keep_it_closed() {
        let breaker = breaker(2);
        for _ in 0..5 {
            assert!(fails(&breaker).await.is_err());
            works(&breaker).await.unwrap();
        }
    }

    #[tokio::test]
    async fn what_is_late_counts_and_what_is_dropped_frees_the_try() {
        let breaker = breaker(1);
        let never = std::future::pending::<Result<(), ()>>;
        let late = breaker.call(Duration::from_millis(10), never()).await;
        assert!(matches!(late, Err(Broken::Late(_))));
        tokio::time::sleep(REST).await;
        let dropped = tokio::time::timeout(Duration::from_millis(10), breaker.call(LIMIT, never()));
        dropped.await.unwrap_err();
        works(&breaker).await.unwrap();
    }
}
