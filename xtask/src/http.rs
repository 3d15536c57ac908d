//! The one HTTP client: straight to loopback and clusters, whatever proxy the environment names.

use std::time::Duration;

use anyhow::{Context, Result};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a connection is kept for the next request. Gateways close theirs after a minute or so of
/// silence (Envoy behind Contour, AWS's balancers), and a request that is on its way then is lost.
const KEPT_IDLE: Duration = Duration::from_secs(20);

/// A client that follows no redirect and uses no proxy.
pub fn client() -> Result<reqwest::Client> {
    built(reqwest::Client::builder())
}

/// The same for calls by gRPC: HTTP/2, also where no TLS agrees on it.
#[cfg(feature = "kubernetes")]
pub fn grpc_client() -> Result<reqwest::Client> {
    built(reqwest::Client::builder().http2_prior_knowledge())
}

fn built(client: reqwest::ClientBuilder) -> Result<reqwest::Client> {
    client
        .no_proxy()
        .redirect(reqwest::redirect::Policy::none())
        .connect_timeout(CONNECT_TIMEOUT)
        .pool_idle_timeout(KEPT_IDLE)
        .build()
        .context("making an HTTP client")
}
