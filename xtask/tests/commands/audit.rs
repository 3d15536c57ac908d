//! `audit`: a clean repository passes, and for each check a planted fault makes it fail, at the
//! place where the fault is.

use std::path::Path;

use serde_json::Value;

use crate::fixture::{Ended, ended, root};
use crate::workspace::Workspace;

/// A crate with one dependency, which is used; the rules are this repository's.
fn clean() -> Workspace {
    let workspace = Workspace::new("step = []");
    workspace.write(
        "Cargo.toml",
        "[package]\nname = \"sample\"\nversion = \"0.1.0\"\nedition = \"2024\"\nlicense = \"MIT\"\n\
         [dependencies]\nglob = \"0.3\"\n",
    );
    workspace.write("src/lib.rs", "pub use glob::glob;\n");
    workspace.write(
        "deny.toml",
        "[advisories]\nmaximum-db-staleness = \"P180D\"\n[licenses]\nallow = [\"MIT\", \"Apache-2.0\"]\n",
    );
    for file in [
        "config/tools.toml",
        "config/policy.toml",
        "xtask/src/audit/workflow-parser/package.json",
        "xtask/src/audit/workflow-parser/package-lock.json",
        "xtask/src/audit/workflow-parser/workflow-parser.mjs",
    ] {
        let text = std::fs::read_to_string(root().join(file)).unwrap();
        workspace.write(file, &text);
    }
    workspace.write(".github/workflows/ci.yml", WORKFLOW);
    workspace.write("k8s/base.yaml", MANIFEST);
    workspace.write("Dockerfile", DOCKERFILE);
    std::fs::remove_file(workspace.path("Cargo.lock")).unwrap();
    let lock = std::process::Command::new("cargo")
        .args(["generate-lockfile", "--quiet"])
        .current_dir(workspace.root())
        .output()
        .unwrap();
    assert!(
        lock.status.success(),
        "{}",
        String::from_utf8_lossy(&lock.stderr)
    );
    advisories(&workspace, "unheard-of", "target/advisories");
    workspace.commit();
    workspace
}

const WORKFLOW: &str = "\
name: ci
on: push
permissions: {}
concurrency:
  group: ci-${{ github.ref }}
  cancel-in-progress: true
jobs:
  ci:
    name: ci
    runs-on: ubuntu-24.04
    timeout-minutes: 5
    steps:
      - name: check
        run: cargo xtask ci
";
const MANIFEST: &str = "\
apiVersion: apps/v1
kind: Deployment
metadata:
  name: sample
spec:
  template:
    spec:
      securityContext:
        runAsNonRoot: true
        seccompProfile: { type: RuntimeDefault }
      containers:
        - name: sample
          image: sample@sha256:0000000000000000000000000000000000000000000000000000000000000000
          resources:
            requests: { cpu: 10m }
            limits: { memory: 64Mi }
          securityContext:
            allowPrivilegeEscalation: false
            readOnlyRootFilesystem: true
            capabilities: { drop: [ALL] }
";
const DOCKERFILE: &str = "\
FROM rust@sha256:0000000000000000000000000000000000000000000000000000000000000000 AS build
RUN cargo build
FROM scratch
COPY --from=build /sample /sample
USER 10001
";

/// A copy of a database of advisories with one in it.
fn advisories(workspace: &Workspace, package: &str, dir: &str) {
    // The same for a whole day, so that copies of copies do not pile up.
    let today = jiff::Timestamp::now().strftime("%FT00:00:00Z").to_string();
    workspace.write(
        &format!("{dir}/SOURCE"),
        &format!("commit 0123{package}\ndate {today}\n"),
    );
    workspace.write(
        &format!("{dir}/crates/{package}/RUSTSEC-2026-0001.md"),
        &format!(
            "```toml\n[advisory]\nid = \"RUSTSEC-2026-0001\"\npackage = \"{package}\"\n\
             date = \"2026-01-01\"\n[versions]\npatched = []\n```\n\n# A planted hole\n\nIt is only a test.\n"
        ),
    );
}

fn audit(workspace: &Workspace, arguments: &[&str]) -> Ended {
    audit_with(workspace, "target/advisories", arguments, &[])
}

fn audit_with(
    workspace: &Workspace,
    advisories: &str,
    arguments: &[&str],
    variables: &[(&str, &str)],
) -> Ended {
    let mut command = workspace.xtask();
    command
        .args(["audit", "--advisory-db", advisories])
        .args(arguments)
        .envs(variables.iter().copied());
    ended(command.output().unwrap())
}

#[test]
fn a_clean_repository_passes_every_check() {
    let workspace = clean();
    let ended = audit(&workspace, &["--strict"]).expect(0, "passed");
    let checks = ended.finished()["checks"].as_array().unwrap();
    assert_eq!(checks.len(), 9, "{checks:?}");
    assert!(
        checks.iter().all(|check| check["outcome"] == "passed"),
        "{checks:?}"
    );
    // The age of the advisories is told.
    assert!(ended.said.contains("(0 days old)"), "{}", ended.said);
}

