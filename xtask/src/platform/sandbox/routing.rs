//! Which process gets a request: first a release by weight, then one of its processes in turn.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::{Duration, Instant};

use hyper::client::conn::{http1, http2};
use hyper::header::HeaderValue;

use super::bodies::RequestBody;
use super::counters::Counters;
use crate::release::ReleaseId;

/// 2^64 divided by the golden ratio: multiples of it, modulo 2^64, are spread evenly however
/// many there are (Weyl's sequence), so weights are exact and need no state to reset.
const GOLDEN: u64 = 0x9E37_79B9_7F4A_7C15;

/// The routing of one environment's port.
#[derive(Default)]
pub struct Router {
    table: RwLock<Arc<Table>>,
    requests: AtomicU64,
}

#[derive(Default)]
pub struct Table {
    pub targets: Vec<Target>,
}

/// A release and its part of the traffic.
pub struct Target {
    /// Told to clients in the response's `x-release`.
    pub header: HeaderValue,
    /// Percent.
    pub weight: u8,
    pub backends: Vec<Arc<Backend>>,
    turn: AtomicUsize,
}

/// A process that takes requests.
pub struct Backend {
    pub address: SocketAddr,
    pub counters: Arc<Counters>,
    in_flight: AtomicU64,
    draining: AtomicBool,
    /// Idle connections, one pool for each worker thread of the proxy.
    pools: Vec<Pool>,
}

#[derive(Default)]
pub struct Pool {
    http1: Mutex<Vec<http1::SendRequest<RequestBody>>>,
    http2: Mutex<Vec<http2::SendRequest<RequestBody>>>,
    /// Held by whoever makes a connection for HTTP/2.
    pub making: tokio::sync::Mutex<()>,
}

/// A request on its way; the backend is busy until this is dropped.
pub struct Flight {
    pub backend: Arc<Backend>,
    pub header: HeaderValue,
    pub started: Instant,
    answered: bool,
    ended: bool,
}

impl Router {
    pub fn set(&self, table: Table) {
        *self.table.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(table);
    }

