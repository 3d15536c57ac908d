//! What the REST interface says of itself, and the page to read it, log in, and try it.

use std::collections::HashMap;
use std::sync::Arc;

use axum::extract::State;
use axum::http::HeaderValue;
use axum::routing::get;
use axum::{Json, Router};
use utoipa::OpenApi as _;
use utoipa::openapi::OpenApi;
use utoipa::openapi::security::{
    AuthorizationCode, Flow, HttpAuthScheme, HttpBuilder, OAuth2, OpenIdConnect, Scopes,
    SecurityRequirement, SecurityScheme,
};
use utoipa_swagger_ui::{Config, SwaggerUi, oauth};

use super::problem::Problem;
use crate::app::App;
use crate::auth::login;
use crate::auth::provider::Provider;
use crate::config::{Auth, AuthMode};

/// Where the page and its files are.
pub const PAGE: &str = "/docs";
const DESCRIPTION: &str = "/openapi.json";

/// How the description calls the way in which callers say who they are.
const SCHEME: &str = "token";

#[derive(utoipa::OpenApi)]
#[openapi(
    info(title = "Orders", description = "Orders over REST, version 1"),
    components(schemas(Problem))
)]
struct Description;

/// All but the routes, which add themselves, and how callers say who they are, which is found out later.
pub fn description() -> OpenApi {
    Description::openapi()
}

/// The page, and the description that it shows.
pub fn routes(description: OpenApi, auth: &Auth) -> Router<Arc<App>> {
    let description = Arc::new(description);
    let describe = async move |State(app): State<Arc<App>>| {
        let mut description = OpenApi::clone(&description);
        let provider = app.auth.provider().await;
        if let Some(scheme) = scheme(&app.config.auth, provider) {
            let components = description.components.get_or_insert_default();
            components.add_security_scheme(SCHEME, scheme);
            let requirement = SecurityRequirement::new(SCHEME, scopes(&app.config.auth));
            description.security = Some(vec![requirement]);
        }
        Json(description)
    };
    Router::from(page(auth)).route(DESCRIPTION, get(describe))
}

/// How callers say who they are.
fn scheme(auth: &Auth, provider: Option<Provider>) -> Option<SecurityScheme> {
    match auth.mode {
        AuthMode::Off => None,
        AuthMode::Development => {
            let says = Some("`service token NAME` prints one");
            let bearer = HttpBuilder::new().scheme(HttpAuthScheme::Bearer);
            let bearer = bearer.bearer_format("JWT").description(says).build();
            Some(SecurityScheme::Http(bearer))
        }
        AuthMode::Jwks => Some(at_provider(auth, provider)),
    }
}

/// At the provider: by authorization code, where it has said how, else in whichever way it will say.
/// <https://openid.net/specs/openid-connect-discovery-1_0.html#ProviderConfig>
fn at_provider(auth: &Auth, provider: Option<Provider>) -> SecurityScheme {
    let endpoints =
        provider.and_then(|known| known.authorization_endpoint.zip(known.token_endpoint));
    match endpoints {
        Some((authorization, token)) => {
            let scopes = scopes(auth).map(|scope| (scope, String::new()));
            let flow = AuthorizationCode::new(authorization, token, Scopes::from_iter(scopes));
            SecurityScheme::OAuth2(OAuth2::new([Flow::AuthorizationCode(flow)]))
        }
        None => SecurityScheme::OpenIdConnect(OpenIdConnect::new(format!(
            "{}/.well-known/openid-configuration",
            auth.issuer.trim_end_matches('/')
        ))),
    }
}

/// What callers ask tokens for. Not for `openid`: with it some providers give a token that is for
/// themselves, unless they are told for whom it is once more, where the page cannot say it.
fn scopes(auth: &Auth) -> impl Iterator<Item = String> {
    let words = match auth.mode {
        AuthMode::Jwks => auth.scope.as_str(),
        // The tokens that it signs itself have none.
        AuthMode::Off | AuthMode::Development => "",
    };
    let words = words.split_whitespace();
    words.filter(|word| *word != "openid").map(str::to_owned)
}

/// Who reads it logs in as `service login` does: by authorization code with PKCE.
fn page(auth: &Auth) -> SwaggerUi {
    let page = SwaggerUi::new(PAGE).config(Config::new([DESCRIPTION]));
    if auth.mode != AuthMode::Jwks {
        return page;
    }
    let mut login = oauth::Config::new()
        .scopes(scopes(auth).collect())
        .use_pkce_with_authorization_code_grant(true);
    if let Some(id) = &auth.client_id {
        login = login.client_id(id);
    }
    if let Some(resource) = login::resource(auth) {
        let resource = HashMap::from([("resource".to_owned(), resource)]);
        login = login.additional_query_string_params(resource);
    }
    page.oauth(login)
}

/// What browsers may do for the page: it brings scripts and styles of its own, and asks the provider
/// for tokens, which may be at another host than its issuer, or a developer's own machine.
/// <https://www.w3.org/TR/CSP3/>
pub fn policy(auth: &Auth) -> HeaderValue {
    HeaderValue::from_static(match auth.mode {
        AuthMode::Jwks => {
            "default-src 'self'; connect-src 'self' https: http://localhost:* http://127.0.0.1:*; \
             img-src 'self' data:; \
             style-src 'self' 'unsafe-inline'; frame-ancestors 'none'"
        }
        AuthMode::Off | AuthMode::Development => {
            "default-src 'self'; img-src 'self' data:; style-src 'self' 'unsafe-inline'; \
             frame-ancestors 'none'"
        }
    })
}
