//! `ci`: what runs and when, what is shown of it, and that no step can hurt it.

use std::process::Command;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process, test_kill_process};
use serde_json::Value;

use crate::fixture::{ended, eventually};
use crate::workspace::{Workspace, outcomes, step};

fn pairs<'a>(wanted: &[(&'a str, &'a str)]) -> Vec<(String, String)> {
    let owned = |(a, b): &(&str, &str)| ((*a).to_owned(), (*b).to_owned());
    wanted.iter().map(owned).collect()
}

#[test]
fn every_kind_of_bad_step_is_reported_truthfully() {
    let workspace = Workspace::new(
        r#"
[[step]]
name = "much"
run = ["sh", "-c", "head -c 200000000 /dev/zero | tr '\\0' x; echo; echo the end"]
reads = []
[[step]]
name = "bytes"
run = ["sh", "-c", "printf '\\377\\376 not text\\n'; exit 3"]
reads = []
[[step]]
name = "hangs"
run = ["sh", "-c", "sleep 600 & sleep 600"]
reads = []
time_out = "500ms"
[[step]]
name = "stubborn"
run = ["sh", "-c", "trap '' TERM; while :; do sleep 1; done"]
reads = []
time_out = "200ms"
[[step]]
name = "leaves"
run = ["sh", "-c", "sleep 600 & echo $! > leftover; exit 4"]
reads = []
[[step]]
name = "killed"
run = ["sh", "-c", "kill -SEGV $$"]
reads = []
[[step]]
name = "absent"
run = ["no-such-program-anywhere"]
reads = []
[[step]]
name = "dependent"
run = ["true"]
reads = []
needs = ["absent"]
[[step]]
name = "limited"
run = ["sh", "-c", "echo 'half of it was not there' > $XTASK_STEP_WARNING"]
reads = []
"#,
    );
    // Half a gigabyte of addresses: who held 200 MB of output in memory, twice, would not fit.
    let mut limited = Command::new("sh");
    limited
        .args(["-c", "ulimit -v 500000; exec \"$@\"", "sh"])
        .arg(env!("CARGO_BIN_EXE_xtask"))
        .args(["--message-format", "json", "ci", "--steps", "steps.toml"])
        .current_dir(workspace.root())
        .env_remove("CARGO_TARGET_DIR")
        .env_remove("GITHUB_ACTIONS");
    let ended = ended(limited.output().unwrap()).expect(1, "failed");
    let last = ended.finished();
    let wanted = [
        ("much", "passed", ""),
        ("bytes", "failed", "exit status: 3"),
        ("hangs", "failed", "not done after 500 ms, its time-out"),
        ("stubborn", "failed", "not done after 200 ms, its time-out"),
        ("leaves", "failed", "exit status: 4"),
        ("killed", "failed", "signal: 11"),
        ("absent", "failed", "no-such-program-anywhere"),
        ("dependent", "not-run", "needs absent"),
        ("limited", "passed", "half of it was not there"),
    ];
    for (name, outcome, reason) in wanted {
        let step = step(last, name);
        assert_eq!(step["outcome"], outcome, "{name}: {step}");
        let said = step["reason"].as_str().unwrap();
        assert!(said.contains(reason), "{name}: {said:?}");
    }
    let log = step(last, "much")["log"].as_str().unwrap();
    assert_eq!(std::fs::metadata(log).unwrap().len(), 200_000_001 + 8);
    assert!(
        ended.said.contains("bytes left out; all of it is in"),
        "the middle is named"
    );
    assert!(
        ended.said.contains("the end"),
        "the end of a long log is shown"
    );
    let leftover = workspace.read("leftover").trim().parse().unwrap();
    assert!(
        test_kill_process(Pid::from_raw(leftover).unwrap()).is_err(),
        "it was left behind"
    );

    // What failed stands at the very end, with the command that repeats it.
    let end = ended.said.find("failed bytes: exit status: 3").unwrap();
    let rest = &ended.said[end..];
    assert!(rest.contains("not text"), "{rest}");
    assert!(
        rest.contains("repeat it:     cargo xtask ci --only bytes"),
        "{rest}"
    );
}

