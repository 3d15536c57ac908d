//! Who calls and what they may do, over every interface; and tokens that must not be believed.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use aws_lc_rs::encoding::{AsDer, Pkcs8V1Der};
use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::rsa::KeySize;
use aws_lc_rs::signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, Ed25519KeyPair};
use axum::Router;
use axum::http::StatusCode;
use axum::routing::get;
use base64::Engine;
use base64::prelude::{BASE64_URL_SAFE, BASE64_URL_SAFE_NO_PAD as URL};
use futures_util::{SinkExt, StreamExt};
use jsonwebtoken::jwk::{Jwk, JwkSet, PublicKeyUse};
use jsonwebtoken::{Algorithm, EncodingKey, Header};
use reqwest::Method;
use serde_json::{Value, json};
use service::api::grpc::pb;
use service::api::grpc::pb::orders_client::OrdersClient;
use service::config::{AuthMode, Config};
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;
use tonic::Code;
use tonic::transport::Channel;

use crate::test_app::{TestApp, config_dir, eventually, free_port, order};

const ISSUER: &str = "https://issuer.example";

/// A key that signs, and its public half.
struct Signer {
    key: EncodingKey,
    algorithm: Algorithm,
    public: Jwk,
}

impl Signer {
    fn new(kid: &str, algorithm: Algorithm) -> Self {
        let random = SystemRandom::new();
        let key = match algorithm {
            Algorithm::EdDSA => {
                let pkcs8 = Ed25519KeyPair::generate_pkcs8v1(&random).unwrap();
                EncodingKey::from_ed_der(pkcs8.as_ref())
            }
            Algorithm::ES256 => {
                let of = &ECDSA_P256_SHA256_FIXED_SIGNING;
                EncodingKey::from_ec_der(
                    EcdsaKeyPair::generate_pkcs8(of, &random).unwrap().as_ref(),
                )
            }
            Algorithm::RS256 => {
                let pair = aws_lc_rs::rsa::KeyPair::generate(KeySize::Rsa2048).unwrap();
                let der: Pkcs8V1Der<'_> = pair.as_der().unwrap();
                // Behind 26 bytes of PKCS #8 is the PKCS #1 that is wanted (RFC 8017, appendix A.1.2).
                EncodingKey::from_rsa_der(&der.as_ref()[26..])
            }
            other => panic!("{other:?}"),
        };
        let mut public = Jwk::from_encoding_key(&key, algorithm).unwrap();
        public.common.key_id = Some(kid.to_owned());
        Self {
            key,
            algorithm,
            public,
        }
    }

    fn kid(&self) -> String {
        self.public.common.key_id.clone().unwrap()
    }

    fn header(&self) -> Value {
        let algorithm = format!("{:?}", self.algorithm);
        json!({ "alg": algorithm, "kid": self.kid(), "typ": "at+jwt" })
    }

    /// Any header and claims, signed.
    fn sign(&self, header: &Value, claims: &Value) -> String {
        let signed = format!("{}.{}", encoded(header), encoded(claims));
        let signature = jsonwebtoken::crypto::sign(signed.as_bytes(), &self.key, self.algorithm);
        format!("{signed}.{}", signature.unwrap())
    }

    fn token(&self, claims: &Value) -> String {
        self.sign(&self.header(), claims)
    }
}

fn encoded(value: &Value) -> String {
    URL.encode(value.to_string())
}

fn claims(roles: &Value) -> Value {
    let now = jsonwebtoken::get_current_timestamp();
    json!({
        "iss": ISSUER, "aud": "orders", "sub": "ada", "iat": now, "nbf": now, "exp": now + 600,
        "roles": roles,
    })
}

fn with(mut value: Value, key: &str, other: Value) -> Value {
    value[key] = other;
    value
}

fn without(mut value: Value, key: &str) -> Value {
    value.as_object_mut().unwrap().remove(key);
    value
}

/// A provider of keys: what it publishes, or nothing where it is down; late, where it is held up.
#[derive(Clone)]
struct Provider {
    url: String,
    set: Arc<Mutex<Option<JwkSet>>>,
    asked: Arc<AtomicUsize>,
    held_up: Arc<tokio::sync::Mutex<()>>,
}

