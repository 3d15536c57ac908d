//! `image --load` into clusters of other makers: their own programs are told to take the image. Neither
//! can run here, so programs of the same names write down what they are told.
//! <https://kind.sigs.k8s.io/docs/user/quick-start/#loading-an-image-into-your-cluster>
//! <https://docs.k3s.io/installation/airgap>

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use serde_json::Value;

use crate::bad_input::which;
use crate::fixture::{Fixture, PRODUCTION, ended};

/// Writes down its arguments, a line each, and keeps the archive.
const STAND_IN: &str = r#"#!/bin/sh
here=$(dirname "$0")
printf '%s\n' "$@" > "$here/told"
for word; do case "$word" in *.tar) cp "$word" "$here/image.tar" ;; esac; done
"#;

#[test]
fn kind_and_k3s_are_told_to_take_the_image() {
    for (context, program, before, after) in [
        (
            "kind-test",
            "kind",
            &["load", "image-archive"][..],
            &["--name", "test"][..],
        ),
        ("my-k3s", "k3s", &["ctr", "images", "import"], &[]),
    ] {
        let fixture = Fixture::with(&[
            ("kubernetes.context", context.into()),
            ("environments.production.platform", "kubernetes".into()),
        ]);
        let dir = tempfile::tempdir().unwrap();
        let stand_in = dir.path().join(program);
        std::fs::write(&stand_in, STAND_IN).unwrap();
        std::fs::set_permissions(&stand_in, PermissionsExt::from_mode(0o755)).unwrap();
        let path = std::env::var("PATH").unwrap();
        let path = format!("{}:{path}", dir.path().display());

        let binary = which("true");
        let image = [
            "image",
            "--version",
            "1.0.0",
            "--binary",
            &binary,
            "--load",
            PRODUCTION,
        ];
        let output = fixture.command(&image).env("PATH", path).output().unwrap();
        let loaded = ended(output).expect(0, "passed");
        let digest = loaded.finished()["image"].as_str().unwrap();

        let told = std::fs::read_to_string(dir.path().join("told")).unwrap();
        let mut told: Vec<&str> = told.lines().collect();
        let archive = told.remove(before.len());
        assert!(archive.ends_with("/image.tar"), "{archive}");
        assert_eq!(told, [before, after].concat());
        let index: Value = serde_json::from_str(&inside(dir.path(), "index.json")).unwrap();
        let manifest = &index["manifests"][0];
        assert_eq!(manifest["digest"], digest);
        // Nodes find it by the name that pods have.
        let name = format!("xtask.local/service@{digest}");
        assert_eq!(manifest["annotations"]["io.containerd.image.name"], name);
        assert!(
            inside(dir.path(), &format!("blobs/{}", digest.replace(':', "/"))).contains("layers")
        );
    }
}

/// A file of the archive that was handed over.
fn inside(dir: &Path, file: &str) -> String {
    let tar = Command::new("tar")
        .arg("-xOf")
        .arg(dir.join("image.tar"))
        .arg(file)
        .output();
    String::from_utf8(tar.unwrap().stdout).unwrap()
}
