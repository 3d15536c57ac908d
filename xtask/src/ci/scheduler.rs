//! Runs steps side by side, as their needs, their locks and the machine's cores allow.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use signal_hook::low_level::emulate_default_handler;

use super::leftovers;
use super::process::{Ended, Invocation, Running};
use super::receipt::Outcome;
use super::step::{Cores, Step};
use crate::output::seconds;

/// How often the view of what runs is drawn anew.
const TICK: Duration = Duration::from_millis(200);
/// How long a command that was asked to end may take.
const GRACE: Duration = Duration::from_secs(5);

/// A step and what is to be done about it.
pub struct Job {
    pub step: Step,
    pub work: Work,
    pub log: PathBuf,
}

pub enum Work {
    /// It passed before, on the same inputs.
    Cached,
    Run(Box<Invocation>),
}

/// How a job ended.
#[derive(Debug, Clone)]
pub struct End {
    pub outcome: Outcome,
    /// Why it failed or was not run; what is odd about a pass.
    pub reason: String,
    /// From the start of the run.
    pub started: Duration,
    pub took: Duration,
}

pub struct Settings<'a> {
    pub cores: usize,
    /// Start nothing more once a step has failed.
    pub fail_fast: bool,
    /// Where the groups of running commands are written down.
    pub dir: &'a Path,
}

/// What happens, for whoever shows it.
pub trait Watcher {
    fn started(&mut self, job: &Job);
    fn ended(&mut self, job: &Job, end: &End);
    /// Called every now and then with a line for each step that runs or waits.
    fn status(&mut self, lines: &[String]);
}

/// The ends of all jobs, in their order, and whether the user broke it off.
pub struct Ran {
    pub ends: Vec<End>,
    pub interrupted: bool,
}

enum Event {
    Ended(usize, std::io::Result<Ended>),
    Interrupted,
}

enum State {
    Waiting,
    Running(Active),
    Done(End),
}

#[derive(PartialEq, Eq)]
enum Started {
    All,
    /// One could not be started, so what depends on it has to be settled first.
    NotAll,
}

struct Active {
    running: Running,
    started: Instant,
    deadline: Instant,
    /// Why it is being stopped, and when it is killed for it.
    stopping: Option<(String, Instant)>,
}

struct Scheduler<'a> {
    jobs: &'a [Job],
    states: Vec<State>,
    settings: &'a Settings<'a>,
    began: Instant,
    events: Sender<Event>,
    /// Why nothing more is started.
    closed: Option<&'static str>,
}

pub fn run(jobs: &[Job], settings: &Settings<'_>, watcher: &mut dyn Watcher) -> Result<Ran> {
    let (events, incoming) = mpsc::channel();
    forward_signals(events.clone())?;
    let mut scheduler = Scheduler {
        jobs,
        states: jobs.iter().map(|_| State::Waiting).collect(),
        settings,
        began: Instant::now(),
        events,
        closed: None,
    };
    let mut interruptions = 0;
    loop {
        scheduler.settle(watcher);
        while scheduler.start_what_can(watcher) == Started::NotAll {
            scheduler.settle(watcher);
        }
        if scheduler.active().next().is_none() {
            break;
        }
        match incoming.recv_timeout(TICK) {
            Ok(Event::Ended(index, ended)) => scheduler.end(index, ended, watcher),
            Ok(Event::Interrupted) => {
                interruptions += 1;
                scheduler.interrupt(interruptions > 1);
            }
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => break,
        }
        scheduler.enforce_deadlines();
        watcher.status(&scheduler.status());
    }
    let ends = scheduler.states.into_iter().map(|state| match state {
        State::Done(end) => end,
        State::Waiting | State::Running(_) => not_run("the run broke off"),
    });
    Ok(Ran {
        ends: ends.collect(),
        interrupted: interruptions > 0,
    })
}

