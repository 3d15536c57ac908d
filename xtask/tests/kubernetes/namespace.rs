//! An environment in a namespace of its own, behind a listener of the gateway that no other test has.

use std::io::Write;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use serde_json::{Value, json};

use crate::fixture::{Ended, Fixture, Load, Running, ended, root};

/// Which of the gateway's listeners for tests are taken: `test-1` and so on. Envoy's ports are 8000
/// above theirs.
static TAKEN: Mutex<[bool; 4]> = Mutex::new([false; 4]);
static RETURNED: Condvar = Condvar::new();

/// The number of a listener that no other running test has.
struct Slot(u16);

impl Slot {
    fn take() -> Self {
        let taken = TAKEN.lock().unwrap_or_else(PoisonError::into_inner);
        let full = |taken: &mut [bool; 4]| taken.iter().all(|taken| *taken);
        let mut taken = RETURNED
            .wait_while(taken, full)
            .unwrap_or_else(PoisonError::into_inner);
        let free = taken.iter().position(|taken| !taken).unwrap();
        taken[free] = true;
        Self(free as u16 + 1)
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        TAKEN.lock().unwrap_or_else(PoisonError::into_inner)[usize::from(self.0) - 1] = false;
        RETURNED.notify_one();
    }
}

pub struct Namespace {
    pub fixture: Fixture,
    pub name: String,
    pub address: String,
    pub manifests: PathBuf,
    workload: String,
    slot: Slot,
    _contours: Option<MutexGuard<'static, ()>>,
}

/// Contour's own routes are told apart by host, and all have the same.
static CONTOURS: Mutex<()> = Mutex::new(());

const SERVICE: &str = "service";

impl Namespace {
    /// An environment whose traffic a gateway splits.
    pub fn new(test: &str) -> Self {
        Self::with(test, "gateway", &[])
    }

    /// `traffic` as in the settings, or "traefik" for its gateway; `changes` on top of them.
    pub fn with(test: &str, traffic: &str, changes: &[(&str, toml::Value)]) -> Self {
        let name = format!("{test}-{}", std::process::id());
        Self::of(SERVICE, name, traffic, changes)
    }

    /// Another service in the same namespace, behind a plain Service, on the same database.
    pub fn neighbour(&self) -> Self {
        Self::of("other-service", self.name.clone(), "replicas", &[])
    }

    fn of(workload: &str, name: String, traffic: &str, changes: &[(&str, toml::Value)]) -> Self {
        let slot = Slot::take();
        let contours = (traffic == "httpproxy")
            .then(|| CONTOURS.lock().unwrap_or_else(PoisonError::into_inner));
        let address = match traffic {
            "httpproxy" => "http://172.31.77.2:8080".to_owned(),
            "replicas" => format!("http://{}", cluster_ip(slot.0)),
            "traefik" => format!("http://172.31.77.2:{}", 18190 + slot.0),
            _ => format!("http://172.31.77.2:{}", 18090 + slot.0),
        };
        let mut settings: Vec<(&str, toml::Value)> = vec![
            ("kubernetes.namespace", name.clone().into()),
            ("kubernetes.name", workload.into()),
            ("kubernetes.overlay", "overlays/test".into()),
            (
                "kubernetes.traffic",
                traffic.replace("traefik", "gateway").into(),
            ),
            ("environments.production.platform", "kubernetes".into()),
            ("environments.production.metrics", "scrape".into()),
            (
                "environments.production.kubernetes.address",
                address.clone().into(),
            ),
            ("rollout.ready_within", "40s".into()),
            ("rollout.max_stage", "5m".into()),
            ("rollout.window", "500ms".into()),
            // Two cores carry a cluster, a database and the load of several tests: how slow an answer
            // is says nothing here.
            ("judge.latency_floor", "10s".into()),
            // A verdict of few requests: the load is most of what these tests cost.
            ("judge.tolerance", 0.05.into()),
            ("judge.latency_tolerance", 0.05.into()),
        ];
        settings.extend(changes.iter().cloned());
        let fixture = Fixture::with(&settings);
        let manifests = fixture.settings().with_file_name("k8s");
        copy(&root().join("k8s"), &manifests);
        let text = std::fs::read_to_string(fixture.settings()).unwrap();
        let own = format!("manifests = {:?}", manifests.display().to_string());
        let mut text = text.replacen("manifests = \"k8s\"", &own, 1);
        if traffic == "traefik" {
            let header = "release_header = \"x-release\"\n";
            assert!(text.contains(header), "{text}");
            text = text.replacen(header, "", 1);
        }
        std::fs::write(fixture.settings(), text).unwrap();
        let namespace = Self {
            fixture,
            name,
            address,
            manifests,
            workload: workload.to_owned(),
            slot,
            _contours: contours,
        };
        namespace.write_overlay(traffic);
        namespace.apply(&json!({
            "apiVersion": "v1",
            "kind": "Namespace",
            "metadata": {
                "name": namespace.name,
                "labels": { "pod-security.kubernetes.io/enforce": "restricted" },
            },
        }));
        namespace
    }