    pub fn table(&self) -> Arc<Table> {
        Arc::clone(&self.table.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// A process for the next request, not one of `refused`; a release without any is passed
    /// over for the others. `None` where no process takes requests.
    pub fn pick(&self, refused: &[SocketAddr], started: Instant) -> Option<Flight> {
        let table = self.table();
        let number = self.requests.fetch_add(1, Ordering::Relaxed);
        let position = ((number.wrapping_mul(GOLDEN) >> 32) * 100) >> 32;
        let mut passed = 0;
        let first = table.targets.iter().position(|target| {
            passed += u64::from(target.weight);
            position < passed
        })?;
        let count = table.targets.len();
        (0..count)
            .map(|i| &table.targets[(first + i) % count])
            .filter(|target| target.weight > 0)
            .find_map(|target| target.take(refused, started))
    }
}

impl Target {
    pub fn new(release: &ReleaseId, weight: u8, backends: Vec<Arc<Backend>>) -> Self {
        let header = HeaderValue::from_str(release.short())
            .unwrap_or_else(|_| HeaderValue::from_static("unknown"));
        Self {
            header,
            weight,
            backends,
            turn: AtomicUsize::new(0),
        }
    }

    /// A target that belongs to no release.
    pub fn for_benchmark(weight: u8, backend: Arc<Backend>) -> Self {
        let header = HeaderValue::from_static("benchmark");
        Self {
            header,
            weight,
            backends: vec![backend],
            turn: AtomicUsize::new(0),
        }
    }

    fn take(&self, refused: &[SocketAddr], started: Instant) -> Option<Flight> {
        let count = self.backends.len();
        let turn = self.turn.fetch_add(1, Ordering::Relaxed);
        (0..count).find_map(|i| {
            let backend = &self.backends[(turn + i) % count];
            if refused.contains(&backend.address) {
                return None;
            }
            let flight = Flight::begin(backend, self.header.clone(), started);
            // Only after it is counted may it look: so a drain that saw no flight stays right.
            if backend.draining.load(Ordering::SeqCst) {
                flight.cancel();
                return None;
            }
            Some(flight)
        })
    }
}

impl Backend {
    pub fn new(address: SocketAddr, counters: Arc<Counters>, workers: usize) -> Arc<Self> {
        Arc::new(Self {
            address,
            counters,
            in_flight: AtomicU64::new(0),
            draining: AtomicBool::new(false),
            pools: (0..workers).map(|_| Pool::default()).collect(),
        })
    }

    /// Takes no more requests from now on.
    pub fn drain(&self) {
        self.draining.store(true, Ordering::SeqCst);
    }

    pub fn in_flight(&self) -> u64 {
        self.in_flight.load(Ordering::SeqCst)
    }

    pub fn pool(&self, worker: usize) -> &Pool {
        &self.pools[worker]
    }

    /// Closes idle connections, so that the process at the other end can stop.
    pub fn close_idle(&self) {
        for pool in &self.pools {
            pool.http1().clear();
            pool.http2().clear();
        }
    }
}

impl Pool {
    /// An idle connection that can carry a request at once. One whose last request is still
    /// being uploaded, though it was answered, is left alone.
    pub fn take_http1(&self) -> Option<http1::SendRequest<RequestBody>> {
        let mut pool = self.http1();
        pool.retain(|sender| !sender.is_closed());
        let ready = pool.iter().rposition(http1::SendRequest::is_ready)?;
        Some(pool.swap_remove(ready))
    }

    pub fn http1(&self) -> MutexGuard<'_, Vec<http1::SendRequest<RequestBody>>> {
        self.http1.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn http2(&self) -> MutexGuard<'_, Vec<http2::SendRequest<RequestBody>>> {
        self.http2.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Flight {
    fn begin(backend: &Arc<Backend>, header: HeaderValue, started: Instant) -> Self {
        backend.in_flight.fetch_add(1, Ordering::SeqCst);
        Self {
            backend: Arc::clone(backend),
            header,
            started,
            answered: false,
            ended: false,
        }
    }

    /// There is an answer; from now on a client that goes away cuts only that short.
    pub fn answered(&mut self) -> Duration {
        self.answered = true;
        self.started.elapsed()
    }

    /// The client broke off its own request.
    pub fn broken_by_client(mut self) {
        self.backend.counters.aborted();
        self.ended = true;
    }

    /// The request came to an end that is counted elsewhere, or never began.
    pub fn end(&mut self) {
        self.ended = true;
    }

    pub fn cancel(mut self) {
        self.ended = true;
    }
}

impl Drop for Flight {
    fn drop(&mut self) {
        match (self.ended, self.answered) {
            (true, _) => {}
            (false, true) => self.backend.counters.aborted(),
            (false, false) => self.backend.counters.abandoned(self.started.elapsed()),
        }
        self.backend.in_flight.fetch_sub(1, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn backend(port: u16) -> Arc<Backend> {
        Backend::new(SocketAddr::from(([127, 0, 0, 1], port)), Arc::default(), 1)
    }

    fn table(weights: &[(u8, &[u16])]) -> Table {
        let target = |(weight, ports): &(u8, &[u16])| {
            Target::new(
                &"r".into(),
                *weight,
                ports.iter().map(|port| backend(*port)).collect(),
            )
        };
        Table {
            targets: weights.iter().map(target).collect(),
        }
    }

    /// Requests to the second target, in percent of 100,000.
    fn share(weight: u8) -> f64 {
        let router = Router::default();
        router.set(table(&[(100 - weight, &[1, 2]), (weight, &[3])]));
        let hits = (0..100_000)
            .filter(|_| {
                router
                    .pick(&[], Instant::now())
                    .unwrap()
                    .backend
                    .address
                    .port()
                    == 3
            })
            .count();
        hits as f64 / 1000.0
    }

    #[test]
    fn weights_are_exact() {
        for weight in [1, 10, 50, 99] {
            let share = share(weight);
            assert!(
                (share - f64::from(weight)).abs() < 0.02,
                "{weight}: {share}"
            );
        }
    }

    #[test]
    fn draining_and_refused_processes_get_nothing() {
        let router = Router::default();
        router.set(table(&[(50, &[1, 2]), (50, &[3]), (0, &[4])]));
        router.table().targets[0].backends[0].drain();
        let mut seen: Vec<u16> = (0..100)
            .filter_map(|_| router.pick(&[SocketAddr::from(([127, 0, 0, 1], 3))], Instant::now()))
            .map(|flight| flight.backend.address.port())
            .collect();
        seen.dedup();
        assert_eq!(
            seen,
            [2],
            "the weight of a release without a process goes to the others"
        );
        router.table().targets[0].backends[1].drain();
        router.table().targets[1].backends[0].drain();
        assert!(
            router.pick(&[], Instant::now()).is_none(),
            "weight 0 is never used"
        );
        assert_eq!(router.table().targets[0].backends[0].in_flight(), 0);
    }
}
