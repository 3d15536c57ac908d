//! A sample production microservice: orders over REST, GraphQL, gRPC and WebSockets, on embedded
//! defaults.
//!
//! Read [`router`] for what it serves, [`middleware`] for what surrounds every request,
//! [`app`] for what it is made of and [`config`] for what can be set.

pub mod adapters;
pub mod api;
pub mod app;
pub mod audit;
pub mod auth;
pub mod breaker;
pub mod cli;
pub mod config;
mod connections;
pub mod consumers;
pub mod domain;
pub mod drain;
pub mod duty;
mod failpoint;
pub mod feed;
pub mod hex;
pub mod keyring;
pub mod limits;
mod log_lines;
pub mod metrics;
pub mod middleware;
mod pause;
pub mod process;
pub mod relay;
pub mod router;
pub mod server;
pub mod sessions;
pub mod telemetry;
pub mod tls;
pub mod traces;
