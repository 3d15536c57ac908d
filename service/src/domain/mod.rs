//! What the service is about: types and rules, no I/O.

pub mod events;
pub mod orders;
