//! Tokens from an OpenID provider, for whoever calls the service: OAuth's authorization code with PKCE
//! for people (RFC 6749, RFC 7636, RFC 8252), client credentials for programs.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use axum::Router;
use axum::extract::{Query, State};
use axum::http::StatusCode;
use axum::routing::get;
use oauth2::basic::{BasicClient, BasicTokenType};
use oauth2::{
    AuthUrl, AuthorizationCode, ClientId, ClientSecret, CsrfToken, EmptyExtraTokenFields,
    EndpointNotSet, EndpointSet, HttpRequest, HttpResponse, PkceCodeChallenge, RedirectUrl, Scope,
    StandardTokenResponse, TokenResponse, TokenUrl,
};
use reqwest::Url;
use serde::Deserialize;
use tokio::net::TcpListener;
use tokio::sync::oneshot;

use super::provider::{self, Provider};
use crate::config::Auth;

/// How long the provider may take.
const TIMEOUT: Duration = Duration::from_secs(30);
/// How long a person may take.
const PATIENCE: Duration = Duration::from_secs(300);

type Client =
    BasicClient<EndpointNotSet, EndpointNotSet, EndpointNotSet, EndpointNotSet, EndpointSet>;
type Answer = StandardTokenResponse<EmptyExtraTokenFields, BasicTokenType>;

/// What a provider sends a browser back with (RFC 6749, section 4.1.2; RFC 9207).
#[derive(Debug, Deserialize)]
struct Callback {
    state: Option<String>,
    code: Option<String>,
    iss: Option<String>,
    error: Option<String>,
    error_description: Option<String>,
}

/// A token for the person who opens the address that `tell` is called with.
pub async fn person(config: &Auth, tell: impl FnOnce(&str)) -> anyhow::Result<String> {
    let (http, provider, client) = prepare(config).await?;
    let endpoint = provider.authorization_endpoint.as_deref();
    let endpoint = endpoint.context("the provider logs in no people")?;
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let here = format!("http://{}/callback", listener.local_addr()?);
    let client = client
        .set_auth_uri(AuthUrl::new(endpoint.to_owned())?)
        .set_redirect_uri(RedirectUrl::new(here)?);
    let (challenge, verifier) = PkceCodeChallenge::new_random_sha256();
    let mut request = client
        .authorize_url(CsrfToken::new_random)
        .set_pkce_challenge(challenge)
        .add_scopes(scopes(config));
    if let Some(resource) = resource(config) {
        request = request.add_extra_param("resource", resource);
    }
    let (url, state) = request.url();
    tell(url.as_str());
    let back = tokio::time::timeout(PATIENCE, callback(listener, state)).await;
    let back = back.context("nobody came back from the provider")??;
    if let Some(error) = back.error {
        let why = back.error_description.unwrap_or_default();
        // It may hold anything, and is shown on a terminal.
        let (error, why) = (error.escape_debug(), why.escape_debug());
        bail!("the provider says {error}: {why}");
    }
    ensure!(
        back.iss.is_none_or(|issuer| issuer == config.issuer),
        "another provider has answered"
    );
    let code = back.code.context("the provider has sent no code")?;
    let mut exchange = client
        .exchange_code(AuthorizationCode::new(code))
        .set_pkce_verifier(verifier);
    if let Some(resource) = resource(config) {
        exchange = exchange.add_extra_param("resource", resource);
    }
    let answer = exchange
        .request_async(&|request| send(&http, request))
        .await;
    token(answer)
}

/// A token for the program that `auth.client_id` and `auth.client_secret` stand for.
pub async fn program(config: &Auth) -> anyhow::Result<String> {
    ensure!(
        config.client_secret.is_some(),
        "a program needs auth.client_secret (SERVICE__AUTH__CLIENT_SECRET)"
    );
    let (http, _, client) = prepare(config).await?;
    let mut exchange = client
        .exchange_client_credentials()
        .add_scopes(scopes(config));
    if let Some(resource) = resource(config) {
        exchange = exchange.add_extra_param("resource", resource);
    }
    let answer = exchange
        .request_async(&|request| send(&http, request))
        .await;
    token(answer)
}