fn forward_signals(events: Sender<Event>) -> Result<()> {
    let mut signals = Signals::new([SIGINT, SIGTERM, SIGHUP]).context("watching for Ctrl-C")?;
    std::thread::spawn(move || {
        for signal in signals.forever() {
            if events.send(Event::Interrupted).is_err() {
                // The run is over; from here on a signal does what it does to every program.
                let _ = emulate_default_handler(signal);
            }
        }
    });
    Ok(())
}

impl Scheduler<'_> {
    fn active(&self) -> impl Iterator<Item = (&Job, &Active)> {
        self.jobs
            .iter()
            .zip(&self.states)
            .filter_map(|(job, state)| match state {
                State::Running(active) => Some((job, active)),
                State::Waiting | State::Done(_) => None,
            })
    }

    /// Ends what needs no process: cached steps, and those whose turn never comes.
    fn settle(&mut self, watcher: &mut dyn Watcher) {
        for index in 0..self.jobs.len() {
            if !matches!(self.states[index], State::Waiting) {
                continue;
            }
            let job = &self.jobs[index];
            let end = if matches!(job.work, Work::Cached) {
                let mut end = not_run("");
                end.outcome = Outcome::Cached;
                end
            } else if let Some(why) = self.closed {
                not_run(why)
            } else if let Some(need) = self.broken_need(job) {
                not_run(&format!("needs {need}, which did not pass"))
            } else {
                continue;
            };
            watcher.ended(job, &end);
            self.states[index] = State::Done(end);
        }
    }

    fn broken_need<'s>(&self, job: &'s Job) -> Option<&'s str> {
        let broken = |need: &&String| {
            self.state_of(need)
                .is_some_and(|state| matches!(state, State::Done(end) if !end.outcome.is_pass()))
        };
        job.step.needs.iter().find(broken).map(String::as_str)
    }

    /// A step that was not selected needs no waiting for.
    fn state_of(&self, name: &str) -> Option<&State> {
        let index = self.jobs.iter().position(|job| job.step.name == name)?;
        Some(&self.states[index])
    }

    /// Starts every job that nothing keeps from it.
    fn start_what_can(&mut self, watcher: &mut dyn Watcher) -> Started {
        for index in 0..self.jobs.len() {
            let job = &self.jobs[index];
            if !matches!(self.states[index], State::Waiting) || self.obstacle(job).is_some() {
                continue;
            }
            let Work::Run(invocation) = &job.work else {
                continue;
            };
            watcher.started(job);
            let events = self.events.clone();
            let started = invocation.start(&job.log, move |ended| {
                // Nobody listens once the run is over.
                let _ = events.send(Event::Ended(index, ended));
            });
            self.states[index] = match started {
                Ok(running) => {
                    leftovers::note(self.settings.dir, running.group());
                    let now = Instant::now();
                    State::Running(Active {
                        running,
                        started: now,
                        deadline: now + job.step.time_out.0,
                        stopping: None,
                    })
                }
                Err(error) => {
                    let mut end = not_run(&format!("{error:#}"));
                    end.outcome = Outcome::Failed;
                    watcher.ended(job, &end);
                    self.states[index] = State::Done(end);
                    self.failed();
                    // What needs it must not start now.
                    return Started::NotAll;
                }
            };
        }
        Started::All
    }

    /// What `job` waits for.
    fn obstacle(&self, job: &Job) -> Option<String> {
        let need = job.step.needs.iter().find(|need| {
            self.state_of(need)
                .is_some_and(|state| !matches!(state, State::Done(_)))
        });
        if let Some(need) = need {
            return Some(format!("needs {need}"));
        }
        for (other, _) in self.active() {
            let taken = |lock: &&String| other.step.locks.contains(lock);
            if let Some(lock) = job.step.locks.iter().find(taken) {
                return Some(format!("{} has {lock}", other.step.name));
            }
        }
        let share = |job: &Job| match job.step.cores {
            Cores::One => 1,
            Cores::All => self.settings.cores,
        };
        let busy: usize = self.active().map(|(other, _)| share(other)).sum();
        // Where nothing runs, even a step that wants more than there is may start.
        (busy > 0 && busy + share(job) > self.settings.cores)
            .then(|| format!("all {} cores are taken", self.settings.cores))
    }

    fn end(&mut self, index: usize, ended: std::io::Result<Ended>, watcher: &mut dyn Watcher) {
        let State::Running(active) = &self.states[index] else {
            return;
        };
        if !matches!(&ended, Ok(ended) if !ended.left_processes) {
            active.running.kill();
        }
        leftovers::forget(self.settings.dir, active.running.group());
        let (outcome, reason) = match (&active.stopping, ended) {
            (Some((why, _)), _) => (Outcome::Failed, why.clone()),
            (None, Ok(ended)) if !ended.status.success() => {
                (Outcome::Failed, ended.status.to_string())
            }
            (None, Ok(ended)) if ended.left_processes => (
                Outcome::Passed,
                "it left processes behind, which were killed".to_owned(),
            ),
            (None, Ok(_)) => (Outcome::Passed, warning(&self.jobs[index])),
            (None, Err(error)) => (Outcome::Failed, format!("waiting for it: {error}")),
        };
        let end = End {
            outcome,
            reason,
            started: active.started - self.began,
            took: active.started.elapsed(),
        };
        if outcome == Outcome::Failed {
            self.failed();
        }
        watcher.ended(&self.jobs[index], &end);
        self.states[index] = State::Done(end);
    }

    fn failed(&mut self) {
        if self.settings.fail_fast && self.closed.is_none() {
            self.closed = Some("another step failed before (--fail-fast)");
        }
    }

    fn interrupt(&mut self, again: bool) {
        self.closed = Some("interrupted");
        for state in &mut self.states {
            if let State::Running(active) = state {
                if again {
                    active.running.kill();
                }
                active.stop("interrupted".to_owned());
            }
        }
    }

    fn enforce_deadlines(&mut self) {
        let now = Instant::now();
        for (job, state) in self.jobs.iter().zip(&mut self.states) {
            let State::Running(active) = state else {
                continue;
            };
            if now >= active.deadline {
                active.stop(format!(
                    "not done after {}, its time-out",
                    seconds(job.step.time_out.0)
                ));
            }
            if active.stopping.as_ref().is_some_and(|(_, at)| now >= *at) {
                active.running.kill();
            }
        }
    }

    fn status(&self) -> Vec<String> {
        let line = |(job, state): (&Job, &State)| match state {
            State::Running(active) => Some(format!(
                "running  {:12} {}",
                job.step.name,
                seconds(active.started.elapsed())
            )),
            State::Waiting => Some(format!(
                "waiting  {:12} {}",
                job.step.name,
                self.obstacle(job).unwrap_or_default()
            )),
            State::Done(_) => None,
        };
        self.jobs
            .iter()
            .zip(&self.states)
            .filter_map(line)
            .collect()
    }
}

