//! The interfaces. Each translates to the use cases in [`crate::app`] and back.

pub mod description;
pub mod fault;
pub mod graphql;
pub mod grpc;
pub mod operations;
pub mod problem;
pub mod rest;
pub mod websocket;
