//! `servers`: containers are removed with the command that started them, or by the next one; those
//! of others are left alone.

use std::process::{Command, Stdio};

use crate::fixture::{ended, eventually, root};

const LABEL: &str = "dev.xtask.owner";

fn xtask(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_xtask"));
    command
        .args(["--message-format", "json", "servers"])
        .args(arguments)
        .current_dir(root());
    command
}

fn docker(arguments: &[&str]) -> String {
    let output = Command::new("docker").args(arguments).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "docker {arguments:?}: {said}");
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

/// The containers whose owner is the process.
fn owned_by(pid: u32) -> Vec<String> {
    let format = format!("{{{{.ID}}}} {{{{.Label \"{LABEL}\"}}}}");
    let listed = docker(&[
        "ps",
        "--all",
        "--filter",
        &format!("label={LABEL}"),
        "--format",
        &format,
    ]);
    listed
        .lines()
        .filter(|line| line.split(' ').nth(3) == Some(&pid.to_string()))
        .map(|line| line.split(' ').next().unwrap().to_owned())
        .collect()
}

#[test]
fn a_command_gets_the_addresses_and_its_outcome_counts() {
    let run = |script: &str| {
        let arguments = ["run", "--only", "redis", "--", "sh", "-c", script];
        ended(xtask(&arguments).output().unwrap())
    };
    let good = run("test -n \"$TEST_REDIS_URL\" && test -z \"$TEST_POSTGRES_URL\"");
    let good = good.expect(0, "passed");
    // Every report says which images were used.
    let image = good.finished()["images"][0].as_str().unwrap().to_owned();
    assert!(
        good.said.contains(&image) && image.contains("redis"),
        "{}",
        good.said
    );
    run("exit 7").expect(1, "failed");
    let unknown = xtask(&["run", "--only", "rediss", "--", "true"])
        .output()
        .unwrap();
    let unknown = ended(unknown).expect(2, "failed");
    assert!(
        unknown.said.contains("did you mean \"redis\"?"),
        "{}",
        unknown.said
    );
}

#[test]
fn what_a_killed_command_left_is_removed_and_nothing_else() {
    let running = || {
        // It reads until this test, or its end, closes the pipe.
        xtask(&["run", "--only", "redis", "--", "cat"])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap()
    };
    let (mut killed, mut alive) = (running(), running());
    for child in [&killed, &alive] {
        eventually("a container", || owned_by(child.id()).len() == 1);
    }
    // Another's container, which only has a label of the same name.
    let image = docker(&[
        "inspect",
        "--format",
        "{{.Config.Image}}",
        &owned_by(alive.id())[0],
    ]);
    let foreign = docker(&["create", "--label", &format!("{LABEL}=somebody"), &image]);

    killed.kill().unwrap();
    killed.wait().unwrap();
    assert_eq!(owned_by(killed.id()).len(), 1, "a kill removes nothing");
    ended(xtask(&["sweep"]).output().unwrap()).expect(0, "passed");
    assert_eq!(owned_by(killed.id()).len(), 0);
    assert_eq!(owned_by(alive.id()).len(), 1, "its command still runs");
    docker(&["inspect", &foreign]);
    docker(&["rm", &foreign]);

    let pid = rustix::process::Pid::from_child(&alive);
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    alive.wait().unwrap();
    eventually("the end of the container", || {
        owned_by(pid.as_raw_nonzero().get().unsigned_abs()).is_empty()
    });
}
