//! A small repository of a test's own, with steps of its own.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::Value;
use tempfile::TempDir;

use crate::fixture::{Ended, ended};

pub struct Workspace {
    dir: TempDir,
}

impl Workspace {
    /// An empty repository with one commit; `steps` is the table, as TOML.
    pub fn new(steps: &str) -> Self {
        let workspace = Self {
            dir: tempfile::tempdir().unwrap(),
        };
        workspace.write("Cargo.lock", "");
        workspace.write(".gitignore", "/target/\n/steps.toml\n");
        workspace.write("steps.toml", steps);
        workspace.git(&["init", "--quiet", "--initial-branch", "main"]);
        workspace.commit();
        workspace
    }

    pub fn root(&self) -> &Path {
        self.dir.path()
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.root().join(name)
    }

    pub fn write(&self, name: &str, content: &str) {
        let path = self.path(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, content).unwrap();
    }

    pub fn read(&self, name: &str) -> String {
        std::fs::read_to_string(self.path(name)).unwrap()
    }

    pub fn git(&self, arguments: &[&str]) {
        let output = Command::new("git")
            .args(["-c", "user.name=test", "-c", "user.email=test@localhost"])
            .args(["-c", "commit.gpgsign=false"])
            .args(arguments)
            .current_dir(self.root())
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "git {arguments:?}: {said}");
    }

    pub fn commit(&self) {
        self.git(&["add", "--all"]);
        self.git(&["commit", "--quiet", "--allow-empty", "--message", "change"]);
    }

    /// A clone that has only the last commit.
    pub fn shallow_clone(&self) -> TempDir {
        let clone = tempfile::tempdir().unwrap();
        let source = format!("file://{}", self.root().display());
        let to = clone.path().to_str().unwrap();
        self.git(&["clone", "--quiet", "--depth", "1", &source, to]);
        clone
    }

    /// xtask in this repository, as it is outside of Actions.
    pub fn xtask(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_xtask"));
        command
            .current_dir(self.root())
            .args(["--message-format", "json"])
            .env_remove("CARGO_TARGET_DIR")
            .env_remove("GITHUB_ACTIONS")
            .env_remove("GITHUB_STEP_SUMMARY")
            // What is missing here is no news to a step that runs this test.
            .env_remove("XTASK_STEP_WARNING")
            .stdin(Stdio::null());
        command
    }

    /// `ci` with this repository's steps.
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = self.xtask();
        command
            .args(["ci", "--steps", "steps.toml"])
            .args(arguments);
        command
    }

    pub fn ci(&self, arguments: &[&str]) -> Ended {
        ended(self.command(arguments).output().unwrap())
    }

    pub fn receipt(&self) -> Value {
        serde_json::from_str(&self.read("target/xtask/ci/run.json")).unwrap()
    }
}

/// Each step's name and outcome, from a command's last line or from a receipt.
pub fn outcomes(of: &Value) -> Vec<(String, String)> {
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    let steps = of["steps"].as_array().unwrap();
    steps
        .iter()
        .map(|step| (text(&step["name"]), text(&step["outcome"])))
        .collect()
}

/// The step of that name.
pub fn step<'v>(of: &'v Value, name: &str) -> &'v Value {
    let steps = of["steps"].as_array().unwrap();
    steps.iter().find(|step| step["name"] == name).unwrap()
}
