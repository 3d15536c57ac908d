//! A proxy in front of the API server that makes calls fail, and writes down which there were.

use std::collections::{BTreeSet, HashMap};
use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::BodyExt;
use hyper::body::{Frame, Incoming};
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;

use crate::namespace::{kubeconfig, kubectl};

/// What happens to a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    None,
    /// It takes effect, and its answer is lost.
    AnswerLost,
    /// It takes effect, and its answer comes so much later.
    Slow(Duration),
    /// It never arrives.
    CallLost,
    /// 429, to be tried again after a second.
    TooMany,
    /// 500.
    Broken,
    /// 409: somebody has changed the object meanwhile.
    Conflict,
    /// What was answered to the same question before, as by a server that lags behind.
    Stale,
    /// 410: the version that a list goes on from is forgotten.
    Expired,
    /// The connection breaks in the middle of the answer.
    HalfAnswer,
}

/// Decides by the number of the call and by whether it writes.
pub type Plan = Arc<dyn Fn(u64, bool) -> Fault + Send + Sync>;

pub struct Proxy {
    /// kubectl's own, which adds the credentials and the encryption.
    inner: Child,
    dir: tempfile::TempDir,
    state: Arc<State>,
    _runtime: tokio::runtime::Runtime,
}

struct State {
    inner: String,
    client: reqwest::Client,
    plan: Mutex<Plan>,
    log: Mutex<Vec<Call>>,
    /// The last answer but one to each question, and the last.
    answers: Mutex<HashMap<String, [Bytes; 2]>>,
}

/// Method and path, and whether an object came into being.
type Call = (String, String, bool);

impl Proxy {
    /// In front of the cluster; `user` is who makes the calls, the administrator unless given.
    pub fn start(user: Option<&str>) -> Self {
        let mut command = Command::new(kubectl());
        command
            .args(["--kubeconfig", &kubeconfig(), "proxy", "--port=0"])
            .arg("--reject-methods=^$")
            .arg("--reject-paths=^$")
            .stdout(Stdio::piped());
        if let Some(user) = user {
            command.arg(format!("--as={user}"));
        }
        let mut inner = command.spawn().unwrap();
        let mut line = String::new();
        let stdout = inner.stdout.take().unwrap();
        BufReader::new(stdout).read_line(&mut line).unwrap();
        let address = line.trim().rsplit(' ').next().unwrap().to_owned();
        let state = Arc::new(State {
            inner: format!("http://{address}"),
            client: reqwest::Client::builder().no_proxy().build().unwrap(),
            plan: Mutex::new(Arc::new(|_, _| Fault::None)),
            log: Mutex::default(),
            answers: Mutex::default(),
        });
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let listening = runtime.block_on(listen(Arc::clone(&state)));
        let dir = tempfile::tempdir().unwrap();
        let config = serde_json::json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "faults",
            "clusters": [{ "name": "faults", "cluster": { "server": format!("http://{listening}") } }],
            "users": [{ "name": "nobody", "user": {} }],
            "contexts": [{ "name": "faults", "context": { "cluster": "faults", "user": "nobody" } }],
        });
        std::fs::write(dir.path().join("kubeconfig"), config.to_string()).unwrap();
        Self {
            inner,
            dir,
            state,
            _runtime: runtime,
        }
    }

    pub fn kubeconfig(&self) -> PathBuf {
        self.dir.path().join("kubeconfig")
    }

    /// From now on calls fail as `plan` says; they are counted from 0 again.
    pub fn fail(&self, plan: impl Fn(u64, bool) -> Fault + Send + Sync + 'static) {
        *self
            .state
            .plan
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = Arc::new(plan);
        self.log().clear();
    }

    pub fn log(&self) -> std::sync::MutexGuard<'_, Vec<Call>> {
        self.state
            .log
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// The rights that the calls so far have needed: verb, group and resource.
    pub fn rights(&self) -> BTreeSet<(String, String, String)> {
        let log = self.log();
        // Whoever applies an object that is not there needs the right to create it, too.
        let applied = log
            .iter()
            .filter(|(method, _, created)| method == "PATCH" && *created);
        let created = applied.filter_map(|(_, path, _)| {
            let (_, group, resource) = right("PATCH", path)?;
            Some(("create".to_owned(), group, resource))
        });
        log.iter()
            .filter_map(|(method, path, _)| right(method, path))
            .chain(created)
            .collect()
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        let _ = self.inner.kill();
        let _ = self.inner.wait();
    }
}

/// What a call asks for, in the words of RBAC.
/// <https://kubernetes.io/docs/reference/access-authn-authz/authorization/#determine-the-request-verb>
fn right(method: &str, path: &str) -> Option<(String, String, String)> {
    let path = Path::new(path.split('?').next()?);
    let parts: Vec<&str> = path
        .iter()
        .skip(1)
        .filter_map(|part| part.to_str())
        .collect();
    let (group, rest) = match *parts.first()? {
        "api" => ("", parts.get(2..)?),
        _ => (*parts.get(1)?, parts.get(3..)?),
    };
    let [_, _namespace, resource, rest @ ..] = rest else {
        return None;
    };
    let resource = match rest {
        // A proxied request goes on with a path of its own.
        [_, sub, ..] => format!("{resource}/{sub}"),
        _ => (*resource).to_owned(),
    };
    let verb = match (method, rest) {
        ("GET", []) => "list",
        ("GET", _) => "get",
        ("POST", _) => "create",
        ("PATCH", _) => "patch",
        ("DELETE", _) => "delete",
        (other, _) => other,
    };
    Some((verb.to_owned(), group.to_owned(), resource))
}

