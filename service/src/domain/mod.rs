//! Types and rules, no input or output.

pub mod orders;
