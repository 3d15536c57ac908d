//! `image --push`: an image to a registry, byte for byte as it is in the layout, so that its digest
//! stays what it is. <https://github.com/opencontainers/distribution-spec/blob/v1.1.1/spec.md>

use std::time::Duration;

use anyhow::{Context, Result, bail};
use docker_credential::{CredentialRetrievalError, DockerCredential};
use http::HeaderValue;
use http::header::WWW_AUTHENTICATE;
use oci_client::client::{Client, ClientConfig, ClientProtocol};
use oci_client::errors::OciDistributionError;
use oci_client::secrets::RegistryAuth;
use oci_client::{Reference, RegistryOperation};
use reqwest::Url;
use serde_json::Value;

use super::layout::{Layout, MANIFEST};
use crate::config::Pipeline;
use crate::output::Output;

const CONNECT: Duration = Duration::from_secs(10);
const READ: Duration = Duration::from_secs(60);

/// Where an image goes, and by what right.
pub struct Target {
    reference: Reference,
    /// Whether a tag was named; a reference without one has `latest`.
    is_tagged: bool,
    protocol: ClientProtocol,
    /// Whether it was said that no encryption will do.
    plain_http: bool,
    auth: RegistryAuth,
}

impl Target {
    /// `text` is `HOST/REPOSITORY[:TAG]`. Without encryption only to this machine, unless asked for.
    pub fn parse(text: &str, plain_http: bool) -> Result<Self> {
        let reference: Reference = text.parse().with_context(|| {
            format!(
                "--push {text}: expected HOST/REPOSITORY[:TAG], such as ghcr.io/team/service:1.2.0"
            )
        })?;
        if reference.digest().is_some() {
            bail!("--push {text}: the digest is the image's own; name a tag, or none");
        }
        let host = reference.registry().to_owned();
        let plain = plain_http || is_loopback(&host);
        let protocol = match plain {
            true => ClientProtocol::HttpsExcept(vec![host.clone()]),
            false => ClientProtocol::Https,
        };
        let last = text.rsplit('/').next().unwrap_or_default();
        Ok(Self {
            is_tagged: last.contains(':'),
            reference,
            protocol,
            plain_http,
            auth: credentials(&host)?,
        })
    }

    /// Pushes what the registry lacks, the manifest last; returns the name by digest.
    pub fn push(&self, pipeline: &Pipeline, digest: &str, output: &Output) -> Result<String> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build();
        let layout = Layout::open(pipeline.state_dir().join("images"))?;
        let name = runtime
            .context("starting a runtime")?
            .block_on(self.send(&layout, digest, output))
            .with_context(|| format!("pushing to {}", self.reference))?;
        output.good(format_args!("pushed {name}"));
        Ok(name)
    }

    async fn send(&self, layout: &Layout, digest: &str, output: &Output) -> Result<String> {
        let client = Client::new(ClientConfig {
            protocol: self.protocol.clone(),
            connect_timeout: Some(CONNECT),
            read_timeout: Some(READ),
            ..ClientConfig::default()
        });
        let reference = &self.reference;
        if !matches!(self.auth, RegistryAuth::Anonymous) {
            self.check_realms().await?;
        }
        client
            .auth(reference, &self.auth, RegistryOperation::Push)
            .await
            .map_err(explain)?;
        let manifest = layout.read(digest)?;
        let parsed: Value = serde_json::from_slice(&manifest).context("reading the manifest")?;
        for blob in Layout::blobs(&parsed) {
            // A registry that does not tell is sent the blob.
            if client.blob_exists(reference, &blob).await.unwrap_or(false) {
                output.detail(format_args!("{blob} is there"));
                continue;
            }
            let content = layout.read(&blob)?;
            output.progress(format_args!("pushing {blob} ({} bytes)", content.len()));
            let pushed = client.push_blob(reference, content, &blob).await;
            pushed.map_err(explain)?;
        }
        let by_digest = reference.clone_with_digest(digest.to_owned());
        let kind = HeaderValue::from_static(MANIFEST);
        client
            .push_manifest_raw(&by_digest, manifest.clone(), kind.clone())
            .await
            .map_err(explain)?;
        if self.is_tagged {
            let tagged = client.push_manifest_raw(reference, manifest, kind).await;
            tagged.map_err(explain)?;
        }
        Ok(format!(
            "{}/{}@{digest}",
            reference.registry(),
            reference.repository()
        ))
    }

    /// Whoever gives out the registry's tokens is told the password, too: without encryption only on this
    /// machine, unless asked for.
    async fn check_realms(&self) -> Result<()> {
        let host = self.reference.resolve_registry();
        let scheme = match &self.protocol {
            ClientProtocol::Https => "https",
            _ => "http",
        };
        // By the same proxies as everything else that is pushed.
        let client = reqwest::Client::builder().connect_timeout(CONNECT).build();
        let asked = client?.get(format!("{scheme}://{host}/v2/")).timeout(READ);
        let answer = asked
            .send()
            .await
            .with_context(|| format!("asking {host} who may push"))?;
        let challenges = answer.headers().get_all(WWW_AUTHENTICATE).iter();
        let challenges = challenges.filter_map(|challenge| challenge.to_str().ok());
        for realm in challenges.flat_map(realms) {
            let realm = Url::parse(&realm)
                .with_context(|| format!("{host} sends whoever pushes to {realm:?} for a token"))?;
            let server = realm.host_str().unwrap_or_default();
            if realm.scheme() != "https" && !self.plain_http && !is_loopback(server) {
                bail!(
                    "{host} sends whoever pushes to {server} for a token, with the password and without \
                     encryption; --plain-http allows that"
                );
            }
        }
        Ok(())
    }
}

