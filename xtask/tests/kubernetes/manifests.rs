//! What ships in `k8s/`, as an API server takes it. No pods are needed: `cargo xtask cluster run --api-only`
//! is enough for these tests, without root.

use std::fs::Permissions;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::{Value, json};

use crate::fixture::{Ended, Fixture, ended, eventually, root};
use crate::namespace::{Namespace, copy, kubectl, variable};

/// The manifests for teams, those for the cluster of `cargo xtask cluster`, the deployer's rights, and what
/// components add.
const SHIPPED: [&str; 6] = [
    "overlays/staging",
    "overlays/production",
    "overlays/local/production",
    "overlays/components",
    "deployer",
    "deployer-contour",
];

/// What an API server says of manifests.
const DRY_RUN: [&str; 4] = [
    "apply",
    "--server-side",
    "--dry-run=server",
    "--validate=strict",
];

/// What ships, with an overlay of all components that go together or not.
fn shipped() -> (tempfile::TempDir, Vec<PathBuf>) {
    let dir = tempfile::tempdir().unwrap();
    copy(&root().join("k8s"), dir.path());
    let components = std::fs::read_dir(dir.path().join("components")).unwrap();
    let components: Vec<String> = components
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .map(|name| format!("../../components/{name}"))
        .collect();
    assert!(components.len() > 4, "{components:?}");
    let overlay = dir.path().join("overlays/components");
    std::fs::create_dir(&overlay).unwrap();
    let kustomization = json!({
        "apiVersion": "kustomize.config.k8s.io/v1beta1", "kind": "Kustomization",
        "resources": ["../../base"], "components": components,
    });
    std::fs::write(
        overlay.join("kustomization.yaml"),
        kustomization.to_string(),
    )
    .unwrap();
    let all = SHIPPED.map(|shipped| dir.path().join(shipped));
    (dir, all.into())
}

#[test]
fn what_ships_is_what_the_api_server_takes() {
    let namespace = Namespace::new("ships");
    let (_dir, shipped) = shipped();
    for dir in shipped {
        let dir = dir.to_str().unwrap();
        let said = namespace.ask(&[&DRY_RUN[..], &["--kustomize", dir]].concat());
        assert!(said.lines().count() > 2, "{said}");
    }
}

/// And what the oldest and the newest supported version of Kubernetes would take.
#[test]
fn what_ships_fits_every_supported_version() {
    let program = PathBuf::from(variable("XTASK_KUBECONFORM"));
    let schemas = program.with_file_name("schemas");
    let versions = std::fs::read_dir(&schemas).unwrap_or_else(|error| {
        panic!("{}: {error}; cargo xtask setup", schemas.display());
    });
    let versions: Vec<String> = versions
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    assert_eq!(versions.len(), 2, "{versions:?}");
    let location = format!(
        "{}/{{{{.NormalizedKubernetesVersion}}}}/{{{{.ResourceKind}}}}{{{{.KindSuffix}}}}.json",
        schemas.display()
    );
    let check = |version: &str, manifests: &[u8]| {
        let mut child = Command::new(&program)
            .args(["-strict", "-summary", "-output", "json"])
            // What comes with a gateway has no schema there; the API servers' own tests have it.
            .args(["-skip", "HTTPRoute,GRPCRoute,HTTPProxy"])
            .args(["-schema-location", &location])
            .args(["-kubernetes-version", version.trim_start_matches('v')])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        child.stdin.take().unwrap().write_all(manifests).unwrap();
        let output = child.wait_with_output().unwrap();
        serde_json::from_slice::<Value>(&output.stdout).unwrap()
    };
    let (_dir, shipped) = shipped();
    for version in versions {
        for dir in &shipped {
            let rendered = Command::new(kubectl())
                .arg("kustomize")
                .arg(dir)
                .output()
                .unwrap();
            let result = check(&version, &rendered.stdout);
            let count = |key: &str| result["summary"][key].as_u64().unwrap();
            assert!(
                count("valid") > 2 && count("invalid") + count("errors") == 0,
                "{version}: {result:#}"
            );
            assert!(count("skipped") <= 3, "{version}: {result:#}");
            let broken = String::from_utf8(rendered.stdout)
                .unwrap()
                .replace("metadata:", "metadatum:");
            let result = check(&version, broken.as_bytes());
            assert!(
                result["summary"]["invalid"].as_u64() > Some(2),
                "{result:#}"
            );
        }
    }
}

