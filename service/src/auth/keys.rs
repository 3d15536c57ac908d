//! The keys of whoever signs tokens: a JSON Web Key Set (RFC 7517), fetched anew now and then, and when
//! a token names a key that is not known.

use std::collections::HashMap;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, Instant};

use anyhow::ensure;
use jsonwebtoken::jwk::{Jwk, JwkSet, KeyAlgorithm, PublicKeyUse};
use jsonwebtoken::{Algorithm, DecodingKey};
use tokio::sync::Mutex;

use super::Distrust;
use super::provider::{self, Provider};
use crate::metrics::METRICS;

const TIMEOUT: Duration = Duration::from_secs(2);
/// Whoever invents names of keys must not make us fetch more often.
const AT_MOST_EVERY: Duration = Duration::from_secs(5);

type Known = HashMap<String, Vec<(Jwk, DecodingKey)>>;

#[derive(Clone)]
pub struct Keys(Arc<Inner>);

struct Inner {
    known: RwLock<Arc<Known>>,
    source: Option<Source>,
}

/// Where keys are.
pub enum Place {
    Url(String),
    /// Where this issuer says.
    Provider(String),
}

struct Source {
    place: Place,
    refresh: Duration,
    http: reqwest::Client,
    /// When it was asked last, whatever came of it, and what went wrong.
    last: Mutex<Last>,
    /// What the provider last said of itself.
    provider: RwLock<Option<Provider>>,
}

#[derive(Default)]
struct Last {
    asked: Option<Instant>,
    answered: Option<Instant>,
    error: Option<String>,
}

impl Keys {
    pub fn fixed(set: JwkSet) -> anyhow::Result<Self> {
        let known = usable(set);
        ensure!(!known.is_empty(), "there is no key that can be used");
        Ok(Self(Arc::new(Inner {
            known: RwLock::new(Arc::new(known)),
            source: None,
        })))
    }

    pub fn fetched(place: Place, refresh: Duration) -> anyhow::Result<Self> {
        let http = provider::client(TIMEOUT)?;
        Ok(Self(Arc::new(Inner {
            known: RwLock::default(),
            source: Some(Source {
                place,
                refresh,
                http,
                last: Mutex::default(),
                provider: RwLock::default(),
            }),
        })))
    }

    /// The key of that name, for that algorithm.
    pub async fn find(&self, kid: &str, algorithm: Algorithm) -> Result<DecodingKey, Distrust> {
        let found = self.look(kid, algorithm);
        match found {
            // Whoever can do without does not wait.
            Some(key) => {
                self.ask(false);
                Ok(key)
            }
            None => {
                let _ = self.ask(true).await;
                self.look(kid, algorithm)
                    .ok_or_else(|| Distrust::new("the token's key is not known"))
            }
        }
    }

    /// Why no key is known, where that is so.
    pub async fn trouble(&self) -> Option<String> {
        let source = self.0.source.as_ref()?;
        if !self.known().is_empty() {
            return None;
        }
        let _ = self.ask(true).await;
        let last = source.last.lock().await;
        let none = || Some("the provider of tokens has no keys".to_owned());
        match self.known().is_empty() {
            true => last.error.clone().or_else(none),
            false => None,
        }
    }

    /// What the provider says of itself; `None` while it has said nothing, and where it is not asked.
    pub async fn provider(&self) -> Option<Provider> {
        let source = self.0.source.as_ref()?;
        if let Place::Url(_) = source.place {
            return None;
        }
        let known = || {
            let provider = source.provider.read();
            provider.unwrap_or_else(PoisonError::into_inner).clone()
        };
        if known().is_none() {
            let _ = self.ask(true).await;
        }
        known()
    }

    fn known(&self) -> Arc<Known> {
        Arc::clone(&self.0.known.read().unwrap_or_else(PoisonError::into_inner))
    }

    fn look(&self, kid: &str, algorithm: Algorithm) -> Option<DecodingKey> {
        let known = self.known();
        let keys = known.get(kid)?.iter();
        let mut keys = keys.filter(|(jwk, key)| {
            let declared = jwk.common.key_algorithm;
            key.family() == algorithm.family()
                && declared.is_none_or(|declared| declared == as_key_algorithm(algorithm))
        });
        keys.next().map(|(_, key)| key.clone())
    }

    /// Fetches the keys where they are old, or where one is missing, in a task that goes on when nobody
    /// waits for it any more.
    fn ask(&self, missing: bool) -> tokio::task::JoinHandle<()> {
        let keys = self.clone();
        tokio::spawn(async move { keys.refresh(missing).await })
    }

    /// One request at a time, and not too often. While that fails, the keys that are known stay known.
    async fn refresh(&self, missing: bool) {
        let Some(source) = &self.0.source else { return };
        let mut last = source.last.lock().await;
        let since = |then: Option<Instant>| then.map(|then| then.elapsed());
        let is_due = missing || since(last.answered).is_none_or(|age| age > source.refresh);
        if !is_due || since(last.asked).is_some_and(|age| age < AT_MOST_EVERY) {
            return;
        }
        last.asked = Some(Instant::now());
        match fetch(source).await {
            Ok(known) => {
                *self.0.known.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(known);
                last.answered = last.asked;
                last.error = None;
            }
            Err(error) => {
                let error = format!("{error:#}");
                tracing::warn!(error, "the keys of tokens were not to be had");
                METRICS.jwks_failures.inc();
                last.error = Some(error);
            }
        }
    }
}

async fn fetch(source: &Source) -> anyhow::Result<Known> {
    let http = &source.http;
    let url = match &source.place {
        Place::Url(url) => url.clone(),
        Place::Provider(issuer) => {
            let provider = Provider::discover(http, issuer).await?;
            let url = provider.jwks_uri.clone();
            let mut known = source
                .provider
                .write()
                .unwrap_or_else(PoisonError::into_inner);
            *known = Some(provider);
            url
        }
    };
    let set = provider::ask(http, &url).await?;
    // A provider that has withdrawn its only key has none.
    Ok(usable(set))
}

/// The keys that sign, by name. Those that nothing here can use are somebody else's.
fn usable(set: JwkSet) -> Known {
    let mut known = Known::new();
    for jwk in set.keys {
        let signs = !matches!(jwk.common.public_key_use, Some(PublicKeyUse::Encryption));
        let is_public = !matches!(
            jwk.algorithm,
            jsonwebtoken::jwk::AlgorithmParameters::OctetKey(_)
        );
        if let Some(kid) = jwk.common.key_id.clone()
            && signs
            && is_public
            && jwk.is_supported()
            && let Ok(key) = DecodingKey::from_jwk(&jwk)
        {
            known.entry(kid).or_default().push((jwk, key));
        }
    }
    known
}

fn as_key_algorithm(algorithm: Algorithm) -> KeyAlgorithm {
    match algorithm {
        Algorithm::EdDSA => KeyAlgorithm::EdDSA,
        Algorithm::ES256 => KeyAlgorithm::ES256,
        Algorithm::RS256 => KeyAlgorithm::RS256,
        // Not among those that are accepted, so nothing is equal to it.
        _ => KeyAlgorithm::UNKNOWN_ALGORITHM,
    }
}