    /// The service on PostgreSQL, as on the cluster of `cargo xtask cluster`.
    fn write_overlay(&self, traffic: &str) {
        let slot = self.slot.0;
        let component = match traffic {
            "httpproxy" => json!(["../../components/httpproxy", "../../components/postgres"]),
            "gateway" | "traefik" => {
                json!(["../../components/gateway", "../../components/postgres"])
            }
            _ => json!(["../../components/postgres"]),
        };
        // As with latencies: that the machine was busy for seconds is no failure of a rollout.
        let environment = [
            ("SERVICE_ENVIRONMENT", "production"),
            ("SERVICE__AUTH__MODE", "off"),
            ("SERVICE__DATABASE__ACQUIRE_TIMEOUT", "13s"),
            ("SERVICE__SERVER__REQUEST_TIMEOUT", "14s"),
        ];
        let environment = environment.map(|(name, value)| {
            json!({ "op": "add", "path": "/spec/template/spec/containers/0/env/-",
                "value": { "name": name, "value": value } })
        });
        let environment = json!(environment);
        let deployment = json!([
            { "op": "replace", "path": "/spec/template/spec/containers/0/resources/requests/cpu",
              "value": "50m" },
        ]);
        let mut patches = vec![
            json!({
                "target": { "kind": "Deployment", "name": "service" },
                "patch": deployment.to_string(),
            }),
            json!({
                "target": { "kind": "Deployment|Job" },
                "patch": environment.to_string(),
            }),
        ];
        if traffic == "gateway" || traffic == "traefik" {
            let parent = json!([{ "op": "replace", "path": "/spec/parentRefs/0", "value": {
                "name": traffic, "namespace": "xtask-gateway", "sectionName": format!("test-{slot}"),
            } }]);
            patches.push(json!({
                "target": { "kind": "HTTPRoute", "name": "service" },
                "patch": parent.to_string(),
            }));
        }
        if traffic == "httpproxy" {
            let host = json!([{ "op": "replace", "path": "/spec/virtualhost/fqdn", "value": "172.31.77.2" }]);
            patches.push(json!({
                "target": { "kind": "HTTPProxy", "name": "service" },
                "patch": host.to_string(),
            }));
        }
        if traffic == "replicas" {
            let address =
                json!([{ "op": "add", "path": "/spec/clusterIP", "value": cluster_ip(slot) }]);
            patches.push(json!({
                "target": { "kind": "Service", "name": "service" },
                "patch": address.to_string(),
            }));
        }
        let mut kustomization = json!({
            "apiVersion": "kustomize.config.k8s.io/v1beta1",
            "kind": "Kustomization",
            "resources": ["../../base"],
            "components": component,
        });
        if let Some(prefix) = self
            .workload
            .strip_suffix(SERVICE)
            .filter(|p| !p.is_empty())
        {
            let name = &self.workload;
            let image = format!("{name}@sha256:{:064}", 0);
            let replace = |path: &str, value: Value| json!({ "op": "replace", "path": format!("/spec/template/spec/{path}"), "value": value });
            let own = json!([
                replace("containers/0/image", json!(image)),
                replace("volumes/0/configMap/name", json!(format!("{name}-config"))),
                replace(
                    "containers/0/env/0",
                    json!({
                        "name": "SERVICE__DATABASE__URL", "value": "postgres://postgres@postgres/postgres",
                    })
                ),
            ]);
            patches.push(json!({
                "target": { "kind": "Deployment|Job" },
                "patch": own.to_string(),
            }));
            kustomization["components"] = json!([]);
            kustomization["namePrefix"] = json!(prefix);
            kustomization["labels"] = json!([{
                "pairs": { "app.kubernetes.io/name": name },
                "includeSelectors": true, "includeTemplates": true,
            }]);
        }
        kustomization["patches"] = patches.into();
        let dir = self.manifests.join("overlays/test");
        std::fs::create_dir_all(&dir).unwrap();
        std::fs::write(dir.join("kustomization.yaml"), kustomization.to_string()).unwrap();
    }