impl Provider {
    async fn start(keys: &[&Signer]) -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let provider = Self {
            url: format!("http://{}/keys", listener.local_addr().unwrap()),
            set: Arc::default(),
            asked: Arc::default(),
            held_up: Arc::default(),
        };
        provider.publish(keys);
        let answering = provider.clone();
        let answer = async move || {
            answering.asked.fetch_add(1, Ordering::SeqCst);
            let _turn = answering.held_up.lock().await;
            let set = answering.set.lock().unwrap().clone();
            set.map(axum::Json).ok_or(StatusCode::BAD_GATEWAY)
        };
        let routes = Router::new().route("/keys", get(answer));
        tokio::spawn(async { axum::serve(listener, routes).await });
        provider
    }

    fn publish(&self, keys: &[&Signer]) {
        let keys = keys.iter().map(|signer| signer.public.clone()).collect();
        *self.set.lock().unwrap() = Some(JwkSet { keys });
    }

    fn go_down(&self) {
        *self.set.lock().unwrap() = None;
    }

    async fn app(&self) -> TestApp {
        self.app_with(|_| {}).await
    }

    async fn app_with(&self, change: impl FnOnce(&mut Config)) -> TestApp {
        TestApp::start_with(|config| {
            config.auth.mode = AuthMode::Jwks;
            config.auth.issuer = ISSUER.to_owned();
            config.auth.jwks_url = Some(self.url.clone());
            change(config);
        })
        .await
    }
}

async fn list(app: &TestApp, token: &str) -> (u16, Value) {
    let bearer = [("authorization", format!("Bearer {token}"))];
    app.send_with(Method::GET, "/v1/orders", None, &bearer)
        .await
}

#[tokio::test]
async fn tokens_of_every_accepted_algorithm_are_believed() {
    let signers = [Algorithm::EdDSA, Algorithm::ES256, Algorithm::RS256];
    let signers = signers.map(|algorithm| Signer::new(&format!("{algorithm:?}"), algorithm));
    let provider = Provider::start(&signers.iter().collect::<Vec<_>>()).await;
    let app = provider.app().await;
    for signer in &signers {
        let (status, answer) = list(&app, &signer.token(&claims(&json!(["clerk"])))).await;
        assert_eq!(status, 200, "{:?}: {answer}", signer.algorithm);
    }
    // Roles as words, as OAuth's scopes are, and one of several audiences.
    let words = claims(&json!("nobody clerk"));
    let words = with(words, "aud", json!(["others", "orders"]));
    assert_eq!(list(&app, &signers[0].token(&words)).await.0, 200);
    assert_eq!(provider.asked.load(Ordering::SeqCst), 1);
}

/// Whoever reads the description asks nobody for keys; where these are by themselves, so is the login.
#[tokio::test]
async fn the_description_fetches_no_keys() {
    let provider = Provider::start(&[]).await;
    let app = provider.app().await;
    let (_, description) = app.get("/openapi.json").await;
    let scheme = &description["components"]["securitySchemes"]["token"];
    assert_eq!(scheme["type"], "openIdConnect", "{description}");
    assert_eq!(provider.asked.load(Ordering::SeqCst), 0);
}

