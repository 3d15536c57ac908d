//! The interfaces. Each translates to the use cases in [`crate::app`] and back.

pub mod operations;
pub mod problem;
pub mod rest;
