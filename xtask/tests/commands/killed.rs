//! Commands, processes and the sandbox itself, killed with SIGKILL under load.

use std::process::Command;

use serde_json::Value;

use crate::fixture::{Fixture, Load, eventually};

fn kill(pid: u32) {
    let status = Command::new("kill")
        .args(["-KILL", &pid.to_string()])
        .status()
        .unwrap();
    assert!(status.success());
}

/// How often a command may be faster than the signal that is to kill it.
const TOO_LATE: usize = 5;

/// The command of a canary is killed after its n-th action was announced; `resume` must end as
/// the undisturbed run does, and no request may fail.
#[test]
fn a_killed_canary_resumes_to_the_same_end() {
    let fixture = Fixture::new();
    fixture.in_production("1.0.0");
    let load = Load::start(fixture.address());
    let mut releases = (1..).map(|minor| fixture.release(&format!("1.{minor}.0")));
    let mut next = || releases.next().unwrap();

    let release = next();
    let undisturbed = fixture
        .run(&["canary", "start", "--release", &release])
        .expect(0, "healthy");
    let actions = undisturbed.events.iter();
    let actions = actions.filter(|event| event["event"] == "action").count();
    assert_eq!(actions, 6);

    for point in 1..=actions {
        let killed = (0..TOO_LATE).any(|_| {
            let release = next();
            let start = ["canary", "start", "--release", &release];
            let killed = fixture.start_until(&start, nth_action(point)).kill();
            if killed {
                let resumed = fixture.run(&["canary", "resume"]).expect(0, "healthy");
                assert_eq!(resumed.finished()["failed"]["candidate"], 0);
            }
            let end = [(release, 100, 2, 2)];
            assert_eq!(fixture.production(), end, "killed at action {point}");
            killed
        });
        assert!(killed, "it always ended before it was killed at {point}");
    }
    load.stop_without_failures();
}

/// The event that announces the n-th action.
fn nth_action(point: usize) -> impl FnMut(&Value) -> bool {
    let mut actions = 0;
    move |event| {
        actions += usize::from(event["event"] == "action");
        actions == point
    }
}

#[test]
fn a_canary_that_is_asked_to_end_says_how_to_go_on() {
    let fixture = Fixture::new();
    fixture.in_production("1.0.0");
    let load = Load::start(fixture.address());
    let release = fixture.release("1.1.0");
    let running = fixture.start_until(&["canary", "start", "--release", &release], nth_action(2));
    running.ask_to_end();
    let ended = running.wait().expect(2, "interrupted");
    assert!(ended.said.contains("canary resume"), "{}", ended.said);
    fixture.run(&["canary", "resume"]).expect(0, "healthy");
    assert_eq!(fixture.production(), [(release, 100, 2, 2)]);
    load.stop_without_failures();
}

/// Neither the command that runs just then nor the sandbox goes on.
#[test]
fn a_demo_that_is_asked_to_end_leaves_nothing() {
    let fixture = Fixture::new();
    let demo = ["demo", "--profile", "release"];
    let demo = fixture.start_until(&demo, |event| event["event"] == "judgement");
    let dir = fixture.state().display().to_string();
    let left = || {
        let processes = std::fs::read_dir("/proc").unwrap();
        let lines = processes.filter_map(|process| {
            let line = std::fs::read(process.unwrap().path().join("cmdline")).ok()?;
            Some(String::from_utf8_lossy(&line).replace('\0', " "))
        });
        lines.filter(|line| line.contains(&dir)).collect::<Vec<_>>()
    };
    assert!(left().len() > 1, "{:?}", left());
    demo.ask_to_end();
    assert_eq!(demo.wait().code, 130);
    eventually("all is gone", || left().is_empty());
}