/// What each role may do is what the table in the configuration says, whatever the interface.
#[tokio::test]
async fn roles_may_do_what_the_table_says() {
    let signer = Signer::new("one", Algorithm::EdDSA);
    let provider = Provider::start(&[&signer]).await;
    let app = provider.app().await;
    let bearer = |role: &str| format!("Bearer {}", signer.token(&claims(&json!([role]))));
    let clerk = [("authorization", bearer("clerk"))];
    let (_, placed) = app
        .send_with(Method::POST, "/v1/orders", Some(order()), &clerk)
        .await;
    let one = format!("/v1/orders/{}", placed["id"].as_str().unwrap());
    let cancel = format!("{one}/cancel");
    let id = &placed["id"];
    let new = "{ customer: \"ada\", currency: \"EUR\", items: [{ sku: \"tea\", quantity: 1, \
               unitPriceCents: 1 }] }";
    // By REST, and by GraphQL.
    let operations = [
        (
            "place-order",
            Method::POST,
            "/v1/orders",
            format!("mutation {{ placeOrder(order: {new}) {{ id }} }}"),
        ),
        (
            "get-order",
            Method::GET,
            &one,
            format!("{{ order(id: {id}) {{ id }} }}"),
        ),
        (
            "list-orders",
            Method::GET,
            "/v1/orders",
            "{ orders { next } }".to_owned(),
        ),
        (
            "cancel-order",
            Method::POST,
            &cancel,
            format!("mutation {{ cancelOrder(id: {id}) {{ id }} }}"),
        ),
        (
            "get-totals",
            Method::GET,
            "/v1/customers/ada/totals",
            "{ totals(customer: \"ada\") { orders } }".to_owned(),
        ),
    ];
    let table = serde_json::to_value(&app.app.config.auth.roles).unwrap();
    for role in ["customer", "clerk", "auditor", "stranger"] {
        for (operation, method, path, query) in &operations {
            let may = table[role]
                .as_array()
                .is_some_and(|may| may.contains(&json!(operation)));
            let headers = [("authorization", bearer(role))];
            let body = (*path == "/v1/orders" && *method == Method::POST).then(order);
            let (status, answer) = app.send_with(method.clone(), path, body, &headers).await;
            assert_eq!(status != 403, may, "{role} {operation}: {status} {answer}");
            assert!(
                status < 300 || status == 403,
                "{role} {operation}: {answer}"
            );
            let body = Some(json!({ "query": query }));
            let (_, answer) = app
                .send_with(Method::POST, "/graphql", body, &headers)
                .await;
            let code = &answer["errors"][0]["extensions"]["code"];
            let expected = if may { Value::Null } else { json!("FORBIDDEN") };
            assert_eq!(*code, expected, "{role} {operation}: {answer}");
        }
    }

    // gRPC has its own words for nobody in particular, and for those who may not.
    let channel = Channel::from_shared(format!("http://{}", app.public)).unwrap();
    let mut grpc = OrdersClient::new(channel.connect().await.unwrap());
    let ask = |role: Option<&str>| {
        let mut request = tonic::Request::new(pb::ListOrdersRequest::default());
        if let Some(role) = role {
            let bearer = bearer(role).parse().unwrap();
            request.metadata_mut().insert("authorization", bearer);
        }
        request
    };
    let nobody = grpc.list_orders(ask(None)).await.unwrap_err();
    assert_eq!(nobody.code(), Code::Unauthenticated);
    let customer = grpc.list_orders(ask(Some("customer"))).await.unwrap_err();
    assert_eq!(customer.code(), Code::PermissionDenied);
    grpc.list_orders(ask(Some("clerk"))).await.unwrap();

    // A socket is refused before it is one.
    let address = format!("ws://{}/v1/events", app.public);
    let refused = tokio_tungstenite::connect_async(address).await.unwrap_err();
    assert!(refused.to_string().contains("401"), "{refused}");
    let answer = reqwest::get(format!("http://{}/v1/orders", app.public))
        .await
        .unwrap();
    assert_eq!(answer.status(), 401);
    assert_eq!(answer.headers()["www-authenticate"], "Bearer");
    let forged = reqwest::Client::new().get(format!("http://{}/v1/orders", app.public));
    let answer = forged.bearer_auth("forged").send().await.unwrap();
    let challenge = &answer.headers()["www-authenticate"];
    assert_eq!(challenge, "Bearer error=\"invalid_token\"");
    // Whoever watches over the service needs no token.
    assert_eq!(app.get("/health/ready").await.0, 200);
}

