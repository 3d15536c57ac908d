//! Rollouts judged by a Prometheus that scrapes the pods, and what happens when it is away.

use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde_json::{Value, json};

use crate::fixture::{eventually, root};
use crate::namespace::{Namespace, kubeconfig, kubectl, short};

/// The image that the cluster has, or else the one that can be pulled.
fn image() -> String {
    let images = std::path::Path::new(&kubeconfig()).with_file_name("../images.json");
    if let Ok(text) = std::fs::read_to_string(images) {
        let images: Value = serde_json::from_str(&text).unwrap();
        return images["prometheus"].as_str().unwrap().to_owned();
    }
    let text = std::fs::read_to_string(root().join("config/tools.toml")).unwrap();
    let pins: toml::Table = text.parse().unwrap();
    let image = &pins["images"]["prometheus"]["ordinary"];
    image.as_str().unwrap().to_owned()
}

/// Tells Prometheus where the pods are and which release each is of. Its own way to ask Kubernetes
/// is not in the distribution's build.
struct Discovery {
    address: SocketAddr,
    stop: Arc<AtomicBool>,
    threads: Vec<std::thread::JoinHandle<()>>,
}

impl Discovery {
    fn start(namespace: &str) -> Self {
        // The machine's end of its link to the node.
        let listener = TcpListener::bind("172.31.77.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        // Whoever asks waits a second at most, and kubectl may take longer on a busy machine.
        let targets = Arc::new(Mutex::new(json!([])));
        let looks = {
            let (stop, targets) = (Arc::clone(&stop), Arc::clone(&targets));
            let namespace = namespace.to_owned();
            move || {
                while !stop.load(Ordering::SeqCst) {
                    if let Some(found) = find(&namespace) {
                        *targets.lock().unwrap() = found;
                    }
                    std::thread::sleep(Duration::from_millis(500));
                }
            }
        };
        let answers = {
            let stop = Arc::clone(&stop);
            move || {
                while let Ok((stream, _)) = listener.accept() {
                    if stop.load(Ordering::SeqCst) {
                        return;
                    }
                    let body = targets.lock().unwrap().to_string();
                    // Prometheus asks again.
                    let _ = answer(&stream, &body);
                }
            }
        };
        let threads = vec![std::thread::spawn(looks), std::thread::spawn(answers)];
        Self {
            address,
            stop,
            threads,
        }
    }
}

impl Drop for Discovery {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        let _ = TcpStream::connect(self.address);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

/// Where a namespace's pods are, as Prometheus wants it told; `None` where nobody answers.
fn find(namespace: &str) -> Option<Value> {
    let pods = Command::new(kubectl())
        .args(["--kubeconfig", &kubeconfig(), "--namespace", namespace])
        .args([
            "get",
            "pods",
            "--selector",
            "xtask.dev/release",
            "--output",
            "json",
        ])
        .output()
        .ok()?;
    let pods: Value = serde_json::from_slice(&pods.stdout).ok()?;
    let targets = pods["items"].as_array()?.iter().filter_map(|pod| {
        let address = pod["status"]["podIP"].as_str()?;
        Some(json!({
            "targets": [format!("{address}:9090")],
            "labels": {
                "namespace": namespace,
                "pod": pod["metadata"]["name"],
                "xtask_dev_release": pod["metadata"]["labels"]["xtask.dev/release"],
            },
        }))
    });
    Some(json!(targets.collect::<Vec<_>>()))
}

fn answer(mut stream: &TcpStream, body: &str) -> std::io::Result<()> {
    // A connection that nobody asks anything by does not keep others waiting.
    stream.set_read_timeout(Some(Duration::from_secs(1)))?;
    let mut reader = BufReader::new(stream);
    let mut line = String::from("-");
    while !line.trim().is_empty() {
        line.clear();
        reader.read_line(&mut line)?;
    }
    write!(
        stream,
        "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\
         Connection: close\r\n\r\n{body}",
        body.len()
    )
}

struct Prometheus<'a>(&'a Namespace, Discovery);

impl Prometheus<'_> {
    /// What it needs besides its pod.
    fn prepare(&self) {
        let name = json!({ "name": "prometheus" });
        let settings = json!({
            "global": { "scrape_interval": "1s" },
            "scrape_configs": [{
                "job_name": "service",
                "http_sd_configs": [{
                    "url": format!("http://{}/", self.1.address), "refresh_interval": "1s",
                }],
            }],
        });
        for object in [
            json!({
                "apiVersion": "v1", "kind": "ConfigMap", "metadata": name,
                "data": { "prometheus.yml": settings.to_string() },
            }),
            json!({
                "apiVersion": "v1", "kind": "Service", "metadata": name,
                "spec": { "selector": { "app": "prometheus" }, "ports": [{ "port": 9090 }] },
            }),
        ] {
            self.0.apply(&object);
        }
    }

