//! Rollouts on a real cluster, which `cargo xtask cluster run` has started.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

#[expect(dead_code, reason = "some of it is for the sandbox only")]
#[path = "../commands/fixture.rs"]
mod fixture;
mod namespace;
mod proxy;

mod faults;
mod manifests;
mod prometheus;
mod rights;
mod rollouts;
mod side_by_side;
mod troubles;
