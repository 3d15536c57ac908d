//! The same outcomes as in the sandbox, behind each kind of router, under load.

use std::collections::BTreeSet;

use serde_json::{Value, json};

use crate::fixture::{Ended, eventually};
use crate::namespace::{Grpc, Namespace, ends_with, short};

fn start(release: &str) -> [&str; 4] {
    ["canary", "start", "--release", release]
}

/// How often each weight was routed.
fn weights(ended: &Ended) -> Vec<u64> {
    let states = ended
        .events
        .iter()
        .filter(|event| event["event"] == "action");
    states
        .filter_map(|event| event["weights"].as_array()?.last()?[1].as_u64())
        .collect()
}

/// A good release, a bad one, and back to the `first`; the two.
fn good_bad_and_back(namespace: &Namespace, first: &str) -> [String; 2] {
    let load = namespace.load();

    let second = namespace.release("1.1.0");
    let good = namespace.run(&start(&second)).expect(0, "healthy");
    assert_eq!(good.finished()["failed"]["candidate"], 0, "{}", good.said);
    assert_eq!(namespace.running(), [(short(&second), 2, 2)]);

    // Only its configuration differs, and it is caught and goes back as a whole.
    let bad = namespace.release_with("1.2.0", &["read_only = true"]);
    let caught = namespace.run(&start(&bad)).expect(1, "rolled-back");
    assert_eq!(
        namespace.running(),
        [(short(&second), 2, 2)],
        "{}",
        caught.said
    );

    // An edit of the Service inside the cluster keeps no way back closed.
    let nobody = r#"{"spec":{"selector":{"xtask.dev/release":"nobody"}}}"#;
    namespace.ask(&["patch", "service", "service", "--patch", nobody]);
    let back = namespace.run(&["rollback"]).expect(0, "healthy");
    assert_eq!(namespace.running(), [(short(first), 2, 2)], "{}", back.said);
    let front = namespace.json(&["get", "service", "service"]);
    assert_eq!(front["spec"]["selector"]["xtask.dev/release"], short(first));
    let failed = load.stop();
    let others: Vec<&String> = failed
        .keys()
        .filter(|release| **release != short(&bad))
        .collect();
    assert!(
        others.is_empty(),
        "failed besides the bad release: {failed:?}"
    );
    [second, bad]
}

#[test]
fn behind_a_gateway() {
    let grpc = Grpc {
        gateway: "gateway",
        number: 1,
    };
    let namespace = Namespace::with("gateway", "gateway", &[grpc.setting()]);
    namespace.add_grpc(grpc);
    namespace.match_paths();
    let first = namespace.in_service("1.0.0");
    // Calls by gRPC have a route of their own, and the same weights.
    let calls = grpc.load();
    let [second, bad] = good_bad_and_back(&namespace, &first);
    let answered = calls.stop_without_failures();
    for release in [&first, &second, &bad] {
        assert!(answered.contains(&short(release)), "{answered:?}");
    }

    // Whoever looks with kubectl sees it too.
    let events = namespace.ask(&["get", "events"]);
    assert!(
        events.contains("Routed") && events.contains("Recorded"),
        "{events}"
    );
    let deployments = namespace.json(&["get", "deployments"]);
    let conditions = deployments.to_string();
    assert!(conditions.contains("xtask.dev/Rollout"), "{conditions}");
}

/// Another implementation of the same API: it splits by a schedule, takes longer to act than to say
/// so, and cannot name the release that answered.
#[test]
fn behind_another_gateway() {
    let grpc = Grpc {
        gateway: "traefik",
        number: 1,
    };
    let namespace = Namespace::with("traefik", "traefik", &[grpc.setting()]);
    namespace.add_grpc(grpc);
    namespace.match_paths();
    let first = namespace.in_service("1.0.0");
    let (load, calls) = (namespace.load(), grpc.load());
    let second = namespace.release("1.1.0");
    namespace.run(&start(&second)).expect(0, "healthy");
    assert_eq!(namespace.running(), [(short(&second), 2, 2)]);
    // That nobody can be asked by gRPC keeps nobody from going back, and is told.
    let nowhere = "http://172.31.77.2:9";
    namespace.change_settings(&grpc.address(), nowhere);
    namespace.run(&["rollback"]).expect(0, "healthy");
    namespace.change_settings(nowhere, &grpc.address());
    let events = namespace.ask(&["get", "events"]);
    let why = format!("{nowhere}/xtask.Probe/Rule0 is still answered by nobody");
    assert!(events.contains(&why), "{events}");
    assert_eq!(namespace.running(), [(short(&first), 2, 2)]);
    load.stop_without_failures();
    calls.stop_without_failures();

    let load = namespace.load();
    let bad = namespace.release_with("1.2.0", &["read_only = true"]);
    let caught = namespace.run(&start(&bad)).expect(1, "rolled-back");
    assert_eq!(caught.finished()["failed"]["stable"], 0, "{}", caught.said);
    assert_eq!(namespace.running(), [(short(&first), 2, 2)]);
    load.stop();
}