#[test]
fn steps_share_the_machine_as_they_say() {
    let workspace = Workspace::new(
        r#"
[[step]]
name = "a"
run = ["sleep", "0.4"]
reads = []
locks = ["target"]
[[step]]
name = "b"
run = ["sleep", "0.4"]
reads = []
locks = ["target"]
[[step]]
name = "c"
run = ["sleep", "0.4"]
reads = []
[[step]]
name = "d"
run = ["sleep", "0.1"]
reads = []
needs = ["a", "c"]
[[step]]
name = "e"
run = ["sleep", "0.1"]
reads = []
cores = "all"
"#,
    );
    workspace.ci(&["--jobs", "2"]).expect(0, "passed");
    let receipt = workspace.receipt();
    let span = |name: &str| {
        let step = step(&receipt, name);
        let started = step["started"].as_f64().unwrap();
        (started, started + step["seconds"].as_f64().unwrap())
    };
    let overlap = |one: &str, other: &str| {
        let (a, b) = (span(one), span(other));
        a.0 < b.1 && b.0 < a.1
    };
    assert!(!overlap("a", "b"), "they share a lock");
    assert!(overlap("a", "c"), "there are two cores");
    assert!(
        span("d").0 >= span("a").1 && span("d").0 >= span("c").1,
        "d needs both"
    );
    for other in ["a", "b", "c", "d"] {
        assert!(!overlap("e", other), "e wants the machine for itself");
    }
}

#[test]
fn what_needs_a_failure_is_not_run_and_says_so() {
    let table = r#"
[[step]]
name = "bad"
run = ["false"]
reads = []
[[step]]
name = "after"
run = ["true"]
reads = []
needs = ["bad"]
[[step]]
name = "last"
run = ["true"]
reads = []
needs = ["after"]
[[step]]
name = "beside"
run = ["true"]
reads = []
"#;
    let workspace = Workspace::new(table);
    let ended = workspace.ci(&["--jobs", "1"]).expect(1, "failed");
    let wanted = [
        ("bad", "failed"),
        ("after", "not-run"),
        ("last", "not-run"),
        ("beside", "passed"),
    ];
    assert_eq!(outcomes(ended.finished()), pairs(&wanted));
    assert!(
        step(ended.finished(), "after")["reason"]
            .as_str()
            .unwrap()
            .contains("needs bad")
    );

    let fast = workspace
        .ci(&["--jobs", "1", "--fail-fast", "--no-cache"])
        .expect(1, "failed");
    assert_eq!(step(fast.finished(), "beside")["outcome"], "not-run");

    // Only what failed, here and from a receipt that came from elsewhere.
    let names = |ended: &crate::fixture::Ended| -> Vec<String> {
        let outcomes = outcomes(ended.finished());
        outcomes.into_iter().map(|(name, _)| name).collect()
    };
    std::fs::copy(
        workspace.path("target/xtask/ci/run.json"),
        workspace.path("target/elsewhere.json"),
    )
    .unwrap();
    workspace.write("steps.toml", &table.replace("\"false\"", "\"true\""));
    // What passed since is not repeated, what was left out meanwhile is not forgotten.
    workspace.ci(&["--only", "beside"]).expect(0, "passed");
    let again = workspace.ci(&["--failed"]).expect(0, "passed");
    assert_eq!(names(&again), ["bad", "after", "last"]);
    let contrary = workspace.ci(&["fast", "--only", "bad"]).expect(2, "failed");
    assert!(
        contrary.said.contains("`ci fast` leaves it out"),
        "{}",
        contrary.said
    );
    let nothing = workspace.ci(&["--failed"]).expect(0, "passed");
    assert_eq!(names(&nothing), [""; 0]);
    let from = ["--failed", "--from", "target/elsewhere.json"];
    let from = workspace.ci(&from).expect(0, "passed");
    assert_eq!(names(&from), ["bad", "after", "last", "beside"]);
}

#[test]
fn an_interrupt_stops_everything_and_leaves_a_receipt() {
    let workspace = Workspace::new(
        r#"
[[step]]
name = "long"
run = ["sh", "-c", "sleep 600 & echo $! > child; wait"]
reads = []
[[step]]
name = "next"
run = ["true"]
reads = []
needs = ["long"]
"#,
    );
    let running = workspace
        .command(&[])
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let child = workspace.path("child");
    let written = || std::fs::read_to_string(&child).is_ok_and(|text| text.ends_with('\n'));
    eventually("the step's start", written);
    kill_process(Pid::from_child(&running), Signal::INT).unwrap();
    let ended = ended(running.wait_with_output().unwrap()).expect(2, "failed");
    assert_eq!(ended.finished()["interrupted"], true);
    let receipt = workspace.receipt();
    let wanted = [("long", "failed"), ("next", "not-run")];
    assert_eq!(outcomes(&receipt), pairs(&wanted));
    assert_eq!(step(&receipt, "long")["reason"], "interrupted");
    let child: i32 = workspace.read("child").trim().parse().unwrap();
    eventually("the child's end", || {
        test_kill_process(Pid::from_raw(child).unwrap()).is_err()
    });
}