    /// Releases that are made from now on are reached by gRPC, too: behind a listener of the gateway that no
    /// other running test has.
    pub fn add_grpc(&self, listener: Grpc) {
        self.add_component("grpc");
        let parent = json!([{ "op": "replace", "path": "/spec/parentRefs/0", "value": {
            "name": listener.gateway, "namespace": "xtask-gateway", "sectionName": listener.name(),
        } }]);
        self.change_overlay(|kustomization| {
            let patches = kustomization["patches"].as_array_mut().unwrap();
            patches.push(json!({
                "target": { "kind": "GRPCRoute", "name": "service-grpc" },
                "patch": parent.to_string(),
            }));
        });
    }

    /// Releases that are made from now on get only what they are asked for, by rules of their own.
    pub fn match_paths(&self) {
        let to = json!([{ "name": "service", "port": 80 }]);
        let is = |kind: &str, path: &str| json!([{ "path": { "type": kind, "value": path } }]);
        let below = |prefix: &str| json!({ "conditions": [{ "prefix": prefix }], "services": to });
        let http = json!([
            { "matches": is("PathPrefix", "/v1"), "backendRefs": to },
            { "matches": is("Exact", "/health/ready"), "backendRefs": to },
        ]);
        // Contour wants both.
        let grpc = json!([{ "method": { "service": "orders.v1.Orders", "method": "ListOrders" } }]);
        let replace =
            |path: &str, value: Value| json!([{ "op": "add", "path": path, "value": value }]);
        self.change_overlay(|kustomization| {
            let patches = kustomization["patches"].as_array_mut().unwrap();
            for (kind, patch) in [
                ("HTTPRoute", replace("/spec/rules", http)),
                ("GRPCRoute", replace("/spec/rules/0/matches", grpc)),
                (
                    "HTTPProxy",
                    replace("/spec/routes", json!([below("/v1"), below("/health")])),
                ),
            ] {
                patches.push(json!({ "target": { "kind": kind }, "patch": patch.to_string() }));
            }
        });
    }

    /// Releases that are made from now on have this component of `k8s/components` too.
    pub fn add_component(&self, name: &str) {
        self.change_overlay(|kustomization| {
            let components = kustomization["components"].as_array_mut().unwrap();
            components.push(json!(format!("../../components/{name}")));
        });
    }

    /// Releases that are made from now on bring these objects along.
    pub fn add_objects(&self, objects: &[Value]) {
        let overlay = self.manifests.join("overlays/test");
        let texts: Vec<String> = objects.iter().map(Value::to_string).collect();
        std::fs::write(overlay.join("more.yaml"), texts.join("\n---\n")).unwrap();
        self.change_overlay(|kustomization| {
            let resources = kustomization["resources"].as_array_mut().unwrap();
            resources.push(json!("more.yaml"));
        });
    }

    fn patch_deployment(&self, patch: &Value) {
        self.change_overlay(|kustomization| {
            let patches = kustomization["patches"].as_array_mut().unwrap();
            patches.push(json!({
                "target": { "kind": "Deployment" },
                "patch": patch.to_string(),
            }));
        });
    }

    /// Releases that are made from now on start their pods with these arguments.
    pub fn add_arguments(&self, arguments: &[&str]) {
        let path = "/spec/template/spec/containers/0/args";
        let patch = json!([{ "op": "add", "path": path, "value": arguments }]);
        self.patch_deployment(&patch);
    }

    /// Releases that are made from now on run only on nodes that have this label.
    pub fn select_nodes(&self, label: &str) {
        let patch = json!([{
            "op": "add", "path": "/spec/template/spec/nodeSelector", "value": { label: "yes" },
        }]);
        self.patch_deployment(&patch);
    }