async fn prepare(config: &Auth) -> anyhow::Result<(reqwest::Client, Provider, Client)> {
    let id = config.client_id.clone();
    let id = id.context("auth.client_id is not set: what the provider knows this program by")?;
    let http = provider::client(TIMEOUT)?;
    let provider = Provider::discover(&http, &config.issuer).await?;
    let endpoint = provider.token_endpoint.clone();
    let endpoint = endpoint.context("the provider gives out no tokens")?;
    let url = Url::parse(&endpoint).with_context(|| endpoint.clone())?;
    let is_here = ["localhost", "127.0.0.1", "[::1]"].contains(&url.host_str().unwrap_or_default());
    ensure!(
        url.scheme() == "https" || is_here,
        "secrets would go to {endpoint} for all to read; it must begin with https:"
    );
    let mut client = BasicClient::new(ClientId::new(id)).set_token_uri(TokenUrl::new(endpoint)?);
    if let Some(secret) = &config.client_secret {
        client = client.set_client_secret(ClientSecret::new(secret.expose().to_owned()));
    }
    Ok((http, provider, client))
}

fn scopes(config: &Auth) -> Vec<Scope> {
    let words = config.scope.split_whitespace();
    words.map(|word| Scope::new(word.to_owned())).collect()
}

/// For whom a token is asked, where that can be said (RFC 8707): it is an absolute URI.
pub fn resource(config: &Auth) -> Option<String> {
    let audience = &config.audience;
    audience.contains("://").then(|| audience.clone())
}

fn token<E>(answer: Result<Answer, E>) -> anyhow::Result<String>
where
    E: std::error::Error + Send + Sync + 'static,
{
    let answer = answer.context("the provider gave no token")?;
    Ok(answer.access_token().secret().clone())
}

/// Waits until the browser that `state` was given to comes back. Whoever else comes has not.
async fn callback(listener: TcpListener, state: CsrfToken) -> anyhow::Result<Callback> {
    type Waiting = Arc<(CsrfToken, Mutex<Option<oneshot::Sender<Callback>>>)>;
    async fn come_back(
        State(waiting): State<Waiting>,
        Query(callback): Query<Callback>,
    ) -> (StatusCode, &'static str) {
        let (state, sender) = &*waiting;
        if callback.state.as_ref() != Some(state.secret()) {
            let stranger = "Nobody was waiting for this page.\n";
            return (StatusCode::BAD_REQUEST, stranger);
        }
        if let Some(sender) = sender.lock().ok().and_then(|mut sender| sender.take()) {
            let _ = sender.send(callback);
        }
        let close = "You can close this page and go back to where you came from.\n";
        (StatusCode::OK, close)
    }
    let (sender, came) = oneshot::channel();
    let routes = Router::new()
        .route("/callback", get(come_back))
        .with_state(Arc::new((state, Mutex::new(Some(sender)))));
    // The browser's answer is sent before this ends.
    let (end, ended) = oneshot::channel::<()>();
    let server = axum::serve(listener, routes).with_graceful_shutdown(async {
        let _ = ended.await;
    });
    let server = tokio::spawn(server.into_future());
    let callback = came.await;
    let _ = end.send(());
    let _ = tokio::time::timeout(Duration::from_secs(1), server).await;
    Ok(callback?)
}

/// oauth2 does not know this version of reqwest.
async fn send(
    http: &reqwest::Client,
    request: HttpRequest,
) -> Result<HttpResponse, reqwest::Error> {
    let response = http.execute(request.try_into()?).await?;
    let mut answer = HttpResponse::new(Vec::new());
    *answer.status_mut() = response.status();
    *answer.headers_mut() = response.headers().clone();
    *answer.body_mut() = response.bytes().await?.into();
    Ok(answer)
}
