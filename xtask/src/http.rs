//! The one HTTP client: straight to loopback and clusters, whatever proxy the environment names.

use std::time::Duration;

use anyhow::{Context, Result};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a connection is kept for the next request. Gateways close theirs after a minute or so of
/// silence (Envoy behind Contour, AWS's balancers), and a request that is on its way then is lost.
const KEPT_IDLE: Duration = Duration::from_secs(20);

/// A client that follows no redirect and uses no proxy.
pub fn client() -> Result<reqwest::Client> {
    reqwest::Client::builder()
        .no_proxy()
        .redirect(reqwest::redirect::Policy::none())
        .connect_timeout(CONNECT_TIMEOUT)
        .pool_idle_timeout(KEPT_IDLE)
        .build()
        .context("making an HTTP client")
}