/// The same for an abort and for a rollback.
#[test]
fn killed_aborts_and_rollbacks_resume_too() {
    let fixture = Fixture::new();
    let first = fixture.in_production("1.0.0");
    let load = Load::start(fixture.address());
    let bad = fixture.release_with("1.1.0", &["read_only = true"]);
    for point in 1..=3 {
        let killed = (0..TOO_LATE).any(|_| {
            let mut reached = nth_action(point);
            let mut turned = false;
            let running = fixture.start_until(&["canary", "start", "--release", &bad], |event| {
                turned |= event["event"] == "state" && event["phase"]["name"] == "back";
                turned && reached(event)
            });
            let killed = running.kill();
            if killed {
                fixture.run(&["canary", "resume"]).expect(1, "rolled-back");
            }
            let end = [(first.clone(), 100, 2, 2)];
            assert_eq!(fixture.production(), end, "killed at {point}");
            killed
        });
        assert!(killed, "it always ended before it was killed at {point}");
    }
    assert_eq!(load.stop().keys().collect::<Vec<_>>(), [&bad[..12]]);

    let load = Load::start(fixture.address());
    let second = fixture.release("1.2.0");
    fixture
        .run(&["canary", "start", "--release", &second])
        .expect(0, "healthy");
    // What was rolled back must earn its place again before it can be gone back to.
    let back = ["rollback", "--to", &first];
    let start = ["canary", "start", "--release", &second];
    for points in [[1, 2], [3, 4]] {
        let killed = (0..TOO_LATE).any(|_| {
            let commands = [(back.as_slice(), &first), (start.as_slice(), &second)];
            let killed = commands
                .iter()
                .zip(points)
                .filter(|((command, target), point)| {
                    let killed = fixture.start_until(command, nth_action(*point)).kill();
                    if killed {
                        fixture.run(&["canary", "resume"]).expect(0, "healthy");
                    }
                    let end = [((*target).clone(), 100, 2, 2)];
                    assert_eq!(fixture.production(), end, "killed at {point}");
                    killed
                });
            killed.count() == points.len()
        });
        assert!(
            killed,
            "one always ended before it was killed at {points:?}"
        );
    }
    load.stop_without_failures();
}

#[test]
fn a_killed_process_is_restarted() {
    let fixture = Fixture::new();
    let first = fixture.in_production("1.0.0");
    let load = Load::start(fixture.address());
    let before = fixture.pids();
    kill(before[0]);
    eventually("another process", || {
        let now = fixture.pids();
        now.len() == 2
            && !now.contains(&before[0])
            && fixture.production() == [(first.clone(), 100, 2, 2)]
    });
    assert!(
        fixture.pids().contains(&before[1]),
        "the other one was left alone"
    );
    // What it was answering when it was killed is lost; nothing else is.
    let failed: u64 = load.stop().values().sum();
    assert!(failed <= 20, "{failed}");
}

#[test]
fn a_killed_sandbox_takes_its_processes_along_and_is_replaced() {
    let fixture = Fixture::new();
    let first = fixture.in_production("1.0.0");
    let (daemon, processes) = (fixture.daemon_pid(), fixture.pids());
    kill(daemon);
    for pid in &processes {
        eventually("the process is gone", || is_gone(*pid));
    }
    // Any command that needs the sandbox brings it back, with all that it had.
    eventually("the release is back", || {
        fixture.production() == [(first.clone(), 100, 2, 2)]
    });
    assert_ne!(fixture.daemon_pid(), daemon);
    let load = Load::start(fixture.address());
    fixture.release("1.1.0");
    fixture
        .run(&["canary", "start", "--release", "1.1.0"])
        .expect(0, "healthy");
    load.stop_without_failures();
}

/// In the middle of a rollout: the command starts another sandbox and goes on.
#[test]
fn a_rollout_survives_its_sandbox() {
    let fixture = Fixture::new();
    fixture.in_production("1.0.0");
    let second = fixture.release("1.1.0");
    let daemon = fixture.daemon_pid();
    let load = Load::start(fixture.address());
    let running = fixture.start_until(&["canary", "start", "--release", &second], |event| {
        event["event"] == "judgement"
    });
    kill(daemon);
    running.wait().expect(0, "healthy");
    drop(load.stop());
    assert_eq!(fixture.production(), [(second, 100, 2, 2)]);
}

/// Gone, or a zombie that nobody has buried yet.
fn is_gone(pid: u32) -> bool {
    match std::fs::read_to_string(format!("/proc/{pid}/stat")) {
        Err(_) => true,
        Ok(stat) => stat
            .rsplit_once(')')
            .is_some_and(|(_, rest)| rest.trim().starts_with('Z')),
    }
}
