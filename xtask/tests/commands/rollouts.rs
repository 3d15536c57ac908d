//! Rollouts on the real sandbox, under load.

use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

use crate::fixture::{Fixture, Load, ended, eventually, root};

#[test]
fn a_good_release_replaces_stable_and_a_rollback_brings_it_back() {
    let fixture = Fixture::new();
    let first = fixture.release("1.0.0");
    fixture.run(&["deploy-staging"]).expect(0, "healthy");
    let start = fixture.run(&["canary", "start"]).expect(0, "healthy");
    assert!(
        start.said.contains("deployed without a judge"),
        "{}",
        start.said
    );
    assert_eq!(fixture.production(), [(first.clone(), 100, 2, 2)]);

    let load = Load::start(fixture.address());
    let second = fixture.release("1.1.0");
    let ended = fixture
        .run(&["canary", "start", "--release", "1.1.0"])
        .expect(0, "healthy");
    let finished = ended.finished();
    assert_eq!(finished["failed"]["stable"], 0, "{finished}");
    assert_eq!(finished["failed"]["candidate"], 0, "{finished}");
    assert_eq!(fixture.production(), [(second, 100, 2, 2)]);

    let again = fixture
        .run(&["canary", "start", "--release", "1.1.0"])
        .expect(0, "healthy");
    assert!(
        again.said.contains("in service in production already"),
        "{}",
        again.said
    );

    fixture.run(&["rollback"]).expect(0, "healthy");
    assert_eq!(fixture.production(), [(first, 100, 2, 2)]);
    let refused = fixture
        .run(&["rollback", "--to", "1.1.0"])
        .expect(2, "failed");
    assert!(
        refused.said.contains("was rolled back here itself"),
        "{}",
        refused.said
    );
    load.stop_without_failures();
}

#[test]
fn a_bad_release_is_caught_and_costs_only_its_own_requests() {
    let fixture = Fixture::new();
    let first = fixture.in_production("1.0.0");
    let load = Load::start(fixture.address());
    let bad = fixture.release_with("1.1.0", &["read_only = true"]);
    let ended = fixture
        .run(&["canary", "start", "--release", &bad])
        .expect(1, "rolled-back");
    let failed = load.stop();
    let finished = ended.finished();
    assert_eq!(finished["failed"]["stable"], 0, "{finished}");
    assert!(
        finished["failed"]["candidate"].as_u64() > Some(0),
        "{finished}"
    );
    assert_eq!(finished["weight"], 25, "{finished}");
    assert!(finished["detection_seconds"].is_number(), "{finished}");
    assert_eq!(
        failed.keys().collect::<Vec<_>>(),
        [&bad[..12]],
        "only the candidate's requests"
    );
    assert_eq!(fixture.production(), [(first.clone(), 100, 2, 2)]);
    // One that was rolled back is no release to go back to.
    fixture.run(&["rollback"]).expect(2, "failed");

    let status = fixture.run(&["canary", "status"]).expect(0, "rolled-back");
    assert!(
        status.said.contains("ended: rolled-back"),
        "{}",
        status.said
    );
}

/// `keep_previous`: the way back starts no process.
#[test]
fn a_kept_release_is_gone_back_to_without_starting_anything() {
    let fixture = Fixture::with(&[
        ("rollout.keep_previous", "30m".into()),
        ("rollout.min_stage", "200ms".into()),
    ]);
    let first = fixture.in_production("1.0.0");
    let load = Load::start(fixture.address());
    let start = |release: &str| {
        let start = ["canary", "start", "--release", release];
        fixture.run(&start).expect(0, "healthy");
    };
    let sorted = |mut running: Vec<(String, u64, u64, u64)>| {
        running.sort_by_key(|(_, weight, ..)| *weight);
        running
    };
    let second = fixture.release("1.1.0");
    start(&second);
    let both = [(first.clone(), 0, 2, 2), (second.clone(), 100, 2, 2)];
    assert_eq!(sorted(fixture.production()), both);
    let status = fixture.run(&["canary", "status"]);
    assert!(status.said.contains("kept until"), "{}", status.said);

    let back = fixture.run(&["rollback"]).expect(0, "healthy");
    let started = back.events.iter().find(|event| {
        event["event"] == "action" && event["name"] == "scale" && event["replicas"] != 0
    });
    assert_eq!(started, None, "{}", back.said);
    // What was gone back from was found wanting, and is not kept.
    assert_eq!(fixture.production(), [(first.clone(), 100, 2, 2)]);

    // Only the newest is kept.
    let third = fixture.release("1.2.0");
    start(&third);
    let fourth = fixture.release("1.3.0");
    start(&fourth);
    let both = [(third, 0, 2, 2), (fourth.clone(), 100, 2, 2)];
    assert_eq!(sorted(fixture.production()), both);
    let not_yet = fixture.run(&["canary", "retire"]).expect(0, "passed");
    assert!(not_yet.said.contains("is kept until"), "{}", not_yet.said);
    assert_eq!(sorted(fixture.production()), both);
    // To be stopped a release need not be known here.
    std::fs::remove_dir_all(fixture.state().join("releases")).unwrap();
    let retire = ["canary", "retire", "--now"];
    fixture.run(&retire).expect(0, "passed");
    assert_eq!(fixture.production(), [(fourth, 100, 2, 2)]);
    load.stop_without_failures();
}

