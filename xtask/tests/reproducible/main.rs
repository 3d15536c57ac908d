//! The same source gives the same image, from whatever directory it is built. By itself, as it
//! builds for minutes: what other tests send meanwhile would wait.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

#[expect(dead_code, reason = "most of it is for rollouts")]
#[path = "../commands/fixture.rs"]
mod fixture;

use std::path::Path;
use std::process::Command;

use fixture::{Fixture, root};

/// Builds the workspace once more from a copy in another directory, into another target directory
/// (which is kept, so that only the service itself is compiled again next time).
#[test]
fn two_directories_give_one_digest() {
    let fixture = Fixture::new();
    let here = fixture.run(&["image"]).expect(0, "passed");

    // Always the same place: the flags name it, and with other flags all would be built anew.
    let copy = second_target().join("somewhere/else");
    let _ = std::fs::remove_dir_all(&copy);
    let files = Command::new("git")
        .args(["ls-files", "--cached", "--others", "--exclude-standard"])
        .current_dir(root())
        .output()
        .unwrap();
    assert!(
        files.status.success(),
        "{}",
        String::from_utf8_lossy(&files.stderr)
    );
    for file in String::from_utf8(files.stdout).unwrap().lines() {
        let (from, to) = (root().join(file), copy.join(file));
        if from.is_file() {
            std::fs::create_dir_all(to.parent().unwrap()).unwrap();
            std::fs::copy(from, to).unwrap();
        }
    }
    let there = Command::new(env!("CARGO_BIN_EXE_xtask"))
        .args(["--message-format", "json", "--pipeline"])
        .arg(fixture.settings())
        .arg("image")
        .current_dir(&copy)
        .env("CARGO_TARGET_DIR", second_target())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&there.stderr);
    assert!(there.status.success(), "{said}");
    let last = String::from_utf8(there.stdout).unwrap();
    let last: serde_json::Value = serde_json::from_str(last.lines().last().unwrap()).unwrap();

    // The images may differ in the revision they name; what is inside must not.
    let layer = |image: &serde_json::Value| layer_of(&fixture.state(), image.as_str().unwrap());
    assert_eq!(layer(&last["image"]), layer(&here.finished()["image"]));
}

fn second_target() -> std::path::PathBuf {
    let target =
        std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), Into::into);
    std::path::absolute(target.join("second")).unwrap()
}

fn layer_of(state: &Path, image: &str) -> String {
    let blob = state.join("images/blobs").join(image.replacen(':', "/", 1));
    let manifest: serde_json::Value =
        serde_json::from_slice(&std::fs::read(blob).unwrap()).unwrap();
    manifest["layers"][0]["digest"].as_str().unwrap().to_owned()
}