    /// Releases that are made from now on have this Secret in their pods' environment, and no other.
    pub fn use_secret(&self, name: &str) {
        let path = "/spec/template/spec/containers/0/envFrom";
        let patch =
            json!([{ "op": "add", "path": path, "value": [{ "secretRef": { "name": name } }] }]);
        self.patch_deployment(&patch);
    }

    /// Releases that are made from now on do without those objects, and their pods have one more label,
    /// which their Service selects by.
    pub fn change_labels(&self) {
        self.change_overlay(|kustomization| {
            let resources = kustomization["resources"].as_array_mut().unwrap();
            resources.retain(|resource| resource != "more.yaml");
            let add = |path: &str| json!([{ "op": "add", "path": path, "value": "web" }]).to_string();
            let patches = kustomization["patches"].as_array_mut().unwrap();
            patches.extend([
                json!({ "target": { "kind": "Deployment" }, "patch": add("/spec/template/metadata/labels/tier") }),
                json!({ "target": { "kind": "Deployment" }, "patch": add("/spec/selector/matchLabels/tier") }),
                json!({ "target": { "kind": "Service", "name": "service" }, "patch": add("/spec/selector/tier") }),
            ]);
        });
    }

    /// Commands that are run from now on have this other value in their settings.
    pub fn change_settings(&self, old: &str, new: &str) {
        let settings = self.fixture.settings();
        let text = std::fs::read_to_string(&settings).unwrap();
        assert!(text.contains(old), "{text}");
        std::fs::write(settings, text.replace(old, new)).unwrap();
    }

    fn change_overlay(&self, change: impl FnOnce(&mut Value)) {
        let overlay = self.manifests.join("overlays/test/kustomization.yaml");
        let text = std::fs::read_to_string(&overlay).unwrap();
        let mut kustomization: Value = serde_json::from_str(&text).unwrap();
        change(&mut kustomization);
        std::fs::write(&overlay, kustomization.to_string()).unwrap();
    }

    pub fn run(&self, arguments: &[&str]) -> Ended {
        self.fixture.run(arguments)
    }

    /// A release that the cluster has the image of.
    pub fn release(&self, version: &str) -> String {
        self.release_with(version, &[])
    }

    /// A release whose `production.toml` has these lines too.
    pub fn release_with(&self, version: &str, lines: &[&str]) -> String {
        self.fixture
            .image(version, lines, &["--load", "production"])
    }

    /// A command with another way to the cluster.
    fn command_by(&self, kubeconfig: &std::path::Path, arguments: &[&str]) -> Command {
        let mut command = self.fixture.command(arguments);
        command.env("XTASK_KUBECONFIG", kubeconfig);
        command
    }

    /// Runs a command with another way to the cluster.
    pub fn run_by(&self, kubeconfig: &std::path::Path, arguments: &[&str]) -> Ended {
        ended(self.command_by(kubeconfig, arguments).output().unwrap())
    }

    pub fn deploy(&self, release: &str) -> Ended {
        self.run(&[
            "deploy-staging",
            "--environment",
            "production",
            "--release",
            release,
        ])
    }

    /// A canary that goes on, once its candidate has been judged for the first time.
    pub fn judged_canary(&self, release: &str) -> Running {
        self.judged_canary_by(std::path::Path::new(&kubeconfig()), release)
    }

    /// The same with another way to the cluster.
    pub fn judged_canary_by(&self, kubeconfig: &std::path::Path, release: &str) -> Running {
        let start = ["canary", "start", "--release", release];
        Running::until(self.command_by(kubeconfig, &start), |event| {
            event["event"] == "judgement"
        })
    }

    /// A first release in service.
    pub fn in_service(&self, version: &str) -> String {
        let release = self.release(version);
        self.deploy(&release).expect(0, "healthy");
        release
    }

    /// Requests that go on until they are stopped; several environments at a time leave the cluster room.
    pub fn load(&self) -> Load {
        Load::with(self.address.clone(), Load::client(), 40)
    }

    /// The same with a connection for each request, as a plain Service splits connections.
    pub fn load_by_connections(&self) -> Load {
        let client = Load::client().pool_max_idle_per_host(0);
        Load::with(self.address.clone(), client, 60)
    }