/// Their own API servers, as those take it: what ships, whole, defaults and all.
#[test]
fn every_supported_api_server_takes_what_ships() {
    let schemas = PathBuf::from(variable("XTASK_KUBECONFORM")).with_file_name("schemas");
    let (_dir, shipped) = shipped();
    for which in ["oldest", "newest"] {
        let alone = Alone::new();
        assert!(
            alone.has_built(&format!("apiserver-{which}-")),
            "`cargo xtask cluster up --api-only --kubernetes {which}` builds it"
        );
        let up = ["up", "--api-only", "--kubernetes", which];
        let up = alone.run(&up).expect(0, "running");
        let kubeconfig = up.finished()["kubeconfig"].as_str().unwrap().to_owned();
        let ask = |words: &[&str]| {
            let output = Command::new(kubectl())
                .args(["--kubeconfig", &kubeconfig])
                .args(words)
                .output()
                .unwrap();
            let said = String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success(), "{which}: {words:?}: {said}");
            String::from_utf8(output.stdout).unwrap()
        };
        let version: Value = serde_json::from_str(&ask(&["get", "--raw", "/version"])).unwrap();
        let version = version["gitVersion"].as_str().unwrap();
        assert!(
            schemas.join(version).is_dir(),
            "{version}, as kubeconform has it"
        );
        for dir in &shipped {
            let dir = dir.to_str().unwrap();
            let said = ask(&[
                &DRY_RUN[..],
                &["--namespace", "default", "--kustomize", dir],
            ]
            .concat());
            assert!(said.lines().count() > 2, "{version}: {said}");
        }
        // Whoever wants the other one is told.
        let other = [
            "up",
            "--api-only",
            "--kubernetes",
            match which {
                "oldest" => "newest",
                _ => "oldest",
            },
        ];
        let refused = alone.run(&other).expect(2, "failed");
        assert!(
            refused.said.contains("of another version"),
            "{}",
            refused.said
        );
    }
}

/// The API server can be had alone by whoever is not root; root tries it as a user in a namespace that has
/// no other, so that nothing can be done in root's name. It ends with the process that holds it.
#[test]
fn the_api_server_alone_needs_no_root() {
    let alone = Alone::new();
    // Whoever has begun it was interrupted, and it goes on.
    let mut begun = alone.command(&["up", "--api-only"]).spawn().unwrap();
    eventually("it has begun", || alone.dir().join("init.json").exists());
    begun.kill().unwrap();
    begun.wait().unwrap();
    let again = alone.run(&["up", "--api-only"]).expect(0, "running");
    assert!(
        again
            .said
            .contains("the API server is running (kubernetes): "),
        "{}",
        again.said
    );
    let status = alone.run(&["status"]).expect(0, "running");
    assert!(status.said.contains("no pods can run"), "{}", status.said);
    assert_eq!(status.finished()["node"], false);
    let kubeconfig = alone.run(&["kubeconfig"]).expect(0, "passed");
    let kubeconfig = kubeconfig.finished()["kubeconfig"]
        .as_str()
        .unwrap()
        .to_owned();
    let apply = |manifests: &str| {
        let mut child = Command::new(kubectl())
            .args(["--kubeconfig", &kubeconfig, "--namespace", "default"])
            .args(DRY_RUN)
            .args(["--filename", "-"])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        child
            .stdin
            .take()
            .unwrap()
            .write_all(manifests.as_bytes())
            .unwrap();
        child.wait().unwrap().success()
    };
    let route =
        "apiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: { name: a }\n";
    assert!(apply(&format!("{route}spec: {{ hostnames: [a.example] }}")));
    assert!(!apply(&format!("{route}spec: {{ hostname: a.example }}")));

    for (words, why) in [
        (&["up"][..], "only the API server is running"),
        (&["load", "image.tar"], "only the API server is running"),
    ] {
        let refused = alone.run(words).expect(2, "failed");
        assert!(refused.said.contains(why), "{}", refused.said);
    }
    let holder = alone.holder();
    eventually("itself, etcd and the API server", || {
        alone.processes().len() == 3
    });
    let killed = Command::new("kill").args(["-KILL", &holder]).status();
    assert!(killed.unwrap().success());
    eventually("its parts end with it", || alone.processes().is_empty());

    let run = [
        "run",
        "--api-only",
        "--",
        "sh",
        "-c",
        "test -s $XTASK_KUBECONFIG",
    ];
    alone.run(&run).expect(0, "passed");
    eventually("it was there for that command", || {
        alone.processes().is_empty()
    });
    assert!(!alone.dir().exists());
}