/// The processes' own metrics instead of the proxy's.
#[test]
fn scraped_metrics_judge_as_well() {
    let fixture = Fixture::with(&[("environments.production.metrics", "scrape".into())]);
    fixture.in_production("1.0.0");
    let load = Load::start(fixture.address());
    let good = fixture.release("1.1.0");
    fixture
        .run(&["canary", "start", "--release", &good])
        .expect(0, "healthy");
    let bad = fixture.release_with("1.2.0", &["read_only = true"]);
    fixture
        .run(&["canary", "start", "--release", &bad])
        .expect(1, "rolled-back");
    let failed = load.stop();
    assert_eq!(failed.keys().collect::<Vec<_>>(), [&bad[..12]]);
}

#[test]
fn gates_promotions_and_aborts() {
    let gated: toml::Value =
        toml::from_str::<toml::Table>("stages = [{ weight = 25, gate = \"sign-off\" }, 100]")
            .unwrap()["stages"]
            .clone();
    let fixture = Fixture::with(&[("rollout.stages", gated)]);
    let first = fixture.in_production("1.0.0");

    // Nothing is under way.
    let idle = fixture.run(&["canary", "abort"]).expect(0, "idle");
    assert!(idle.said.contains("nothing to abort"), "{}", idle.said);
    for verb in ["resume", "promote"] {
        let refused = fixture.run(&["canary", verb]).expect(2, "failed");
        assert!(
            refused.said.contains(&format!("nothing to {verb}")),
            "{}",
            refused.said
        );
    }

    let load = Load::start(fixture.address());
    let at_gate = |event: &Value| event["hold"]["reason"]["name"] == "gate";
    let second = fixture.release("1.1.0");
    let start = ["canary", "start", "--release", &second];
    let running = fixture.start_until(&start, at_gate);
    let status = fixture.run(&["canary", "status"]).expect(0, "held");
    for wanted in ["asked 25 %, routed 25 %", "sign-off", "AGAINST IT"] {
        assert!(status.said.contains(wanted), "{wanted}: {}", status.said);
    }
    let second_at_once = fixture
        .run(&["canary", "start", "--release", "1.0.0"])
        .expect(2, "failed");
    assert!(
        second_at_once.said.contains("another command is at work"),
        "{}",
        second_at_once.said
    );
    fixture.run(&["canary", "abort"]).expect(0, "aborted");
    running.wait().expect(1, "aborted");
    assert_eq!(fixture.production(), [(first, 100, 2, 2)]);

    let running = fixture.start_until(&start, at_gate);
    fixture.run(&["canary", "promote"]).expect(0, "passed");
    running.wait().expect(0, "healthy");
    assert_eq!(fixture.production(), [(second, 100, 2, 2)]);

    // A rollout whose command is gone is aborted by the command that asks for it.
    let third = fixture.release("1.2.0");
    fixture
        .start_until(&["canary", "start", "--release", &third], at_gate)
        .kill();
    fixture.run(&["canary", "status"]).expect(0, "held");
    let refused = fixture.run(&["rollback"]).expect(2, "failed");
    assert!(refused.said.contains("canary resume"), "{}", refused.said);
    fixture.run(&["canary", "abort"]).expect(0, "aborted");
    load.stop_without_failures();
}

#[test]
fn without_traffic_a_rollout_is_refused_before_anything_changes() {
    let fixture = Fixture::new();
    let first = fixture.in_production("1.0.0");
    fixture.release("1.1.0");
    let refused = fixture
        .run(&["canary", "start", "--release", "1.1.0"])
        .expect(2, "failed");
    assert!(
        refused.said.contains("gets no requests"),
        "{}",
        refused.said
    );
    assert_eq!(fixture.production(), [(first, 100, 2, 2)]);
}

#[test]
fn stopping_keeps_everything_for_the_next_start() {
    let fixture = Fixture::new();
    let first = fixture.in_production("1.0.0");
    fixture.run(&["sandbox", "stop"]).expect(0, "stopped");
    fixture.run(&["sandbox", "status"]).expect(0, "stopped");
    assert!(nothing_listens(&fixture), "nothing listens any more");
    let status = fixture.run(&["canary", "status"]).expect(0, "healthy");
    assert!(
        status.said.contains("the sandbox is stopped"),
        "{}",
        status.said
    );
    fixture.run(&["sandbox", "status"]).expect(0, "stopped");
    in_service_already(&fixture, &first);
    eventually("the release is back", || {
        fixture.production() == [(first.clone(), 100, 2, 2)]
    });
    let logs = fixture
        .run(&["sandbox", "logs", "--environment", "production"])
        .expect(0, "passed");
    assert!(logs.said.contains("serving"), "{}", logs.said);
}