#[test]
fn a_killed_run_leaves_nothing_to_the_next_one() {
    let workspace = Workspace::new(
        r#"
[[step]]
name = "long"
run = ["sh", "-c", "test -e quick || { echo $$ > child; sleep 600; }"]
reads = []
"#,
    );
    let mut running = workspace
        .command(&[])
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::null())
        .spawn()
        .unwrap();
    let notes = workspace.path("target/xtask/ci/running");
    eventually("the note of the step's group", || {
        std::fs::read_dir(&notes).is_ok_and(|mut notes| {
            // One that is still being written has a dot in front.
            notes.any(|note| !note.unwrap().file_name().to_string_lossy().starts_with('.'))
        }) && std::fs::read_to_string(workspace.path("child")).is_ok_and(|t| t.ends_with('\n'))
    });
    running.kill().unwrap();
    running.wait().unwrap();
    let child: i32 = workspace.read("child").trim().parse().unwrap();
    assert!(
        test_kill_process(Pid::from_raw(child).unwrap()).is_ok(),
        "the kill spared it"
    );

    workspace.write("quick", "");
    let next = workspace.ci(&[]).expect(0, "passed");
    assert!(
        next.said.contains("1 commands of a run that was killed"),
        "{}",
        next.said
    );
    eventually("the child's end", || {
        test_kill_process(Pid::from_raw(child).unwrap()).is_err()
    });
}

#[test]
fn actions_reads_groups_annotations_and_a_summary() {
    let workspace = Workspace::new(
        r#"
[[step]]
name = "lint"
run = ["sh", "-c", "echo '::set-output name=x::forged'; echo 'error: bad thing'; echo '  --> src/a.rs:7:3'; exit 1"]
reads = []
"#,
    );
    workspace.write("src/a.rs", "fn main() {}\n");
    let summary = workspace.path("target/summary.md");
    let output = Command::new(env!("CARGO_BIN_EXE_xtask"))
        .args(["ci", "--steps", "steps.toml"])
        .current_dir(workspace.root())
        .env_remove("CARGO_TARGET_DIR")
        .env("GITHUB_ACTIONS", "true")
        .env("GITHUB_STEP_SUMMARY", &summary)
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    let said = String::from_utf8(output.stdout).unwrap();
    let at = |part: &str| {
        said.find(part)
            .unwrap_or_else(|| panic!("no {part} in {said}"))
    };
    // Between these no line of the log is a command to the runner.
    assert!(at("::stop-commands::") < at("::set-output"), "{said}");
    assert!(at("::group::lint") < at("::endgroup::"));
    assert!(
        at("::endgroup::") < at("repeat it:"),
        "failures stand outside of groups"
    );
    // The last lines are shown once more at the end, and are no commands there either.
    let rest = &said[at("::endgroup::")..];
    let forged = rest.find("::set-output").unwrap();
    let stopped = rest.find("::stop-commands::").unwrap();
    let token = &rest[stopped + "::stop-commands::".len()..][..64];
    let resumed = rest.find(&format!("::{token}::\n")).unwrap();
    assert!(stopped < forged && forged < resumed, "{rest}");
    at("::error file=src/a.rs,line=7,col=3,title=lint lint::error: bad thing");
    let summary = std::fs::read_to_string(summary).unwrap();
    assert!(
        summary.contains("| lint | failed: exit status: 1 |"),
        "{summary}"
    );

    let dir = "target/xtask/ci";
    let junit = workspace.read(&format!("{dir}/junit.xml"));
    assert!(
        junit.contains("<failure message=\"exit status: 1\""),
        "{junit}"
    );
    let sarif: Value = serde_json::from_str(&workspace.read(&format!("{dir}/run.sarif"))).unwrap();
    let place = &sarif["runs"][0]["results"][0]["locations"][0]["physicalLocation"];
    assert_eq!(place["artifactLocation"]["uri"], "src/a.rs");
    assert_eq!(place["region"]["startLine"], 7);
    let trace: Value = serde_json::from_str(&workspace.read(&format!("{dir}/trace.json"))).unwrap();
    assert_eq!(trace["traceEvents"][0]["name"], "lint");
}

