//! A registry that wants to know who pushes: a guard in front of one that does not ask.
//! <https://distribution.github.io/distribution/spec/auth/token/>

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::header::{AUTHORIZATION, HOST, WWW_AUTHENTICATE};
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;

/// `ci:test`, as Docker's file and the header have it.
pub const CREDENTIALS: &str = "Y2k6dGVzdA==";
const TOKEN: &str = "only-for-those-who-asked";

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scheme {
    Basic,
    /// The registry sends whoever asks to a server of tokens.
    Bearer,
    /// The same, and that one is elsewhere and without encryption.
    Elsewhere,
}

/// Guards the registry at `registry`; returns where the guard is, without a scheme.
pub async fn guard(registry: &str, scheme: Scheme) -> String {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let (registry, own) = (registry.to_owned(), address.clone());
    tokio::spawn(async move {
        while let Ok((socket, _)) = listener.accept().await {
            let (registry, own) = (registry.clone(), own.clone());
            tokio::spawn(async move {
                let service = service_fn(move |request| {
                    let (registry, own) = (registry.clone(), own.clone());
                    async move { serve(&registry, &own, scheme, request).await }
                });
                // The one who pushes may hang up.
                let _ = auto::Builder::new(TokioExecutor::new())
                    .serve_connection(TokioIo::new(socket), service)
                    .await;
            });
        }
    });
    address
}

async fn serve(
    registry: &str,
    own: &str,
    scheme: Scheme,
    request: Request<Incoming>,
) -> hyper::Result<Response<Full<Bytes>>> {
    let (head, body) = request.into_parts();
    let body = body.collect().await?.to_bytes();
    let answer = |status: u16, body: String| {
        let mut answer = Response::new(Full::new(Bytes::from(body)));
        *answer.status_mut() = status.try_into().unwrap();
        answer
    };
    let path = head.uri.path_and_query().map_or("/", |path| path.as_str());
    let given = head
        .headers
        .get(AUTHORIZATION)
        .map(|given| given.to_str().unwrap());
    let basic = format!("Basic {CREDENTIALS}");
    if head.uri.path() == "/token" {
        let asked = path.contains("service=guarded") && path.contains("push");
        return Ok(match given == Some(&basic) && asked {
            true => answer(200, serde_json::json!({ "token": TOKEN }).to_string()),
            false => answer(401, String::new()),
        });
    }
    let (wanted, challenge) = match scheme {
        Scheme::Basic => (basic, "Basic realm=\"guarded\"".to_owned()),
        Scheme::Elsewhere => (
            format!("Bearer {TOKEN}"),
            "Bearer realm=\"http://tokens.invalid/token\",service=\"guarded\"".to_owned(),
        ),
        Scheme::Bearer => (
            format!("Bearer {TOKEN}"),
            format!(
                "Bearer realm=\"http://{own}/token\",service=\"guarded\",\
                 scope=\"repository:any:pull,push\""
            ),
        ),
    };
    if given != Some(&wanted) {
        let mut refused = answer(401, String::new());
        let challenge = challenge.parse().unwrap();
        refused.headers_mut().insert(WWW_AUTHENTICATE, challenge);
        return Ok(refused);
    }
    let mut headers = head.headers.clone();
    headers.remove(AUTHORIZATION);
    // Where uploads go on is told by the name that was asked.
    headers.insert(HOST, own.parse().unwrap());
    let client = reqwest::Client::builder().no_proxy().build().unwrap();
    let forward = client.request(head.method, format!("{registry}{path}"));
    let answered = forward.headers(headers).body(body).send().await.unwrap();
    let (status, headers) = (answered.status(), answered.headers().clone());
    let mut response = Response::new(Full::new(answered.bytes().await.unwrap()));
    *response.status_mut() = status;
    *response.headers_mut() = headers;
    response.headers_mut().remove("content-length");
    Ok(response)
}
