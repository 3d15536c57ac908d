//! What goes wrong in a cluster: each ends as documented, and says what it is.

use std::collections::BTreeSet;

use serde_json::{Value, json};

use crate::fixture::eventually;
use crate::namespace::{Namespace, ends_with, short};

/// Each of `parts` must have been said.
#[track_caller]
fn says(said: &str, parts: &[&str]) {
    for part in parts {
        assert!(said.contains(part), "no {part:?} in:\n{said}");
    }
}

#[test]
fn an_image_that_cannot_be_pulled_is_no_long_wait() {
    let namespace = Namespace::new("no-image");
    let release = namespace.release("9.9.1");
    // The node would have to pull it from a registry that does not exist.
    let (right, wrong) = ("xtask.local/service", "xtask.local/elsewhere");
    namespace.change_settings(right, wrong);
    let failed = namespace.deploy(&release).expect(2, "failed");
    ends_with("image", &failed);
    says(&failed.said, &["event of service-"]);
    assert!(namespace.running().is_empty());

    // Whoever puts the settings right has put the release right, too.
    namespace.change_settings(wrong, right);
    namespace.deploy(&release).expect(0, "healthy");
    assert_eq!(namespace.running(), [(short(&release), 2, 2)]);
}

/// Nor is a node that there is not, unless something says that it is on its way.
#[test]
fn what_no_node_takes_is_waited_for_only_where_one_comes() {
    let namespace = Namespace::with(
        "no-node",
        "gateway",
        &[("rollout.ready_within", "2m".into())],
    );
    let first = namespace.in_service("1.0.0");
    let load = namespace.load();
    let label = format!("{}.test", namespace.name);
    namespace.select_nodes(&label);
    let release = namespace.release("1.1.0");
    let start = ["canary", "start", "--release", &release];
    ends_with("no-node", &namespace.run(&start).expect(2, "failed"));
    assert_eq!(namespace.running(), [(short(&first), 2, 2)]);

    let is_scaled = |event: &Value| event["event"] == "action" && event["name"] == "scale";
    let running = namespace.fixture.start_until(&start, is_scaled);
    let selector = format!("xtask.dev/release={}", short(&release));
    let mut told = BTreeSet::new();
    eventually("the scheduler's word", || {
        let pods = namespace.json(&["get", "pods", "--selector", &selector]);
        for pod in pods["items"].as_array().unwrap() {
            let name = pod["metadata"]["name"].as_str().unwrap();
            if told.insert(name.to_owned()) {
                namespace.apply(&scaled_up(pod));
            }
        }
        let message = namespace.ask(&["get", "pods", "--selector", &selector, "--output", WAITS]);
        message.split(' ').any(waited_long)
    });
    // Longer than one that nobody makes a node for may wait.
    let node = namespace.ask(&["get", "nodes", "--output", "name"]);
    namespace.ask(&["label", node.trim(), &format!("{label}=yes")]);
    running.wait().expect(0, "healthy");
    namespace.ask(&["label", node.trim(), &format!("{label}-")]);
    assert_eq!(namespace.running(), [(short(&release), 2, 2)]);
    load.stop_without_failures();
}

/// When each pod was found to have no place.
const WAITS: &str =
    r#"jsonpath={.items[*].status.conditions[?(@.reason=="Unschedulable")].lastTransitionTime}"#;

fn waited_long(since: &str) -> bool {
    let since: Result<jiff::Timestamp, _> = since.parse();
    since.is_ok_and(|since| jiff::Timestamp::now().as_second() - since.as_second() > 35)
}

