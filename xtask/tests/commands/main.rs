//! xtask as its users run it: real commands, real processes, a sandbox and ports of each test's
//! own. What is started is stopped; nothing else is touched.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod audit;
mod bad_input;
mod cache;
mod ci;
mod fixture;
mod guard;
mod judge;
mod killed;
mod load;
mod push;
mod rollouts;
mod servers;
mod workflows;
mod workspace;
