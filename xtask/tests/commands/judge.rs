//! `canary judge` on the documented format, and on the journals of real rollouts.

use std::fmt::Write;
use std::path::Path;

use crate::fixture::{Fixture, Load};

fn judge(fixture: &Fixture, lines: &str) -> (i32, Vec<serde_json::Value>, String) {
    let file = fixture.settings().with_file_name("windows.jsonl");
    std::fs::write(&file, lines).unwrap();
    let ended = fixture.run(&["canary", "judge", &file.display().to_string()]);
    let judged = ended
        .events
        .iter()
        .filter(|event| event["event"] == "judgement");
    (ended.code, judged.cloned().collect(), ended.said)
}

/// Ten windows with these errors of 1,200 requests.
fn windows(baseline: u64, candidate: u64) -> String {
    let mut lines = String::new();
    for window in 1..=10 {
        for (arm, errors) in [("baseline", baseline), ("candidate", candidate)] {
            writeln!(
                lines,
                "{{\"window\":{window},\"seconds\":60,\"arm\":\"{arm}\",\"requests\":1200,\"errors\":{errors}}}"
            )
            .unwrap();
        }
    }
    lines
}

#[test]
fn the_documented_format_is_judged() {
    let fixture = Fixture::with(&[("judge.tolerance", 0.005.into())]);
    for (baseline, candidate, code, verdict) in [
        (0, 0, 0, "non-inferior"),
        (6, 60, 1, "regressed"),
        (6, 8, 2, "undecided"),
        (120, 120, 2, "outage"),
    ] {
        let (got, judged, said) = judge(&fixture, &windows(baseline, candidate));
        assert_eq!(got, code, "{baseline}/{candidate}: {said}");
        assert_eq!(judged.len(), 10);
        let last = judged.last().unwrap();
        assert_eq!(last["verdict"], verdict, "{last}");
        assert_eq!(last["window"], 10);
        assert!(
            last["e_value"].is_number() && last["metric"].is_string(),
            "{last}"
        );
    }
    let tenfold = judge(&fixture, &windows(6, 60)).1;
    assert_eq!(
        tenfold[0]["verdict"], "regressed",
        "seen in the first window"
    );
}

#[test]
fn latency_is_judged_at_the_baselines_bounds() {
    let fixture = Fixture::with(&[("judge.latency_floor", "1ms".into())]);
    let mut lines = String::new();
    for window in 1..=6 {
        for (arm, counts) in [
            ("baseline", "[1100,80,15,5]"),
            ("candidate", "[900,180,80,40]"),
        ] {
            writeln!(
                lines,
                "{{\"window\":{window},\"seconds\":60,\"arm\":\"{arm}\",\"instance\":\"a\",\"requests\":1200,\
                 \"errors\":0,\"latency\":{{\"le\":[0.05,0.1,0.25],\"count\":{counts}}}}}"
            )
            .unwrap();
        }
    }
    let (code, judged, said) = judge(&fixture, &lines);
    assert_eq!(code, 1, "{said}");
    let last = judged.last().unwrap();
    assert!(
        last["metric"].as_str().unwrap().starts_with("latency"),
        "{last}"
    );
    assert_ne!(
        judged[0]["verdict"], "regressed",
        "the first window only fixes the bounds"
    );
}

#[test]
fn lines_that_cannot_be_are_named() {
    let fixture = Fixture::new();
    let good = windows(0, 0);
    for (bad, wanted) in [
        ("{\"window\":1", "line 21"),
        (
            "{\"window\":1,\"seconds\":60,\"arm\":\"baseline\",\"requests\":1,\"errors\":2}",
            "2 errors of 1 requests",
        ),
        (
            "{\"window\":1,\"seconds\":0,\"arm\":\"baseline\",\"requests\":1,\"errors\":0}",
            "no length of time",
        ),
        (
            "{\"window\":1,\"seconds\":1,\"arm\":\"stable\",\"requests\":1,\"errors\":0}",
            "stable",
        ),
        (
            "{\"window\":1,\"seconds\":1,\"arm\":\"baseline\",\"requests\":NaN,\"errors\":0}",
            "line 21",
        ),
    ] {
        let (code, _, said) = judge(&fixture, &format!("{good}{bad}\n"));
        assert_eq!(code, 2, "{bad}");
        assert!(said.contains(wanted), "{bad}: {said}");
    }
    let (code, _, said) = judge(&fixture, "");
    assert_eq!(code, 2);
    assert!(said.contains("holds no window"), "{said}");
}

/// The journal of a live rollout, judged again, gives the verdicts it had.
#[test]
fn a_journal_replays() {
    let fixture = Fixture::new();
    fixture.in_production("1.0.0");
    let load = Load::start(fixture.address());
    let bad = fixture.release_with("1.1.0", &["read_only = true"]);
    fixture
        .run(&["canary", "start", "--release", &bad])
        .expect(1, "rolled-back");
    drop(load.stop());
    let journal = journal_of(&fixture.state(), &bad[..12]);
    let text = std::fs::read_to_string(journal).unwrap();
    let (code, judged, said) = judge(&fixture, &text);
    assert_eq!(code, 1, "{said}");
    let live: Vec<serde_json::Value> = text
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .filter(|line: &serde_json::Value| line["event"] == "judged")
        .collect();
    let of = |lines: &[serde_json::Value]| -> Vec<(String, String)> {
        lines
            .iter()
            .map(|line| (line["verdict"].to_string(), line["e_value"].to_string()))
            .collect()
    };
    assert_eq!(of(&judged), of(&live));
}

fn journal_of(state: &Path, release: &str) -> std::path::PathBuf {
    let dir = std::fs::read_dir(state.join("rollouts/production")).unwrap();
    let mut paths = dir.map(|entry| entry.unwrap().path());
    paths
        .find(|path| path.display().to_string().contains(&format!("-{release}")))
        .unwrap()
}