/// `keep_previous`: going back moves the traffic and starts nothing.
#[test]
fn a_kept_release_is_gone_back_to_at_once() {
    let keep = [("rollout.keep_previous", "30m".into())];
    let namespace = Namespace::with("kept", "gateway", &keep);
    namespace.add_objects(&[json!({
        "apiVersion": "v1", "kind": "ServiceAccount", "metadata": { "name": "more" },
    })]);
    let accounts = || namespace.ask(&["get", "serviceaccounts", "--output", "name"]);
    let first = namespace.in_service("1.0.0");
    let load = namespace.load();
    let second = namespace.release("1.1.0");
    namespace.run(&start(&second)).expect(0, "healthy");
    let mut both = [(short(&first), 2, 2), (short(&second), 2, 2)];
    both.sort();
    assert_eq!(namespace.running(), both);

    let back = namespace.run(&["rollback"]).expect(0, "healthy");
    let started = back.events.iter().find(|event| {
        event["event"] == "action" && event["name"] == "scale" && event["replicas"] != 0
    });
    assert_eq!(started, None, "{}", back.said);
    assert_eq!(namespace.running(), [(short(&first), 2, 2)]);

    // What only the kept one needs goes with it.
    namespace.change_labels();
    let third = namespace.release("1.2.0");
    namespace.run(&start(&third)).expect(0, "healthy");
    assert!(accounts().contains("more"));
    let retire = ["canary", "retire", "--now"];
    namespace.run(&retire).expect(0, "passed");
    assert!(!accounts().contains("more"));
    assert_eq!(namespace.running(), [(short(&third), 2, 2)]);
    load.stop_without_failures();
}

/// The Service inside the cluster has pods at every moment, and what only one release needs goes and
/// comes with it.
#[test]
fn a_release_may_change_its_labels_and_its_objects() {
    let namespace = Namespace::new("labels");
    namespace.add_objects(&[json!({
        "apiVersion": "v1", "kind": "ServiceAccount", "metadata": { "name": "more" },
    })]);
    let first = namespace.in_service("1.0.0");
    let load = namespace.load();
    namespace.change_labels();
    let second = namespace.release("1.1.0");
    let is_served = || {
        let own = [
            "get",
            "endpointslices",
            "--selector",
            "kubernetes.io/service-name=service",
        ];
        let slices = namespace.json(&own);
        let slices = slices["items"].as_array().unwrap();
        slices
            .iter()
            .any(|slice| !slice["endpoints"].as_array().unwrap().is_empty())
    };
    let accounts = || namespace.ask(&["get", "serviceaccounts", "--output", "name"]);
    let running = namespace.judged_canary(&second);
    assert!(is_served() && accounts().contains("more"));
    running.wait().expect(0, "healthy");
    assert!(is_served() && !accounts().contains("more"));
    namespace.run(&["rollback"]).expect(0, "healthy");
    assert_eq!(namespace.running(), [(short(&first), 2, 2)]);
    assert!(is_served() && accounts().contains("more"));
    load.stop_without_failures();
}

