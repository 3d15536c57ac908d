//! `workflows check`: what ships passes, and each planted defect is found, by its rule.

use std::fs;
use std::path::Path;
use std::process::Command;

use crate::fixture::{Ended, ended, root};

const CI: &str = "workflows/ci.yml";
const ACTION: &str = "actions/xtask/action.yml";

/// A file, what stands in it, what stands there instead, and the rule that is broken.
type Defect = (&'static str, &'static str, &'static str, &'static str);

const DEFECTS: &[Defect] = &[
    (CI, "cargo xtask setup --share", "make all", "command"),
    (
        CI,
        "cargo xtask setup --share",
        "cargo xtask setup --share && true",
        "command",
    ),
    (
        CI,
        "cargo xtask setup --share",
        "cargo xtask ci --only ${{ github.actor }}",
        "expression",
    ),
    (
        CI,
        "cargo xtask setup --share",
        "cargo xtask setup --sahre",
        "arguments",
    ),
    (
        CI,
        "cargo xtask setup --share",
        "cargo xtask deploy",
        "arguments",
    ),
    (CI, "--only format,", "--only ", "missing-step"),
    (CI, "--only build,", "--only format,build,", "repeated-step"),
    (
        CI,
        "--only format,",
        "--only format,fromat,",
        "unknown-step",
    ),
    (
        CI,
        "ci --setup --only format",
        "ci fast --setup --only format",
        "narrowed",
    ),
    (
        CI,
        "actions/checkout@08c6903cd8c0fde910a37f88322edcfb5dd907a8",
        "actions/checkout@v5",
        "pin",
    ),
    (
        CI,
        "08c6903cd8c0fde910a37f88322edcfb5dd907a8",
        "0000000000000000000000000000000000000000",
        "pin",
    ),
    (CI, "actions/checkout@", "somebody/checkout@", "allow-list"),
    (CI, " # v5.0.0", "", "version"),
    (
        CI,
        "persist-credentials: false",
        "persist-credentials: true",
        "credentials",
    ),
    (
        CI,
        "permissions: {}",
        "permissions: write-all",
        "permissions",
    ),
    (CI, "contents: read", "contents: write", "permissions"),
    (CI, "    timeout-minutes: 20\n", "", "time-out"),
    (CI, "concurrency:", "other:", "concurrency"),
    (CI, "  pull_request:", "  pull_request_target:", "trigger"),
    (
        CI,
        "NEEDS: ${{ toJSON(needs) }}",
        "NEEDS: ${{ secrets.TOKEN }}",
        "secret",
    ),
    (
        CI,
        "needs: [xtask, checks, tests, cluster]",
        "needs: [xtask, checks]",
        "conclusion",
    ),
    (CI, "    if: always()\n    needs", "    needs", "conclusion"),
    (
        CI,
        "cargo xtask workflows conclude",
        "cargo xtask workflows check",
        "conclusion",
    ),
    (
        ACTION,
        "actions/cache@0057852bfaa89a56745cba8c7296529d2fc39830",
        "actions/cache@v4",
        "pin",
    ),
    (
        CI,
        "ci --setup --only format",
        "ci --graph --only format",
        "narrowed",
    ),
    (
        CI,
        "        run: cargo xtask ci",
        "        if: false\n        run: cargo xtask ci",
        "condition",
    ),
    (
        CI,
        "    needs: xtask\n",
        "    needs: xtask\n    if: github.actor == 'x'\n",
        "condition",
    ),
    (
        CI,
        "        run: cargo xtask ci",
        "        continue-on-error: true\n        run: cargo xtask ci",
        "meaning",
    ),
    (
        CI,
        "        run: cargo xtask ci",
        "        shell: cat {0}\n        run: cargo xtask ci",
        "meaning",
    ),
    (
        CI,
        "CARGO_ALIAS_XTASK: ${{ steps.xtask.outputs.alias }}",
        "CARGO_ALIAS_XTASK: version",
        "meaning",
    ),
    (CI, "jobs:\n", "env:\n  PATH: /tmp\njobs:\n", "meaning"),
    (
        CI,
        "NEEDS: ${{ toJSON(needs) }}",
        "NEEDS: ${{ toJSON(SECRETS) }}",
        "secret",
    ),
    (
        CI,
        "uses: $/.github/actions/xtask",
        "uses: $/tools/other",
        "allow-list",
    ),
    (CI, "jobs:", "jobs: [", "yaml"),
];

