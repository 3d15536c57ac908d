//! The outside world, each part behind one trait with an embedded adapter.

pub mod bus;
pub mod cache;
pub mod lock;
mod redis;
pub mod storage;
