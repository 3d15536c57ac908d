//! An open-loop load: requests are sent when they are due, not when the last one was answered.
//!
//! Latency counts from the moment a request was due, so a stall shows in every request that it
//! delayed (Gil Tene, "How NOT to Measure Latency": coordinated omission).

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use hdrhistogram::Histogram;
use serde_json::Value;
use tokio::sync::Semaphore;

use crate::config::LoadRequest;
use crate::http;
use crate::rollout::checks::request;

/// Requests under way at once; more wait, and their waiting counts.
const MOST_IN_FLIGHT: usize = 512;
/// Whatever happens, the load ends.
const LONGEST: Duration = Duration::from_secs(600);
const TIMEOUT: Duration = Duration::from_secs(10);

/// What was measured.
#[derive(Debug)]
pub struct Measured {
    pub requests: u64,
    pub seconds: f64,
    /// Microseconds, from when a request was due to when its answer was read.
    pub latency: Histogram<u64>,
    /// Failed requests by the release that failed them; "none" where no answer came.
    pub failed: BTreeMap<String, u64>,
}

/// A load that runs on a thread of its own until it is stopped.
pub struct Load {
    stop: Arc<AtomicBool>,
    thread: std::thread::JoinHandle<Result<Measured>>,
}

struct Generator {
    client: reqwest::Client,
    address: String,
    /// Each request as often as its share says, spread evenly.
    schedule: Vec<LoadRequest>,
    /// The newest value of a `capture`, for paths with `{id}`.
    captured: Mutex<Option<String>>,
    measured: Mutex<Measured>,
}

impl Load {
    /// Sends `rate` requests a second to `address`.
    pub fn start(address: String, requests: &[LoadRequest], rate: u32) -> Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let generator = Generator::new(address, requests)?;
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build();
        let runtime = runtime.context("starting the load's runtime")?;
        let thread = std::thread::Builder::new()
            .name("load".to_owned())
            .spawn(move || runtime.block_on(generator.run(rate, &stopped)))
            .context("starting the load's thread")?;
        Ok(Self { stop, thread })
    }

    pub fn stop(self) -> Result<Measured> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread
            .join()
            .map_err(|_| anyhow::anyhow!("the load's thread panicked"))?
    }
}

impl Generator {
    fn new(address: String, requests: &[LoadRequest]) -> Result<Arc<Self>> {
        let measured = Measured {
            requests: 0,
            seconds: 0.0,
            latency: Histogram::new_with_bounds(1, 60_000_000, 3).context("making a histogram")?,
            failed: BTreeMap::new(),
        };
        Ok(Arc::new(Self {
            client: http::client()?,
            address,
            schedule: spread(requests),
            captured: Mutex::default(),
            measured: Mutex::new(measured),
        }))
    }

    async fn run(self: Arc<Self>, rate: u32, stop: &AtomicBool) -> Result<Measured> {
        let began = Instant::now();
        let interval = Duration::from_secs(1) / rate;
        let limit = Arc::new(Semaphore::new(MOST_IN_FLIGHT));
        let mut number = 0u32;
        while !stop.load(Ordering::Relaxed) && began.elapsed() < LONGEST {
            let due = began + interval * number;
            tokio::time::sleep_until(due.into()).await;
            let place = Arc::clone(&limit)
                .acquire_owned()
                .await
                .context("waiting for a place")?;
            let generator = Arc::clone(&self);
            let index = number as usize % self.schedule.len().max(1);
            tokio::spawn(async move {
                generator.send(index, due).await;
                drop(place);
            });
            number += 1;
        }
        // All places free means that every answer is in.
        let _all = limit
            .acquire_many(MOST_IN_FLIGHT as u32)
            .await
            .context("waiting for answers")?;
        let mut measured = self.measured.lock().unwrap_or_else(PoisonError::into_inner);
        measured.seconds = began.elapsed().as_secs_f64();
        Ok(Measured {
            requests: measured.requests,
            seconds: measured.seconds,
            latency: measured.latency.clone(),
            failed: measured.failed.clone(),
        })
    }