    fn start(&self) {
        self.0.apply(&json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": { "name": "prometheus", "labels": { "app": "prometheus" } },
            "spec": {
                "automountServiceAccountToken": false,
                "terminationGracePeriodSeconds": 0,
                "securityContext": {
                    "runAsNonRoot": true, "runAsUser": 65534, "fsGroup": 65534,
                    "seccompProfile": { "type": "RuntimeDefault" },
                },
                "containers": [{
                    "name": "prometheus",
                    "image": image(),
                    "resources": { "requests": { "cpu": "50m" } },
                    "args": ["--config.file=/etc/prometheus/own/prometheus.yml", "--storage.tsdb.path=/data"],
                    "readinessProbe": {
                        "httpGet": { "path": "/-/ready", "port": 9090 }, "periodSeconds": 1,
                    },
                    "securityContext": {
                        "allowPrivilegeEscalation": false, "readOnlyRootFilesystem": true,
                        "capabilities": { "drop": ["ALL"] },
                    },
                    "volumeMounts": [
                        { "name": "settings", "mountPath": "/etc/prometheus/own" },
                        { "name": "data", "mountPath": "/data" },
                    ],
                }],
                "volumes": [
                    { "name": "settings", "configMap": { "name": "prometheus" } },
                    { "name": "data", "emptyDir": {} },
                ],
            },
        }));
        let ready = [
            "wait",
            "--for=condition=Ready",
            "--timeout=60s",
            "pod/prometheus",
        ];
        self.0.ask(&ready);
    }

    fn stop(&self) {
        let stop = ["delete", "pod", "prometheus", "--force", "--grace-period=0"];
        self.0.ask(&stop);
    }

    fn url(&self) -> String {
        let service = self.0.json(&["get", "service", "prometheus"]);
        format!(
            "http://{}:9090",
            service["spec"]["clusterIP"].as_str().unwrap()
        )
    }
}

#[test]
fn prometheus_judges_and_its_absence_only_holds() {
    let namespace = Namespace::with(
        "prometheus",
        "gateway",
        &[
            ("environments.production.metrics", "prometheus".into()),
            // It scrapes each second: on a busy machine a few may come late.
            ("prometheus.interval", "2s".into()),
        ],
    );
    let prometheus = Prometheus(&namespace, Discovery::start(&namespace.name));
    prometheus.prepare();
    let settings = namespace.fixture.settings();
    let text = std::fs::read_to_string(&settings).unwrap();
    let shipped = "http://127.0.0.1:9090";
    assert!(text.contains(shipped));
    std::fs::write(&settings, text.replacen(shipped, &prometheus.url(), 1)).unwrap();

    namespace.in_service("1.0.0");
    let load = namespace.load();
    let first_try = namespace.release("1.1.0");
    let start = ["canary", "start", "--release", &first_try];
    // Where nothing can be judged, nothing is begun.
    let refused = namespace.run(&start).expect(2, "failed");
    let told = refused.said.contains("measuring stable's traffic");
    assert!(
        told && refused.said.contains("api/v1/query"),
        "{}",
        refused.said
    );

    prometheus.start();
    let mut begun = None;
    eventually("Prometheus has what can be compared", || {
        let ended = namespace.run(&start);
        let too_early = ["measuring stable's traffic", "gets no requests"];
        let refused = ended.code == 2 && too_early.iter().any(|why| ended.said.contains(why));
        begun = (!refused).then_some(ended);
        begun.is_some()
    });
    begun.unwrap().expect(0, "healthy");
    assert_eq!(namespace.running(), [(short(&first_try), 2, 2)]);

    // Its absence is nobody's fault: the rollout waits, and goes on by itself.
    let good = namespace.release("1.2.0");
    let running = namespace.judged_canary(&good);
    prometheus.stop();
    eventually("the rollout holds", || {
        let status = namespace.run(&["canary", "status"]);
        status.said.contains("the metrics cannot be had")
    });
    prometheus.start();
    running.wait().expect(0, "healthy");

    let bad = namespace.release_with("1.3.0", &["read_only = true"]);
    let start = ["canary", "start", "--release", &bad];
    namespace.run(&start).expect(1, "rolled-back");
    assert_eq!(namespace.running(), [(short(&good), 2, 2)]);
    let failed = load.stop();
    assert_eq!(failed.keys().collect::<Vec<_>>(), [&short(&bad)]);
}