/// A subscription's token may come with its first message, as browsers can send it.
#[tokio::test]
async fn subscriptions_say_who_they_are() {
    let signer = Signer::new("one", Algorithm::EdDSA);
    let provider = Provider::start(&[&signer]).await;
    let app = provider.app().await;
    let token = signer.token(&claims(&json!(["auditor"])));
    let clerk = format!("Bearer {}", signer.token(&claims(&json!(["clerk"]))));
    for (token, expected) in [
        (None, "UNAUTHENTICATED"),
        (Some(token), "FORBIDDEN"),
        (Some(signer.token(&claims(&json!(["clerk"])))), "allowed"),
    ] {
        let mut request = format!("ws://{}/graphql", app.public)
            .into_client_request()
            .unwrap();
        let protocol = "graphql-transport-ws".parse().unwrap();
        request
            .headers_mut()
            .insert("sec-websocket-protocol", protocol);
        let (mut socket, _) = tokio_tungstenite::connect_async(request).await.unwrap();
        let greeting = token.map(|token| json!({ "authorization": format!("Bearer {token}") }));
        let query = "subscription { orderEvents { id } }";
        for message in [
            json!({ "type": "connection_init", "payload": greeting }),
            json!({ "id": "1", "type": "subscribe", "payload": { "query": query } }),
        ] {
            socket
                .send(Message::text(message.to_string()))
                .await
                .unwrap();
        }
        let mut seen = String::new();
        let began = Instant::now();
        while seen.is_empty() {
            assert!(
                began.elapsed() < Duration::from_secs(20),
                "nothing was said"
            );
            // What is allowed is shown by an event.
            let headers = [("authorization", clerk.clone())];
            let placed = app.send_with(Method::POST, "/v1/orders", Some(order()), &headers);
            assert_eq!(placed.await.0, 201);
            let wait = Duration::from_millis(100);
            let said = tokio::time::timeout(wait, socket.next()).await;
            let Ok(Some(Ok(Message::Text(text)))) = said else {
                continue;
            };
            let said: Value = serde_json::from_str(&text).unwrap();
            if said["payload"]["data"]["orderEvents"]["id"].is_string() {
                seen = "allowed".to_owned();
            }
            let code = &said["payload"]["errors"][0]["extensions"]["code"];
            if let Some(code) = code
                .as_str()
                .or(said["payload"][0]["extensions"]["code"].as_str())
            {
                code.clone_into(&mut seen);
            }
        }
        assert_eq!(seen, expected);
    }
}

/// Whoever says who they are has a share of their own, wherever they are.
#[tokio::test]
async fn callers_have_shares_of_their_own() {
    let signer = Signer::new("one", Algorithm::EdDSA);
    let provider = Provider::start(&[&signer]).await;
    let app = provider
        .app_with(|config| {
            config.rate_limit.per_second = 1.try_into().unwrap();
            config.rate_limit.burst = 1.try_into().unwrap();
        })
        .await;
    let by = |subject: &str| signer.token(&with(claims(&json!(["clerk"])), "sub", json!(subject)));
    let ada = by("ada");
    assert_eq!(list(&app, &ada).await.0, 200);
    assert_eq!(list(&app, &ada).await.0, 429);
    assert_eq!(list(&app, &by("bob")).await.0, 200);
    // What is not believed counts against where it came from.
    assert_eq!(list(&app, "nonsense").await.0, 401);
    assert_eq!(list(&app, "nonsense").await.0, 429);
    // Nor are further ones looked at then, for a while: the answer to a good one is not its owner's.
    let mut strangers = 0;
    eventually("strangers are turned away", async || {
        strangers += 1;
        list(&app, "nonsense").await;
        list(&app, &by(&format!("stranger {strangers}"))).await.0 == 429
    })
    .await;
    eventually("whoever is known is not", async || {
        list(&app, "nonsense").await;
        list(&app, &ada).await.0 == 200
    })
    .await;
}

