//! Calls of the API server, on objects as JSON: each with a time limit, and repeated where it
//! failed in a way that passes.
//!
//! There is no watch and no cache: what is decided on is read at that moment, so no stale list, no
//! expired resource version and no closed watch can mislead a rollout.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use http::{Method, Request, header};
use http_body_util::BodyExt;
use kube::config::{KubeConfigOptions, Kubeconfig};
use serde_json::{Value, json};

use crate::cluster::{self, Cluster};
use crate::config::Kubernetes as Settings;

/// The name under which this program owns fields of objects.
/// <https://kubernetes.io/docs/reference/using-api/server-side-apply/#managers>
pub const FIELD_MANAGER: &str = "xtask";

/// A call that takes longer is taken for lost.
const CALL: Duration = Duration::from_secs(10);
/// How long a call is repeated for before its failure counts.
const PATIENCE: Duration = Duration::from_secs(15);
/// The same where waiting would keep other things from being seen.
const GLANCE: Duration = Duration::from_secs(2);
const GLANCE_CALL: Duration = Duration::from_secs(5);
/// How often a write that names no version is repeated because the object was just changed.
const ATTEMPTS: u32 = 5;
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);

/// A kind of object, and where the API server has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Kind {
    pub api_version: String,
    pub kind: String,
}

/// What the API server said when it refused.
/// <https://kubernetes.io/docs/reference/kubernetes-api/common-definitions/status/>
#[derive(Debug)]
pub struct Refusal {
    pub code: u16,
    reason: String,
    message: String,
}

impl std::fmt::Display for Refusal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.message)?;
        if self.code == 403 && self.message.contains("cannot") {
            f.write_str("; k8s/deployer/ has the rights that are needed")?;
        }
        Ok(())
    }
}

impl std::error::Error for Refusal {}

/// Why a call failed.
enum Failure {
    Refused {
        refusal: Refusal,
        wait: Option<u64>,
    },
    /// Nobody knows whether the call took effect.
    Lost(anyhow::Error),
}

impl Failure {
    /// Whether the same call may succeed a little later.
    fn passes(&self) -> bool {
        match self {
            Self::Lost(_) => true,
            Self::Refused { refusal, .. } => {
                // 410: what a list goes on from is forgotten, and it begins anew.
                matches!(refusal.code, 410 | 429 | 500 | 502 | 503 | 504)
            }
        }
    }
}

impl Kind {
    pub fn new(api_version: &str, kind: &str) -> Self {
        Self {
            api_version: api_version.to_owned(),
            kind: kind.to_owned(),
        }
    }

    pub fn of(object: &Value) -> Result<Self> {
        match (object["apiVersion"].as_str(), object["kind"].as_str()) {
            (Some(api_version), Some(kind)) => Ok(Self::new(api_version, kind)),
            _ => bail!("an object in the manifests has no apiVersion or no kind"),
        }
    }

    /// The group of the API; empty for the first one.
    pub fn group(&self) -> &str {
        self.split().0
    }

    fn split(&self) -> (&str, &str) {
        let version = self.api_version.as_str();
        version.split_once('/').unwrap_or(("", version))
    }

    /// The resource's name in paths and in rules of RBAC.
    pub fn plural(&self) -> String {
        let (group, version) = self.split();
        let kind = kube::core::GroupVersionKind::gvk(group, version, &self.kind);
        kube::core::ApiResource::from_gvk(&kind).plural
    }

    fn path(&self, namespace: &str) -> String {
        let root = match self.api_version.contains('/') {
            true => "apis",
            false => "api",
        };
        let (version, plural) = (&self.api_version, self.plural());
        format!("/{root}/{version}/namespaces/{namespace}/{plural}")
    }
}

/// Now, as leases and events have it: RFC 3339 with microseconds.
/// <https://kubernetes.io/docs/reference/kubernetes-api/workload-resources/> (MicroTime)
pub fn micro_time() -> String {
    jiff::Timestamp::now()
        .strftime("%Y-%m-%dT%H:%M:%S.%6fZ")
        .to_string()
}

/// Now, as everything else has it.
pub fn time() -> String {
    jiff::Timestamp::now()
        .strftime("%Y-%m-%dT%H:%M:%SZ")
        .to_string()
}

/// The name of an object.
pub fn name(object: &Value) -> &str {
    object["metadata"]["name"].as_str().unwrap_or_default()
}

pub fn resource_version(object: &Value) -> &str {
    object["metadata"]["resourceVersion"]
        .as_str()
        .unwrap_or_default()
}

pub fn annotation<'a>(object: &'a Value, name: &str) -> Option<&'a str> {
    object["metadata"]["annotations"][name].as_str()
}

