//! The API server fails in every way, at every call: a rollout ends as the undisturbed one does.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::namespace::{Namespace, ends_with, short};
use crate::proxy::{Fault, Proxy};

const FAULTS: [Fault; 8] = [
    Fault::AnswerLost,
    Fault::CallLost,
    Fault::TooMany,
    Fault::Broken,
    Fault::Conflict,
    Fault::Stale,
    Fault::Expired,
    Fault::HalfAnswer,
];

/// Every fifth call fails, each time in another way, in five rollouts and five rollbacks with both shifted, so
/// that each call of each has failed: a conflict is one of writes only, and some are of reads only.
#[test]
fn every_fault_at_every_call() {
    let namespace = Namespace::new("faults");
    let proxy = Proxy::start(None);
    let through = |shift: u64, words: &[&str], code: i32, outcome: &str| {
        proxy.fail(move |number, writes| {
            if !(number + shift).is_multiple_of(5) {
                return Fault::None;
            }
            let fault = FAULTS[((number / 5 + shift) % FAULTS.len() as u64) as usize];
            match fault {
                Fault::Conflict if !writes => Fault::Broken,
                Fault::Stale | Fault::Expired if writes => Fault::Broken,
                fault => fault,
            }
        });
        let ended = namespace.run_by(&proxy.kubeconfig(), words);
        let ended = ended.expect(code, outcome);
        let calls = proxy.log().len();
        assert!(calls > 50, "{calls} calls\n{}", ended.said);
    };
    fn start(release: &str) -> [&str; 4] {
        ["canary", "start", "--release", release]
    }
    let first = namespace.in_service("1.0.0");
    let undisturbed = standing(&namespace);
    let second = namespace.release("1.1.0");
    for shift in 0..5 {
        let load = namespace.load();
        through(shift, &start(&second), 0, "healthy");
        assert_eq!(namespace.running(), [(short(&second), 2, 2)]);
        through(shift, &["rollback"], 0, "healthy");
        assert_eq!(standing(&namespace), undisturbed, "{shift}");
        load.stop_without_failures();
    }
    let load = namespace.load();
    let bad = namespace.release_with("1.2.0", &["read_only = true"]);
    through(0, &start(&bad), 1, "rolled-back");
    assert_eq!(standing(&namespace), undisturbed);
    let failed = load.stop();
    assert_eq!(failed.keys().collect::<Vec<_>>(), [&short(&bad)]);
    assert_eq!(namespace.running(), [(short(&first), 2, 2)]);
}

/// What serves and what leads to it, without what is kept of other releases.
fn standing(namespace: &Namespace) -> Value {
    let mut route = namespace.json(&["get", "httproute", "service"]);
    for rule in route["spec"]["rules"].as_array_mut().unwrap() {
        let backends = rule["backendRefs"].as_array_mut().unwrap();
        backends.retain(|backend| backend["weight"] != 0);
    }
    let deployments = namespace.json(&["get", "deployments"]);
    let unfinished = deployments["items"].as_array().unwrap().iter();
    let unfinished: Vec<&Value> = unfinished
        .map(|deployment| &deployment["metadata"]["annotations"]["xtask.dev/unfinished"])
        .filter(|annotation| !annotation.is_null())
        .collect();
    json!({
        "running": namespace.running(),
        "unfinished": unfinished,
        "rules": route["spec"]["rules"],
        "unseen": route["metadata"]["annotations"]["xtask.dev/unseen"],
        "service": namespace.json(&["get", "service", "service"])["spec"]["selector"],
        "accounts": namespace.ask(&["get", "serviceaccounts", "--output", "name"]),
        "policies": namespace.ask(&["get", "networkpolicies", "--output", "name"]),
    })
}

/// Answers take their time: some longer than a call is waited for, after they took effect.
#[test]
fn slow_answers_are_waited_for_or_asked_for_again() {
    let namespace = Namespace::new("slow");
    let proxy = Proxy::start(None);
    namespace.in_service("1.0.0");
    let load = namespace.load();
    let release = namespace.release("1.1.0");
    // A rollout that has not begun is not begun where nobody answers.
    proxy.fail(|number, _| match (number, number % 40) {
        (..80, _) => Fault::None,
        (_, 9 | 19 | 29) => Fault::Slow(Duration::from_secs(1)),
        (_, 39) => Fault::Slow(Duration::from_secs(40)),
        _ => Fault::None,
    });
    let start = ["canary", "start", "--release", &release];
    let ended = namespace.run_by(&proxy.kubeconfig(), &start);
    let ended = ended.expect(0, "healthy");
    let calls = proxy.log().len();
    assert!(calls > 160, "{calls} calls\n{}", ended.said);
    assert_eq!(namespace.running(), [(short(&release), 2, 2)]);
    load.stop_without_failures();
}

/// Nothing answers for longer than a call is repeated: the rollout waits, and goes on.
#[test]
fn a_partition_is_waited_for() {
    let namespace = Namespace::new("partition");
    let proxy = Proxy::start(None);
    namespace.in_service("1.0.0");
    let load = namespace.load();
    let release = namespace.release("1.1.0");
    let running = namespace.judged_canary_by(&proxy.kubeconfig(), &release);
    let began = Instant::now();
    let was_cut = Arc::new(AtomicBool::new(false));
    let cut = Arc::clone(&was_cut);
    proxy.fail(move |_, _| {
        if began.elapsed() > Duration::from_secs(60) {
            return Fault::None;
        }
        cut.store(true, Ordering::SeqCst);
        Fault::CallLost
    });
    let ended = running.wait().expect(0, "healthy");
    assert!(was_cut.load(Ordering::SeqCst), "{}", ended.said);
    assert_eq!(namespace.running(), [(short(&release), 2, 2)]);
    load.stop_without_failures();
}

/// A machine is cut off for so long that its lease runs out, and another goes on with its rollout. When
/// the first one's calls arrive again, it is told so, and changes nothing any more.
#[test]
fn who_was_cut_off_and_replaced_changes_nothing() {
    let namespace = Namespace::with("fenced", "gateway", &[("rollout.min_stage", "10s".into())]);
    let proxy = Proxy::start(None);
    namespace.in_service("1.0.0");
    let load = namespace.load();
    let release = namespace.release("1.1.0");
    let replaced = namespace.judged_canary_by(&proxy.kubeconfig(), &release);
    proxy.fail(|_, _| Fault::CallLost);
    // Whether a process of this machine is there is looked up, and its lease is not waited for.
    let elsewhere = json!({ "spec": { "holderIdentity": "another-machine boot 1 1" } });
    let lease = "lease/service-rollouts";
    namespace.ask(&[
        "patch",
        lease,
        "--type=merge",
        "--patch",
        &elsewhere.to_string(),
    ]);

    let resume = ["canary", "resume"];
    let is_action = |event: &Value| event["event"] == "action";
    let other = namespace.fixture.start_until(&resume, is_action);
    proxy.fail(|_, _| Fault::None);
    ends_with("fenced", &replaced.wait().expect(2, "failed"));
    other.wait().expect(0, "healthy");
    assert_eq!(namespace.running(), [(short(&release), 2, 2)]);
    let changed = |call: &&(String, String, bool)| call.0 != "GET" && !call.1.contains("lease");
    let log = proxy.log();
    assert_eq!(
        log.iter().filter(changed).collect::<Vec<_>>(),
        Vec::<&_>::new()
    );
    drop(log);
    load.stop_without_failures();
}