fn check(dir: &Path) -> Ended {
    let output = Command::new(env!("CARGO_BIN_EXE_xtask"))
        .args(["--message-format", "json", "workflows", "check", "--dir"])
        .arg(dir)
        .current_dir(root())
        .env_remove("GITHUB_ACTIONS")
        .output();
    ended(output.unwrap())
}

fn copy(to: &Path) {
    for file in [CI, ACTION, "workflows/audit.yml"] {
        let path = to.join(file);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::copy(root().join(".github").join(file), path).unwrap();
    }
}

#[test]
fn each_planted_defect_is_found() {
    for (file, right, wrong, rule) in DEFECTS {
        let dir = tempfile::tempdir().unwrap();
        copy(dir.path());
        let path = dir.path().join(file);
        let text = fs::read_to_string(&path).unwrap();
        assert!(text.contains(right), "{right:?} is not in {file}");
        fs::write(&path, text.replacen(right, wrong, 1)).unwrap();
        let ended = check(dir.path()).expect(1, "failed");
        let findings = ended.finished()["findings"].as_array().unwrap();
        let found = findings
            .iter()
            .any(|finding| finding["rule"] == *rule && finding["file"] == *file);
        assert!(found, "{right:?} -> {wrong:?}: no {rule} in {findings:?}");
    }
}

#[test]
fn what_ships_is_what_the_steps_render_to() {
    check(Path::new(".github")).expect(0, "passed");
    let elsewhere = tempfile::tempdir().unwrap();
    copy(elsewhere.path());
    check(elsewhere.path()).expect(0, "passed");
}

#[test]
fn the_last_job_passes_only_when_all_before_it_did() {
    let conclude = |needs: &str| {
        let output = Command::new(env!("CARGO_BIN_EXE_xtask"))
            .args(["--message-format", "json", "workflows", "conclude"])
            .current_dir(root())
            .env("NEEDS", needs)
            .output();
        ended(output.unwrap())
    };
    conclude(r#"{"a":{"result":"success"},"b":{"result":"success"}}"#).expect(0, "passed");
    for result in ["failure", "cancelled", "skipped"] {
        let needs = format!(r#"{{"a":{{"result":"success"}},"b":{{"result":"{result}"}}}}"#);
        let ended = conclude(&needs).expect(1, "failed");
        assert_eq!(ended.finished()["jobs"].as_array().unwrap(), &["b"]);
    }
    conclude("{}").expect(2, "failed");
}

/// Jobs share one build: cargo finds it by an alias, and it finds its arguments.
#[test]
fn the_shared_program_is_a_cargo_command() {
    let home = tempfile::tempdir().unwrap();
    let share = Command::new(env!("CARGO_BIN_EXE_xtask"))
        .args(["--message-format", "json", "setup", "--share"])
        .current_dir(root())
        .env("CARGO_HOME", home.path())
        .output();
    ended(share.unwrap()).expect(0, "passed");
    let path = std::env::var("PATH").unwrap();
    let bin = home.path().join("bin");
    let listed = Command::new("cargo")
        .args(["xtask", "--message-format", "json", "ci", "--list"])
        .current_dir(root())
        .env("PATH", format!("{}:{path}", bin.display()))
        .env("CARGO_ALIAS_XTASK", "ready-xtask")
        .output();
    let listed = ended(listed.unwrap()).expect(0, "passed");
    assert_eq!(listed.finished()["steps"], 14);
}
