//! The workflows, written from the table of steps.

use std::fmt::Write;

use super::{Action, CACHE, CACHE_RESTORE, CACHE_SAVE, CHECKOUT, UPLOAD_ARTIFACT, UPLOAD_SARIF};
use crate::ci::steps;

const HEAD: &str =
    "# Written by `cargo xtask workflows write` from the steps in xtask/src/ci/steps.rs.\n";

/// Each file below `.github/`, and what is in it.
pub fn files() -> Vec<(&'static str, String)> {
    vec![
        ("workflows/ci.yml", ci()),
        ("workflows/audit.yml", audit()),
        ("actions/xtask/action.yml", action()),
    ]
}

fn ci() -> String {
    let mut text = format!(
        "{HEAD}name: ci

on:
  push:
    branches: [main]
  pull_request:

# Nothing is granted that a job does not ask for.
permissions: {{}}

concurrency:
  group: ci-${{{{ github.ref }}}}
  cancel-in-progress: ${{{{ github.event_name == 'pull_request' }}}}

jobs:
  # Builds xtask once; the other jobs find it in the cache.
  xtask:
    name: xtask
    runs-on: ubuntu-24.04
    timeout-minutes: 20
    permissions:
      contents: read # check out
    steps:
{}      - name: build and share
        env:
          CARGO_ALIAS_XTASK: ${{{{ steps.xtask.outputs.alias }}}}
        run: cargo xtask setup --share
",
        prepare(false)
    );
    let mut jobs: Vec<String> = Vec::new();
    for step in steps::steps() {
        if !jobs.contains(&step.job) {
            jobs.push(step.job);
        }
    }
    for job in &jobs {
        let names = steps::steps().into_iter().filter(|step| step.job == *job);
        let names: Vec<String> = names.map(|step| step.name).collect();
        let _ = write!(
            text,
            "
  {job}:
    name: {job}
    needs: xtask
    runs-on: ubuntu-24.04
    timeout-minutes: 90
    permissions:
      contents: read # check out
    steps:
{}{}      - name: steps
        env:
          CARGO_ALIAS_XTASK: ${{{{ steps.xtask.outputs.alias }}}}
        run: cargo xtask ci --setup --only {}
      - name: keep passes
        if: always()
        uses: {}
        with:
          path: target/xtask/ci/cache
          key: passes-{job}-${{{{ github.run_id }}}}-${{{{ github.run_attempt }}}}
      - name: receipt
        if: always()
        uses: {}
        with:
          name: receipt-{job}
          path: |
            target/xtask/ci/*.json
            target/xtask/ci/junit.xml
            target/xtask/ci/run.sarif
            target/xtask/ci/summary.md
",
            prepare(true),
            passes(job),
            names.join(","),
            uses(&CACHE_SAVE),
            uses(&UPLOAD_ARTIFACT)
        );
    }
    let _ = write!(
        text,
        "
  # The one job that branch protection requires.
  passed:
    name: passed
    if: always()
    needs: [xtask, {}]
    runs-on: ubuntu-24.04
    timeout-minutes: 20
    permissions:
      contents: read # check out
    steps:
{}      - name: conclude
        env:
          CARGO_ALIAS_XTASK: ${{{{ steps.xtask.outputs.alias }}}}
          NEEDS: ${{{{ toJSON(needs) }}}}
        run: cargo xtask workflows conclude
",
        jobs.join(", "),
        prepare(false)
    );
    text
}

/// The audit by itself: advisories appear without any change here.
fn audit() -> String {
    format!(
        "{HEAD}name: audit

on:
  push:
    branches: [main]
  schedule:
    - cron: \"17 4 * * 1\"
  workflow_dispatch:

permissions: {{}}

concurrency:
  group: audit-${{{{ github.ref }}}}
  cancel-in-progress: true

jobs:
  audit:
    name: audit
    runs-on: ubuntu-24.04
    timeout-minutes: 30
    permissions:
      contents: read # check out
      security-events: write # code scanning shows what is found
    steps:
{}      - name: tools
        env:
          CARGO_ALIAS_XTASK: ${{{{ steps.xtask.outputs.alias }}}}
        run: cargo xtask setup --only audit
      - name: audit
        env:
          CARGO_ALIAS_XTASK: ${{{{ steps.xtask.outputs.alias }}}}
        run: cargo xtask audit --strict
      - name: findings
        if: always()
        uses: {}
        with:
          sarif_file: target/xtask/audit/audit.sarif
",
        prepare(true),
        uses(&UPLOAD_SARIF)
    )
}

/// Says by which alias jobs call xtask: the shared program where the cache has it.
fn action() -> String {
    format!(
        "{HEAD}name: xtask
description: Takes xtask from the cache, by the hash of its sources
outputs:
  alias:
    description: What `cargo xtask` stands for
    value: ${{{{ steps.cache.outputs.cache-hit == 'true' && 'ready-xtask' || 'run --locked --package xtask --' }}}}
runs:
  using: composite
  steps:
    - id: cache
      uses: {}
      with:
        path: ~/.cargo/bin/cargo-ready-xtask
        key: xtask-${{{{ runner.os }}}}-${{{{ runner.arch }}}}-${{{{ hashFiles('xtask/**', 'Cargo.toml', 'Cargo.lock', '.cargo/config.toml') }}}}
",
        uses(&CACHE)
    )
}

/// Checks the sources out and finds xtask. Secrets are looked for in the whole history.
fn prepare(history: bool) -> String {
    let depth = if history {
        "\n          fetch-depth: 0"
    } else {
        ""
    };
    format!(
        "      - name: sources
        uses: {}
        with:
          persist-credentials: false{depth}
      - name: xtask
        id: xtask
        uses: $/.github/actions/xtask
",
        uses(&CHECKOUT)
    )
}

/// The passes that earlier runs remembered, failed ones too. Each is named by the key that xtask computes, the same
/// one as on a laptop, so an old pass is harmless.
fn passes(job: &str) -> String {
    format!(
        "      - name: passes
        uses: {}
        with:
          path: target/xtask/ci/cache
          key: passes-{job}-${{{{ github.run_id }}}}-${{{{ github.run_attempt }}}}
          restore-keys: passes-{job}-
",
        uses(&CACHE_RESTORE)
    )
}

fn uses(action: &Action) -> String {
    format!("{}@{} # {}", action.name, action.commit, action.version)
}