/// Those whose tokens have yet to be verified have a quarter of the places: where their keys are late, the
/// others are served.
#[tokio::test]
async fn strangers_who_wait_for_their_keys_leave_places_to_the_others() {
    let signer = Signer::new("one", Algorithm::EdDSA);
    let provider = Provider::start(&[&signer]).await;
    let app = provider
        .app_with(|config| config.server.max_in_flight = 4.try_into().unwrap())
        .await;
    let by = |subject: &str| signer.token(&with(claims(&json!(["clerk"])), "sub", json!(subject)));
    let (ada, bob) = (by("ada"), by("bob"));
    let held_up = provider.held_up.lock().await;
    let refused = async {
        eventually("her key is asked for", async || {
            provider.asked.load(Ordering::SeqCst) == 1
        })
        .await;
        let others = app.get("/openapi.json").await.0;
        let refused = list(&app, &bob).await.0;
        drop(held_up);
        (others, refused)
    };
    let (first, (others, refused)) = tokio::join!(list(&app, &ada), refused);
    assert_eq!((others, refused, first.0), (200, 503, 200));
    assert_eq!(list(&app, &bob).await.0, 200);
}

/// When a token ends, so does what was begun with it.
#[tokio::test]
async fn what_a_token_has_begun_ends_with_it() {
    let signer = Signer::new("one", Algorithm::EdDSA);
    let provider = Provider::start(&[&signer]).await;
    let app = provider
        .app_with(|config| {
            config.auth.leeway.0 = Duration::from_secs(1);
        })
        .await;
    let now = jsonwebtoken::get_current_timestamp();
    let short = with(claims(&json!(["clerk"])), "exp", json!(now + 1));
    let bearer = format!("Bearer {}", signer.token(&short));
    let mut request = format!("ws://{}/v1/events", app.public)
        .into_client_request()
        .unwrap();
    request
        .headers_mut()
        .insert("authorization", bearer.parse().unwrap());
    let (mut socket, _) = tokio_tungstenite::connect_async(request).await.unwrap();
    let channel = Channel::from_shared(format!("http://{}", app.public)).unwrap();
    let mut grpc = OrdersClient::new(channel.connect().await.unwrap());
    let mut watch = tonic::Request::new(pb::WatchOrdersRequest::default());
    watch
        .metadata_mut()
        .insert("authorization", bearer.parse().unwrap());
    let mut stream = grpc.watch_orders(watch).await.unwrap().into_inner();
    let ended = async {
        assert!(stream.message().await.unwrap().is_none());
        loop {
            match socket.next().await.unwrap().unwrap() {
                Message::Ping(_) => {}
                Message::Close(Some(close)) => break u16::from(close.code),
                other => panic!("{other:?}"),
            }
        }
    };
    let code = tokio::time::timeout(Duration::from_secs(20), ended)
        .await
        .unwrap();
    assert_eq!(code, 1008);
    let headers = [("authorization", bearer)];
    let (status, _) = app
        .send_with(Method::GET, "/v1/orders", None, &headers)
        .await;
    assert_eq!(status, 401);
}

/// The same key of two callers is two keys.
#[tokio::test]
async fn callers_do_not_share_their_keys() {
    let signer = Signer::new("one", Algorithm::EdDSA);
    let provider = Provider::start(&[&signer]).await;
    let app = provider.app().await;
    let mut ids = Vec::new();
    for subject in ["ada", "bob", "ada"] {
        let claims = with(claims(&json!(["clerk"])), "sub", json!(subject));
        let headers = [
            ("authorization", format!("Bearer {}", signer.token(&claims))),
            ("idempotency-key", "once".to_owned()),
        ];
        let (status, placed) = app
            .send_with(Method::POST, "/v1/orders", Some(order()), &headers)
            .await;
        assert_eq!(status, 201, "{placed}");
        ids.push(placed["id"].clone());
    }
    assert_eq!(ids[0], ids[2]);
    assert_ne!(ids[0], ids[1]);
}

