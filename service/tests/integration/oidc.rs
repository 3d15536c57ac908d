//! Logging in with a certified OpenID provider, and what the service then lets people and programs do.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::Stdio;

use reqwest::header::{COOKIE, LOCATION, SET_COOKIE};
use reqwest::redirect::Policy;
use reqwest::{Client, Method, Response, Url};
use serde_json::{Value, json};
use service::config::{AuthMode, Config};
use tokio::io::{AsyncBufReadExt, BufReader, Lines};
use tokio::process::{Child, ChildStderr, ChildStdout, Command};

use crate::test_app::{TestApp, config_dir, eventually, order};

const AUDIENCE: &str = "https://orders.example";
/// <https://www.rfc-editor.org/rfc/rfc7636#appendix-B>
const VERIFIER: &str = "dBjftJeZ4CVP-mB92K27uhbUJU1p1r_wW1gFWFOEjXk";
const CHALLENGE: &str = "E9Melhoa2OwvFrEMTJguCHaoeK1t8URWbuGJSstw-cM";

/// `tests/oidc-provider`, running.
struct Provider {
    issuer: String,
    _process: Child,
    _lines: Lines<BufReader<ChildStdout>>,
}

impl Provider {
    async fn start() -> Self {
        let path = std::env::var_os("PATH").unwrap_or_default();
        let program: PathBuf = std::env::split_paths(&path)
            .map(|dir| dir.join("oidc-provider.mjs"))
            .find(|program| program.is_file())
            .expect("`cargo xtask setup` installs oidc-provider, and `cargo xtask ci` finds it");
        let mut process = Command::new("node")
            .arg(program)
            .arg(AUDIENCE)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(process.stdout.take().unwrap()).lines();
        let issuer = lines.next_line().await.unwrap().unwrap();
        Self {
            issuer,
            _process: process,
            _lines: lines,
        }
    }

    /// A service that believes this provider, and knows no more of it than its name.
    async fn service(&self) -> TestApp {
        self.service_with(|_| ()).await
    }

    async fn service_with(&self, change: impl FnOnce(&mut Config)) -> TestApp {
        TestApp::start_with(|config| {
            config.auth.mode = AuthMode::Jwks;
            config.auth.issuer.clone_from(&self.issuer);
            config.auth.audience = AUDIENCE.to_owned();
            change(config);
        })
        .await
    }

    fn login(&self, client: &str) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_service"));
        command
            .arg("login")
            .env("SERVICE_CONFIG_DIR", config_dir())
            .env("SERVICE__AUTH__ISSUER", &self.issuer)
            .env("SERVICE__AUTH__AUDIENCE", AUDIENCE)
            .env("SERVICE__AUTH__CLIENT_ID", client)
            .env("SERVICE__AUTH__SCOPE", "openid orders")
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true);
        command
    }
}

/// As much of a browser as the provider's forms need.
struct Browser {
    client: Client,
    cookies: BTreeMap<String, String>,
}

impl Browser {
    fn new() -> Self {
        let client = Client::builder().redirect(Policy::none()).build();
        Self {
            client: client.unwrap(),
            cookies: BTreeMap::new(),
        }
    }

    /// Follows redirections up to a page, or to what is not the provider's.
    async fn go(&mut self, method: Method, url: &str, form: &[(&str, &str)]) -> (Url, Response) {
        let mut url = Url::parse(url).unwrap();
        let host = url.authority().to_owned();
        let mut request = self.client.request(method, url.clone()).form(form);
        loop {
            let cookies = self.cookies.iter();
            let cookies: Vec<String> = cookies
                .map(|(name, value)| format!("{name}={value}"))
                .collect();
            let answer = request
                .header(COOKIE, cookies.join("; "))
                .send()
                .await
                .unwrap();
            for cookie in answer.headers().get_all(SET_COOKIE) {
                let (pair, _) = cookie.to_str().unwrap().split_once(';').unwrap();
                let (name, value) = pair.split_once('=').unwrap();
                self.cookies.insert(name.to_owned(), value.to_owned());
            }
            let Some(next) = answer.headers().get(LOCATION) else {
                return (url, answer);
            };
            url = url.join(next.to_str().unwrap()).unwrap();
            if url.authority() != host {
                let answer = self.client.get(url.clone()).send().await.unwrap();
                return (url, answer);
            }
            request = self.client.get(url.clone());
        }
    }

