//! Three ways back, one after the other on the same cluster, under the same load: ours, `kubectl
//! rollout undo`, and the script of many a runbook, which scales to zero first.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::fixture::eventually;
use crate::namespace::{Namespace, short};

/// How long a way back took, and what failed meanwhile.
struct Way {
    name: &'static str,
    time: Duration,
    failed: u64,
}

fn under_load(name: &'static str, namespace: &Namespace, back: impl FnOnce()) -> Way {
    let load = namespace.load();
    let began = Instant::now();
    back();
    let time = began.elapsed();
    let failed: BTreeMap<String, u64> = load.stop();
    Way {
        name,
        time,
        failed: failed.values().sum(),
    }
}

/// The pods of `release` as an ordinary Deployment of one name, which is rolled over in place.
fn in_place(namespace: &Namespace, release: &str) -> Value {
    let name = format!("deployment/service-{}", short(release));
    let ours = namespace.json(&["get", &name]);
    let mut template = ours["spec"]["template"].clone();
    let labels = json!({ "app": "in-place" });
    template["metadata"] = json!({ "labels": labels });
    let spread = "topologySpreadConstraints";
    template["spec"].as_object_mut().unwrap().remove(spread);
    json!({
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": { "name": "in-place" },
        "spec": {
            "replicas": 2,
            "selector": { "matchLabels": labels },
            "strategy": { "rollingUpdate": { "maxSurge": 1, "maxUnavailable": 0 } },
            "template": template,
        },
    })
}

/// Leads the gateway's listener to the ordinary Deployment.
fn lead_to_in_place(namespace: &Namespace) {
    namespace.apply(&json!({
        "apiVersion": "v1", "kind": "Service", "metadata": { "name": "in-place" },
        "spec": {
            "selector": { "app": "in-place" },
            "ports": [{ "name": "http", "port": 80, "targetPort": "http" }],
        },
    }));
    let backends = r#"[{"op":"replace","path":"/spec/rules/0/backendRefs",
        "value":[{"name":"in-place","port":80}]}]"#;
    namespace.ask(&[
        "patch",
        "httproute",
        "service",
        "--type=json",
        "--patch",
        backends,
    ]);
}

fn status(namespace: &Namespace) {
    namespace.ask(&["rollout", "status", "deployment/in-place", "--timeout=120s"]);
}

#[test]
#[expect(
    clippy::print_stderr,
    reason = "the figures belong into the test's log"
)]
fn ours_loses_nothing() {
    let namespace = Namespace::new("ways-back");
    let first = namespace.in_service("1.0.0");
    let load = namespace.load();
    let second = namespace.release("1.1.0");
    namespace
        .run(&["canary", "start", "--release", &second])
        .expect(0, "healthy");
    load.stop_without_failures();

    let ours = under_load("ours", &namespace, || {
        namespace.run(&["rollback"]).expect(0, "healthy");
    });
    assert_eq!(namespace.running(), [(short(&first), 2, 2)]);

    namespace.apply(&in_place(&namespace, &first));
    status(&namespace);
    namespace.apply(&in_place(&namespace, &second));
    status(&namespace);
    lead_to_in_place(&namespace);
    eventually("the ordinary Deployment", || {
        let answer = std::process::Command::new("curl")
            .args(["--silent", "--head", "--max-time", "2", &namespace.address])
            .output();
        answer.is_ok_and(|answer| !String::from_utf8_lossy(&answer.stdout).contains("x-release"))
    });
    let undo = under_load("kubectl rollout undo", &namespace, || {
        namespace.ask(&["rollout", "undo", "deployment/in-place"]);
        status(&namespace);
    });
    let script = under_load("scale to zero, undo, scale up", &namespace, || {
        namespace.ask(&["scale", "deployment/in-place", "--replicas=0"]);
        namespace.ask(&["rollout", "undo", "deployment/in-place"]);
        status(&namespace);
        // With no pods wanted, "rolled out" is all that it says; a person scales it up again.
        namespace.ask(&["scale", "deployment/in-place", "--replicas=2"]);
        status(&namespace);
    });
    for way in [&ours, &undo, &script] {
        let (seconds, failed) = (way.time.as_secs_f64(), way.failed);
        eprintln!("{:32} {seconds:5.1} s, {failed} requests failed", way.name);
    }
    assert_eq!(ours.failed, 0);
    assert!(script.failed > 0, "without a pod, requests fail");
}
