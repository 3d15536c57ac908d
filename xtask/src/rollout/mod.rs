//! Rollouts: an environment moves from its stable release to a candidate.
//!
//! Data flows one way: settings → [`plan`] → [`engine`] and [`judge`] decide (pure) → a platform
//! acts → the [`journal`] records → output shows. [`driver`] is the loop that does this.

pub mod checks;
pub mod commands;
pub mod desk;
pub mod driver;
pub mod engine;
mod evidence;
#[cfg(test)]
mod explore;
mod exposition;
pub mod journal;
pub mod judge;
mod judge_file;
pub mod metrics;
mod narrator;
pub mod plan;
mod prometheus;
pub mod report;
#[cfg(test)]
mod simulation;
pub mod status;
#[cfg(test)]
mod torture;
pub mod windows;
