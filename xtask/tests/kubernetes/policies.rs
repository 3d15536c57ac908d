//! What the NetworkPolicy that ships lets through, as pods find it: the cluster enforces it.

use serde_json::{Value, json};

use crate::fixture::eventually;
use crate::namespace::{Namespace, short};

/// Pods of the service, and of somebody else. A policy does not ask what they run.
const ITS: (&str, &str) = ("app.kubernetes.io/name", "service");
const STRANGER: (&str, &str) = ("app.kubernetes.io/name", "stranger");

/// Where the API server listens, as pods find it behind its Service.
const NODE: &str = "172.31.77.2";

/// Who calls: pods that each connect to somebody, again and again.
struct Callers<'a> {
    namespace: &'a Namespace,
    /// The pod of the release's migration, which connects to what it is told.
    migration: Value,
}

/// A pod that calls, and whether it should be let through.
#[derive(Debug)]
struct Call {
    pod: String,
    is_open: bool,
}

impl Callers<'_> {
    fn call(&self, (label, value): (&str, &str), host: &str, port: u16, is_open: bool) -> Call {
        let pod = format!("{value}-{}-{port}", host.replace('.', "-"));
        let mut spec = self.migration.clone();
        spec["restartPolicy"] = json!("Always");
        let database = json!(format!("postgres://postgres@{host}:{port}/postgres"));
        spec["containers"][0]["env"][0] = json!({
            "name": "SERVICE__DATABASE__URL", "value": database,
        });
        self.namespace.apply(&json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": { "name": pod, "labels": { label: value } },
            "spec": spec,
        }));
        Call { pod, is_open }
    }

    /// Each call comes to end as it should: its first tries may come before the node has heard of the pod, or of
    /// a policy.
    fn expect(&self, calls: &[Call]) {
        for call in calls {
            eventually(&format!("{call:?}"), || {
                let logs = self.namespace.kubectl(&["logs", &call.pod]);
                is_reached(&String::from_utf8_lossy(&logs.stdout)) == Some(call.is_open)
            });
        }
        let pods: Vec<&str> = calls.iter().map(|call| call.pod.as_str()).collect();
        self.namespace
            .ask(&[&["delete", "pods", "--now"], &pods[..]].concat());
    }
}

/// Whether somebody was there, by what the caller says; `None` while it says nothing of it.
fn is_reached(said: &str) -> Option<bool> {
    let has = |words: &[&str]| words.iter().any(|word| said.contains(word));
    if has(&["Connection refused", "failed to lookup"]) {
        return Some(false);
    }
    // Somebody who speaks something else than PostgreSQL is somebody.
    has(&["the schema is", "no answer within", "unexpected response"]).then_some(true)
}

#[test]
fn nothing_but_what_is_named_gets_through() {
    let namespace = Namespace::new("policies");
    let release = namespace.in_service("1.0.0");
    let job = format!("job/service-migrate-{}", short(&release));
    let callers = Callers {
        namespace: &namespace,
        migration: namespace.json(&["get", &job])["spec"]["template"]["spec"].clone(),
    };
    // A database that is the service's, to call it by a port that it has not named.
    let set = namespace.json(&["get", "statefulset", "postgres"]);
    namespace.apply(&json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": { "name": "its", "labels": { ITS.0: ITS.1 } },
        "spec": set["spec"]["template"]["spec"],
    }));
    let ready = ["wait", "--for=condition=Ready", "--timeout=120s", "pod/its"];
    namespace.ask(&ready);
    let address = |pod: &Value| pod["status"]["podIP"].as_str().unwrap().to_owned();
    let its = address(&namespace.json(&["get", "pod", "its"]));
    let pods = namespace.json(&["get", "pods", "--selector", "xtask.dev/release"]);
    let server = address(&pods["items"][0]);

    let call = |from, host: &str, port, is_open| callers.call(from, host, port, is_open);
    callers.expect(&[
        // The database, by its name, and so names too.
        call(ITS, "postgres", 5432, true),
        call(STRANGER, "postgres", 5432, true),
        call(STRANGER, "service", 80, true),
        call(STRANGER, &server, 9090, true),
        // In by no other port, and out to nothing else: not to the API server.
        call(STRANGER, &its, 5432, false),
        call(STRANGER, NODE, 16443, true),
        call(ITS, NODE, 16443, false),
    ]);
    // It is the policy that closes them.
    namespace.ask(&["delete", "networkpolicy", "service"]);
    callers.expect(&[
        call(STRANGER, &its, 5432, true),
        call(ITS, NODE, 16443, true),
    ]);
}
