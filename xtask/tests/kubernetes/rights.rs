//! What ships in `k8s/deployer` is all that is needed, and no more.

use std::collections::BTreeSet;

use serde_json::{Value, json};

use crate::fixture::{eventually, root};
use crate::namespace::{Grpc, Namespace, ends_with, short};
use crate::proxy::Proxy;

type Right = (String, String, String);

/// Every verb on every resource that the role allows.
fn granted(role: &Value) -> BTreeSet<Right> {
    let list = |value: &Value| -> Vec<String> {
        let items = value.as_array().into_iter().flatten();
        items
            .filter_map(|item| item.as_str().map(str::to_owned))
            .collect()
    };
    let mut rights = BTreeSet::new();
    for rule in role["rules"].as_array().unwrap() {
        for group in list(&rule["apiGroups"]) {
            for resource in list(&rule["resources"]) {
                for verb in list(&rule["verbs"]) {
                    rights.insert((verb, group.clone(), resource.clone()));
                }
            }
        }
    }
    rights
}

/// What is left of a release that nobody goes back to: its Deployment, its Service, its journal, its
/// configuration.
fn old(number: u32) -> [Value; 4] {
    let id = format!("{number}{:063}", 0);
    let name = format!("service-{}", &id[..12]);
    let pod = json!({
        "containers": [{ "name": "old", "image": "old@sha256:0", "securityContext": {
            "allowPrivilegeEscalation": false, "capabilities": { "drop": ["ALL"] },
        } }],
        "securityContext": { "runAsNonRoot": true, "seccompProfile": { "type": "RuntimeDefault" } },
    });
    let service = json!({
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": { "name": name },
        "spec": { "ports": [{ "port": 80 }] },
    });
    let journal = json!({
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {
            "name": format!("service-rollout-2000-{number}"),
            "labels": { "xtask.dev/workload": "service", "xtask.dev/rollout": "2000" },
        },
    });
    let config = json!({
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {
            "name": format!("service-config-old-{number}"),
            "labels": { "xtask.dev/workload": "service", "app.kubernetes.io/managed-by": "xtask" },
        },
        "immutable": true,
    });
    let deployment = json!({
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {
            "name": name,
            "labels": { "xtask.dev/workload": "service", "xtask.dev/release": &id[..12] },
            "annotations": { "xtask.dev/release-id": id },
        },
        "spec": {
            "replicas": 0,
            "selector": { "matchLabels": { "app": name } },
            "template": { "metadata": { "labels": { "app": name } }, "spec": pod },
        },
    });
    [deployment, service, journal, config]
}

/// One of each kind that the manifests have besides.
fn more() -> [Value; 3] {
    let name = json!({ "name": "more" });
    let nobody = json!({ "matchLabels": { "app": "more" } });
    [
        json!({ "apiVersion": "v1", "kind": "ServiceAccount", "metadata": name }),
        json!({
            "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": name,
            "spec": { "podSelector": nobody, "policyTypes": ["Ingress"] },
        }),
        json!({
            "apiVersion": "policy/v1", "kind": "PodDisruptionBudget", "metadata": name,
            "spec": { "maxUnavailable": 1, "selector": nobody },
        }),
    ]
}

/// A way to the API server as a user with these rights, and with those to the tests' own database.
fn deployer(namespace: &Namespace, rights: &str) -> Proxy {
    let rights = root().join(rights);
    namespace.ask(&["apply", "-k", rights.to_str().unwrap()]);
    let of_role = "--verb=get,create,patch --resource=statefulsets.apps";
    let of_binding = format!(
        "--role=database --serviceaccount={}:deployer",
        namespace.name
    );
    for (kind, options) in [("role", of_role), ("rolebinding", &of_binding)] {
        let options = options.split(' ');
        let create: Vec<&str> = ["create", kind, "database"]
            .into_iter()
            .chain(options)
            .collect();
        namespace.ask(&create);
    }
    Proxy::start(Some(&format!(
        "system:serviceaccount:{}:deployer",
        namespace.name
    )))
}

/// Rights that were granted in vain, and those that were used without having been.
fn compared(namespace: &Namespace, proxy: &Proxy) -> (Vec<Right>, Vec<Right>) {
    let granted = granted(&namespace.json(&["get", "role", "deployer"]));
    let mut used = proxy.rights();
    used.retain(|(_, _, resource)| resource != "statefulsets");
    (
        granted.difference(&used).cloned().collect(),
        used.difference(&granted).cloned().collect(),
    )
}

