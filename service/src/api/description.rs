//! What the REST interface says of itself, and the page to read it, log in, and try it.

use std::collections::HashMap;

use axum::http::HeaderValue;
use utoipa::OpenApi as _;
use utoipa::openapi::OpenApi;
use utoipa::openapi::security::{
    HttpAuthScheme, HttpBuilder, OpenIdConnect, SecurityRequirement, SecurityScheme,
};
use utoipa_swagger_ui::{SwaggerUi, oauth};

use super::problem::Problem;
use crate::auth::login;
use crate::config::{Auth, AuthMode};

/// Where the page and its files are.
pub const PAGE: &str = "/docs";

/// How the description calls the way in which callers say who they are.
const SCHEME: &str = "token";

#[derive(utoipa::OpenApi)]
#[openapi(
    info(title = "Orders", description = "Orders over REST, version 1"),
    components(schemas(Problem))
)]
struct Description;

/// All but the routes, which add themselves.
pub fn description(auth: &Auth) -> OpenApi {
    let mut description = Description::openapi();
    let scheme = match auth.mode {
        AuthMode::Off => return description,
        AuthMode::Development => {
            let says = Some("`service token NAME` prints one");
            let bearer = HttpBuilder::new().scheme(HttpAuthScheme::Bearer);
            SecurityScheme::Http(bearer.bearer_format("JWT").description(says).build())
        }
        // <https://openid.net/specs/openid-connect-discovery-1_0.html#ProviderConfig>
        AuthMode::Jwks => SecurityScheme::OpenIdConnect(OpenIdConnect::new(format!(
            "{}/.well-known/openid-configuration",
            auth.issuer.trim_end_matches('/')
        ))),
    };
    let components = description.components.get_or_insert_default();
    components.add_security_scheme(SCHEME, scheme);
    // The tokens that it signs itself have none.
    let scopes = match auth.mode {
        AuthMode::Jwks => auth.scope.as_str(),
        AuthMode::Off | AuthMode::Development => "",
    };
    let requirement = SecurityRequirement::new(SCHEME, scopes.split_whitespace());
    description.security = Some(vec![requirement]);
    description
}

/// Who reads it logs in as `service login` does: by authorization code with PKCE.
pub fn page(description: OpenApi, auth: &Auth) -> SwaggerUi {
    let page = SwaggerUi::new(PAGE).url("/openapi.json", description);
    if auth.mode != AuthMode::Jwks {
        return page;
    }
    let scopes = auth.scope.split_whitespace().map(str::to_owned);
    let mut login = oauth::Config::new()
        .scopes(scopes.collect())
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