    /// Logs in under this name, consents, and returns the page that there is in the end.
    async fn log_in(&mut self, url: &str, name: &str) -> String {
        let (_, page) = self.consent(url, name).await;
        page.text().await.unwrap()
    }

    /// The same; where that page is.
    async fn come_back(&mut self, url: &str, name: &str) -> Url {
        self.consent(url, name).await.0
    }

    async fn consent(&mut self, url: &str, name: &str) -> (Url, Response) {
        let (form, _) = self.go(Method::GET, url, &[]).await;
        let login = [("prompt", "login"), ("login", name), ("password", "any")];
        let (form, _) = self.go(Method::POST, form.as_str(), &login).await;
        let consent = [("prompt", "consent")];
        self.go(Method::POST, form.as_str(), &consent).await
    }
}

/// The address that the person is told to open.
async fn address(said: &mut Lines<BufReader<ChildStderr>>) -> String {
    let line = said.next_line().await.unwrap().unwrap();
    let (_, address) = line.split_once("open this in a browser: ").unwrap();
    address.to_owned()
}

async fn place(app: &TestApp, token: &str) -> u16 {
    let bearer = [("authorization", format!("Bearer {token}"))];
    let path = "/v1/orders";
    let (status, _) = app
        .send_with(Method::POST, path, Some(order()), &bearer)
        .await;
    status
}

#[tokio::test(flavor = "multi_thread")]
async fn people_log_in_with_a_browser() {
    let provider = Provider::start().await;
    let app = provider.service().await;
    for (name, allowed) in [("ada-clerk", 201), ("ada-auditor", 403)] {
        let mut login = provider.login("people").spawn().unwrap();
        let mut said = BufReader::new(login.stderr.take().unwrap()).lines();
        let address = address(&mut said).await;
        for part in ["code_challenge_method=S256", "resource=https", "state="] {
            assert!(address.contains(part), "{address}");
        }
        let page = Browser::new().log_in(&address, name).await;
        assert!(page.contains("You can close this page"), "{page}");
        let ended = login.wait_with_output().await.unwrap();
        assert!(ended.status.success());
        let token = String::from_utf8(ended.stdout).unwrap();
        assert_eq!(place(&app, token.trim()).await, allowed, "{name}");
    }
    assert_eq!(place(&app, "x").await, 401);
}

/// As the page of the API's description does it: only when the browser is sent to the provider does it say
/// for whom a token is, and it must be one for the service all the same.
#[tokio::test(flavor = "multi_thread")]
async fn readers_of_the_description_log_in_on_its_page() {
    let provider = Provider::start().await;
    let app = provider
        .service_with(|config| {
            config.auth.client_id = Some("people".to_owned());
            config.auth.scope = "openid orders".to_owned();
        })
        .await;
    let (_, description) = app.get("/openapi.json").await;
    assert_eq!(
        description["security"],
        json!([{ "token": ["orders"] }]),
        "{description}"
    );
    let scheme = &description["components"]["securitySchemes"]["token"];
    let flow = &scheme["flows"]["authorizationCode"];
    assert_eq!(flow["scopes"], json!({ "orders": "" }), "{scheme}");
    let endpoint = |name: &str| Url::parse(flow[name].as_str().unwrap()).unwrap();
    let page = app.page_login().await;
    let scopes = page["scopes"].as_array().unwrap().iter();
    let scopes: Vec<&str> = scopes.map(|scope| scope.as_str().unwrap()).collect();
    let client = page["clientId"].as_str().unwrap();

    let back = format!("http://{}/callback", app.public);
    let mut address = endpoint("authorizationUrl");
    address.query_pairs_mut().extend_pairs([
        ("response_type", "code"),
        ("client_id", client),
        ("redirect_uri", &back),
        ("scope", &scopes.join(" ")),
        ("code_challenge", CHALLENGE),
        ("code_challenge_method", "S256"),
    ]);
    for (name, value) in page["additionalQueryStringParams"].as_object().unwrap() {
        let value = value.as_str().unwrap();
        address.query_pairs_mut().append_pair(name, value);
    }
    let mut browser = Browser::new();
    let came_to = browser.come_back(address.as_str(), "ada-clerk").await;
    let (_, code) = came_to
        .query_pairs()
        .find(|(name, _)| name == "code")
        .unwrap();
    let form = [
        ("grant_type", "authorization_code"),
        ("client_id", client),
        ("redirect_uri", &back),
        ("code", &code),
        ("code_verifier", VERIFIER),
    ];
    let answer = browser.client.post(endpoint("tokenUrl")).form(&form).send();
    let answer: Value = answer.await.unwrap().json().await.unwrap();
    let token = answer["access_token"].as_str().unwrap();
    assert_eq!(place(&app, token).await, 201);
}