/// Another version of a Secret is another release, and goes back as one. One that is not there is no
/// long wait.
#[test]
fn a_release_may_change_only_its_secret() {
    let namespace = Namespace::new("secrets");
    for version in ["v1", "v2"] {
        namespace.apply(&json!({
            "apiVersion": "v1", "kind": "Secret", "metadata": { "name": format!("more-{version}") },
            "immutable": true, "stringData": { "token": version },
        }));
    }
    let tokens = || {
        let pods = ["get", "pods", "--selector", "xtask.dev/release"];
        let names = ["--output", "jsonpath={..secretRef.name}"];
        let names = namespace.ask(&[pods.as_slice(), names.as_slice()].concat());
        let tokens: BTreeSet<String> = names.split_whitespace().map(str::to_owned).collect();
        tokens.into_iter().collect::<Vec<_>>()
    };
    namespace.use_secret("more-v1");
    let first = namespace.in_service("1.0.0");
    let load = namespace.load();
    namespace.use_secret("more-v2");
    let second = namespace.release("1.0.0");
    assert_ne!(first, second);
    namespace.run(&start(&second)).expect(0, "healthy");
    eventually("the new Secret", || tokens() == ["more-v2"]);
    namespace.run(&["rollback"]).expect(0, "healthy");
    eventually("the old Secret", || tokens() == ["more-v1"]);

    namespace.use_secret("more-v3");
    let lacking = namespace.release("1.0.1");
    let failed = namespace.run(&start(&lacking)).expect(2, "failed");
    ends_with("secret", &failed);
    namespace.use_secret("more");
    let unversioned = namespace.release("1.0.2");
    let refused = namespace.run(&start(&unversioned)).expect(2, "failed");
    ends_with("unversioned", &refused);
    assert_eq!(namespace.running(), [(short(&first), 2, 2)]);
    load.stop_without_failures();
}

#[test]
fn behind_contours_own_route() {
    let namespace = Namespace::with("httpproxy", "httpproxy", &[]);
    namespace.match_paths();
    let first = namespace.in_service("1.0.0");
    good_bad_and_back(&namespace, &first);
}

#[test]
fn behind_a_plain_service() {
    let namespace = Namespace::with("replicas", "replicas", &[]);
    let first = namespace.in_service("1.0.0");
    let load = namespace.load_by_connections();
    let second = namespace.release("1.1.0");
    let good = namespace.run(&start(&second)).expect(0, "healthy");
    // 25 % are wanted, a third is what two pods and one more make.
    assert!(
        good.said
            .contains("the weights that 2 pods can make: 33 %, 100 %"),
        "{}",
        good.said
    );
    assert_eq!(weights(&good), [33, 100], "{}", good.said);
    namespace.run(&["rollback"]).expect(0, "healthy");
    assert_eq!(namespace.running(), [(short(&first), 2, 2)]);
    load.stop_without_failures();
}

/// Two services in one namespace are rolled out at a time, and neither is the other's business; two
/// environments in one namespace are refused.
#[test]
fn who_shares_a_namespace_is_not_seen() {
    let staging = ("environments.staging.platform", "kubernetes".into());
    let namespace = Namespace::with("shared", "replicas", &[staging]);
    namespace.in_service("1.0.0");
    // The name that earlier releases of ours gave to their budget.
    namespace.apply(&json!({
        "apiVersion": "policy/v1", "kind": "PodDisruptionBudget", "metadata": { "name": "service" },
        "spec": { "maxUnavailable": 1, "selector": { "matchLabels": { "app": "somebody-elses" } } },
    }));
    let neighbour = namespace.neighbour();
    let theirs = neighbour.in_service("2.0.0");
    let loads = [
        namespace.load_by_connections(),
        neighbour.load_by_connections(),
    ];

    let second = namespace.release("1.1.0");
    let ours = namespace.judged_canary(&second);
    let next = neighbour.release("2.1.0");
    neighbour.run(&start(&next)).expect(0, "healthy");
    ours.wait().expect(0, "healthy");
    assert_eq!(namespace.running(), [(short(&second), 2, 2)]);
    assert_eq!(neighbour.running(), [(short(&next), 2, 2)]);
    neighbour.run(&["rollback"]).expect(0, "healthy");
    assert_eq!(neighbour.running(), [(short(&theirs), 2, 2)]);
    assert_eq!(namespace.running(), [(short(&second), 2, 2)]);
    let status = namespace
        .run(&["canary", "status"])
        .expect(0, "healthy")
        .said;
    assert!(status.contains(&short(&second)), "{status}");
    assert!(!status.contains(&short(&theirs)), "{status}");
    for load in loads {
        load.stop_without_failures();
    }
    namespace.ask(&["get", "poddisruptionbudget", "service"]);

    let status = ["canary", "status", "--environment", "staging"];
    let refused = namespace.run(&status).expect(2, "failed");
    let why = "give staging a namespace of its own";
    assert!(refused.said.contains(why), "{}", refused.said);
}