    pub fn kubectl(&self, words: &[&str]) -> Output {
        Command::new(kubectl())
            .args(["--kubeconfig", &kubeconfig(), "--namespace", &self.name])
            .args(words)
            .stdin(Stdio::null())
            .output()
            .unwrap()
    }

    /// What kubectl prints; it must succeed.
    #[track_caller]
    pub fn ask(&self, words: &[&str]) -> String {
        let output = self.kubectl(words);
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "kubectl {words:?}: {said}");
        String::from_utf8(output.stdout).unwrap()
    }

    pub fn json(&self, words: &[&str]) -> Value {
        let words = [words, &["--output", "json"]].concat();
        serde_json::from_str(&self.ask(&words)).unwrap()
    }

    /// Asks for a pod's end, as a drain does; whether the disruption budget allows it now.
    pub fn evict(&self, pod: &str) -> bool {
        let eviction = json!({
            "apiVersion": "policy/v1", "kind": "Eviction",
            "metadata": { "name": pod, "namespace": self.name },
        });
        let file = self.manifests.join("eviction.json");
        std::fs::write(&file, eviction.to_string()).unwrap();
        let path = format!("/api/v1/namespaces/{}/pods/{pod}/eviction", self.name);
        let file = file.display().to_string();
        let asked = self.kubectl(&["create", "--raw", &path, "--filename", &file]);
        let said = String::from_utf8_lossy(&asked.stderr);
        // One that is gone already needs no eviction.
        asked.status.success() || said.contains("not found")
    }

    /// Whether the deployer may do so: a verb on a resource of a group.
    pub fn may(&self, (verb, group, resource): &(String, String, String)) -> bool {
        let deployer = format!("--as=system:serviceaccount:{}:deployer", self.name);
        let (resource, sub) = resource.split_once('/').unwrap_or((resource, ""));
        let resource = match group.as_str() {
            "" => resource.to_owned(),
            group => format!("{resource}.{group}"),
        };
        let asked = ["auth", "can-i", verb, &resource, &deployer];
        let asked = self.kubectl(&[&asked[..], &[&format!("--subresource={sub}")]].concat());
        asked.stdout.starts_with(b"yes")
    }

    pub fn apply(&self, object: &Value) {
        let mut child = Command::new(kubectl())
            .args(["--kubeconfig", &kubeconfig(), "--namespace", &self.name])
            .args([
                "apply",
                "--server-side",
                "--force-conflicts",
                "--filename",
                "-",
            ])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let mut stdin = child.stdin.take().unwrap();
        stdin.write_all(object.to_string().as_bytes()).unwrap();
        drop(stdin);
        assert!(child.wait().unwrap().success(), "{object}");
    }

    /// Deployments that run pods, but a neighbour's: their release's short id, pods wanted and ready.
    pub fn running(&self) -> Vec<(String, u64, u64)> {
        let list = self.json(&["get", "deployments"]);
        let mut running: Vec<(String, u64, u64)> = list["items"]
            .as_array()
            .unwrap()
            .iter()
            .filter(|deployment| {
                let of = deployment["metadata"]["labels"]["xtask.dev/workload"].as_str();
                deployment["spec"]["replicas"] != 0 && of.is_none_or(|of| of == self.workload)
            })
            .map(|deployment| {
                let release = &deployment["metadata"]["labels"]["xtask.dev/release"];
                (
                    release.as_str().unwrap_or("none").to_owned(),
                    deployment["spec"]["replicas"].as_u64().unwrap(),
                    deployment["status"]["readyReplicas"].as_u64().unwrap_or(0),
                )
            })
            .collect();
        running.sort();
        running
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        // Its Service's address is the next one's.
        if self.address.contains(&cluster_ip(self.slot.0)) {
            let _ = self.kubectl(&["delete", "service", &self.workload]);
        }
        // And so is its place at the gateway, where another's rule might match better.
        let routes = "httproutes,grpcroutes,httpproxies";
        let _ = self.kubectl(&["delete", routes, "--all"]);
        // The cluster finishes it by itself.
        let _ = self.kubectl(&["delete", "namespace", &self.name, "--wait=false"]);
    }
}