#[test]
fn arguments_go_to_the_one_step_that_is_named() {
    let workspace = Workspace::new(
        r#"
[[step]]
name = "echo"
run = ["sh", "-c", "echo got \"$@\"; test \"$1\" = yes", "sh"]
reads = []
[[step]]
name = "other"
run = ["true"]
reads = []
"#,
    );
    let yes = workspace.ci(&["--only", "echo", "--", "yes", "orders::"]);
    assert!(yes.expect(0, "passed").said.contains("got yes orders::"));
    // Other arguments are another command: no pass of these counts for those.
    workspace
        .ci(&["--only", "echo", "--", "no"])
        .expect(1, "failed");
    let both = workspace.ci(&["--", "yes"]).expect(2, "failed");
    assert!(both.said.contains("name it with --only"), "{}", both.said);
    let unknown = workspace.ci(&["--only", "ecko"]).expect(2, "failed");
    assert!(
        unknown.said.contains("did you mean \"echo\"?"),
        "{}",
        unknown.said
    );
}

#[test]
fn what_explain_prints_can_be_pasted() {
    let workspace = Workspace::new(
        r#"
[[step]]
name = "look"
run = ["sh", "-c", "pwd; echo \"$GREETING/${UNDECLARED:-nothing}/$CI\""]
reads = []
variables = { GREETING = "it's me" }
"#,
    );
    let ended = workspace.ci(&["--explain", "look"]).expect(0, "passed");
    let script = ended.finished()["script"].as_str().unwrap();
    let output = Command::new("sh")
        .args(["-c", script])
        .current_dir("/")
        .env("UNDECLARED", "seen")
        .output()
        .unwrap();
    let root = workspace.root().canonicalize().unwrap();
    let wanted = format!("{}\nit's me/nothing/true\n", root.display());
    assert_eq!(String::from_utf8(output.stdout).unwrap(), wanted);
}

#[test]
fn fix_lets_steps_mend_the_tree() {
    let workspace = Workspace::new(
        r#"
[[step]]
name = "tidy"
run = ["grep", "-q", "tidy", "a.txt"]
reads = ["a.txt"]
mend = ["sh", "-c", "echo tidy > a.txt"]
[[step]]
name = "other"
run = ["true"]
reads = []
"#,
    );
    workspace.write("a.txt", "a mess\n");
    workspace.ci(&[]).expect(1, "failed");
    let fixed = workspace.ci(&["--fix"]).expect(0, "passed");
    let changed = fixed.finished()["changed"].as_array().unwrap();
    assert_eq!(changed, &["file a.txt: changed"]);
    workspace.ci(&[]).expect(0, "passed");
}

#[test]
fn affected_is_what_the_branch_touched() {
    let table = r#"
[[step]]
name = "docs"
run = ["true"]
reads = ["docs/**"]
[[step]]
name = "code"
run = ["true"]
reads = ["src/**"]
[[step]]
name = "push"
run = ["true"]
effect = "somewhere else"
"#;
    let workspace = Workspace::new(table);
    workspace.write("docs/a.md", "a");
    workspace.write("src/a.rs", "a");
    workspace.commit();
    workspace.git(&["switch", "--quiet", "--create", "branch"]);
    let selected = |workspace: &Workspace| -> Vec<String> {
        let ended = workspace
            .ci(&["--affected", "--no-cache"])
            .expect(0, "passed");
        outcomes(ended.finished())
            .into_iter()
            .map(|(name, _)| name)
            .collect()
    };
    assert_eq!(selected(&workspace), ["push"]);
    workspace.write("docs/b.md", "not committed, not even added");
    assert_eq!(selected(&workspace), ["docs", "push"]);
    workspace.commit();
    workspace.write("src/a.rs", "changed");
    assert_eq!(selected(&workspace), ["docs", "code", "push"]);
    workspace.git(&["checkout", "--quiet", "src/a.rs"]);
    // A file that moves away is missed where it was.
    workspace.git(&["mv", "src/a.rs", "docs/a.rs"]);
    assert_eq!(selected(&workspace), ["docs", "code", "push"]);
    workspace.git(&["mv", "docs/a.rs", "src/a.rs"]);
    workspace.write("Cargo.lock", "# changed");
    let everything = workspace
        .ci(&["--affected", "--no-cache"])
        .expect(0, "passed");
    assert!(
        everything
            .said
            .contains("everything runs: Cargo.lock changed")
    );
    assert_eq!(outcomes(everything.finished()).len(), 3);

    let clone = workspace.shallow_clone();
    std::fs::write(clone.path().join("steps.toml"), table).unwrap();
    let output = workspace
        .command(&["--affected", "--dry-run"])
        .current_dir(clone.path())
        .output()
        .unwrap();
    let shallow = ended(output).expect(0, "passed");
    assert!(
        shallow
            .said
            .contains("everything runs: this clone is shallow"),
        "{}",
        shallow.said
    );
    assert_eq!(shallow.finished()["steps"], 3);
}