async fn listen(state: Arc<State>) -> SocketAddr {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((socket, _)) = listener.accept().await {
            let state = Arc::clone(&state);
            tokio::spawn(async move {
                let service = service_fn(move |request| serve(Arc::clone(&state), request));
                // A connection that is broken on purpose ends with an error.
                let _ = auto::Builder::new(TokioExecutor::new())
                    .serve_connection(TokioIo::new(socket), service)
                    .await;
            });
        }
    });
    address
}

/// What makes hyper close the connection without an answer.
#[derive(Debug)]
struct Cut;

impl std::fmt::Display for Cut {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("cut on purpose")
    }
}

impl std::error::Error for Cut {}

/// An answer that may break off after what there is of it.
struct Answer {
    bytes: Option<Bytes>,
    breaks: bool,
}

impl hyper::body::Body for Answer {
    type Data = Bytes;
    type Error = Cut;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Cut>>> {
        Poll::Ready(match self.bytes.take() {
            Some(bytes) => Some(Ok(Frame::data(bytes))),
            None if self.breaks => Some(Err(Cut)),
            None => None,
        })
    }
}

async fn serve(state: Arc<State>, request: Request<Incoming>) -> Result<Response<Answer>, Cut> {
    let (head, body) = request.into_parts();
    let body = body.collect().await.map_err(|_| Cut)?.to_bytes();
    let path = head
        .uri
        .path_and_query()
        .map_or("/", |path| path.as_str())
        .to_owned();
    let number = {
        let mut log = state.log.lock().unwrap_or_else(PoisonError::into_inner);
        log.push((head.method.to_string(), path.clone(), false));
        log.len() as u64 - 1
    };
    let plan = Arc::clone(&state.plan.lock().unwrap_or_else(PoisonError::into_inner));
    let fault = plan(number, head.method != hyper::Method::GET);
    let answer = |code: u16, reason: &str, message: &str| {
        let status = serde_json::json!({
            "kind": "Status", "apiVersion": "v1", "status": "Failure",
            "code": code, "reason": reason, "message": message,
        });
        Response::builder()
            .status(code)
            .header("content-type", "application/json")
            .header("retry-after", if code == 429 { "1" } else { "0" })
            .body(Answer {
                bytes: Some(status.to_string().into()),
                breaks: false,
            })
            .map_err(|_| Cut)
    };
    match fault {
        Fault::CallLost => return Err(Cut),
        Fault::TooMany => return answer(429, "TooManyRequests", "too many requests"),
        Fault::Broken => return answer(500, "InternalError", "etcdserver: request timed out"),
        Fault::Conflict => {
            let message =
                "the object has been modified; please apply your changes to the latest version";
            return answer(409, "Conflict", message);
        }
        Fault::Expired => return answer(410, "Expired", "The provided continue token is too old"),
        _ => {}
    }
    let is_read = head.method == hyper::Method::GET;
    let mut forward = state
        .client
        .request(head.method, format!("{}{path}", state.inner))
        .body(body);
    for name in ["content-type", "accept"] {
        if let Some(value) = head.headers.get(name) {
            forward = forward.header(name, value);
        }
    }
    let answered = forward.send().await.map_err(|_| Cut)?;
    let (status, headers) = (answered.status(), answered.headers().clone());
    let body = answered.bytes().await.map_err(|_| Cut)?;
    if status.as_u16() == 201 {
        let mut log = state.log.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(call) = log.get_mut(number as usize) {
            call.2 = true;
        }
    }
    let mut body = body;
    if is_read && status.is_success() {
        let mut answers = state.answers.lock().unwrap_or_else(PoisonError::into_inner);
        let [before, last] = answers
            .entry(path)
            .or_insert_with(|| [body.clone(), body.clone()]);
        (*before, *last) = (last.clone(), body.clone());
        if fault == Fault::Stale {
            body = before.clone();
        }
    }
    match fault {
        Fault::AnswerLost => return Err(Cut),
        Fault::Slow(delay) => tokio::time::sleep(delay).await,
        _ => {}
    }
    let breaks = fault == Fault::HalfAnswer;
    if breaks {
        body.truncate(body.len() / 2);
    }
    let mut response = Response::new(Answer {
        bytes: Some(body),
        breaks,
    });
    *response.status_mut() = StatusCode::from_u16(status.as_u16()).map_err(|_| Cut)?;
    if let Some(kind) = headers.get("content-type") {
        response.headers_mut().insert("content-type", kind.clone());
    }
    Ok(response)
}