/// Whoever makes a browser come back with a code of theirs has not logged anybody in, nor ended it. The
/// provider's own words are shown, without what terminals take for commands.
#[tokio::test]
async fn nobody_is_logged_in_by_another() {
    let provider = Provider::start().await;
    let mut login = provider.login("people").spawn().unwrap();
    let mut said = BufReader::new(login.stderr.take().unwrap()).lines();
    let address = Url::parse(&address(&mut said).await).unwrap();
    let parameter = |wanted: &str| {
        let (_, value) = address
            .query_pairs()
            .find(|(name, _)| name == wanted)
            .unwrap();
        value.into_owned()
    };
    let (back, state) = (parameter("redirect_uri"), parameter("state"));
    for query in ["code=x&state=guessed", "code=x", "error=access_denied"] {
        let answer = reqwest::get(format!("{back}?{query}")).await.unwrap();
        assert_eq!(answer.status(), 400, "{query}");
    }
    let query = format!("state={state}&error=access_denied&error_description=no%1b%5B2J");
    let answer = reqwest::get(format!("{back}?{query}")).await.unwrap();
    assert_eq!(answer.status(), 200);
    let last = said.next_line().await.unwrap().unwrap();
    assert!(last.contains(r"access_denied: no\u{1b}[2J"), "{last}");
    assert_eq!(login.wait().await.unwrap().code(), Some(1));
}

#[tokio::test]
async fn programs_log_in_by_a_secret() {
    let provider = Provider::start().await;
    let app = provider.service().await;
    let mut login = provider.login("machine");
    login.arg("--program").env("SERVICE__AUTH__SCOPE", "orders");
    login.env("SERVICE__AUTH__CLIENT_SECRET", "machine-secret");
    let ended = login.output().await.unwrap();
    assert!(ended.status.success(), "{ended:?}");
    let token = String::from_utf8(ended.stdout).unwrap();
    assert_eq!(place(&app, token.trim()).await, 201);

    let refused = login.env("SERVICE__AUTH__CLIENT_SECRET", "not-it").output();
    let refused = refused.await.unwrap();
    let said = String::from_utf8(refused.stderr).unwrap();
    assert_eq!(refused.status.code(), Some(1), "{said}");
    assert!(
        said.contains("gave no token") && said.contains("invalid_client"),
        "{said}"
    );
    assert!(!said.contains("not-it"), "{said}");
}

/// A provider that speaks for somebody else is not believed, and until there is one, nobody is served.
#[tokio::test]
async fn the_provider_must_be_who_was_asked() {
    let provider = Provider::start().await;
    let other_name = provider.issuer.replace("127.0.0.1", "localhost");
    let app = TestApp::start_with(|config| {
        config.auth.mode = AuthMode::Jwks;
        config.auth.issuer = other_name;
    })
    .await;
    eventually("it says why", async || {
        let ready = app.admin_text("/health/ready").await;
        ready.contains("speaks for")
    })
    .await;
}