/// A command that needs the platform and changes nothing.
fn in_service_already(fixture: &Fixture, release: &str) {
    let deploy = [
        "deploy-staging",
        "--environment",
        "production",
        "--release",
        release,
    ];
    let ended = fixture.run(&deploy).expect(0, "healthy");
    assert!(ended.said.contains("already"), "{}", ended.said);
}

fn nothing_listens(fixture: &Fixture) -> bool {
    std::net::TcpStream::connect(("127.0.0.1", fixture.port)).is_err()
}

/// The processes go on, and only the port is another one.
#[test]
fn an_environment_can_move_to_another_port() {
    let mut fixture = Fixture::new();
    let first = fixture.in_production("1.0.0");
    let pids = fixture.pids();
    let before = fixture.port;
    fixture.move_production();
    for _ in 0..2 {
        in_service_already(&fixture, &first);
        assert!(!nothing_listens(&fixture), "{} serves", fixture.port);
    }
    assert_eq!(fixture.pids(), pids);
    assert_eq!(fixture.production(), [(first, 100, 2, 2)]);
    eventually("the old port is free", || {
        std::net::TcpListener::bind(("127.0.0.1", before)).is_ok()
    });
}

#[test]
fn what_is_judged_is_not_deployed_past_the_judge() {
    let fixture = Fixture::new();
    let first = fixture.in_production("1.0.0");
    let second = fixture.release("1.1.0");
    let past = [
        "deploy-staging",
        "--environment",
        "production",
        "--release",
        &second,
    ];
    let refused = fixture.run(&past).expect(2, "failed");
    assert!(refused.said.contains("judged stages"), "{}", refused.said);
    assert_eq!(fixture.production(), [(first, 100, 2, 2)]);
}

/// Where callers must say who they are, a smoke check brings a token; that there is none shows before
/// anything is done.
#[test]
fn a_smoke_check_says_who_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let key = dir.path().join("key").display().to_string();
    let (mode, key_file) = ("SERVICE__AUTH__MODE", "SERVICE__AUTH__DEVELOPMENT_KEY");
    let check = toml::toml! {
        name = "place an order"
        method = "POST"
        path = "/v1/orders"
        body = r#"{"customer":"smoke","currency":"EUR","items":[{"sku":"smoke","quantity":1,"unit_price_cents":1}]}"#
        status = 201
        secret = { env = "TOKEN_OF_SMOKE_CHECKS" }
    };
    let fixture = Fixture::with(&[
        (&format!("service.variables.{mode}"), "development".into()),
        (&format!("service.variables.{key_file}"), key.clone().into()),
        ("smoke", vec![toml::Value::Table(check)].into()),
    ]);
    let release = fixture.release("1.0.0");
    let deploy = |token: Option<&str>| {
        let mut command = fixture.command(&["deploy-staging", "--release", &release]);
        command.env_remove("TOKEN_OF_SMOKE_CHECKS");
        command.envs(token.map(|token| ("TOKEN_OF_SMOKE_CHECKS", token)));
        ended(command.output().unwrap())
    };
    let none = deploy(None).expect(2, "failed");
    for part in ["\"place an order\"", "TOKEN_OF_SMOKE_CHECKS"] {
        assert!(none.said.contains(part), "{}", none.said);
    }
    let nothing = fixture.run(&["rollback", "--environment", "staging"]);
    let nothing = nothing.expect(2, "failed");
    assert!(
        nothing.said.contains("nothing is in service"),
        "{}",
        nothing.said
    );

    let wrong = deploy(Some("x")).expect(1, "rolled-back");
    assert!(wrong.said.contains("401"), "{}", wrong.said);
    let token = Command::new(built_for_images())
        .args(["token", "smoke"])
        .env("SERVICE_CONFIG_DIR", root().join("config/service"))
        .envs([(mode, "development"), (key_file, &key)])
        .output()
        .unwrap();
    assert!(token.status.success(), "{token:?}");
    let token = String::from_utf8(token.stdout).unwrap();
    deploy(Some(token.trim())).expect(0, "healthy");
}

/// The service's program, as `image` builds it: TARGET/TRIPLE/release/service.
fn built_for_images() -> PathBuf {
    let target = Path::new(env!("CARGO_BIN_EXE_xtask")).ancestors().nth(2);
    let dirs = std::fs::read_dir(target.unwrap()).unwrap().flatten();
    let programs = dirs.map(|dir| dir.path().join("release/service"));
    let mut programs = programs.filter(|program| program.is_file());
    programs.next().unwrap()
}
