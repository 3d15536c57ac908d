//! The driver, killed at every point of a rollout on an in-memory platform, then resumed: the
//! end must be the one of the undisturbed run. Journals are real files.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard};
use std::time::Duration;

use anyhow::{Result, bail};
use async_trait::async_trait;
use tokio::sync::Notify;

use super::desk::{Desk, Files};
use super::driver::{Checks, Clock, Driver, End, Pace};
use super::engine::{
    Action, Kind, Limits, Mark, Millis, Outcome, Plan, Request, RequestKind, State, decide,
};
use super::journal::{Entry, Started};
use super::metrics::Metrics;
use super::windows::Counts;
use crate::config::{Judge, Probability, Ratio, Stage, Time};
use crate::platform::{
    HistoryEntry, InstanceCounts, InstanceStatus, Platform, ReleaseStatus, Status,
};
use crate::release::{Recorded, ReleaseId};

/// Requests a second in virtual time.
const RATE: f64 = 2000.0;
/// How long a process takes to get ready, in virtual milliseconds.
const BOOT: Millis = 120;

/// The start of a canary from "stable" to "candidate".
pub fn started() -> Started {
    let stage = |weight| Stage { weight, gate: None };
    Started {
        plan: Plan {
            rollout: "20260101T000000.000Z-candidate".to_owned(),
            environment: "production".to_owned(),
            kind: Kind::Canary,
            stable: Some("stable".into()),
            candidate: "candidate".into(),
            replicas: 2,
            least: 1,
            by_replicas: false,
            traffic: None,
            keeps_previous: false,
            others: Vec::new(),
            stages: [10, 50, 100].map(stage).into(),
            limits: Limits {
                min_stage: 500,
                max_stage: 60_000,
                max_hold: 60_000,
                ready_within: 5_000,
            },
        },
        judge: Judge {
            alpha: Probability(0.03),
            beta: Probability(0.05),
            margin: Ratio(1.5),
            tolerance: Probability(0.005),
            outage: Probability(0.05),
            latency_floor: Time(Duration::from_millis(50)),
            latency_tolerance: Probability(0.02),
        },
        bounds: None,
        counts: Vec::new(),
        stable_name: Some("1.0.0".to_owned()),
        candidate_name: "1.1.0".to_owned(),
        token: 1,
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Scenario {
    Good,
    Bad,
    Aborted,
    Rollback,
    FirstDeployment,
}

#[derive(Debug, Default)]
struct World {
    /// Processes wanted, and when the newest of them are ready.
    releases: BTreeMap<ReleaseId, (u32, Millis)>,
    weights: Vec<(ReleaseId, u8)>,
    stable: Option<ReleaseId>,
    /// Release, rollout and what was earned.
    history: Vec<(ReleaseId, String, Mark)>,
    token: u64,
    served: BTreeMap<ReleaseId, Counts>,
    counted_until: Millis,
    refused: u32,
}

/// A platform whose processes get ready in virtual time, and which can kill its caller.
struct Memory {
    world: Mutex<World>,
    now: AtomicU64,
    desk: Files,
    scenario: Scenario,
    /// Points at which the driver could be killed, counted; the one at which it is.
    points: AtomicU64,
    deadly: u64,
    killed: Notify,
}

impl Memory {
    fn new(desk: Files, scenario: Scenario) -> Self {
        let mut world = World {
            counted_until: 0,
            ..World::default()
        };
        if scenario != Scenario::FirstDeployment {
            world.releases.insert("stable".into(), (2, 0));
            world.weights = vec![("stable".into(), 100)];
            world.stable = Some("stable".into());
        }
        Self {
            world: Mutex::new(world),
            now: AtomicU64::new(10_000),
            desk,
            scenario,
            points: AtomicU64::new(0),
            deadly: u64::MAX,
            killed: Notify::new(),
        }
    }

    /// Somebody else gives the rollout up when the candidate has half of the traffic.
    async fn abort_in_the_middle(&self) -> Result<()> {
        let half = self.world().weights.contains(&("candidate".into(), 50));
        if self.scenario == Scenario::Aborted && half && self.desk.request().await?.is_none() {
            let kind = RequestKind::Abort;
            self.desk.ask(Request { number: 5, kind }).await?;
        }
        Ok(())
    }

    /// A point at which the process may die: then this never returns.
    async fn point(&self) {
        if self.points.fetch_add(1, Ordering::SeqCst) + 1 == self.deadly {
            self.killed.notify_one();
            std::future::pending::<()>().await;
        }
    }

    fn world(&self) -> MutexGuard<'_, World> {
        self.world.lock().unwrap()
    }

    /// Traffic up to now, split by weight.
    fn serve(&self, world: &mut World) {
        let now = self.now();
        let passed = now.saturating_sub(world.counted_until) as f64 / 1000.0;
        world.counted_until = now;
        for (release, weight) in world.weights.clone() {
            let requests = (RATE * passed * f64::from(weight) / 100.0) as u64;
            let bad = self.scenario == Scenario::Bad && release.as_str() == "candidate";
            let counts = world.served.entry(release).or_default();
            counts.requests += requests;
            counts.errors += if bad { requests / 5 } else { 0 };
        }
    }

    /// What must be equal after a run with kills and one without.
    fn end(&self) -> String {
        let world = self.world();
        let wanted: Vec<_> = world.releases.iter().filter(|(_, (n, _))| *n > 0).collect();
        let wanted: Vec<_> = wanted.iter().map(|(id, (n, _))| (id, n)).collect();
        format!(
            "{wanted:?} {:?} {:?} {:?}",
            world.weights, world.stable, world.history
        )
    }
}

#[async_trait]
impl Clock for Memory {
    fn now(&self) -> Millis {
        self.now.load(Ordering::SeqCst)
    }

    async fn sleep(&self, time: Duration) {
        self.now
            .fetch_add(u64::try_from(time.as_millis()).unwrap(), Ordering::SeqCst);
        tokio::task::yield_now().await;
    }
}

#[async_trait]
impl Metrics for Memory {
    async fn sample(&self) -> Result<Vec<InstanceCounts>> {
        self.point().await;
        self.counts().await
    }

    async fn totals(&self) -> Result<Vec<InstanceCounts>> {
        self.counts().await
    }
}

#[async_trait]
impl Checks for Memory {
    async fn failures(&self) -> Vec<String> {
        self.point().await;
        Vec::new()
    }
}

#[async_trait]
impl Platform for Memory {
    async fn status(&self) -> Result<Status> {
        self.abort_in_the_middle().await?;
        let now = self.now();
        let mut world = self.world();
        self.serve(&mut world);
        let weight = |id: &ReleaseId| {
            world
                .weights
                .iter()
                .find(|(other, _)| other == id)
                .map_or(0, |(_, weight)| *weight)
        };
        let releases = world
            .releases
            .iter()
            .map(|(id, (desired, ready_at))| ReleaseStatus {
                release: id.clone(),
                version: String::new(),
                desired: *desired,
                weight: weight(id),
                instances: (0..*desired)
                    .map(|i| InstanceStatus {
                        name: format!("{}-{i}", id.as_str()),
                        ready: now >= *ready_at,
                        state: String::new(),
                        pid: None,
                        admin: None,
                        restarts: 0,
                        in_flight: 0,
                    })
                    .collect(),
                broken: None,
                edited: None,
                paused: None,
                available: None,
                unfinished: false,
            })
            .collect();
        let history = world
            .history
            .iter()
            .map(|(release, rollout, mark)| HistoryEntry {
                release: release.clone(),
                rollout: rollout.clone(),
                mark: *mark,
                at: jiff::Timestamp::UNIX_EPOCH,
            })
            .collect();
        Ok(Status {
            releases,
            unseen: false,
            stable: world.stable.clone(),
            history,
        })
    }

    async fn prepare(&mut self, _release: &Recorded) -> Result<()> {
        Ok(())
    }

    async fn claim(&self, token: u64) -> Result<()> {
        self.point().await;
        let mut world = self.world();
        world.token = world.token.max(token);
        Ok(())
    }

    async fn stop(&self, release: &ReleaseId, _token: u64) -> Result<()> {
        self.world().releases.remove(release);
        Ok(())
    }

    async fn apply(&self, plan: &Plan, action: &Action, token: u64) -> Result<()> {
        self.point().await;
        {
            let now = self.now();
            let mut world = self.world();
            self.serve(&mut world);
            if token < world.token {
                world.refused += 1;
                bail!("a stale writer");
            }
            match action {
                Action::Scale { release, replicas } => {
                    let entry = world.releases.entry(release.clone()).or_insert((0, now));
                    if *replicas > entry.0 {
                        entry.1 = now + BOOT;
                    }
                    entry.0 = *replicas;
                }
                Action::Route { weights } => {
                    for (release, weight) in weights {
                        let ready = world
                            .releases
                            .get(release)
                            .is_some_and(|(desired, at)| *desired > 0 && now >= *at);
                        assert!(*weight == 0 || ready, "weight without ready capacity");
                    }
                    world.weights = weights.clone();
                }
                Action::Record { mark } => {
                    world
                        .history
                        .retain(|(_, rollout, _)| *rollout != plan.rollout);
                    let entry = (plan.candidate.clone(), plan.rollout.clone(), *mark);
                    world.history.push(entry);
                    world.stable = match mark {
                        Mark::Healthy => Some(plan.candidate.clone()),
                        Mark::RolledBack => plan.stable.clone(),
                    };
                }
            }
        }
        self.point().await;
        Ok(())
    }

    async fn ask(&self, _instance: &InstanceStatus, _path: &str) -> Result<String> {
        anyhow::bail!("nobody asks")
    }

    fn explain(&self, _release: &ReleaseId) -> Vec<String> {
        Vec::new()
    }

    async fn counts(&self) -> Result<Vec<InstanceCounts>> {
        let mut world = self.world();
        self.serve(&mut world);
        let counts = world.served.iter().map(|(release, counts)| InstanceCounts {
            release: release.clone(),
            instance: "one".to_owned(),
            counts: counts.clone(),
        });
        Ok(counts.collect())
    }

    fn address(&self) -> String {
        String::new()
    }
}

fn start_of(scenario: Scenario) -> Started {
    let mut started = started();
    let plan = &mut started.plan;
    match scenario {
        Scenario::Good | Scenario::Bad | Scenario::Aborted => {}
        Scenario::Rollback => plan.kind = Kind::Rollback,
        Scenario::FirstDeployment => {
            plan.kind = Kind::Deploy;
            plan.stable = None;
        }
    }
    if plan.kind != Kind::Canary {
        plan.stages = vec![Stage {
            weight: 100,
            gate: None,
        }];
    }
    started
}

/// Drives the rollout until it ends (`Some`) or its driver is killed (`None`).
async fn drive(memory: &Memory) -> Option<End> {
    let desk = &memory.desk;
    let writer = desk
        .lock()
        .await
        .unwrap()
        .expect("the killed writer's lock is free");
    let mut journal = match desk.unfinished_to_write(&writer).await.unwrap() {
        Some(mut journal) => {
            journal
                .append([Entry::Resumed {
                    token: writer.token,
                }])
                .await
                .unwrap();
            journal
        }
        None => {
            let state = State::start(Clock::now(memory));
            desk.create(&writer, start_of(memory.scenario), state)
                .await
                .unwrap()
        }
    };
    let driver = Driver {
        platform: memory,
        metrics: memory,
        checks: memory,
        clock: memory,
        decide,
        desk,
        writer: &writer,
        pace: Pace {
            window: Duration::from_millis(200),
            warm_up: Duration::from_millis(50),
            tick: Duration::from_millis(50),
        },
        audience: &|_| {},
    };
    tokio::select! {
        end = driver.run(&mut journal) => Some(end.unwrap()),
        () = memory.killed.notified() => None,
    }
}

/// Runs a scenario with kills at these points; returns the end and the number of points.
async fn run(scenario: Scenario, kills: &[u64]) -> (End, String, u64) {
    let dir = tempfile::tempdir().unwrap();
    let mut memory = Memory::new(Files::new(dir.path(), "production"), scenario);
    for kill in kills {
        memory.deadly = memory.points.load(Ordering::SeqCst) + kill;
        if let Some(end) = drive(&memory).await {
            let points = memory.points.load(Ordering::SeqCst);
            return (end, memory.end(), points);
        }
        // The world goes on while nobody drives.
        memory.now.fetch_add(700, Ordering::SeqCst);
    }
    memory.deadly = u64::MAX;
    let end = drive(&memory).await.expect("nobody kills this one");
    let points = memory.points.load(Ordering::SeqCst);
    assert!(memory.desk.unfinished().await.unwrap().is_none());
    (end, memory.end(), points)
}

/// Where the test's output is read by people.
#[expect(
    clippy::print_stderr,
    reason = "the number of kills belongs into the test's log"
)]
async fn torture(scenario: Scenario, outcome: Outcome) {
    let (end, world, points) = run(scenario, &[]).await;
    assert_eq!(end, End::Outcome(outcome), "{scenario:?}, undisturbed");
    for point in 1..=points {
        // Once, and once more soon after it was resumed.
        for kills in [vec![point], vec![point, 1], vec![point, 4]] {
            let (same_end, same_world, _) = run(scenario, &kills).await;
            assert_eq!(same_end, end, "{scenario:?}, killed at {kills:?}");
            assert_eq!(same_world, world, "{scenario:?}, killed at {kills:?}");
        }
    }
    eprintln!("{scenario:?}: killed at {points} points, alone and in pairs; always the same end");
}

#[tokio::test]
async fn a_good_canary_survives_every_kill() {
    torture(Scenario::Good, Outcome::Healthy).await;
}

#[tokio::test]
async fn a_bad_canary_is_rolled_back_in_spite_of_every_kill() {
    torture(Scenario::Bad, Outcome::RolledBack).await;
}

#[tokio::test]
async fn an_abort_survives_every_kill() {
    torture(Scenario::Aborted, Outcome::Aborted).await;
}

#[tokio::test]
async fn a_rollback_survives_every_kill() {
    torture(Scenario::Rollback, Outcome::Healthy).await;
}

#[tokio::test]
async fn a_first_deployment_survives_every_kill() {
    torture(Scenario::FirstDeployment, Outcome::Healthy).await;
}

/// What a writer that was replaced still sends is refused.
#[tokio::test]
async fn a_stale_writer_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let memory = Memory::new(Files::new(dir.path(), "production"), Scenario::Good);
    memory.claim(7).await.unwrap();
    let action = Action::Route {
        weights: vec![("stable".into(), 100)],
    };
    assert!(memory.apply(&started().plan, &action, 6).await.is_err());
    memory.apply(&started().plan, &action, 7).await.unwrap();
    assert_eq!(memory.world().refused, 1);
}
