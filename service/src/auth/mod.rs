//! Who calls, by a bearer token (RFC 6750) that is a signed JWT (RFC 7519, RFC 8725), and what they
//! may do: roles × operations, one table in the configuration.

pub mod development;
mod keys;
pub mod login;
pub(crate) mod provider;

use std::collections::BTreeSet;
use std::time::Duration;

use axum::http::{HeaderMap, HeaderValue, header};
use axum::response::{IntoResponse, Response};
use jsonwebtoken::{Algorithm, Validation};
use moka::sync::Cache;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::api::fault::Fault;
use crate::api::problem::Problem;
use crate::app::Error;
use crate::config::{self, AuthMode};
use crate::limits::Client;
use crate::metrics::METRICS;
use keys::{Keys, Place};
use provider::Provider;

/// Signatures that are accepted. `none`, and secrets that both sides know, are not among them.
const ALGORITHMS: [Algorithm; 3] = [Algorithm::EdDSA, Algorithm::ES256, Algorithm::RS256];
/// Longer tokens are not looked at.
const MAX_TOKEN: usize = 8192;
/// How many verified tokens are remembered, and for how long: a key that was withdrawn ends that much
/// later.
const REMEMBERED: u64 = 10_000;
const REMEMBERED_FOR: Duration = Duration::from_secs(60);

/// Everything a caller can ask for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Operation {
    PlaceOrder,
    GetOrder,
    ListOrders,
    CancelOrder,
    GetTotals,
    WatchOrders,
}

/// Who sent a request, and what they may do.
#[derive(Debug, Clone, Default)]
pub struct Caller {
    /// `None` where nobody has said who they are.
    pub subject: Option<String>,
    /// With whom their requests and connections count.
    pub client: Client,
    may: Allowed,
    /// Seconds since the Unix epoch: then the token ends.
    until: Option<u64>,
}

#[derive(Debug, Clone, Default)]
enum Allowed {
    Everything,
    #[default]
    Nothing,
    Only(BTreeSet<Operation>),
}

impl Caller {
    /// Whoever calls where nobody has to say who they are.
    pub fn anybody() -> Self {
        Self {
            may: Allowed::Everything,
            ..Self::default()
        }
    }

    /// How long it is until the token ends; `None` where there is none.
    pub fn remaining(&self) -> Option<Duration> {
        let now = jsonwebtoken::get_current_timestamp();
        self.until
            .map(|until| Duration::from_secs(until.saturating_sub(now)))
    }

    fn has_ended(&self) -> bool {
        self.remaining().is_some_and(|left| left.is_zero())
    }

    /// Returns when the token ends; never where there is none.
    pub fn token_ends(&self) -> impl Future<Output = ()> + Send + use<> {
        let remaining = self.remaining();
        async move {
            match remaining {
                Some(remaining) => tokio::time::sleep(remaining).await,
                None => std::future::pending().await,
            }
        }
    }

    /// Refuses what this caller may not do, or not any more.
    pub fn check(&self, operation: Operation) -> Result<(), Error> {
        if self.has_ended() {
            return Err(Error::Unauthenticated);
        }
        let may = match &self.may {
            Allowed::Everything => true,
            Allowed::Nothing => false,
            Allowed::Only(operations) => operations.contains(&operation),
        };
        match may {
            true => Ok(()),
            false if self.subject.is_none() => Err(Error::Unauthenticated),
            false => Err(Error::Forbidden),
        }
    }
}

/// Why a token is not believed. It is told to the client: nothing in it helps to forge one.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Distrust(String);

impl Distrust {
    fn new(why: impl Into<String>) -> Self {
        Self(why.into())
    }
}

/// What a request shows of its caller before any signature is looked at.
pub enum Shown {
    Caller(Caller),
    /// Somebody with a token that is not known yet.
    Stranger(Token),
}

/// A token that has yet to be verified.
pub struct Token {
    text: String,
    digest: [u8; 32],
}

/// What a token says.
#[derive(Debug, Deserialize)]
struct Claims {
    sub: String,
    /// Seconds, perhaps with a fraction (RFC 7519, section 2).
    exp: f64,
    #[serde(flatten)]
    others: serde_json::Map<String, serde_json::Value>,
}

pub struct Auth {
    config: config::Auth,
    /// `None` where anybody may do anything.
    keys: Option<Keys>,
    verified: Cache<[u8; 32], Caller>,
}

impl Auth {
    /// `environment` is the one the process runs in; in production nobody signs their own tokens.
    pub fn open(config: &config::Auth, environment: Option<&str>) -> anyhow::Result<Self> {
        let keys = match config.mode {
            AuthMode::Off => {
                tracing::warn!("auth.mode is \"off\": anybody who reaches this may do anything");
                None
            }
            AuthMode::Development => {
                development::check(environment)?;
                let key = development::key(&config.development_key)?;
                Some(Keys::fixed(development::set(&key)?)?)
            }
            AuthMode::Jwks => {
                let place = match &config.jwks_url {
                    Some(url) => Place::Url(url.clone()),
                    None => Place::Provider(config.issuer.clone()),
                };
                Some(Keys::fetched(place, config.refresh.0)?)
            }
        };
        Ok(Self {
            config: config.clone(),
            keys,
            verified: Cache::builder()
                .max_capacity(REMEMBERED)
                .time_to_live(REMEMBERED_FOR)
                .build(),
        })
    }

