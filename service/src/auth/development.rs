//! A small issuer of tokens, for development only: a key in a file, with which `service token` signs
//! and `service serve` verifies.

use std::fs::OpenOptions;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use anyhow::{Context, ensure};
use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::signature::Ed25519KeyPair;
use jsonwebtoken::jwk::{Jwk, JwkSet, ThumbprintHash};
use jsonwebtoken::{Algorithm, EncodingKey, Header};
use serde_json::json;

use crate::config::Auth;

/// The environment in which this refuses to work.
const PRODUCTION: &str = "production";

pub fn check(environment: Option<&str>) -> anyhow::Result<()> {
    ensure!(
        environment != Some(PRODUCTION),
        "auth.mode = \"development\" is not for production: whoever reads the file of the key may \
         call themselves anything; name an OpenID provider's keys by auth.mode = \"jwks\""
    );
    Ok(())
}

/// The key in the file; a new one where there is none.
pub fn key(path: &Path) -> anyhow::Result<EncodingKey> {
    let shown = path.display();
    if !path.exists() {
        let new = Ed25519KeyPair::generate_pkcs8v1(&SystemRandom::new())
            .map_err(|_| anyhow::anyhow!("no key could be made"))?;
        if let Some(dir) = path.parent() {
            std::fs::create_dir_all(dir).with_context(|| format!("creating {}", dir.display()))?;
        }
        // Whole or not at all: another process may be about to read it.
        let written = path.with_extension(std::process::id().to_string());
        let mut options = OpenOptions::new();
        let file = options.write(true).create(true).truncate(true).mode(0o600);
        let linked = file
            .open(&written)
            .and_then(|mut file| file.write_all(new.as_ref()))
            .and_then(|()| std::fs::hard_link(&written, path));
        let _ = std::fs::remove_file(&written);
        match linked {
            // Another process was quicker.
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
            linked => linked.with_context(|| format!("writing {shown}"))?,
        }
    }
    let der = std::fs::read(path).with_context(|| format!("reading {shown}"))?;
    Ed25519KeyPair::from_pkcs8(&der)
        .map_err(|error| anyhow::anyhow!("{shown} is no key of Ed25519 in PKCS #8: {error}"))?;
    Ok(EncodingKey::from_ed_der(&der))
}

/// The public half.
pub fn set(key: &EncodingKey) -> anyhow::Result<JwkSet> {
    let mut jwk = Jwk::from_encoding_key(key, Algorithm::EdDSA).context("the public key")?;
    jwk.common.key_id = Some(
        jwk.thumbprint(ThumbprintHash::SHA256)
            .context("the key's name")?,
    );
    Ok(JwkSet { keys: vec![jwk] })
}

/// A token for `subject` in `roles`, for `seconds` from now.
pub fn token(
    config: &Auth,
    subject: &str,
    roles: &[String],
    seconds: u64,
) -> anyhow::Result<String> {
    let key = key(&config.development_key)?;
    let mut header = Header::new(Algorithm::EdDSA);
    header.kid = set(&key)?.keys.remove(0).common.key_id;
    let now = jsonwebtoken::get_current_timestamp();
    let mut claims = json!({
        "iss": config.issuer, "aud": config.audience, "sub": subject,
        "iat": now, "nbf": now, "exp": now + seconds,
    });
    claims[config.roles_claim.as_str()] = json!(roles);
    jsonwebtoken::encode(&header, &claims, &key).context("signing the token")
}