    async fn send(&self, index: usize, due: Instant) {
        let Some(wanted) = self.schedule.get(index) else {
            return;
        };
        let captured = self
            .captured
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        // Until there is something to ask for, the first request that needs nothing stands in.
        let (wanted, path) = match (wanted.path.contains("{id}"), captured) {
            (true, Some(id)) => (wanted, wanted.path.replace("{id}", &id)),
            (true, None) => match self
                .schedule
                .iter()
                .find(|other| !other.path.contains("{id}"))
            {
                Some(other) => (other, other.path.clone()),
                None => return,
            },
            (false, _) => (wanted, wanted.path.clone()),
        };
        let request = request(
            &self.client,
            wanted.method,
            &self.address,
            &path,
            wanted.body.as_deref(),
        );
        let failed = match request.timeout(TIMEOUT).send().await {
            Err(_) => Some("none".to_owned()),
            Ok(answer) => {
                let release = answer
                    .headers()
                    .get("x-release")
                    .and_then(|release| release.to_str().ok())
                    .unwrap_or("none")
                    .to_owned();
                let error = answer.status().is_server_error();
                match answer.bytes().await {
                    Ok(body) if !error => {
                        self.capture(wanted, &body);
                        None
                    }
                    _ => Some(release),
                }
            }
        };
        let micros = u64::try_from(due.elapsed().as_micros()).unwrap_or(u64::MAX);
        let mut measured = self.measured.lock().unwrap_or_else(PoisonError::into_inner);
        measured.requests += 1;
        measured.latency.saturating_record(micros);
        if let Some(release) = failed {
            *measured.failed.entry(release).or_default() += 1;
        }
    }

    fn capture(&self, wanted: &LoadRequest, body: &[u8]) {
        let Some(field) = &wanted.capture else { return };
        let value: Option<Value> = serde_json::from_slice(body).ok();
        if let Some(id) = value.as_ref().and_then(|value| value[field].as_str()) {
            *self.captured.lock().unwrap_or_else(PoisonError::into_inner) = Some(id.to_owned());
        }
    }
}

/// A hundred requests at most, each kind as often as its share and not in a row.
fn spread(requests: &[LoadRequest]) -> Vec<LoadRequest> {
    let total: u32 = requests.iter().map(|request| request.share).sum();
    let length = total.min(100);
    let mut owed: Vec<i64> = vec![0; requests.len()];
    (0..length)
        .filter_map(|_| {
            for (owed, request) in owed.iter_mut().zip(requests) {
                *owed += i64::from(request.share);
            }
            let next = (0..requests.len()).max_by_key(|i| owed[*i])?;
            owed[next] -= i64::from(total);
            Some(requests[next].clone())
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Method;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    fn kind(share: u32, path: &str) -> LoadRequest {
        LoadRequest {
            share,
            method: Method::Get,
            path: path.into(),
            body: None,
            capture: None,
        }
    }

    #[test]
    fn shares_are_kept_and_spread() {
        let schedule = spread(&[kind(20, "/a"), kind(60, "/b"), kind(20, "/c")]);
        let count = |path| {
            schedule
                .iter()
                .filter(|request| request.path == path)
                .count()
        };
        assert_eq!((count("/a"), count("/b"), count("/c")), (20, 60, 20));
        assert!(
            schedule
                .windows(3)
                .all(|three| three.iter().any(|r| r.path == "/b"))
        );
    }

    /// A server that stalls for half a second: the requests that were due meanwhile must show it.
    #[tokio::test]
    async fn a_stall_shows_in_the_high_percentiles() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let began = Instant::now();
        tokio::spawn(async move {
            loop {
                let (mut socket, _) = listener.accept().await.unwrap();
                tokio::spawn(async move {
                    let mut buffer = [0; 1024];
                    while socket.read(&mut buffer).await.is_ok_and(|read| read > 0) {
                        let stalled = Duration::from_millis(300)..Duration::from_millis(800);
                        if stalled.contains(&began.elapsed()) {
                            tokio::time::sleep(stalled.end - began.elapsed()).await;
                        }
                        let answer = b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n";
                        if socket.write_all(answer).await.is_err() {
                            return;
                        }
                    }
                });
            }
        });
        let load = Load::start(address, &[kind(1, "/")], 200).unwrap();
        tokio::time::sleep(Duration::from_millis(1500)).await;
        let measured = tokio::task::spawn_blocking(|| load.stop().unwrap())
            .await
            .unwrap();
        assert!(measured.failed.is_empty(), "{:?}", measured.failed);
        assert!(measured.requests >= 200, "{}", measured.requests);
        // A third of the time was a stall, on average a quarter of a second long.
        let high = measured.latency.value_at_quantile(0.9);
        assert!(high > 150_000, "{high} us");
    }
}