/// The command is killed at each of its actions; another machine, which knows of no release and no
/// rollout, goes on with it.
#[test]
fn a_killed_rollout_is_resumed_from_elsewhere() {
    let namespace = Namespace::new("killed");
    namespace.in_service("1.0.0");
    let load = namespace.load();
    let mut undisturbed = 0;
    for (minor, point) in (1..).zip([usize::MAX, 1, 2, 4]) {
        let release = namespace.release(&format!("1.{minor}.0"));
        let mut actions = 0;
        let running = namespace
            .fixture
            .start_until(&start(&release), |event: &Value| {
                actions += usize::from(event["event"] == "action");
                actions == point || event["event"] == "finished"
            });
        if actions < point {
            running.wait().expect(0, "healthy");
            undisturbed = actions;
        } else {
            running.kill();
            std::fs::remove_dir_all(namespace.fixture.state()).unwrap();
            // Other settings would look for the weights elsewhere, and take away what still serves.
            let (gateway, replicas) = ("traffic = \"gateway\"", "traffic = \"replicas\"");
            namespace.change_settings(gateway, replicas);
            let refused = namespace.run(&["canary", "resume"]).expect(2, "failed");
            let why =
                "was begun with kubernetes.traffic = \"gateway\", and it is \"replicas\" here";
            assert!(refused.said.contains(why), "{}", refused.said);
            namespace.change_settings(replicas, gateway);
            let resumed = namespace.run(&["canary", "resume"]).expect(0, "healthy");
            assert_eq!(
                resumed.finished()["failed"]["candidate"],
                0,
                "{}",
                resumed.said
            );
        }
        assert_eq!(
            namespace.running(),
            [(short(&release), 2, 2)],
            "killed at action {point}"
        );
    }
    assert_eq!(undisturbed, 5, "the run to compare with had its actions");
    load.stop_without_failures();
}

/// A rollout that takes days fills its journal, and an object has room for a mebibyte: the journal is made
/// shorter, and whoever goes on from what is left of it ends as well.
#[test]
fn a_long_journal_is_made_shorter() {
    let namespace = Namespace::with("long", "gateway", &[("rollout.min_stage", "10s".into())]);
    namespace.in_service("1.0.0");
    let load = namespace.load();
    let release = namespace.release("1.1.0");
    namespace.judged_canary(&release).kill();
    let names = namespace.ask(&["get", "configmaps", "--output", "name"]);
    let mut journals = names.lines().filter(|name| name.contains("-rollout-"));
    let journal = journals.next_back().unwrap();
    let long = 420 << 10;
    namespace.ask(&[
        "patch",
        journal,
        "--patch-file",
        &lengthened(&namespace, journal, long),
    ]);
    assert!(text_of(&namespace, journal).len() > long);

    let resume = ["canary", "resume"];
    let is_judged = |event: &Value| event["event"] == "judgement";
    namespace.fixture.start_until(&resume, is_judged).kill();
    let left = text_of(&namespace, journal);
    assert!(
        left.len() < 100 << 10 && left.contains("snapshot"),
        "{left}"
    );
    namespace.run(&resume).expect(0, "healthy");
    assert_eq!(namespace.running(), [(short(&release), 2, 2)]);
    load.stop_without_failures();
}

/// All that a journal says.
fn text_of(namespace: &Namespace, journal: &str) -> String {
    let object = namespace.json(&["get", journal]);
    let pieces = object["data"].as_object().unwrap().values();
    pieces.map(|piece| piece.as_str().unwrap()).collect()
}

/// A patch by which its last window has come again and again.
fn lengthened(namespace: &Namespace, journal: &str, long: usize) -> String {
    let text = text_of(namespace, journal);
    let lines = text.lines().map(|line| serde_json::from_str(line).unwrap());
    let lines: Vec<Value> = lines.collect();
    let mut window = lines
        .iter()
        .rfind(|line| line["event"] == "window")
        .unwrap()
        .clone();
    let mut more = String::new();
    for seq in lines.len() + 1.. {
        window["seq"] = json!(seq);
        more.push_str(&format!("{window}\n"));
        if more.len() > long {
            break;
        }
    }
    let file = namespace.manifests.join("journal.json");
    std::fs::write(&file, json!({ "data": { "00001000": more } }).to_string()).unwrap();
    file.display().to_string()
}
