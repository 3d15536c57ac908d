//! The steps, as data. To add a check, add a row.

use super::facts::{ADVISORIES, HISTORY, RUST, TODAY};
use super::step::Step;
use crate::cargo::WHOLE_BUILD;
use crate::cluster;
use crate::setup::{CLUSTER, CLUSTER_TESTS, CONTAINERS};

/// Jobs of the workflow; each runs its steps on a machine of its own.
pub const CHECKS: &str = "checks";
pub const TESTS: &str = "tests";
pub const CLUSTERS: &str = "cluster";

/// cargo's directory of what is built: two builds in it would only wait for each other.
const TARGET: &str = "target";

/// Variables that change what cargo and rustc do.
const BUILD: &[&str] = &[
    "CARGO_BUILD_RUSTFLAGS",
    "CARGO_BUILD_TARGET",
    "CARGO_ENCODED_RUSTFLAGS",
    "CC",
    "CFLAGS",
    "RUSTC",
    "RUSTC_WRAPPER",
    "RUSTFLAGS",
];

/// The tools that `audit` calls.
const AUDIT: &[&str] = &[
    "cargo-deny",
    "cargo-shear",
    "kingfisher",
    "zizmor",
    "workflow-parser",
    "node",
    "kubectl",
];

/// In the order in which they start where several can: the quickest to fail first.
pub fn steps() -> Vec<Step> {
    vec![
        Step::check(
            "format",
            "the code is formatted as rustfmt does it",
            "cargo fmt --all --check",
        )
        .reads(&[
            "**/*.rs",
            "**/Cargo.toml",
            "**/rustfmt.toml",
            "**/.rustfmt.toml",
        ])
        .tools(&[RUST])
        .mended_by("cargo fmt --all")
        .minutes(5)
        .fast()
        .job(CHECKS),
        Step::check(
            "workflows",
            "GitHub Actions runs these very steps, each once, with no right it does not need",
            "cargo xtask workflows check",
        )
        .reads(&[".github/**", "config/tools.toml"])
        .packages(&["xtask"])
        .mended_by("cargo xtask workflows write")
        .minutes(5)
        .fast()
        .job(CHECKS),
        Step::check(
            "audit",
            "no known vulnerability, secret, unused or unlicensed dependency, or unsafe manifest",
            "cargo xtask audit",
        )
        .reads(&["**"])
        .tools(AUDIT)
        .tools(&[RUST, ADVISORIES, HISTORY, TODAY])
        .minutes(10)
        .fast()
        .job(CHECKS),
        cargo_step(
            "thin",
            "xtask builds without any feature and without a warning",
            "cargo clippy --locked --package xtask -- --deny warnings",
        )
        .packages(&["xtask"])
        .job(CHECKS),
        cargo_step(
            "clippy",
            "clippy and the compiler have no warning",
            "cargo clippy --locked --workspace --all-targets --all-features -- --deny warnings",
        )
        .packages(&["xtask", "service"])
        .mended_by(
            "cargo clippy --locked --workspace --all-targets --all-features \
             --fix --allow-dirty --allow-staged",
        )
        .fast()
        .job(CHECKS),
        cargo_step(
            "docs",
            "the documentation builds and its links lead somewhere",
            "cargo doc --locked --workspace --all-features --no-deps --document-private-items",
        )
        .packages(&["xtask", "service"])
        .variable("RUSTDOCFLAGS", "--deny warnings")
        .job(CHECKS),
        cargo_step(
            "build",
            "programs and tests build",
            // Benchmarks are checked by clippy, and linked by whoever runs one.
            "cargo build --locked --workspace --all-features --lib --bins --tests",
        )
        .packages(&["xtask", "service"])
        .job(TESTS),
        cargo_step(
            "unit",
            "each part of xtask does by itself what it says",
            "cargo test --locked --workspace --all-features --bin xtask",
        )
        .packages(&["xtask"])
        .reads(&["config/**", ".github/**"])
        .needs(&["build"])
        .job(TESTS),
        cargo_step(
            "integration",
            "the service works on SQLite and on real servers in containers",
            "cargo xtask servers run -- \
             cargo test --locked --workspace --all-features \
             --lib --test integration --test round_trips",
        )
        // And xtask, which starts the servers.
        .packages(&["service", "xtask"])
        .reads(&["config/**"])
        .tools(&[CONTAINERS, "schemathesis", "oidc-provider"])
        .locks(&["containers"])
        .variable(WHOLE_BUILD, "1")
        .needs(&["build"])
        .job(TESTS),
        cargo_step(
            "image",
            "the service builds into an image",
            "cargo xtask image",
        )
        .packages(&["xtask", "service"])
        .reads(&["config/**"])
        // The image names the commit.
        .tools(&[HISTORY])
        .writes(&["target/xtask/images/index.json"])
        .job(TESTS),
        cargo_step(
            "commands",
            "xtask's commands do what they say, on real processes under load",
            "cargo test --locked --workspace --all-features --test reproducible --test commands",
        )
        .packages(&["xtask", "service"])
        .reads(&["config/**", ".github/**", "**/*.md", "deny.toml"])
        .tools(AUDIT)
        .tools(&[CONTAINERS])
        .locks(&["containers"])
        .needs(&["build", "image"])
        .minutes(40)
        .job(TESTS),
        cluster_step(
            "kubernetes",
            "rollouts do on a real cluster what they do in the sandbox, whatever goes wrong there",
            "cargo xtask cluster run -- \
             cargo test --locked --workspace --all-features --test kubernetes -- --test-threads 4",
        )
        .tools(&[CLUSTER_TESTS])
        .minutes(40),
        cluster_step(
            "demo-kubernetes",
            "the whole path works on a real cluster, too",
            "cargo xtask demo --platform kubernetes --profile release",
        ),
        cargo_step(
            "demo",
            "the whole path works under load, a bad release and a kill included",
            // What the image's step has built.
            "cargo xtask demo --profile release",
        )
        .packages(&["xtask", "service"])
        .reads(&["config/**"])
        .variable(WHOLE_BUILD, "1")
        .needs(&["build", "image"])
        .job(TESTS),
    ]
}

/// A step that builds with cargo, which keeps all cores busy.
fn cargo_step(name: &str, proves: &str, run: &str) -> Step {
    Step::check(name, proves, run)
        .environment(BUILD)
        .tools(&[RUST])
        .locks(&[TARGET])
        .all_cores()
        .minutes(30)
}

/// A step that runs releases of the service on a Kubernetes cluster.
fn cluster_step(name: &str, proves: &str, run: &str) -> Step {
    cargo_step(name, proves, run)
        .packages(&["xtask", "service"])
        .reads(&["config/**", "k8s/**"])
        .environment(&[cluster::KUBECONFIG])
        .tools(&[CONTAINERS, CLUSTER])
        .locks(&["containers"])
        .variable(WHOLE_BUILD, "1")
        .needs(&["build", "image"])
        .job(CLUSTERS)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ci::step;

    #[test]
    fn the_table_can_be_run() {
        let steps = steps();
        step::verify(&steps).unwrap();
        for step in steps {
            assert!(
                [CHECKS, TESTS, CLUSTERS].contains(&step.job.as_str()),
                "{step}"
            );
            assert!(!step.proves.is_empty(), "{step}");
        }
    }
}
