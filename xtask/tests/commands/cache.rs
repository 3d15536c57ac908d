//! The cache of `ci`: whatever happens to the workspace, there is never a pass that a run without
//! the cache would not give.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::{Command, Stdio};

use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};

use crate::fixture::ended;
use crate::workspace::{Workspace, outcomes, step};

/// A check whose outcome is a function of all that it may depend on: content, names and modes of
/// files, a variable, a link, and a file that it writes for others.
const CHECK: &str = r#"
[[step]]
name = "check"
run = ["sh", "check.sh"]
reads = ["in/**", "check.sh"]
environment = ["MOOD"]
writes = ["target/out"]
"#;
const SCRIPT: &str = r#"
test "$MOOD" != bad || exit 1
! grep -rqs bad in || exit 1
for file in in/*; do
    case $file in *bad*) exit 1;; esac
    if [ -f "$file" ] && [ -x "$file" ]; then exit 1; fi
    if [ -L "$file" ]; then case $(readlink "$file") in bad*) exit 1;; esac; fi
done
mkdir -p target && echo made > target/out
"#;

#[derive(Debug, Clone)]
enum Change {
    Write(u8, bool),
    Append(u8, bool),
    Rename(u8, u8, bool),
    Mode(u8, bool),
    Remove(u8),
    Link(u8, bool),
    DropOutput,
    SpoilOutput,
    Mood(bool),
    Commit,
    /// An entry of the cache loses its end.
    Tear,
    Script(bool),
}

fn change() -> impl Strategy<Value = Change> {
    let file = 0u8..4;
    let good = prop::bool::weighted(0.7);
    prop_oneof![
        (file.clone(), good).prop_map(|(f, g)| Change::Write(f, g)),
        (file.clone(), good).prop_map(|(f, g)| Change::Append(f, g)),
        (file.clone(), file.clone(), good).prop_map(|(a, b, g)| Change::Rename(a, b, g)),
        (file.clone(), good).prop_map(|(f, g)| Change::Mode(f, g)),
        file.clone().prop_map(Change::Remove),
        (file, good).prop_map(|(f, g)| Change::Link(f, g)),
        Just(Change::DropOutput),
        Just(Change::SpoilOutput),
        good.prop_map(Change::Mood),
        Just(Change::Commit),
        Just(Change::Tear),
        good.prop_map(Change::Script),
    ]
}

/// What tells a good file from a bad one.
fn word(good: bool) -> &'static str {
    if good { "good" } else { "bad" }
}

fn apply(workspace: &Workspace, mood: &mut &'static str, change: &Change) {
    let file = |number: u8| workspace.path(&format!("in/{number}"));
    // Where a change finds nothing to change, nothing changes.
    match change {
        Change::Write(f, good) => {
            let _ = fs::remove_file(file(*f));
            fs::write(file(*f), word(*good)).unwrap();
        }
        Change::Append(f, good) => {
            if let Ok(mut text) = fs::read_to_string(file(*f)) {
                text.push_str(word(*good));
                fs::write(file(*f), text).unwrap();
            }
        }
        Change::Rename(from, to, good) => {
            let to = workspace.path(&format!("in/{}{to}", if *good { "" } else { "bad" }));
            let _ = fs::rename(file(*from), to);
        }
        Change::Mode(f, good) => {
            let mode = if *good { 0o644 } else { 0o755 };
            if file(*f).is_file() {
                fs::set_permissions(file(*f), fs::Permissions::from_mode(mode)).unwrap();
            }
        }
        Change::Remove(f) => {
            let _ = fs::remove_file(file(*f));
        }
        Change::Link(f, good) => {
            let _ = fs::remove_file(file(*f));
            std::os::unix::fs::symlink(word(*good), file(*f)).unwrap();
        }
        Change::DropOutput => {
            let _ = fs::remove_file(workspace.path("target/out"));
        }
        Change::SpoilOutput => {
            let _ = fs::write(workspace.path("target/out"), "spoiled");
        }
        Change::Mood(good) => *mood = word(*good),
        Change::Commit => workspace.commit(),
        Change::Tear => {
            for entry in fs::read_dir(workspace.path("target/xtask/ci/cache/check"))
                .into_iter()
                .flatten()
            {
                let path = entry.unwrap().path();
                let text = fs::read(&path).unwrap();
                fs::write(&path, &text[..text.len() * 2 / 3]).unwrap();
            }
        }
        Change::Script(good) => {
            let mut script = SCRIPT.to_owned();
            if !good {
                script.insert_str(0, "exit 1\n");
            }
            workspace.write("check.sh", &script);
        }
    }
}

#[test]
fn there_is_never_a_pass_that_a_run_would_not_give() {
    let mut runner = TestRunner::new(Config {
        cases: 12,
        failure_persistence: None,
        ..Config::default()
    });
    let changes = prop::collection::vec(change(), 1..14);
    let mut cached = 0;
    let counted = std::cell::Cell::new(0);
    runner
        .run(&changes, |changes| {
            let workspace = Workspace::new(CHECK);
            workspace.write("in/0", "good");
            workspace.write("check.sh", SCRIPT);
            let mut mood = "good";
            let run = |mood: &str, arguments: &[&str]| {
                let output = workspace.command(arguments).env("MOOD", mood).output();
                ended(output.unwrap())
            };
            run(mood, &[]);
            for change in &changes {
                apply(&workspace, &mut mood, change);
                let with = run(mood, &[]);
                let outcome = step(with.finished(), "check")["outcome"].clone();
                if outcome == "cached" {
                    counted.set(counted.get() + 1);
                    let output = fs::read_to_string(workspace.path("target/out"));
                    prop_assert_eq!(output.unwrap_or_default(), "made\n", "{:?}", change);
                }
                let without = run(mood, &["--no-cache"]);
                prop_assert_eq!(with.code, without.code, "after {:?}: {}", change, with.said);
            }
            Ok(())
        })
        .unwrap();
    cached += counted.get();
    assert!(cached > 0, "the cache was of use at least once");
}

#[test]
fn an_unchanged_step_is_not_run_and_why_names_what_changed() {
    let workspace = Workspace::new(
        r#"
[[step]]
name = "code"
run = ["sh", "-c", "echo ran >> target/code"]
reads = ["src/**"]
environment = ["FLAVOUR"]
[[step]]
name = "docs"
run = ["sh", "-c", "echo ran >> target/docs"]
reads = ["*.md"]
[[step]]
name = "push"
run = ["sh", "-c", "echo ran >> target/push"]
effect = "somewhere else"
"#,
    );
    workspace.write("src/a.rs", "// a comment\n");
    workspace.write("src/b.rs", "");
    workspace.write("README.md", "");
    workspace.commit();
    let runs = |name: &str| {
        let text = fs::read_to_string(workspace.path(&format!("target/{name}")));
        text.map_or(0, |text| text.lines().count())
    };
    workspace.ci(&[]).expect(0, "passed");
    let second = workspace.ci(&[]).expect(0, "passed");
    let wanted = [("code", "cached"), ("docs", "cached"), ("push", "passed")];
    let wanted = wanted.map(|(a, b)| (a.to_owned(), b.to_owned()));
    assert_eq!(outcomes(second.finished()), wanted);
    assert_eq!((runs("code"), runs("docs"), runs("push")), (1, 1, 2));
    assert!(
        second.said.contains("on the same 2 files"),
        "{}",
        second.said
    );

    workspace.write("src/a.rs", "// another comment\n");
    workspace.write("src/c.rs", "");
    fs::remove_file(workspace.path("src/b.rs")).unwrap();
    let output = workspace
        .command(&["--why", "code"])
        .env("FLAVOUR", "sweet")
        .output();
    let why = ended(output.unwrap()).expect(0, "passed");
    let wanted = [
        "environment FLAVOUR: sweet (was not set)",
        "file src/a.rs: changed",
        "file src/b.rs: gone",
        "file src/c.rs: new",
    ];
    assert_eq!(why.finished()["changes"].as_array().unwrap(), &wanted);
    workspace.ci(&[]).expect(0, "passed");
    assert_eq!((runs("code"), runs("docs"), runs("push")), (2, 1, 3));
}

/// A step of this program's own is remembered only for the sources that it was built from.
#[test]
fn a_stale_program_remembers_nothing() {
    let workspace = Workspace::new(
        "[[step]]\nname = \"own\"\nrun = [\"cargo\", \"xtask\", \"ci\", \"--help\"]\nreads = []\n",
    );
    for _ in 0..2 {
        // There is no xtask in this workspace that the program could have been built from.
        let ended = workspace.ci(&[]).expect(0, "passed");
        assert_eq!(step(ended.finished(), "own")["outcome"], "passed");
    }
}

/// A pass that lacks something is a pass, but not one to rely on later.
#[test]
fn a_pass_with_a_warning_is_not_remembered() {
    let workspace = Workspace::new(
        r#"
[[step]]
name = "limited"
run = ["sh", "-c", "test -e whole || echo 'half of it was not there' > $XTASK_STEP_WARNING"]
reads = []
"#,
    );
    let outcome = || {
        let ended = workspace.ci(&[]).expect(0, "passed");
        step(ended.finished(), "limited")["outcome"].clone()
    };
    assert_eq!((outcome(), outcome()), ("passed".into(), "passed".into()));
    workspace.write("whole", "");
    assert_eq!((outcome(), outcome()), ("passed".into(), "cached".into()));
}

/// A step that ran on one state of the files is not remembered for another, even if they are put
/// back as they were.
#[test]
fn inputs_that_change_meanwhile_are_not_remembered() {
    let workspace = Workspace::new(
        r#"
[[step]]
name = "meddles"
run = ["sh", "-c", "cp in.txt kept; echo other > in.txt; cp kept in.txt; rm kept"]
reads = ["in.txt"]
"#,
    );
    workspace.write("in.txt", "good\n");
    let first = workspace.ci(&[]).expect(0, "passed");
    assert!(
        first.said.contains("in.txt was touched meanwhile"),
        "{}",
        first.said
    );
    let second = workspace.ci(&[]).expect(0, "passed");
    assert_eq!(step(second.finished(), "meddles")["outcome"], "passed");
}

#[test]
fn runs_at_once_do_not_disturb_each_other() {
    let workspace = Workspace::new(
        r#"
[[step]]
name = "check"
run = ["sh", "-c", "sleep 0.1; ! grep -q bad in.txt"]
reads = ["in.txt"]
"#,
    );
    workspace.write("in.txt", "good");
    let start = || {
        workspace
            .command(&[])
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap()
    };
    let all: Vec<_> = (0..4).map(|_| start()).collect();
    for one in all {
        ended(one.wait_with_output().unwrap()).expect(0, "passed");
    }
    let after = workspace.ci(&[]).expect(0, "passed");
    assert_eq!(step(after.finished(), "check")["outcome"], "cached");
    workspace.write("in.txt", "bad");
    workspace.ci(&[]).expect(1, "failed");
}

/// A run that is killed while its step runs has passed nothing; one that cannot write its pass
/// says so.
#[test]
fn a_kill_or_a_full_disk_is_no_pass() {
    let workspace = Workspace::new(
        r#"
[[step]]
name = "check"
run = ["sh", "-c", "test ! -e slow || { touch started; sleep 600; }"]
reads = ["*.txt"]
"#,
    );
    for number in 0..10 {
        workspace.write(&format!("{number}.txt"), "");
    }
    workspace.write("slow", "");
    let mut killed = workspace
        .command(&[])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    crate::fixture::eventually("the step's start", || workspace.path("started").exists());
    killed.kill().unwrap();
    killed.wait().unwrap();
    fs::remove_file(workspace.path("slow")).unwrap();

    // No file may grow beyond 512 bytes, as if the disk were full.
    let full = Command::new("sh")
        .args(["-c", "trap '' XFSZ; ulimit -f 1; exec \"$@\"", "sh"])
        .arg(env!("CARGO_BIN_EXE_xtask"))
        .args(["--message-format", "json", "ci", "--steps", "steps.toml"])
        .current_dir(workspace.root())
        .env_remove("CARGO_TARGET_DIR")
        .env_remove("GITHUB_ACTIONS")
        .output()
        .unwrap();
    let full = ended(full);
    assert_eq!(full.code, 2, "{}", full.said);
    assert!(
        full.said.contains("the pass of check is not remembered"),
        "{}",
        full.said
    );

    let next = workspace.ci(&[]).expect(0, "passed");
    assert_eq!(
        step(next.finished(), "check")["outcome"],
        "passed",
        "{}",
        next.said
    );
    let last = workspace.ci(&[]).expect(0, "passed");
    assert_eq!(step(last.finished(), "check")["outcome"], "cached");
}