impl Active {
    fn stop(&mut self, why: String) {
        if self.stopping.is_none() {
            self.running.ask_to_end();
            self.stopping = Some((why, Instant::now() + GRACE));
        }
    }
}

/// What a step that passed could not do, where it says so: see [`super::process::WARNING_FILE`].
fn warning(job: &Job) -> String {
    let text = match &job.work {
        Work::Run(invocation) => invocation.warning(),
        Work::Cached => None,
    };
    text.unwrap_or_default()
}

fn not_run(why: &str) -> End {
    End {
        outcome: Outcome::NotRun,
        reason: why.to_owned(),
        started: Duration::ZERO,
        took: Duration::ZERO,
    }
}

/// The time that the jobs need at least, however many cores there are: the longest way through
/// their needs, by how long each took.
pub fn critical_path(jobs: &[Job], ends: &[End]) -> Duration {
    let mut finished: BTreeMap<&str, Duration> = BTreeMap::new();
    for (job, end) in jobs.iter().zip(ends) {
        let needs = job.step.needs.iter().map(String::as_str);
        let ready = needs.filter_map(|need| finished.get(need)).max().copied();
        finished.insert(&job.step.name, ready.unwrap_or_default() + end.took);
    }
    finished.into_values().max().unwrap_or_default()
}