/// What an autoscaler of nodes tells of a pod that it makes one for.
fn scaled_up(pod: &Value) -> Value {
    let now = jiff::Timestamp::now()
        .strftime("%Y-%m-%dT%H:%M:%SZ")
        .to_string();
    let name = &pod["metadata"]["name"];
    json!({
        "apiVersion": "v1", "kind": "Event",
        "metadata": { "name": format!("{}.scaled-up", name.as_str().unwrap()) },
        "involvedObject": {
            "apiVersion": "v1", "kind": "Pod", "name": name,
            "namespace": pod["metadata"]["namespace"], "uid": pod["metadata"]["uid"],
        },
        "type": "Normal", "reason": "TriggeredScaleUp",
        "message": "pod triggered scale-up: [{nodes 1->2 (max: 5)}]",
        "source": { "component": "cluster-autoscaler" },
        "firstTimestamp": now, "lastTimestamp": now, "count": 1,
    })
}

#[test]
fn a_release_that_crashes_shows_its_last_words() {
    let namespace = Namespace::new("crashes");
    let first = namespace.in_service("1.0.0");
    let load = namespace.load();
    namespace.add_arguments(&["sevre"]);
    let broken = namespace.release("1.1.0");
    let failed = namespace
        .run(&["canary", "start", "--release", &broken])
        .expect(2, "failed");
    ends_with("crash", &failed);
    assert_eq!(namespace.running(), [(short(&first), 2, 2)]);
    load.stop_without_failures();
}

/// The schema is brought up to date before the first pod starts. Where that fails, nothing else is
/// begun, and it is tried anew the next time.
#[test]
fn a_migration_that_fails_ends_the_rollout() {
    let namespace = Namespace::new("migration");
    let first = namespace.in_service("1.0.0");
    let load = namespace.load();
    let broken = namespace.release_with("1.1.0", &["busy_timeout = \"soon\""]);
    let start = ["canary", "start", "--release", &broken];
    for _ in 0..2 {
        let failed = namespace.run(&start).expect(2, "failed");
        ends_with("migration", &failed);
    }
    assert_eq!(namespace.running(), [(short(&first), 2, 2)]);
    let jobs = namespace.ask(&["get", "jobs", "--output", "name"]);
    let its_own = format!("job.batch/service-migrate-{}", short(&first));
    assert_eq!(jobs.trim(), its_own);
    load.stop_without_failures();
}

/// What a candidate needs before its pods may take minutes, and nobody has to wait for it to give up.
#[test]
fn an_abort_is_heard_while_a_job_is_waited_for() {
    let namespace = Namespace::new("waiting");
    let first = namespace.in_service("1.0.0");
    let load = namespace.load();
    namespace.add_objects(&[json!({
        "apiVersion": "batch/v1", "kind": "Job", "metadata": { "name": "waits" },
        "spec": {
            "suspend": true,
            "template": { "spec": {
                "restartPolicy": "Never", "containers": [{
                    "name": "waits", "image": "service",
                    // The test's overlay gives every job its database.
                    "env": [{ "name": "DATABASE", "value": "" }],
                }],
            } },
        },
    })]);
    let next = namespace.release("1.1.0");
    let start = ["canary", "start", "--release", &next];
    let running = namespace.fixture.start_until(&start, |event| {
        event["event"] == "action" && event["name"] == "scale"
    });
    let jobs = || namespace.ask(&["get", "jobs", "--output", "name"]);
    eventually("the job", || jobs().contains("waits"));
    namespace.run(&["canary", "abort"]).expect(0, "aborted");
    let given_up = running.wait().expect(1, "aborted");
    assert!(
        !given_up.said.contains("not done within"),
        "{}",
        given_up.said
    );
    assert!(!jobs().contains("waits"));
    assert_eq!(namespace.running(), [(short(&first), 2, 2)]);
    load.stop_without_failures();
}