    /// Why nobody can be recognised at the moment, where that is so.
    pub async fn trouble(&self) -> Option<String> {
        match &self.keys {
            Some(keys) => keys.trouble().await,
            None => None,
        }
    }

    /// What the provider of tokens says of itself, where one was asked and has answered.
    pub async fn provider(&self) -> Option<Provider> {
        self.keys.as_ref()?.provider().await
    }

    /// Who sent these fields, as far as that is known. Without a token that is nobody in particular.
    pub fn shown(&self, headers: &HeaderMap) -> Result<Shown, Distrust> {
        let mut fields = headers.get_all(header::AUTHORIZATION).iter();
        match (fields.next(), fields.next()) {
            _ if self.keys.is_none() => Ok(Shown::Caller(Caller::anybody())),
            (None, _) => Ok(Shown::Caller(Caller::default())),
            (Some(field), None) => self.shown_by(field.to_str().unwrap_or_default()),
            (Some(_), Some(_)) => Err(Distrust::new("there is more than one Authorization field")),
        }
    }

    /// Who a field `Bearer TOKEN` speaks for.
    pub async fn bearer(&self, field: &str) -> Result<Caller, Distrust> {
        match self.shown_by(field)? {
            Shown::Caller(caller) => Ok(caller),
            Shown::Stranger(token) => self.verify(token).await,
        }
    }

    fn shown_by(&self, field: &str) -> Result<Shown, Distrust> {
        let token = match field.split_once(' ') {
            Some((scheme, token)) if scheme.eq_ignore_ascii_case("bearer") => token.trim(),
            _ => return Err(Distrust::new("the Authorization field is no bearer token")),
        };
        if token.len() > MAX_TOKEN {
            return Err(Distrust::new("the token is too long"));
        }
        if self.keys.is_none() {
            return Ok(Shown::Caller(Caller::anybody()));
        }
        let digest = Sha256::digest(token).into();
        Ok(match self.verified.get(&digest) {
            Some(caller) if !caller.has_ended() => Shown::Caller(caller),
            _ => Shown::Stranger(Token {
                text: token.to_owned(),
                digest,
            }),
        })
    }

    /// Who a token speaks for. Its key may have to be fetched from the provider first.
    pub async fn verify(&self, token: Token) -> Result<Caller, Distrust> {
        let Some(keys) = &self.keys else {
            return Ok(Caller::anybody());
        };
        let caller = self.verify_by(keys, &token.text).await?;
        self.verified.insert(token.digest, caller.clone());
        Ok(caller)
    }

    async fn verify_by(&self, keys: &Keys, token: &str) -> Result<Caller, Distrust> {
        let header = jsonwebtoken::decode_header(token)
            .map_err(|_| Distrust::new("the token is no signed JWT"))?;
        if !ALGORITHMS.contains(&header.alg) {
            return Err(Distrust::new(
                "the token is signed in a way that is not accepted",
            ));
        }
        if header.crit.is_some() {
            return Err(Distrust::new(
                "the token has critical fields that are not known",
            ));
        }
        let kid = header
            .kid
            .ok_or_else(|| Distrust::new("the token names no key"))?;
        let key = keys.find(&kid, header.alg).await?;
        let mut validation = Validation::new(header.alg);
        validation.leeway = self.config.leeway.0.as_secs();
        validation.validate_nbf = true;
        validation.set_issuer(&[&self.config.issuer]);
        validation.set_audience(&[&self.config.audience]);
        validation.set_required_spec_claims(&["exp", "iss", "aud", "sub"]);
        let claims = jsonwebtoken::decode::<Claims>(token, &key, &validation)
            .map_err(|error| Distrust::new(format!("the token is not valid: {error}")))?
            .claims;
        Ok(self.recognise(claims))
    }

    /// What the roles of a token's subject allow.
    fn recognise(&self, claims: Claims) -> Caller {
        let roles = claims.others.get(&self.config.roles_claim);
        // A list, or words as OAuth's `scope` has them (RFC 6749, section 3.3).
        let roles: Vec<&str> = match roles {
            Some(serde_json::Value::Array(roles)) => {
                roles.iter().filter_map(|r| r.as_str()).collect()
            }
            Some(serde_json::Value::String(roles)) => roles.split(' ').collect(),
            _ => Vec::new(),
        };
        let allowed = roles.iter().filter_map(|role| self.config.roles.get(*role));
        Caller {
            client: Client::Subject(claims.sub.clone()),
            may: Allowed::Only(allowed.flatten().copied().collect()),
            // What is not a number of seconds was refused by now.
            until: Some((claims.exp as u64).saturating_add(self.config.leeway.0.as_secs())),
            subject: Some(claims.sub),
        }
    }
}

impl IntoResponse for Distrust {
    fn into_response(self) -> Response {
        METRICS.tokens_refused.inc();
        let problem = Problem::new(Fault::Unauthenticated).detail(self.to_string());
        let mut response = problem.into_response();
        response
            .headers_mut()
            .insert(header::WWW_AUTHENTICATE, INVALID_TOKEN);
        response
    }
}

/// What a client is to do that has to say who it is (RFC 9110, section 11.6.1).
pub const CHALLENGE: HeaderValue = HeaderValue::from_static("Bearer");
/// What one is told whose token is not believed (RFC 6750, section 3.1).
const INVALID_TOKEN: HeaderValue = HeaderValue::from_static("Bearer error=\"invalid_token\"");
