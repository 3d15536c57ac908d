//! The service as its clients and its operators see it: a real server on free ports, with a
//! database file of its own for each test.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod config;
mod operations;
mod orders;
mod test_app;