/// A listener for calls by gRPC.
#[derive(Clone, Copy)]
pub struct Grpc {
    pub gateway: &'static str,
    pub number: u16,
}

impl Grpc {
    fn name(self) -> String {
        format!("test-grpc-{}", self.number)
    }

    pub fn address(self) -> String {
        let before = match self.gateway {
            "traefik" => 18194,
            _ => 18094,
        };
        format!("http://172.31.77.2:{}", before + self.number)
    }

    /// Lists of orders are asked for until they are stopped.
    pub fn load(self) -> Load {
        let client = Load::client().http2_prior_knowledge();
        Load::of(list, self.address(), client, 10)
    }

    /// The settings of an environment behind it.
    pub fn setting(self) -> (&'static str, toml::Value) {
        let name = "environments.production.kubernetes.grpc_address";
        (name, self.address().into())
    }
}

fn list(client: &reqwest::Client, address: &str, _number: u64) -> reqwest::RequestBuilder {
    /// An empty message: not compressed, and no bytes long.
    const EMPTY: &[u8] = &[0; 5];
    client
        .post(format!("{address}/orders.v1.Orders/ListOrders"))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(EMPTY)
}

/// An address among the cluster's Services, known before there is one.
fn cluster_ip(slot: u16) -> String {
    format!("10.96.77.{}", 200 + slot)
}

/// What a command that failed said at the end must be what `snapshots/` has, but for what differs in
/// every run. (`INSTA_UPDATE=always` writes them anew.)
#[track_caller]
pub fn ends_with(name: &str, ended: &Ended) {
    let is_verdict = |line: &str| {
        ["error ", "failed ", "rolled back "]
            .iter()
            .any(|word| line.starts_with(word))
    };
    // How many events there are by then, and in which order, is the cluster's affair.
    let lines = ended.said.split_inclusive('\n');
    let last: String = lines
        .skip_while(|line| !is_verdict(line))
        .filter(|line| !line.trim_start().starts_with("event of"))
        .collect();
    assert!(!last.is_empty(), "{}", ended.said);
    let mut settings = insta::Settings::clone_current();
    settings.set_omit_expression(true);
    settings.set_prepend_module_to_snapshot(false);
    for (pattern, instead) in VARYING {
        settings.add_filter(pattern, *instead);
    }
    settings.bind(|| insta::assert_snapshot!(name, last));
}

/// What differs in every run.
const VARYING: &[(&str, &str)] = &[
    (r"[0-9]{8}[Tt][0-9]{6}\.[0-9]{3}[Zz]", "[time]"),
    (r"[0-9a-f]{64}", "[digest]"),
    (r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", "[uid]"),
    (r"\b[0-9a-f]{12}(-[0-9a-z]{7,10})?-[0-9a-z]{5}\b", "[pod]"),
    (r"\b[0-9a-f]{12}\b", "[release]"),
    (r"\b[0-9]+\.[0-9]+ s;", "[seconds];"),
    (r"\b[0-9]+ requests", "[number] requests"),
    (r"pod=[^ (]+", "pod=[pod]"),
    (r"172\.31\.77\.1:[0-9]+", "[here]"),
    (r"back-off [0-9]+s", "back-off [seconds]"),
    // What the network of the machine makes of the name of a registry that there is not.
    (r"ErrImagePull: .*", "ErrImagePull: [why]"),
    (r"\b([a-z-]+)-[0-9]+\b", "$1-[process]"),
];

/// The first digits of a release's id, as they are in names.
pub fn short(release: &str) -> String {
    release[..12].to_owned()
}

pub fn variable(name: &str) -> String {
    std::env::var(name).unwrap_or_else(|_| {
        panic!("{name} is not set: these tests are run by `cargo xtask ci --only kubernetes`")
    })
}

pub fn kubeconfig() -> String {
    variable("XTASK_KUBECONFIG")
}

pub fn kubectl() -> String {
    variable("XTASK_KUBECTL")
}

pub fn copy(from: &std::path::Path, to: &std::path::Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        let to = to.join(path.file_name().unwrap());
        if path.is_dir() {
            copy(&path, &to);
        } else {
            std::fs::copy(&path, &to).unwrap();
        }
    }
}
