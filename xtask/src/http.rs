//! The one HTTP client: straight to loopback and clusters, whatever proxy the environment names.

use std::time::Duration;

use anyhow::{Context, Result};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// A client that follows no redirect and uses no proxy.
pub fn client() -> Result<reqwest::Client> {
    reqwest::Client::builder()
        .no_proxy()
        .redirect(reqwest::redirect::Policy::none())
        .connect_timeout(CONNECT_TIMEOUT)
        .build()
        .context("making an HTTP client")
}