/// Releases come and go, one crashes, and old ones are removed, all by a user with these rights.
#[test]
fn the_deployer_has_exactly_the_rights_it_needs() {
    let grpc = Grpc {
        gateway: "gateway",
        number: 2,
    };
    let namespace = Namespace::with("rights", "gateway", &[grpc.setting()]);
    namespace.add_component("autoscaling");
    let proxy = deployer(&namespace, "k8s/deployer");
    let by = proxy.kubeconfig();
    let first = namespace.release("1.0.0");
    let deploy = [
        "deploy-staging",
        "--environment",
        "production",
        "--release",
        &first,
    ];
    namespace.run_by(&by, &deploy).expect(0, "healthy");
    let load = namespace.load();
    // Releases and rollouts of long ago: there are more of them than are kept.
    let old: Vec<Value> = (1..=12).flat_map(old).collect();
    namespace.apply(&json!({ "apiVersion": "v1", "kind": "List", "items": old }));
    // A way in by gRPC comes with a release, and goes with it.
    namespace.add_grpc(grpc);
    let last = namespace.release("1.1.0");
    namespace
        .run_by(&by, &["canary", "start", "--release", &last])
        .expect(0, "healthy");
    namespace.add_objects(&more());
    let broken = namespace.release_with("1.8.0", &["busy_timeout = \"soon\""]);
    namespace
        .run_by(&by, &["canary", "start", "--release", &broken])
        .expect(2, "failed");
    // What it brought along is gone with it.
    for kind in ["serviceaccount", "networkpolicy", "poddisruptionbudget"] {
        let there = namespace.ask(&["get", kind, "--output", "name"]);
        assert!(!there.contains("more"), "{there}");
        assert!(there.contains("service"), "{there}");
    }
    let configs = namespace.ask(&["get", "configmaps", "--output", "name"]);
    assert!(!configs.contains("service-config-old"), "{configs}");
    assert!(configs.contains("service-config-"), "{configs}");
    let routes = || namespace.ask(&["get", "grpcroutes", "--output", "name"]);
    assert!(routes().contains("service-grpc"));
    namespace.run_by(&by, &["rollback"]).expect(0, "healthy");
    assert_eq!(routes(), "");
    load.stop_without_failures();
    assert_eq!(namespace.running(), [(short(&first), 2, 2)]);

    let (unused, lacking) = compared(&namespace, &proxy);
    assert!(
        unused.is_empty() && lacking.is_empty(),
        "granted in vain: {unused:?}; lacking: {lacking:?}"
    );

    // One verb short, whichever it is, nothing is begun, and it says which one.
    let next = namespace.release("1.9.0");
    let again = ["canary", "start", "--release", &next];
    let role = namespace.json(&["get", "role", "deployer"]);
    let rights = granted(&role);
    assert!(rights.len() > 40, "{rights:?}");
    for right in &rights {
        namespace.apply(&without(&rights, right));
        let (verb, group, resource) = right;
        let named = match group.as_str() {
            "" => format!("{verb} {resource}"),
            group => format!("{verb} {resource}.{group}"),
        };
        // The API server takes a moment to learn of it.
        eventually(&named, || !namespace.may(right));
        let refused = namespace.run_by(&by, &again).expect(2, "failed");
        // Some are needed before it can be known what else is.
        let by_us = format!("you may not {named}, which a rollout needs");
        let by_server = format!("cannot {verb} resource \"{resource}\"");
        assert!(
            refused.said.contains(&by_us) || refused.said.contains(&by_server),
            "{named}: {}",
            refused.said
        );
        if named == "delete jobs.batch" {
            ends_with("right", &refused);
        }
    }
    namespace.apply(&without(&rights, &Right::default()));
    let last = rights.last().unwrap();
    eventually("the role is whole again", || namespace.may(last));
    assert_eq!(namespace.running(), [(short(&first), 2, 2)]);
    let load = namespace.load();
    namespace.run_by(&by, &again).expect(0, "healthy");
    load.stop_without_failures();
}

/// A role with all of these rights but one.
fn without(rights: &BTreeSet<Right>, left_out: &Right) -> Value {
    let others = rights.iter().filter(|right| *right != left_out);
    let rules = others.map(|(verb, group, resource)| {
        json!({ "apiGroups": [group], "resources": [resource], "verbs": [verb] })
    });
    let rules: Vec<Value> = rules.collect();
    json!({
        "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "Role",
        "metadata": { "name": "deployer" }, "rules": rules,
    })
}

/// Where Contour's own routes split the traffic, the rights are to those.
#[test]
fn the_deployer_may_change_contours_routes() {
    let namespace = Namespace::with("rights-contour", "httpproxy", &[]);
    let proxy = deployer(&namespace, "k8s/deployer-contour");
    let by = proxy.kubeconfig();
    let first = namespace.release("1.0.0");
    let start = |release| ["canary", "start", "--release", release];
    namespace.run_by(&by, &start(&first)).expect(0, "healthy");
    let load = namespace.load();
    let next = namespace.release("1.1.0");
    namespace.run_by(&by, &start(&next)).expect(0, "healthy");
    load.stop_without_failures();

    let (unused, lacking) = compared(&namespace, &proxy);
    assert_eq!(lacking, []);
    // Other kinds' are the other test's.
    let in_vain = unused
        .iter()
        .find(|(_, group, _)| group.contains("gateway") || group.contains("contour"));
    assert_eq!(in_vain, None);
}