/// Tokens that were not signed by the issuer for this service, for now, for somebody.
#[tokio::test]
async fn forgeries_are_not_believed() {
    let [ed, es, rs, other, withdrawn] = [
        ("ed", Algorithm::EdDSA),
        ("es", Algorithm::ES256),
        ("rs", Algorithm::RS256),
        ("ed", Algorithm::EdDSA),
        ("old", Algorithm::EdDSA),
    ]
    .map(|(kid, algorithm)| Signer::new(kid, algorithm));
    let mut for_encryption = Signer::new("enc", Algorithm::RS256);
    for_encryption.public.common.public_key_use = Some(PublicKeyUse::Encryption);
    let mut for_others = Signer::new("es384", Algorithm::EdDSA);
    for_others.public.common.key_algorithm = Some(jsonwebtoken::jwk::KeyAlgorithm::ES384);
    let provider = Provider::start(&[&ed, &es, &rs, &for_encryption, &for_others]).await;
    let app = provider.app().await;

    let good = claims(&json!(["clerk"]));
    let token = ed.token(&good);
    assert_eq!(list(&app, &token).await.0, 200);
    let [head, body, signature] =
        <[&str; 3]>::try_from(token.split('.').collect::<Vec<_>>()).unwrap();
    let now = jsonwebtoken::get_current_timestamp();
    let unsigned = |alg: &str, signature: &str| {
        let header = json!({ "alg": alg, "kid": "ed" });
        format!("{}.{}.{signature}", encoded(&header), encoded(&good))
    };
    // Signed with what everybody knows, as if it were a secret of both sides.
    let confused = |alg: Algorithm, kid: &str, secret: &[u8]| {
        let mut header = Header::new(alg);
        header.kid = Some(kid.to_owned());
        jsonwebtoken::encode(&header, &good, &EncodingKey::from_secret(secret)).unwrap()
    };
    let public = |signer: &Signer| serde_json::to_value(&signer.public).unwrap();
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    let (x, n) = (text(&public(&ed)["x"]), text(&public(&rs)["n"]));
    let mut flipped = URL.decode(signature).unwrap();
    flipped[0] ^= 1;
    let flipped = URL.encode(flipped);
    let ed_header = ed.header();
    let changed = |key: &str, value: Value| ed.token(&with(good.clone(), key, value));
    let headed = |key: &str, value: Value| ed.sign(&with(ed_header.clone(), key, value), &good);
    let embedded = {
        let jwk = serde_json::to_value(&other.public).unwrap();
        other.sign(&with(other.header(), "jwk", jwk), &good)
    };
    let elsewhere = other.sign(&with(other.header(), "jku", json!(provider.url)), &good);

    // Signed, but written with the padding that JWS forbids (RFC 7515, section 2).
    let padded = {
        let mut text = good.to_string();
        while text.len().is_multiple_of(3) {
            text.push(' ');
        }
        let signed = format!("{}.{}", encoded(&ed_header), BASE64_URL_SAFE.encode(text));
        let signature = jsonwebtoken::crypto::sign(signed.as_bytes(), &ed.key, ed.algorithm);
        format!("{signed}.{}", signature.unwrap())
    };

    let forgeries = [
        ("alg none", unsigned("none", "")),
        ("alg None", unsigned("None", "")),
        ("alg nOnE", unsigned("nOnE", "")),
        ("alg none, signed", unsigned("none", signature)),
        ("alg empty", unsigned("", signature)),
        (
            "HS256 with Ed25519's x",
            confused(Algorithm::HS256, "ed", x.as_bytes()),
        ),
        (
            "HS256 with x's bytes",
            confused(Algorithm::HS256, "ed", &URL.decode(&x).unwrap()),
        ),
        (
            "HS256 with RSA's n",
            confused(Algorithm::HS256, "rs", &URL.decode(&n).unwrap()),
        ),
        (
            "HS384 with the whole key",
            confused(Algorithm::HS384, "rs", public(&rs).to_string().as_bytes()),
        ),
        ("HS512 with nothing", confused(Algorithm::HS512, "ed", b"")),
        (
            "PS256 by header",
            rs.sign(&with(rs.header(), "alg", json!("PS256")), &good),
        ),
        (
            "RS384 by header",
            rs.sign(&with(rs.header(), "alg", json!("RS384")), &good),
        ),
        (
            "ES384 by header",
            es.sign(&with(es.header(), "alg", json!("ES384")), &good),
        ),
        (
            "ES256 with EdDSA's key",
            es.sign(&with(es.header(), "kid", json!("ed")), &good),
        ),
        (
            "EdDSA with RSA's key",
            ed.sign(&with(ed_header.clone(), "kid", json!("rs")), &good),
        ),
        ("a flipped bit", format!("{head}.{body}.{flipped}")),
        (
            "half a signature",
            format!("{head}.{body}.{}", &signature[..40]),
        ),
        ("no signature", format!("{head}.{body}.")),
        (
            "a signature of zeros",
            format!("{}.{body}.{}", encoded(&es.header()), URL.encode([0; 64])),
        ),
        (
            "another one's signature",
            format!(
                "{head}.{body}.{}",
                changed("sub", json!("bob")).rsplit('.').next().unwrap()
            ),
        ),
        (
            "other claims",
            format!(
                "{head}.{}.{signature}",
                encoded(&with(good.clone(), "sub", json!("root")))
            ),
        ),
        (
            "other roles",
            format!(
                "{head}.{}.{signature}",
                encoded(&with(good.clone(), "roles", json!(["root"])))
            ),
        ),
        (
            "another header",
            format!(
                "{}.{body}.{signature}",
                encoded(&with(ed_header.clone(), "x", json!(1)))
            ),
        ),
        ("another's key of that name", other.token(&good)),
        ("a key in the token", embedded),
        ("a key elsewhere", elsewhere),
        ("an unknown key", withdrawn.token(&good)),
        ("no key", ed.sign(&without(ed_header.clone(), "kid"), &good)),
        ("an empty name", headed("kid", json!(""))),
        (
            "a path for a name",
            headed("kid", json!("../../etc/passwd")),
        ),
        ("a query for a name", headed("kid", json!("' OR 1=1 --"))),
        ("a key for encryption", for_encryption.token(&good)),
        ("a key for another algorithm", for_others.token(&good)),
        ("critical and unknown", headed("crit", json!(["exp"]))),
        ("expired", changed("exp", json!(now - 60))),
        ("no end", ed.token(&without(good.clone(), "exp"))),
        ("an end in words", changed("exp", json!("never"))),
        ("an end below zero", changed("exp", json!(-1))),
        ("not yet", changed("nbf", json!(now + 600))),
        (
            "another issuer",
            changed("iss", json!("https://evil.example")),
        ),
        ("no issuer", ed.token(&without(good.clone(), "iss"))),
        (
            "almost the issuer",
            changed("iss", json!(format!("{ISSUER}.evil.example"))),
        ),
        ("another audience", changed("aud", json!("others"))),
        ("no audience", ed.token(&without(good.clone(), "aud"))),
        (
            "other audiences",
            changed("aud", json!(["others", "order"])),
        ),
        ("nobody", ed.token(&without(good.clone(), "sub"))),
        ("a number for a name", changed("sub", json!(7))),
        ("padding", padded),
        ("five parts", format!("{token}.{body}.{signature}")),
        ("two parts", format!("{head}.{body}")),
        ("something behind it", format!("{token}x")),
        ("two of them", format!("{token} {token}")),
        ("nothing", String::new()),
        ("dots", "..".to_owned()),
        ("too long", format!("{token}{}", "A".repeat(10_000))),
    ];
    for (name, forgery) in &forgeries {
        let (status, problem) = list(&app, forgery).await;
        assert_eq!(status, 401, "{name}: {problem}");
        assert_eq!(problem["type"], "unauthenticated", "{name}");
    }
    assert!(forgeries.len() >= 40);
    // By another scheme, and twice.
    for fields in [
        vec![("authorization", format!("Basic {token}"))],
        vec![("authorization", token.clone())],
        vec![("authorization", format!("Bearer {token}")); 2],
    ] {
        let (status, _) = app
            .send_with(Method::GET, "/v1/orders", None, &fields)
            .await;
        assert_eq!(status, 401, "{fields:?}");
    }
    // Whoever invents names of keys does not make us ask for them each time.
    assert!(provider.asked.load(Ordering::SeqCst) <= 3);
    assert_eq!(list(&app, &token).await.0, 200);
}