/// A cache of its own, with what this machine has built.
struct Alone {
    fixture: Fixture,
    cache: tempfile::TempDir,
}

impl Alone {
    fn new() -> Self {
        let cache = tempfile::tempdir().unwrap();
        let program = PathBuf::from(variable("XTASK_KUBECONFORM"));
        let built = program.ancestors().nth(2).unwrap();
        let link = |there: &Path, name: &str| {
            std::os::unix::fs::symlink(there.join(name), cache.path().join(name)).unwrap();
        };
        link(built.parent().unwrap(), "tools");
        std::fs::create_dir(cache.path().join("cluster")).unwrap();
        // As after a cluster of root's.
        let lock = cache.path().join("cluster/run.lock");
        std::fs::write(&lock, "").unwrap();
        std::fs::set_permissions(&lock, Permissions::from_mode(0o444)).unwrap();
        for entry in std::fs::read_dir(built).unwrap() {
            let name = entry.unwrap().file_name().into_string().unwrap();
            if !name.starts_with("run") {
                link(built.parent().unwrap(), &format!("cluster/{name}"));
            }
        }
        let alone = Self {
            fixture: Fixture::new(),
            cache,
        };
        assert!(
            alone.has_built("kubernetes-"),
            "`cargo xtask cluster up --api-only` builds it"
        );
        alone
    }

    /// Whether what the cluster is made of has such a program.
    fn has_built(&self, prefix: &str) -> bool {
        let built = self.cache.path().join("cluster").read_dir().unwrap();
        let mut names = built.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        names.any(|name| name.starts_with(prefix) && !name.contains(".new-"))
    }

    fn dir(&self) -> PathBuf {
        self.cache.path().join("cluster/run")
    }

    fn run(&self, words: &[&str]) -> Ended {
        ended(self.command(words).output().unwrap())
    }

    fn command(&self, words: &[&str]) -> Command {
        let mut command = self.fixture.command(&[&["cluster"], words].concat());
        if rustix::process::geteuid().is_root() {
            let mut unshare = Command::new("unshare");
            unshare
                .args(["--user", "--map-user=1000", "--"])
                .arg(command.get_program())
                .args(command.get_args())
                .current_dir(root())
                .stdin(Stdio::null());
            command = unshare;
        }
        command
            .env("XTASK_CACHE_DIR", self.cache.path())
            .env_remove("XTASK_KUBECONFIG")
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command
    }

    /// The number of the process that holds it.
    fn holder(&self) -> String {
        let init = std::fs::read(self.dir().join("init.json")).unwrap();
        let init: Value = serde_json::from_slice(&init).unwrap();
        init["pid"].to_string()
    }

    /// Those that were started for it.
    fn processes(&self) -> Vec<PathBuf> {
        let dir = self.dir().display().to_string();
        let processes = std::fs::read_dir("/proc").unwrap().flatten();
        let processes = processes.map(|entry| entry.path().join("cmdline"));
        // One that ends while it is looked at is none.
        let belongs = |path: &PathBuf| {
            let words = std::fs::read(path).unwrap_or_default();
            String::from_utf8_lossy(&words).contains(&dir)
        };
        processes.filter(belongs).collect()
    }
}

impl Drop for Alone {
    fn drop(&mut self) {
        let _ = self.run(&["down"]);
    }
}
