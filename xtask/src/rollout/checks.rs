//! Smoke checks: requests whose answers show that a deployment works.

use std::time::Duration;

use anyhow::{Context, Result};
use async_trait::async_trait;
use reqwest::header;

use super::driver::Checks;
use crate::config::{Method, Secret, Smoke};
use crate::http;

const TIMEOUT: Duration = Duration::from_secs(5);

pub struct SmokeChecks {
    client: reqwest::Client,
    address: String,
    /// With the tokens that they need.
    checks: Vec<(Smoke, Option<String>)>,
}

impl SmokeChecks {
    /// # Errors
    /// A check's token is not where the settings say.
    pub fn new(address: String, checks: &[Smoke]) -> Result<Self> {
        let with_token = |check: &Smoke| {
            let token = check.secret.as_ref().map(Secret::read).transpose();
            let wrong = || format!("the secret of the smoke check {:?}", check.name);
            Ok((check.clone(), token.with_context(wrong)?))
        };
        Ok(Self {
            client: http::client()?,
            address,
            checks: checks.iter().map(with_token).collect::<Result<_>>()?,
        })
    }

    async fn failure(&self, check: &Smoke, token: Option<&str>) -> Option<String> {
        let mut request = request(
            &self.client,
            check.method,
            &self.address,
            &check.path,
            check.body.as_deref(),
        );
        if let Some(token) = token {
            request = request.bearer_auth(token);
        }
        let failed = |what: String| Some(format!("smoke check {:?}: {what}", check.name));
        match request.timeout(TIMEOUT).send().await {
            Err(error) => failed(error.to_string()),
            Ok(answer) => {
                let status = answer.status();
                let wanted = match check.status {
                    Some(wanted) => status.as_u16() == wanted,
                    None => status.is_success(),
                };
                if wanted {
                    return None;
                }
                let text: String = answer
                    .text()
                    .await
                    .unwrap_or_default()
                    .chars()
                    .take(200)
                    .collect();
                failed(format!("{} answered {status}: {text}", check.path))
            }
        }
    }
}

#[async_trait]
impl Checks for SmokeChecks {
    async fn failures(&self) -> Vec<String> {
        let mut failures = Vec::new();
        for (check, token) in &self.checks {
            failures.extend(self.failure(check, token.as_deref()).await);
        }
        failures
    }
}

/// A request to an environment, as the pipeline's settings describe it.
pub fn request(
    client: &reqwest::Client,
    method: Method,
    address: &str,
    path: &str,
    body: Option<&str>,
) -> reqwest::RequestBuilder {
    let method = match method {
        Method::Get => reqwest::Method::GET,
        Method::Post => reqwest::Method::POST,
        Method::Put => reqwest::Method::PUT,
        Method::Delete => reqwest::Method::DELETE,
    };
    let request = client.request(method, format!("{address}{path}"));
    match body {
        Some(body) => request
            .header(header::CONTENT_TYPE, "application/json")
            .body(body.to_owned()),
        None => request,
    }
}