pub fn label<'a>(object: &'a Value, name: &str) -> Option<&'a str> {
    object["metadata"]["labels"][name].as_str()
}

/// The items of a list, or nothing.
pub fn items(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

/// Whether `error` says that somebody else has changed the object meanwhile, or owns its field.
pub fn is_conflict(error: &anyhow::Error) -> bool {
    error
        .downcast_ref::<Refusal>()
        .is_some_and(|r| r.code == 409)
}

/// Whether `error` says that the object was changed between reading and writing it.
pub fn is_race(error: &anyhow::Error) -> bool {
    is_conflict(error) && !is_owned_by_others(error) && !is_there_already(error)
}

/// Whether `error` says that there is an object of that name.
pub fn is_there_already(error: &anyhow::Error) -> bool {
    error
        .downcast_ref::<Refusal>()
        .is_some_and(|refusal| refusal.reason == "AlreadyExists")
}

/// Whether `error` says that another manager owns a field, and not that the object has changed.
pub fn is_owned_by_others(error: &anyhow::Error) -> bool {
    error
        .downcast_ref::<Refusal>()
        .is_some_and(|r| r.code == 409 && r.message.starts_with("Apply failed with"))
}

/// A namespace of a cluster.
#[derive(Clone)]
pub struct Api {
    client: kube::Client,
    pub namespace: String,
    patience: Duration,
    /// How long one call may take.
    limit: Duration,
}

impl Api {
    /// Opens the cluster that the settings name; never the user's current context.
    pub async fn open(settings: &Settings) -> Result<Self> {
        let given = std::env::var_os(cluster::KUBECONFIG);
        let (config, context) = match (&settings.context, given) {
            (Some(context), _) => {
                let config = Kubeconfig::read();
                let config = config.map_err(|error| {
                    anyhow!("kubernetes.context = {context:?} asks for your kubeconfig: {error}")
                })?;
                let known = config.contexts.iter().map(|known| known.name.as_str());
                let known: Vec<&str> = known.collect();
                if !known.contains(&context.as_str()) {
                    bail!(
                        "kubernetes.context = {context:?}: your kubeconfig has no such context; it has {}",
                        known.join(", ")
                    );
                }
                (config, Some(context.clone()))
            }
            (None, Some(path)) => {
                let cluster = Cluster::open()?;
                if *path == *cluster.kubeconfig() {
                    cluster.check_node()?;
                }
                let config = Kubeconfig::read_from(&path);
                let config = config.map_err(|error| anyhow!("{}: {error}", cluster::KUBECONFIG))?;
                (config, None)
            }
            (None, None) => {
                let cluster = Cluster::open()?;
                if !cluster.is_running() {
                    bail!(
                        "kubernetes.context names no cluster, and none of ours is running: \
                         `cargo xtask cluster up` starts one"
                    );
                }
                cluster.check_node()?;
                let config = Kubeconfig::read_from(cluster.kubeconfig())
                    .context("reading the cluster's kubeconfig")?;
                (config, None)
            }
        };
        let options = KubeConfigOptions {
            context,
            ..KubeConfigOptions::default()
        };
        let config = kube::Config::from_custom_kubeconfig(config, &options)
            .await
            .context("in the kubeconfig")?;
        Ok(Self {
            client: kube::Client::try_from(config).context("preparing calls of the API server")?,
            namespace: settings.namespace.clone(),
            patience: PATIENCE,
            limit: CALL,
        })
    }

    /// The same, whose calls are repeated for so long.
    #[must_use]
    pub fn patient(&self, patience: Duration) -> Self {
        Self {
            patience,
            ..self.clone()
        }
    }

    /// The same for calls whose failure matters to nobody, or is dealt with by whoever calls.
    #[must_use]
    pub fn impatient(&self) -> Self {
        Self {
            limit: GLANCE_CALL,
            ..self.patient(GLANCE)
        }
    }

    async fn once(
        &self,
        method: &Method,
        path: &str,
        kind: &str,
        body: &[u8],
    ) -> Result<String, Failure> {
        let lost = |error: anyhow::Error| Failure::Lost(error);
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header(header::CONTENT_TYPE, kind)
            .body(kube::client::Body::from(body.to_vec()))
            .map_err(|error| lost(error.into()))?;
        let call = async {
            let answer = self.client.send(request).await?;
            let (head, body) = answer.into_parts();
            anyhow::Ok((head, body.collect().await?.to_bytes()))
        };
        let (head, body) = tokio::time::timeout(self.limit, call)
            .await
            .map_err(|_| {
                lost(anyhow::anyhow!(
                    "no answer within {} s",
                    self.limit.as_secs()
                ))
            })?
            .map_err(lost)?;
        let text = String::from_utf8_lossy(&body).into_owned();
        if head.status.is_success() {
            return Ok(text);
        }
        let status: Value = serde_json::from_str(&text).unwrap_or_default();
        let code = head.status.as_u16();
        let message = match status["message"].as_str() {
            Some(message) if !message.is_empty() => message.to_owned(),
            _ => format!("{}: {}", head.status, text.trim()),
        };
        let header = head.headers.get(header::RETRY_AFTER);
        let wait = header
            .and_then(|value| value.to_str().ok()?.parse().ok())
            .or_else(|| status["details"]["retryAfterSeconds"].as_u64());
        let reason = status["reason"].as_str().unwrap_or_default().to_owned();
        let refusal = Refusal {
            code,
            reason,
            message,
        };
        Err(Failure::Refused { refusal, wait })
    }

    /// A write. Where it names no version, that somebody else was quicker is no reason to give up.
    async fn write(&self, method: Method, path: &str, kind: &str, body: &Value) -> Result<Value> {
        let text = body.to_string();
        let is_pinned = !body["metadata"]["resourceVersion"].is_null();
        for _ in 1..ATTEMPTS {
            match self.json(method.clone(), path, kind, text.as_bytes()).await {
                Err(error) if !is_pinned && is_race(&error) => {}
                answer => return answer,
            }
        }
        self.json(method, path, kind, text.as_bytes()).await
    }

    /// A call, repeated while it may yet succeed. Every write of ours can be repeated: it names the
    /// version that it changes, or says how the object should be.
    async fn call(&self, method: Method, path: &str, kind: &str, body: &[u8]) -> Result<String> {
        let deadline = Instant::now() + self.patience;
        let mut pause = FIRST_PAUSE;
        loop {
            let failure = match self.once(&method, path, kind, body).await {
                Ok(text) => return Ok(text),
                Err(failure) => failure,
            };
            let asked = match &failure {
                Failure::Refused { wait, .. } => wait.map(Duration::from_secs),
                Failure::Lost(_) => None,
            };
            let wait = asked.unwrap_or(pause);
            if !failure.passes() || Instant::now() + wait > deadline {
                return Err(match failure {
                    Failure::Refused { refusal, .. } => refusal.into(),
                    Failure::Lost(error) => {
                        error.context(format!("the API server, {method} {}", without_query(path)))
                    }
                });
            }
            tokio::time::sleep(wait).await;
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    async fn json(&self, method: Method, path: &str, kind: &str, body: &[u8]) -> Result<Value> {
        let text = self.call(method, path, kind, body).await?;
        serde_json::from_str(&text).context("reading the API server's answer")
    }

    /// What a path of the API server answers, as text.
    pub async fn text(&self, path: &str) -> Result<String> {
        self.call(Method::GET, path, "application/json", b"").await
    }

    pub async fn get(&self, kind: &Kind, name: &str) -> Result<Option<Value>> {
        let path = format!("{}/{name}", kind.path(&self.namespace));
        missing_is_none(self.json(Method::GET, &path, "application/json", b"").await)
    }

    /// All objects with these labels, as they are now.
    pub async fn list(&self, kind: &Kind, labels: &str) -> Result<Vec<Value>> {
        let path = format!(
            "{}?labelSelector={}",
            kind.path(&self.namespace),
            encode(labels)
        );
        let mut list = self
            .json(Method::GET, &path, "application/json", b"")
            .await?;
        let Value::Array(mut items) = list["items"].take() else {
            return Ok(Vec::new());
        };
        // In a list the items do not say what they are.
        for item in &mut items {
            item["apiVersion"] = json!(kind.api_version);
            item["kind"] = json!(kind.kind);
        }
        Ok(items)
    }

    /// Makes the object as `wanted` says, and leaves what it does not mention. A resource version in
    /// it is a precondition. Where somebody else owns one of its fields, it is refused unless
    /// `force` takes the field over.
    /// <https://kubernetes.io/docs/reference/using-api/server-side-apply/>
    pub async fn apply(&self, wanted: &Value, force: bool, dry_run: bool) -> Result<Value> {
        let kind = Kind::of(wanted)?;
        let path = format!(
            "{}/{}?fieldManager={FIELD_MANAGER}&force={force}{}",
            kind.path(&self.namespace),
            name(wanted),
            if dry_run { "&dryRun=All" } else { "" }
        );
        let content = "application/apply-patch+yaml";
        let applied = self.write(Method::PATCH, &path, content, wanted).await;
        applied.with_context(|| format!("{} {}", kind.kind, name(wanted)))
    }

    /// Creates an object; one that is there already is an error with code 409.
    pub async fn create(&self, object: &Value) -> Result<Value> {
        let kind = Kind::of(object)?;
        let path = format!(
            "{}?fieldManager={FIELD_MANAGER}",
            kind.path(&self.namespace)
        );
        self.write(Method::POST, &path, "application/json", object)
            .await
    }

    /// Asks a question about whoever asks; nothing is kept of it.
    pub async fn review(&self, kind: &str, spec: Value) -> Result<Value> {
        let api_version = "authorization.k8s.io/v1";
        let review = json!({ "apiVersion": api_version, "kind": kind, "spec": spec });
        let path = format!(
            "/apis/{api_version}/{}",
            Kind::new(api_version, kind).plural()
        );
        self.write(Method::POST, &path, "application/json", &review)
            .await
    }

    /// Changes parts of an object, which must be of the version that `change` names. Where the object
    /// has been removed since, that version is gone as it is after a change: it is looked at again.
    /// <https://datatracker.ietf.org/doc/html/rfc7396>
    pub async fn merge(&self, kind: &Kind, name: &str, change: &Value) -> Result<Value> {
        let path = format!(
            "{}/{name}?fieldManager={FIELD_MANAGER}",
            kind.path(&self.namespace)
        );
        let content = "application/merge-patch+json";
        let merged = self.write(Method::PATCH, &path, content, change).await;
        merged.map_err(removed_is_changed)
    }

    /// Changes the conditions of an object, and no other of its fields.
    pub async fn apply_status(&self, wanted: &Value) -> Result<Value> {
        let kind = Kind::of(wanted)?;
        let path = format!(
            "{}/{}/status?fieldManager={FIELD_MANAGER}-status&force=true",
            kind.path(&self.namespace),
            name(wanted)
        );
        let body = wanted.to_string();
        let content = "application/apply-patch+yaml";
        self.json(Method::PATCH, &path, content, body.as_bytes())
            .await
    }

    /// Removes this very version of an object, and no later one; with it what it owns.
    pub async fn delete(&self, object: &Value) -> Result<()> {
        let kind = Kind::of(object)?;
        let path = format!("{}/{}", kind.path(&self.namespace), name(object));
        let body = json!({
            "apiVersion": "v1",
            "kind": "DeleteOptions",
            "propagationPolicy": "Background",
            "preconditions": {
                "uid": object["metadata"]["uid"],
                "resourceVersion": object["metadata"]["resourceVersion"],
            },
        });
        let body = body.to_string();
        let deleted = self
            .json(Method::DELETE, &path, "application/json", body.as_bytes())
            .await;
        missing_is_none(deleted).map(|_| ())
    }

    /// What a pod answers on a port, asked by way of the API server.
    pub async fn ask_pod(&self, pod: &str, port: u16, path: &str) -> Result<String> {
        let namespace = &self.namespace;
        self.text(&format!(
            "/api/v1/namespaces/{namespace}/pods/{pod}:{port}/proxy{path}"
        ))
        .await
    }

    /// The last lines of a pod's container; of the one before its restart where there was one.
    pub async fn logs(&self, pod: &str, container: &str, previous: bool) -> Result<Vec<String>> {
        let path = format!(
            "/api/v1/namespaces/{}/pods/{pod}/log?container={container}&tailLines=15&previous={previous}",
            self.namespace
        );
        Ok(self.text(&path).await?.lines().map(str::to_owned).collect())
    }

    /// Whether `error` says that there is no such namespace or kind.
    pub fn is_missing(error: &anyhow::Error) -> bool {
        error
            .downcast_ref::<Refusal>()
            .is_some_and(|r| r.code == 404)
    }
}

fn missing_is_none(answer: Result<Value>) -> Result<Option<Value>> {
    match answer {
        Ok(value) => Ok(Some(value)),
        Err(error) if Api::is_missing(&error) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Makes the refusal of a change to what was removed meanwhile that of a change to another version.
fn removed_is_changed(error: anyhow::Error) -> anyhow::Error {
    match error.downcast::<Refusal>() {
        Ok(refusal) if refusal.code == 404 => anyhow::Error::new(Refusal {
            code: 409,
            ..refusal
        }),
        Ok(refusal) => refusal.into(),
        Err(error) => error,
    }
}

fn without_query(path: &str) -> &str {
    path.split('?').next().unwrap_or(path)
}

/// Percent-encodes what has a meaning in a query.
fn encode(text: &str) -> String {
    let mut encoded = String::new();
    for byte in text.bytes() {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => {
                encoded.push(char::from(byte));
            }
            other => encoded.push_str(&format!("%{other:02X}")),
        }
    }
    encoded
}