/// A fault, put into a clean repository.
type Plant = fn(&Workspace);
/// The check and rule that find it, and where.
type Wanted = (&'static str, &'static str, &'static str, u64);

const PLANTED: &[(Plant, Wanted)] = &[
    (
        |w| advisories(w, "glob", "target/advisories"),
        ("advisories", "RUSTSEC-2026-0001", "Cargo.lock", 6),
    ),
    (
        |w| {
            let deny = w.read("deny.toml");
            w.write(
                "deny.toml",
                &format!("{deny}[bans]\ndeny = [\n  {{ crate = \"glob\" }},\n]\n"),
            );
        },
        ("dependencies", "banned", "Cargo.lock", 6),
    ),
    (
        |w| w.write("deny.toml", "[licenses]\nallow = [\"Zlib\"]\n"),
        ("dependencies", "rejected", "Cargo.lock", 6),
    ),
    (
        |w| {
            let deny = w.read("deny.toml");
            let ignore = "ignore = [{ id = \"RUSTSEC-2020-0001\", reason = \"until 2021-01-01: not ours\" }]";
            w.write(
                "deny.toml",
                &deny.replace("[licenses]", &format!("{ignore}\n[licenses]")),
            );
        },
        ("exceptions", "expired", "deny.toml", 3),
    ),
    (
        |w| w.write("src/lib.rs", "pub fn nothing() {}\n"),
        ("unused", "shear/unused_dependency", "Cargo.toml", 7),
    ),
    (
        |w| w.write("notes.txt", &format!("first\ntoken = \"{}\"\n", token())),
        ("secrets", "github-pat", "notes.txt", 2),
    ),
    (
        |w| {
            // It is gone from the files, but not from the history.
            w.write("old.txt", &format!("a\nb\ntoken = \"{}\"\n", token()));
            w.commit();
            w.git(&["rm", "--quiet", "old.txt"]);
            w.commit();
        },
        ("secrets", "github-pat", "old.txt", 3),
    ),
    (
        |w| {
            let bad = WORKFLOW.replace(
                "cargo xtask ci",
                "echo ${{ github.event.head_commit.message }}",
            );
            w.write(".github/workflows/ci.yml", &bad);
        },
        (
            "workflows",
            "template-injection",
            ".github/workflows/ci.yml",
            14,
        ),
    ),
    (
        |w| {
            w.write(
                ".github/workflows/ci.yml",
                &WORKFLOW.replace("github.ref", "githb.ref"),
            )
        },
        ("workflow-syntax", "syntax", ".github/workflows/ci.yml", 5),
    ),
    (
        |w| {
            w.write(
                ".github/workflows/ci.yml",
                &WORKFLOW.replace("runs-on", "runs-in"),
            )
        },
        ("workflow-syntax", "syntax", ".github/workflows/ci.yml", 10),
    ),
    (
        |w| {
            let image = MANIFEST
                .lines()
                .find(|line| line.contains("image:"))
                .unwrap();
            w.write(
                "k8s/base.yaml",
                &MANIFEST.replace(image, "          image: sample:latest"),
            );
        },
        ("manifests", "image-by-digest", "k8s/base.yaml", 13),
    ),
    (
        |w| {
            w.write(
                "k8s/base.yaml",
                &MANIFEST.replace("runAsNonRoot: true", "runAsNonRoot: false"),
            )
        },
        ("manifests", "non-root", "k8s/base.yaml", 9),
    ),
    (
        |w| {
            let secret = "kind: Secret\nmetadata:\n  name: x\ndata:\n  key: dmFsdWU=\n";
            w.write("k8s/secret.yaml", secret);
        },
        ("manifests", "no-secret-in-the-tree", "k8s/secret.yaml", 5),
    ),
    (
        |w| {
            w.write(
                "Dockerfile",
                &DOCKERFILE.replace("FROM rust@sha256:", "FROM rust:"),
            )
        },
        ("manifests", "base-by-digest", "Dockerfile", 1),
    ),
    (
        |w| w.write("Dockerfile", &DOCKERFILE.replace("USER 10001\n", "")),
        ("manifests", "user", "Dockerfile", 3),
    ),
    (
        // The build's user says nothing of the last stage's.
        |w| {
            let moved = DOCKERFILE.replace("USER 10001\n", "");
            w.write(
                "Dockerfile",
                &moved.replace("RUN cargo", "USER 10001\nRUN cargo"),
            );
        },
        ("manifests", "user", "Dockerfile", 4),
    ),
    (
        |w| w.write("Dockerfile", &DOCKERFILE.replace("USER 10001", "USER 0")),
        ("manifests", "user", "Dockerfile", 5),
    ),
    (
        |w| {
            w.write(
                "Dockerfile",
                &DOCKERFILE.replace("FROM scratch", "FROM alpine AS alpine"),
            )
        },
        ("manifests", "base-by-digest", "Dockerfile", 3),
    ),
    (
        |w| {
            w.write(
                "Dockerfile",
                &DOCKERFILE.replace("cargo build", "curl x://y | bash"),
            )
        },
        ("manifests", "no-piped-script", "Dockerfile", 2),
    ),
    (
        |w| {
            let item = MANIFEST.replace("runAsNonRoot: true", "runAsNonRoot: false");
            let item = item.replace('\n', "\n    ");
            w.write(
                "k8s/list.yaml",
                &format!("kind: List\nitems:\n  - {}\n", item.trim_end()),
            );
        },
        ("manifests", "non-root", "k8s/list.yaml", 11),
    ),
    (
        |w| {
            let own = "readOnlyRootFilesystem: true\n            runAsUser: 0";
            w.write(
                "k8s/base.yaml",
                &MANIFEST.replace("readOnlyRootFilesystem: true", own),
            );
        },
        ("manifests", "non-root", "k8s/base.yaml", 20),
    ),
    (
        |w| {
            w.write(
                "src/lib.rs",
                "pub use glob::glob;\npub fn f() { unsafe { g() } }\nunsafe fn g() {}\n",
            )
        },
        ("unsafe", "unsafe-code", "src/lib.rs", 2),
    ),
];

/// Made here, so that no credential, even a false one, stands in this repository.
fn token() -> String {
    const LETTERS: &[u8] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789";
    let mut state: u64 = 0x9E37_79B9_7F4A_7C15;
    let letters = (0..36).map(|_| {
        // xorshift64: any sequence without a pattern will do.
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        char::from(LETTERS[usize::try_from(state % LETTERS.len() as u64).unwrap()])
    });
    format!("gh{}_{}", 'p', letters.collect::<String>())
}

#[test]
fn each_planted_fault_is_found_at_its_place() {
    for (plant, (check, rule, file, line)) in PLANTED {
        let workspace = clean();
        plant(&workspace);
        let ended = audit(&workspace, &["--only", check]).expect(1, "failed");
        let found: Vec<String> = ended
            .events
            .iter()
            .filter(|event| event["event"] == "finding" && event["level"] != "note")
            .map(|event| {
                let text = |name: &str| event[name].as_str().unwrap();
                format!("{} {}:{}", text("rule"), text("file"), event["line"])
            })
            .collect();
        let wanted = format!("{rule} {file}:{line}");
        assert!(
            found.contains(&wanted),
            "no {wanted} in {found:?}\n{}",
            ended.said
        );

        // Code scanning refuses a result without a place.
        let sarif = workspace.read("target/xtask/audit/audit.sarif");
        let sarif: Value = serde_json::from_str(&sarif).unwrap();
        for result in sarif["runs"][0]["results"].as_array().unwrap() {
            let place = &result["locations"][0]["physicalLocation"];
            let uri = place["artifactLocation"]["uri"].as_str().unwrap();
            assert!(!Path::new(uri).is_absolute() && !uri.is_empty(), "{result}");
            assert!(place["region"]["startLine"].as_u64() >= Some(1), "{result}");
        }
    }
}

/// Without advisories nothing is known, and that is never a quiet pass.
#[test]
fn advisories_that_cannot_be_had_are_loud() {
    let workspace = clean();
    let nowhere = format!("file://{}/nowhere", workspace.root().display());
    let with = |arguments: &[&str], variables: &[(&str, &str)]| {
        let arguments = [&["--only", "advisories"], arguments].concat();
        audit_with(&workspace, &nowhere, &arguments, variables)
    };
    let here = with(&[], &[]).expect(0, "incomplete");
    assert!(
        here.said.contains("advisories was NOT checked"),
        "{}",
        here.said
    );
    with(&["--strict"], &[]).expect(2, "unavailable");
    with(&[], &[("GITHUB_ACTIONS", "true")]).expect(2, "unavailable");
}

#[test]
fn advisories_that_are_too_old_are_refused() {
    let workspace = clean();
    let year_ago = jiff::Timestamp::now() - jiff::SignedDuration::from_hours(24 * 365);
    workspace.write(
        "target/advisories/SOURCE",
        &format!("commit old\ndate {year_ago}\n"),
    );
    let ended = audit(&workspace, &["--only", "advisories", "--strict"]).expect(2, "unavailable");
    assert!(ended.said.contains("stale"), "{}", ended.said);
}

#[test]
fn a_shallow_history_is_not_taken_for_a_clean_one() {
    let workspace = clean();
    workspace.commit();
    let clone = workspace.shallow_clone();
    let output = workspace
        .xtask()
        .args(["audit", "--only", "secrets", "--strict"])
        .current_dir(clone.path())
        .output()
        .unwrap();
    let ended = ended(output).expect(2, "unavailable");
    assert!(
        ended.said.contains("the clone is shallow"),
        "{}",
        ended.said
    );
}
