//! The same source gives the same image, from whatever directory it is built.
//!
//! Two whole builds of the service would take as long as all other tests: a small program with what
//! makes builds differ, C code, macros, and code that a build script writes, stands in for it. Of the
//! service's own executable it is looked up that it names no place of this machine.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

#[expect(dead_code, reason = "most of it is for rollouts")]
#[path = "../commands/fixture.rs"]
mod fixture;

use std::path::{Path, PathBuf};
use std::process::Command;

use fixture::{Ended, Fixture, ended, root};

/// The program's files.
const PROBE: [(&str, &str); 6] = [
    ("Cargo.toml", include_str!("probe/Cargo.toml.in")),
    ("build.rs", include_str!("probe/build.rs")),
    ("src/main.rs", include_str!("probe/main.rs")),
    ("config/default.toml", "[server]\n"),
    ("k8s/kustomization.yaml", "resources: []\n"),
    ("migrations/0001_first.sql", "SELECT 1;\n"),
];

/// Of a pipeline that builds the program in place of the service.
fn pipeline() -> Fixture {
    Fixture::with(&[
        ("service.package", "probe".into()),
        ("service.binary", "probe".into()),
        ("service.config_dir", "config".into()),
        ("service.migrations_dir", "migrations".into()),
    ])
}

/// Builds the program's image in `dir`, with the workspace's versions of what it is built from.
fn image(pipeline: &Fixture, dir: &Path, words: &[&str]) -> Ended {
    for (name, text) in PROBE {
        let path = dir.join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    }
    std::fs::copy(root().join("Cargo.lock"), dir.join("Cargo.lock")).unwrap();
    // Takes what it does not need out of the lock file.
    let pruned = Command::new("cargo")
        .args(["metadata", "--offline", "--format-version", "1"])
        .current_dir(dir)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&pruned.stderr);
    assert!(pruned.status.success(), "{said}");
    let output = Command::new(env!("CARGO_BIN_EXE_xtask"))
        .args(["--message-format", "json", "--pipeline"])
        .arg(pipeline.settings())
        .arg("image")
        .args(words)
        .current_dir(dir)
        .env("CARGO_TARGET_DIR", dir.join("target"))
        .output()
        .unwrap();
    ended(output)
}

#[test]
fn two_directories_give_one_digest() {
    let pipeline = pipeline();
    let place = tempfile::tempdir().unwrap();
    let here = image(&pipeline, &place.path().join("here"), &[]).expect(0, "passed");
    let there = image(&pipeline, &place.path().join("somewhere/else"), &[]).expect(0, "passed");
    for part in ["image", "release"] {
        assert_eq!(here.finished()[part], there.finished()[part], "{part}");
    }

    // It does name what it was made of, by the names that stand for this machine's directories.
    let target = place.path().join("here/target");
    let program = std::fs::read(executable(&target, "probe")).unwrap();
    assert!(contains(&program, "/target/"), "nothing was replaced");
    assert!(!contains(&program, place.path().to_str().unwrap()));
}

#[test]
fn another_profile_is_one_of_cargos() {
    let pipeline = pipeline();
    let place = tempfile::tempdir().unwrap();
    let unknown = image(&pipeline, place.path(), &["--profile", "swift"]);
    let said = &unknown.said;
    assert_eq!(unknown.code, 2, "{said}");
    assert!(said.contains("profile `swift` is not defined"), "{said}");

    let dev = image(&pipeline, place.path(), &["--profile", "dev"]).expect(0, "passed");
    let binary = dev.finished()["binary"].as_str().unwrap().to_owned();
    assert!(binary.ends_with("/debug/probe"), "{binary}");
}

#[test]
fn the_service_names_no_place_of_this_machine() {
    let fixture = Fixture::new();
    fixture.run(&["image"]).expect(0, "passed");
    let target =
        std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), Into::into);
    // Without the `..` in it, which no executable would name.
    let target = target.canonicalize().unwrap();
    let program = std::fs::read(executable(&target, "service")).unwrap();
    let cargo = std::env::var_os("CARGO_HOME").map_or_else(
        || std::env::home_dir().unwrap().join(".cargo"),
        PathBuf::from,
    );
    for place in [root().canonicalize().unwrap(), target, cargo] {
        let place = place.display().to_string();
        assert!(!contains(&program, &place), "it names {place}");
    }
    assert!(
        contains(&program, "/cargo/registry/"),
        "nothing was replaced"
    );
}

/// Where a target directory has it, below the directory of its target.
fn executable(target: &Path, name: &str) -> PathBuf {
    let entries = std::fs::read_dir(target).unwrap().flatten();
    let found = entries.map(|entry| entry.path().join("release").join(name));
    found
        .filter(|path| path.parent().unwrap().parent().unwrap() != target)
        .find(|path| path.is_file())
        .unwrap()
}

fn contains(bytes: &[u8], text: &str) -> bool {
    bytes
        .windows(text.len())
        .any(|part| part == text.as_bytes())
}