/// Where challenges send whoever asks for a token. <https://www.rfc-editor.org/rfc/rfc6750#section-3>
fn realms(challenges: &str) -> Vec<String> {
    // What cannot be read leads nowhere.
    let challenges = http_auth::parse_challenges(challenges).unwrap_or_default();
    let bearers = challenges
        .iter()
        .filter(|challenge| challenge.scheme.eq_ignore_ascii_case("bearer"));
    let parameters = bearers.flat_map(|bearer| &bearer.params);
    parameters
        .filter(|(name, _)| name.eq_ignore_ascii_case("realm"))
        .map(|(_, value)| value.to_unescaped())
        .collect()
}

/// A refusal with what to do about it. Some registries ask who it is only when something is pushed.
fn explain(error: OciDistributionError) -> anyhow::Error {
    use OciDistributionError::{AuthenticationFailure, ServerError, UnauthorizedError};
    let is_refusal = matches!(
        error,
        AuthenticationFailure(_)
            | UnauthorizedError { .. }
            | ServerError {
                code: 401 | 403,
                ..
            }
    );
    let error = anyhow::Error::from(error);
    match is_refusal {
        true => {
            error.context("it is not allowed; `docker login` leaves the credentials that are used")
        }
        false => error,
    }
}

/// Whether the host is this machine. <https://www.rfc-editor.org/rfc/rfc6761#section-6.3>
fn is_loopback(host: &str) -> bool {
    let name = match host.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or(rest),
        None => host.rsplit_once(':').map_or(host, |(name, _)| name),
    };
    let address = name.parse::<std::net::IpAddr>();
    name == "localhost" || address.is_ok_and(|address| address.is_loopback())
}

/// What `docker login` has left for this registry; nothing where it has left nothing.
fn credentials(host: &str) -> Result<RegistryAuth> {
    match docker_credential::get_credential(host) {
        Ok(DockerCredential::UsernamePassword(name, password)) => {
            Ok(RegistryAuth::Basic(name, password))
        }
        Ok(DockerCredential::IdentityToken(_)) => bail!(
            "the credentials for {host} are an identity token, which cannot push; log in with a name \
             and a password or an access token"
        ),
        Err(
            CredentialRetrievalError::NoCredentialConfigured
            | CredentialRetrievalError::ConfigNotFound
            | CredentialRetrievalError::ConfigReadError,
        ) => Ok(RegistryAuth::Anonymous),
        Err(error) => bail!("reading Docker's credentials for {host}: {error}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tag_is_one_that_was_named() {
        for (text, is_tagged) in [
            ("registry.example/service", false),
            ("registry.example:5000/service", false),
            ("registry.example:5000/service:latest", true),
            ("registry.example/team/service:1.2.0", true),
        ] {
            let target = Target::parse(text, false).unwrap();
            assert_eq!(target.is_tagged, is_tagged, "{text}");
            assert!(matches!(target.protocol, ClientProtocol::Https), "{text}");
        }
        assert!(Target::parse("registry.example/service@sha256:1", false).is_err());
    }

    #[test]
    fn realms_are_bearers() {
        for (challenges, wanted) in [
            (
                "Bearer realm=\"https://auth.example/token\",service=\"registry.example\"",
                &["https://auth.example/token"][..],
            ),
            (
                "bearer service=\"s\", Realm=\"http://auth.example\"",
                &["http://auth.example"],
            ),
            (
                "Basic realm=\"one\", Bearer realm=\"http://auth.example\"",
                &["http://auth.example"],
            ),
            ("Basic realm=\"http://auth.example\"", &[]),
        ] {
            assert_eq!(realms(challenges), wanted, "{challenges}");
        }
    }

    #[test]
    fn only_this_machine_is_pushed_to_without_encryption() {
        for host in [
            "localhost",
            "localhost:5000",
            "127.0.0.1:5000",
            "[::1]:5000",
            "127.9.9.9",
        ] {
            assert!(is_loopback(host), "{host}");
        }
        for host in [
            "ghcr.io",
            "10.0.0.1:5000",
            "localhost.example.com",
            "[::2]:5000",
        ] {
            assert!(!is_loopback(host), "{host}");
        }
    }
}