/// A new key is found when it is first used; while the provider is away the known ones do.
#[tokio::test]
async fn keys_change_and_the_provider_may_be_away() {
    let first = Signer::new("first", Algorithm::EdDSA);
    let second = Signer::new("second", Algorithm::ES256);
    let provider = Provider::start(&[&first]).await;
    provider.go_down();
    let app = provider.app().await;
    let good = claims(&json!(["clerk"]));
    // Nobody can be recognised, which is not for the service to serve with.
    assert_eq!(list(&app, &first.token(&good)).await.0, 401);
    let (status, answer) = app.get("/health/ready").await;
    assert_eq!(status, 503);
    assert_eq!(answer, json!({ "status": "not ready" }));
    let reason = app.admin_text("/health/ready").await;
    assert!(reason.contains("502"), "{reason}");

    provider.publish(&[&first]);
    eventually("the first key", async || {
        list(&app, &first.token(&good)).await.0 == 200
    })
    .await;
    assert_eq!(app.get("/health/ready").await.0, 200);
    provider.go_down();
    let later = with(good.clone(), "sub", json!("bob"));
    assert_eq!(list(&app, &first.token(&later)).await.0, 200);

    provider.publish(&[&second]);
    eventually("the second key", async || {
        list(&app, &second.token(&good)).await.0 == 200
    })
    .await;
    // What was signed with the first and is not remembered is not believed any more.
    let late = with(good.clone(), "sub", json!("eve"));
    assert_eq!(list(&app, &first.token(&late)).await.0, 401);

    // Nor with the second, once there is none at all.
    provider.publish(&[]);
    eventually("no key", async || {
        list(&app, &first.token(&late)).await;
        let new = with(good.clone(), "sub", json!(uuid::Uuid::now_v7()));
        list(&app, &second.token(&new)).await.0 == 401
    })
    .await;
}

