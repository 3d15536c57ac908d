//! A webhook that the API server asks about each write of an object of a namespace, and what a rollout makes
//! of its answers. <https://kubernetes.io/docs/reference/access-authn-authz/extensible-admission-controllers/>

use std::sync::Arc;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use http_body_util::{BodyExt, Full};
use hyper::body::{Bytes, Incoming};
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use rustls::ServerConfig;
use rustls::pki_types::PrivatePkcs8KeyDer;
use serde_json::{Value, json};
use tokio_rustls::TlsAcceptor;

use crate::fixture::eventually;
use crate::namespace::{Namespace, ends_with, short};

/// This machine, as the cluster's node sees it.
const HERE: &str = "172.31.77.1";

/// What is answered to a question about an object, but for the question's uid.
type Answer = fn(&Value) -> Value;

struct Webhook<'a> {
    namespace: &'a Namespace,
    /// `Mutating` or `Validating`.
    kind: &'static str,
    runtime: Option<tokio::runtime::Runtime>,
}

impl<'a> Webhook<'a> {
    /// Is asked about the namespace's Deployments from now on, and nothing is taken where it does not answer.
    fn start(namespace: &'a Namespace, kind: &'static str, answer: Answer) -> Self {
        let rcgen::CertifiedKey { cert, signing_key } =
            rcgen::generate_simple_self_signed([HERE.to_owned()]).unwrap();
        let key = PrivatePkcs8KeyDer::from(signing_key.serialize_der());
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![cert.der().clone()], key.into())
            .unwrap();
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let listener = runtime
            .block_on(tokio::net::TcpListener::bind((HERE, 0)))
            .unwrap();
        let port = listener.local_addr().unwrap().port();
        runtime.spawn(listen(
            listener,
            TlsAcceptor::from(Arc::new(config)),
            answer,
        ));
        let webhook = Self {
            namespace,
            kind,
            runtime: Some(runtime),
        };
        namespace.apply(&json!({
            "apiVersion": "admissionregistration.k8s.io/v1",
            "kind": format!("{kind}WebhookConfiguration"),
            "metadata": { "name": webhook.name() },
            "webhooks": [{
                "name": "deployments.xtask.dev",
                "admissionReviewVersions": ["v1"],
                "sideEffects": "None",
                "failurePolicy": "Fail",
                "timeoutSeconds": 5,
                "clientConfig": {
                    "url": format!("https://{HERE}:{port}/"),
                    "caBundle": STANDARD.encode(cert.pem()),
                },
                "namespaceSelector": { "matchLabels": {
                    "kubernetes.io/metadata.name": namespace.name,
                } },
                "rules": [{
                    "apiGroups": ["apps"], "apiVersions": ["v1"], "resources": ["deployments"],
                    "operations": ["CREATE", "UPDATE"],
                }],
            }],
        }));
        webhook
    }

    fn name(&self) -> String {
        format!("{}-{}", self.kind.to_lowercase(), self.namespace.name)
    }

    /// The API server goes on asking.
    fn stop_answering(&mut self) {
        self.runtime.take().unwrap().shutdown_background();
    }
}

impl Drop for Webhook<'_> {
    fn drop(&mut self) {
        let kind = format!("{}webhookconfiguration", self.kind.to_lowercase());
        self.namespace.kubectl(&["delete", &kind, &self.name()]);
    }
}

async fn listen(listener: tokio::net::TcpListener, acceptor: TlsAcceptor, answer: Answer) {
    while let Ok((socket, _)) = listener.accept().await {
        let acceptor = acceptor.clone();
        tokio::spawn(async move {
            let Ok(socket) = acceptor.accept(socket).await else {
                return;
            };
            let service = service_fn(move |request| review(request, answer));
            // The API server ends connections as it likes.
            let _ = auto::Builder::new(TokioExecutor::new())
                .serve_connection(TokioIo::new(socket), service)
                .await;
        });
    }
}

async fn review(
    request: Request<Incoming>,
    answer: Answer,
) -> Result<Response<Full<Bytes>>, hyper::Error> {
    let body = request.into_body().collect().await?.to_bytes();
    let mut review: Value = serde_json::from_slice(&body).unwrap();
    let asked = review["request"].take();
    let mut response = answer(&asked);
    response["uid"] = asked["uid"].clone();
    let review = json!({
        "apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "response": response,
    });
    let answer = Response::builder().header("content-type", "application/json");
    Ok(answer.body(review.to_string().into()).unwrap())
}

/// As meshes and policy engines do: one label more on each pod.
fn label_pods(_: &Value) -> Value {
    let label = json!([{
        "op": "add", "path": "/spec/template/metadata/labels/team", "value": "orders",
    }]);
    let patch = STANDARD.encode(label.to_string());
    json!({ "allowed": true, "patchType": "JSONPatch", "patch": patch })
}

fn refuse(asked: &Value) -> Value {
    let name = &asked["object"]["metadata"]["labels"]["xtask.dev/workload"];
    let message = format!("{name} needs a cost centre");
    json!({ "allowed": false, "status": { "code": 403, "message": message } })
}

/// Whoever is asked by the API server changes what a release is, and that shows before anything is changed;
/// refuses it, or is not there: then nothing is begun.
#[test]
fn a_webhook_is_heard_before_anything_is_changed() {
    let namespace = Namespace::with("webhook", "gateway", &[("rollout.min_stage", "4s".into())]);
    let first = namespace.in_service("1.0.0");
    let load = namespace.load();
    let start = |release: &str| namespace.run(&["canary", "start", "--release", release]);

    let output = "jsonpath={.spec.template.metadata.labels.team}";
    // Asks as a write would; the API server takes a moment to learn of a webhook.
    let dry_run = || {
        let deployment = format!("deployment/service-{}", short(&first));
        let patch = r#"{"metadata":{"annotations":{"note":"nothing"}}}"#;
        let dry = ["patch", &deployment, "--dry-run=server", "--patch", patch];
        namespace.kubectl(&[&dry[..], &["--output", output]].concat())
    };

    let changes = Webhook::start(&namespace, "Mutating", label_pods);
    eventually("the webhook", || dry_run().stdout == b"orders");
    let second = namespace.release_with("1.1.0", &["# only its configuration differs"]);
    let ended = start(&second).expect(0, "healthy");
    // Its image and its configuration are others, and nothing else is: what the server fills in is no change.
    let is_told = |line: &&str| ["+ ", "- ", "~ "].iter().any(|sign| line.starts_with(sign));
    let is_its_own = |line: &&str| line.contains("].image: ") || line.contains(".configMap.name: ");
    let lines = ended.said.lines().map(str::trim).filter(is_told);
    let (own, others): (Vec<&str>, Vec<&str>) = lines.partition(is_its_own);
    assert_eq!(own.len(), 4, "{own:#?}");
    assert_eq!(
        others,
        ["+ Deployment service-RELEASE spec.template.metadata.labels.team: \"orders\""]
    );
    let deployment = format!("deployment/service-{}", short(&second));
    let team = namespace.ask(&["get", &deployment, "--output", output]);
    assert_eq!(team, "orders");
    namespace.run(&["rollback"]).expect(0, "healthy");
    drop(changes);

    let third = namespace.release("1.2.0");
    let mut refuses = Webhook::start(&namespace, "Validating", refuse);
    eventually("the webhook", || !dry_run().status.success());
    ends_with("webhook", &start(&third).expect(2, "failed"));
    refuses.stop_answering();
    ends_with("webhook-away", &start(&third).expect(2, "failed"));
    assert_eq!(namespace.running(), [(short(&first), 2, 2)]);
    load.stop_without_failures();
}