#[test]
fn two_runs_are_compared_by_what_they_proved() {
    let workspace = Workspace::new(
        "[[step]]\nname = \"a\"\nrun = [\"true\"]\nreads = [\"*.txt\"]\nenvironment = [\"FLAVOUR\"]\n",
    );
    workspace.write("a.txt", "1");
    workspace.ci(&[]).expect(0, "passed");
    let keep = |name: &str| {
        let from = workspace.path("target/xtask/ci/run.json");
        std::fs::copy(from, workspace.path(name)).unwrap();
    };
    keep("target/one.json");
    workspace.ci(&[]).expect(0, "passed");
    keep("target/two.json");
    // A pass from the cache proves the same as the run it remembers.
    workspace
        .ci(&["--compare", "target/one.json", "target/two.json"])
        .expect(0, "passed");
    workspace.write("a.txt", "2");
    let other = workspace
        .command(&[])
        .env("FLAVOUR", "sweet")
        .output()
        .unwrap();
    ended(other).expect(0, "passed");
    keep("target/three.json");
    let differ = workspace
        .ci(&["--compare", "target/one.json", "target/three.json"])
        .expect(1, "failed");
    let lines = differ.finished()["differences"].as_array().unwrap();
    let wanted = [
        "a: environment FLAVOUR: sweet (was not set)",
        "a: file a.txt: changed",
    ];
    assert_eq!(lines, &wanted);
    workspace.write("target/first.json", &workspace.read("target/one.json"));
    let rewrite = |name: &str, step: &str| {
        let mut receipt: Value = serde_json::from_str(&workspace.read("target/one.json")).unwrap();
        receipt["steps"][0]["name"] = step.into();
        workspace.write(name, &receipt.to_string());
    };
    // Actions has a receipt for each job; a laptop has one for all.
    rewrite("target/job-b.json", "b");
    let mut whole: Value = serde_json::from_str(&workspace.read("target/one.json")).unwrap();
    let other: Value = serde_json::from_str(&workspace.read("target/job-b.json")).unwrap();
    whole["steps"]
        .as_array_mut()
        .unwrap()
        .push(other["steps"][0].clone());
    workspace.write("target/whole.json", &whole.to_string());
    let jobs = [
        "--compare",
        "target/whole.json",
        "target/one.json",
        "target/job-b.json",
    ];
    workspace.ci(&jobs).expect(0, "passed");
    workspace.ci(&jobs[..3]).expect(1, "failed");
    let nothing = workspace.ci(&["--compare", "target/one.json", "nothing.json"]);
    assert!(
        nothing
            .expect(2, "failed")
            .said
            .contains("nothing.json is no receipt")
    );
}

/// What the runner itself costs: the sum of short steps one after the other.
#[test]
fn a_step_costs_little_beyond_itself() {
    let steps: String = (0..20)
        .map(|n| format!("[[step]]\nname = \"s{n}\"\nrun = [\"sleep\", \"0.05\"]\nreads = []\n"))
        .collect();
    let workspace = Workspace::new(&steps);
    let began = Instant::now();
    let ended = workspace.ci(&["--jobs", "1"]).expect(0, "passed");
    // No time is asserted, only that nothing waits for a clock's tick: that would add 4 s.
    let overhead = began.elapsed().saturating_sub(Duration::from_secs(1));
    assert!(
        overhead < Duration::from_secs(4),
        "{overhead:?}: {}",
        ended.said
    );
}
