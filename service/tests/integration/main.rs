//! The service as its clients and its operators see it: a real server on free ports, with a
//! database of its own for each test.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod audit;
mod auth;
mod broker;
mod bus;
mod cache;
mod commands;
mod config;
mod connections;
mod contacts;
mod database;
mod disk;
mod events;
mod failover;
mod faults;
mod generated;
mod interfaces;
mod limits;
mod lock;
mod oidc;
mod operations;
mod orders;
mod secure_servers;
mod storage;
mod test_app;
mod tls;
mod traces;
mod wire;