#[test]
fn a_quota_and_who_owns_a_field_are_named() {
    let namespace = Namespace::new("quota");
    namespace.in_service("1.0.0");
    namespace.apply(&json!({
        "apiVersion": "v1",
        "kind": "ResourceQuota",
        "metadata": { "name": "few-pods" },
        "spec": { "hard": { "pods": "3" } },
    }));
    let load = namespace.load();
    let next = namespace.release("1.1.0");
    let start = ["canary", "start", "--release", &next];
    let failed = namespace.run(&start).expect(2, "failed");
    ends_with("quota", &failed);

    // What somebody else has made their own is not fought over, and nothing is begun.
    let patch = |types: &str| {
        let patch = format!(r#"{{"spec":{{"policyTypes":{types}}}}}"#);
        namespace.ask(&["patch", "networkpolicy", "service", "--patch", &patch]);
    };
    patch(r#"["Ingress"]"#);
    ends_with("owned", &namespace.run(&start).expect(2, "failed"));
    load.stop_without_failures();
}

#[test]
fn what_admission_refuses_is_refused_before_anything_is_changed() {
    let namespace = Namespace::new("admission");
    let policy = format!("no-{}", namespace.name);
    namespace.apply(&json!({
        "apiVersion": "admissionregistration.k8s.io/v1",
        "kind": "ValidatingAdmissionPolicy",
        "metadata": { "name": policy },
        "spec": {
            "matchConstraints": { "resourceRules": [{
                "apiGroups": ["apps"], "apiVersions": ["v1"], "operations": ["CREATE", "UPDATE"],
                "resources": ["deployments"],
            }] },
            "validations": [{ "expression": "false", "message": "Deployments need a cost centre" }],
        },
    }));
    namespace.apply(&json!({
        "apiVersion": "admissionregistration.k8s.io/v1",
        "kind": "ValidatingAdmissionPolicyBinding",
        "metadata": { "name": policy },
        "spec": {
            "policyName": policy, "validationActions": ["Deny"],
            "matchResources": { "namespaceSelector": { "matchLabels": {
                "kubernetes.io/metadata.name": namespace.name,
            } } },
        },
    }));
    let release = namespace.release("1.0.0");
    // The API server takes a moment to learn of a policy.
    let mut refused = None;
    eventually("the policy", || {
        let ended = namespace.deploy(&release);
        let is_refused = ended.said.contains("cost centre");
        refused = Some(ended);
        is_refused
    });
    namespace.ask(&["delete", "validatingadmissionpolicybinding", &policy]);
    namespace.ask(&["delete", "validatingadmissionpolicy", &policy]);
    ends_with("admission", &refused.unwrap().expect(2, "failed"));
    assert!(namespace.running().is_empty());
}

/// Somebody edits the candidate: then it is not the release any more, and is not promoted. What they have made
/// their own does not keep it from being taken away.
#[test]
fn an_edited_candidate_is_not_the_release() {
    let namespace = Namespace::with("edited", "gateway", &[("rollout.min_stage", "20s".into())]);
    let first = namespace.in_service("1.0.0");
    let load = namespace.load();
    let next = namespace.release("1.1.0");
    let running = namespace.judged_canary(&next);
    let name = format!("service-{}", short(&next));
    namespace.ask(&[
        "set",
        "resources",
        &format!("deployment/{name}"),
        "--limits=memory=300Mi",
    ]);
    let ended = running.wait().expect(1, "rolled-back");
    ends_with("edited", &ended);
    assert_eq!(namespace.running(), [(short(&first), 2, 2)]);
    let status = namespace.run(&["canary", "status"]).said;
    says(&status, &["because", "changed the pod template"]);

    // The next time it is the release again.
    let start = ["canary", "start", "--release", &next];
    namespace.run(&start).expect(0, "healthy");
    assert_eq!(namespace.running(), [(short(&next), 2, 2)]);
    let deployment = namespace.ask(&["get", "deployment", &name, "--output", "yaml"]);
    assert!(!deployment.contains("300Mi"), "{deployment}");
    load.stop_without_failures();
}

/// Somebody takes away what is in service, or what leads to it: that is said, nothing is compared with it, and
/// one command puts it back.
#[test]
fn what_is_in_service_and_gone_is_put_back() {
    let namespace = Namespace::new("lost");
    let first = namespace.in_service("1.0.0");
    let start = ["canary", "start", "--release", &first];
    let deployment = format!("deployment/service-{}", short(&first));
    for (lost, why) in [
        (deployment.as_str(), "but it is gone"),
        ("httproute/service", "but nothing leads to it"),
    ] {
        namespace.ask(&["delete", lost]);
        let status = namespace.run(&["canary", "status"]).said;
        says(&status, &[why, "puts it back"]);
        let next = namespace.release("1.1.0");
        let compared = ["canary", "start", "--release", &next];
        let refused = namespace.run(&compared).expect(2, "failed");
        says(&refused.said, &[why, "nothing to compare 1.1.0"]);
        namespace.run(&start).expect(0, "healthy");
        assert_eq!(namespace.running(), [(short(&first), 2, 2)]);
        let status = namespace.run(&["canary", "status"]).said;
        assert!(!status.contains("puts it back"), "{status}");
    }
    let load = namespace.load();
    namespace.run(&start).expect(0, "healthy");
    assert_eq!(load.stop_without_failures().len(), 1);

    // Another namespace is not one in which all is quiet.
    namespace.change_settings(&namespace.name, "no-such-namespace");
    for command in ["status", "abort"] {
        let refused = namespace.run(&["canary", command]).expect(2, "failed");
        says(&refused.said, &["there is no namespace no-such-namespace"]);
    }
}

/// Somebody stops a release, and later changes stable: the canary waits until a person has put it right
/// or has said that it is.
#[test]
fn what_others_do_to_stable_is_waited_for() {
    let namespace = Namespace::with("stopped", "gateway", &[("rollout.min_stage", "8s".into())]);
    let first = namespace.in_service("1.0.0");
    let load = namespace.load();
    let next = namespace.release("1.1.0");
    let stable = format!("deployment/service-{}", short(&first));
    let status = || namespace.run(&["canary", "status"]).said;
    let running = namespace.judged_canary(&next);

    namespace.ask(&["rollout", "pause", &stable]);
    let paused = format!("has paused the Deployment service-{}", short(&first));
    eventually("the hold", || status().contains(&paused));
    // Before that ends, or the first stage might.
    namespace.ask(&["set", "resources", &stable, "--limits=memory=300Mi"]);
    namespace.ask(&["rollout", "resume", &stable]);
    eventually("the other hold", || {
        let said = status();
        said.contains("changed the pod template of the Deployment") && !said.contains(&paused)
    });
    // Each stage is compared with it, so each is accepted by itself.
    namespace.run(&["canary", "promote"]).expect(0, "passed");
    eventually("the last stage's hold", || {
        let said = status();
        said.contains("watching 100 %") && said.contains("changed the pod template")
    });
    namespace.run(&["canary", "promote"]).expect(0, "passed");
    let ended = running.wait().expect(0, "healthy");
    says(
        &ended.said,
        &[&paused, "or `canary promote`, which accepts it"],
    );
    assert_eq!(namespace.running(), [(short(&next), 2, 2)]);
    says(&namespace.ask(&["get", "events"]), &["EditedByOthers"]);
    load.stop_without_failures();
}

/// Somebody's own autoscaler takes pods away each time that they are there.
#[test]
fn what_is_undone_each_time_is_not_fought_over() {
    let namespace = Namespace::with(
        "contested",
        "gateway",
        &[("rollout.min_stage", "2m".into())],
    );
    let first = namespace.in_service("1.0.0");
    let load = namespace.load();
    let next = namespace.release("1.1.0");
    let candidate = format!("deployment/service-{}", short(&next));
    let running = namespace.judged_canary(&next);
    let status = || namespace.run(&["canary", "status"]).said;
    let mut undone = 0;
    eventually("the hold", || {
        let wanted = namespace.running();
        if wanted
            .iter()
            .any(|(id, pods, _)| *id == short(&next) && *pods > 1)
        {
            namespace.ask(&["scale", &candidate, "--replicas", "1"]);
            undone += 1;
        }
        status().contains("each time that they are right")
    });
    // Once, and three times again; more where one was too quick to be seen.
    assert!(undone >= 4, "{undone}");
    namespace.run(&["canary", "abort"]).expect(0, "aborted");
    let ended = running.wait().expect(1, "aborted");
    says(&ended.said, &["holding: somebody else changes the weights"]);
    assert_eq!(namespace.running(), [(short(&first), 2, 2)]);
    load.stop_without_failures();
}

/// Somebody has scaled stable by hand: a rollback takes the number over and says so.
#[test]
fn a_number_of_pods_set_by_hand_does_not_stop_a_rollback() {
    let namespace = Namespace::new("scaled");
    let first = namespace.in_service("1.0.0");
    let second = namespace.release("1.1.0");
    namespace.deploy(&second).expect(2, "failed");
    let load = namespace.load();
    namespace
        .run(&["canary", "start", "--release", &second])
        .expect(0, "healthy");
    let old = format!("deployment/service-{}", short(&first));
    namespace.ask(&["scale", &old, "--replicas", "1"]);
    namespace.run(&["rollback"]).expect(0, "healthy");
    assert_eq!(namespace.running(), [(short(&first), 2, 2)]);
    says(&namespace.ask(&["get", "events"]), &["ScaledByOthers"]);
    load.stop_without_failures();
}

/// A second operator is told who is at work, and can end it.
#[test]
fn two_operators_do_not_fight() {
    let namespace = Namespace::with(
        "operators",
        "gateway",
        &[("rollout.min_stage", "60s".into())],
    );
    let first = namespace.in_service("1.0.0");
    let load = namespace.load();
    let next = namespace.release("1.1.0");
    let running = namespace.judged_canary(&next);
    let refused = namespace.run(&["rollback"]).expect(2, "failed");
    ends_with("operators", &refused);
    let seen = namespace.run(&["canary", "status"]).expect(0, "running");
    says(&seen.said, &["watching 25 %"]);
    namespace.run(&["canary", "abort"]).expect(0, "aborted");
    running.wait().expect(1, "aborted");
    assert_eq!(namespace.running(), [(short(&first), 2, 2)]);
    load.stop_without_failures();
}

/// An autoscaler makes more of stable during the ramp: the candidate follows, and nothing is undersized when the
/// old release goes, nor when it gets everything back.
#[test]
fn the_candidate_follows_an_autoscaler() {
    let last: toml::Table = r#"weight = 100
        gate = "sign-off""#
        .parse()
        .unwrap();
    let stages: Vec<toml::Value> = vec![25.into(), last.into()];
    let changes = [
        ("rollout.min_stage", "5s".into()),
        ("rollout.stages", stages.into()),
    ];
    let namespace = Namespace::with("autoscaler", "gateway", &changes);
    namespace.add_component("autoscaling");
    let first = namespace.in_service("1.0.0");
    let load = namespace.load();
    let next = namespace.release("1.1.0");
    let running = namespace.judged_canary(&next);
    let least = |release: &str| {
        let its = namespace.json(&["get", "hpa", &format!("service-{}", short(release))]);
        its["spec"]["minReplicas"].as_u64().unwrap()
    };
    // What has traffic can grow with it.
    assert_eq!((least(&first), least(&next)), (2, 2));
    // What an autoscaler does where there is more to do, as there are no metrics of processors here.
    let stable = format!("deployment/service-{}", short(&first));
    namespace.ask(&["scale", &stable, "--replicas", "4"]);
    let status = || namespace.run(&["canary", "status"]).said;
    eventually("the gate", || status().contains("sign-off"));
    // With less to do, stable keeps what it would need to take everything back.
    assert_eq!((least(&first), least(&next)), (4, 4));
    namespace.run(&["canary", "promote"]).expect(0, "passed");
    running.wait().expect(0, "healthy");
    assert_eq!(namespace.running(), [(short(&next), 4, 4)]);
    let scales_only = |release: &str| {
        let autoscalers = namespace.json(&["get", "hpa"]);
        let autoscalers = autoscalers["items"].as_array().unwrap().clone();
        let targets = autoscalers
            .iter()
            .map(|hpa| &hpa["spec"]["scaleTargetRef"]["name"]);
        let wanted = format!("service-{}", short(release));
        assert_eq!(targets.collect::<Vec<_>>(), [&wanted], "{autoscalers:?}");
    };
    scales_only(&next);

    // Back, as many as there are now, while its own autoscaler goes and the other's comes.
    namespace.run(&["rollback"]).expect(0, "healthy");
    assert_eq!(namespace.running(), [(short(&first), 4, 4)]);
    scales_only(&first);
    load.stop_without_failures();
}

/// What a drain of their nodes does to pods: they are evicted, one after another as the budget
/// allows, and come up elsewhere.
#[test]
fn drained_pods_come_back_and_nothing_fails() {
    let namespace = Namespace::with("drained", "gateway", &[("rollout.min_stage", "8s".into())]);
    namespace.in_service("1.0.0");
    let load = namespace.load();
    let next = namespace.release("1.1.0");
    let running = namespace.judged_canary(&next);
    let pods = namespace.json(&["get", "pods", "--selector", "xtask.dev/release"]);
    for pod in pods["items"].as_array().unwrap() {
        let name = pod["metadata"]["name"].as_str().unwrap();
        eventually("the eviction", || namespace.evict(name));
    }
    running.wait().expect(0, "healthy");
    assert_eq!(namespace.running(), [(short(&next), 2, 2)]);
    load.stop_without_failures();
}

/// Somebody tidies up ConfigMaps in the middle of a rollout.
#[test]
fn what_is_deleted_by_hand_is_put_back_or_named() {
    let namespace = Namespace::with("deleted", "gateway", &[("rollout.min_stage", "4s".into())]);
    namespace.in_service("1.0.0");
    let load = namespace.load();
    let delete = |selector: &str| {
        let names = namespace.ask(&["get", "configmaps", "--output", "name"]);
        for name in names.lines().filter(|name| name.contains(selector)) {
            namespace.ask(&["delete", name]);
        }
    };

    // A configuration: its next pods need it.
    let second = namespace.release_with("1.1.0", &["# another"]);
    let running = namespace.judged_canary(&second);
    delete("service-config-");
    running.wait().expect(0, "healthy");

    // The journal: nobody can go on with this rollout, and it says so. It can be begun again.
    let third = namespace.release_with("1.2.0", &["# yet another"]);
    let running = namespace.judged_canary(&third);
    delete("service-rollout-2");
    let ended = running.wait().expect(2, "failed");
    ends_with("deleted", &ended);
    let start = ["canary", "start", "--release", &third];
    namespace.run(&start).expect(0, "healthy");

    // The record: what gets the requests is in service all the same, and is not replaced unjudged.
    delete("service-rollouts");
    let bad = namespace.release_with("1.3.0", &["read_only = true"]);
    let start = ["canary", "start", "--release", &bad];
    namespace.run(&start).expect(1, "rolled-back");
    assert_eq!(namespace.running(), [(short(&third), 2, 2)]);
    let failed = load.stop();
    assert_eq!(failed.keys().collect::<Vec<_>>(), [&short(&bad)]);
}

/// Every process waits for the same database: none of them is taken out of service for it, and what was
/// asked is answered late, as the tests' pods have more patience than the shipped ones.
#[test]
fn a_database_that_stops_for_seconds_fails_nothing() {
    let namespace = Namespace::new("stall");
    let first = namespace.in_service("1.0.0");
    let load = namespace.load();
    // All but the one that takes new connections.
    let stall = "kill -STOP -1; sleep 3; kill -CONT -1";
    namespace.ask(&["exec", "postgres-0", "--", "sh", "-c", stall]);
    assert_eq!(namespace.running(), [(short(&first), 2, 2)]);
    load.stop_without_failures();
}