/// `service token` signs what `service serve` believes; in production neither works.
#[tokio::test]
async fn development_has_tokens_of_its_own() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name).display().to_string();
    let service = |arguments: &[&str], environment: Option<&str>| {
        let mut command = tokio::process::Command::new(env!("CARGO_BIN_EXE_service"));
        command
            .args(arguments)
            .kill_on_drop(true)
            .env("SERVICE_CONFIG_DIR", config_dir())
            .env("SERVICE__AUTH__MODE", "development")
            .env("SERVICE__AUTH__DEVELOPMENT_KEY", at("key"))
            .env(
                "SERVICE__DATABASE__URL",
                format!("sqlite://{}", at("orders.db")),
            );
        if let Some(environment) = environment {
            command.env("SERVICE_ENVIRONMENT", environment);
        }
        command
    };
    let minted = service(&["token", "ada", "--role", "clerk"], None)
        .output()
        .await
        .unwrap();
    assert!(minted.status.success(), "{minted:?}");
    let token = String::from_utf8(minted.stdout).unwrap();
    for arguments in [&["token", "ada"][..], &["serve"]] {
        let refused = service(arguments, Some("production"))
            .output()
            .await
            .unwrap();
        assert_eq!(refused.status.code(), Some(1), "{arguments:?}");
        let said = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert!(said.contains("not for production"), "{said}");
    }

    let [port, admin] = [free_port(), free_port()];
    let _running = service(&["serve"], None)
        .env("SERVICE__SERVER__LISTEN", format!("127.0.0.1:{port}"))
        .env(
            "SERVICE__SERVER__ADMIN_LISTEN",
            format!("127.0.0.1:{admin}"),
        )
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::null())
        .spawn()
        .unwrap();
    let address = format!("http://127.0.0.1:{port}/v1/orders");
    let client = reqwest::Client::new();
    eventually("it serves", async || {
        let answer = client.get(&address).bearer_auth(token.trim()).send().await;
        answer.is_ok_and(|answer| answer.status() == 200)
    })
    .await;
    assert_eq!(client.get(&address).send().await.unwrap().status(), 401);
}
