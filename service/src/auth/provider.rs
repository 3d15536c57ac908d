//! What an OpenID provider says of itself (OpenID Connect Discovery 1.0, section 4).

use std::time::Duration;

use anyhow::{Context, ensure};
use serde::Deserialize;
use serde::de::DeserializeOwned;

const MAX_ANSWER: usize = 1 << 20;

#[derive(Debug, Clone, Deserialize)]
pub struct Provider {
    issuer: String,
    pub jwks_uri: String,
    pub authorization_endpoint: Option<String>,
    pub token_endpoint: Option<String>,
}

impl Provider {
    /// Asks `issuer`. An answer that speaks for somebody else is none.
    pub async fn discover(http: &reqwest::Client, issuer: &str) -> anyhow::Result<Self> {
        let place = issuer.trim_end_matches('/');
        let url = format!("{place}/.well-known/openid-configuration");
        let provider: Self = ask(http, &url).await?;
        ensure!(
            provider.issuer == issuer,
            "{url} speaks for {}, not for auth.issuer = {issuer}",
            provider.issuer
        );
        Ok(provider)
    }
}

/// A client that goes only where it is sent.
pub fn client(timeout: Duration) -> anyhow::Result<reqwest::Client> {
    reqwest::Client::builder()
        .timeout(timeout)
        .redirect(reqwest::redirect::Policy::none())
        .build()
        .context("making a client for the provider of tokens")
}

/// What `url` answers, as JSON.
pub async fn ask<T: DeserializeOwned>(http: &reqwest::Client, url: &str) -> anyhow::Result<T> {
    let response = http.get(url).send().await;
    let mut response = response
        .and_then(reqwest::Response::error_for_status)
        .with_context(|| format!("asking {url}"))?;
    let mut body = Vec::new();
    while let Some(chunk) = response
        .chunk()
        .await
        .with_context(|| format!("reading {url}"))?
    {
        body.extend_from_slice(&chunk);
        ensure!(
            body.len() <= MAX_ANSWER,
            "{url} answers with more than {MAX_ANSWER} bytes"
        );
    }
    serde_json::from_slice(&body).with_context(|| format!("what {url} answers is not expected"))
}
