//! Whatever is wrong is said clearly, with exit code 2, and nothing has changed.

use std::net::TcpListener;
use std::path::PathBuf;
use std::process::Command;

use crate::fixture::{Fixture, Load, PRODUCTION};

#[test]
fn names_that_do_not_exist() {
    let fixture = Fixture::new();
    let nothing = fixture.run(&["deploy-staging"]).expect(2, "failed");
    assert!(
        nothing.said.contains("cargo xtask image"),
        "{}",
        nothing.said
    );
    let first = fixture.in_production("1.0.0");
    let cases: [(&[&str], &[&str]); 6] = [
        (
            &["canary", "start", "--environment", "prodution"],
            &["prodution", "Did you mean \"production\"?"],
        ),
        (
            &["canary", "start", "--release", "9.9.9"],
            &["9.9.9", "1.0.0", "cargo xtask releases"],
        ),
        (
            &["canary", "start"],
            &["nothing is in service in staging", "deploy-staging"],
        ),
        (
            &["rollback", "--environment", "staging"],
            &["nothing is in service here"],
        ),
        (&["rollback"], &["no release before", "earned its place"]),
        (
            &["ci", "--only", "clipy"],
            &["clipy", "did you mean \"clippy\"?"],
        ),
    ];
    for (arguments, wanted) in cases {
        let ended = fixture.run(arguments).expect(2, "failed");
        for part in wanted {
            assert!(
                ended.said.contains(part),
                "{arguments:?}: no {part:?} in {}",
                ended.said
            );
        }
    }
    assert_eq!(fixture.production(), [(first, 100, 2, 2)]);
}

#[test]
fn settings_that_cannot_be() {
    let falling: Vec<toml::Value> = vec![50.into(), 10.into(), 100.into()];
    let cases: [(&str, toml::Value, &[&str]); 3] = [
        (
            "rollout.windw",
            "1s".into(),
            &["windw", "did you mean `window`?"],
        ),
        ("rollout.stages", falling.into(), &["10 comes after 50"]),
        ("judge.alpha", 2.into(), &["between 0 and 1"]),
    ];
    for (key, value, wanted) in cases {
        let fixture = Fixture::with(&[(key, value)]);
        let ended = fixture.run(&["releases"]).expect(2, "failed");
        let file = fixture.settings().display().to_string();
        for part in wanted.iter().copied().chain([file.as_str(), "line "]) {
            assert!(
                ended.said.contains(part),
                "{key}: no {part:?} in {}",
                ended.said
            );
        }
    }
}

#[test]
fn a_port_that_is_taken() {
    let fixture = Fixture::new();
    let _taken = TcpListener::bind(("127.0.0.1", fixture.port)).unwrap();
    let release = fixture.release("1.0.0");
    let deploy = [
        "deploy-staging",
        "--environment",
        PRODUCTION,
        "--release",
        &release,
    ];
    let ended = fixture.run(&deploy).expect(2, "failed");
    let port = fixture.port.to_string();
    for part in [port.as_str(), "another port in the pipeline's settings"] {
        assert!(ended.said.contains(part), "no {part:?} in {}", ended.said);
    }
}

/// Files that were damaged are named, and are not written over.
#[test]
fn damaged_files() {
    let fixture = Fixture::new();
    let state = fixture.state();
    // It damages its own images, not those of all tests.
    std::fs::remove_file(state.join("images")).unwrap();
    let first = fixture.in_production("1.0.0");
    let second = fixture.release("1.1.0");

    let blob = largest(state.join("images/blobs/sha256"));
    let whole = std::fs::read(&blob).unwrap();
    let mut damaged = whole.clone();
    damaged[whole.len() / 2] ^= 1;
    std::fs::write(&blob, &damaged).unwrap();
    // What is unpacked is not unpacked again.
    std::fs::remove_dir_all(state.join("sandbox/images")).unwrap();
    let load = Load::start(fixture.address());
    let start = ["canary", "start", "--release", &second];
    let ended = fixture.run(&start).expect(2, "failed");
    assert!(
        ended.said.contains("the image is damaged"),
        "{}",
        ended.said
    );
    assert!(
        ended.said.contains(&blob.display().to_string()),
        "{}",
        ended.said
    );
    std::fs::write(&blob, whole).unwrap();

    let record = state.join(format!("releases/{second}.json"));
    let text = std::fs::read_to_string(&record).unwrap();
    std::fs::write(
        &record,
        text.replace("\"schema_version\": ", "\"schema_version\": 1"),
    )
    .unwrap();
    let ended = fixture.run(&start).expect(2, "failed");
    assert!(
        ended.said.contains("does not hold the release"),
        "{}",
        ended.said
    );
    std::fs::write(&record, text).unwrap();

    let journal = largest(state.join("rollouts/production"));
    let text = std::fs::read_to_string(&journal).unwrap();
    std::fs::write(&journal, text.replacen("\"seq\":2", "\"seq\":7", 1)).unwrap();
    let ended = fixture.run(&start).expect(2, "failed");
    for part in [
        "journal is damaged",
        "line 2",
        &journal.display().to_string(),
    ] {
        assert!(ended.said.contains(part), "no {part:?} in {}", ended.said);
    }
    std::fs::write(&journal, text).unwrap();
    fixture.run(&start).expect(0, "healthy");
    load.stop_without_failures();
    assert_ne!(first, second);

    fixture.run(&["sandbox", "stop"]).expect(0, "stopped");
    let saved = state.join("sandbox/state.json");
    let text = std::fs::read_to_string(&saved).unwrap();
    std::fs::write(&saved, &text[..text.len() / 2]).unwrap();
    let ended = fixture
        .run(&["deploy-staging", "--release", &second])
        .expect(2, "failed");
    assert!(
        ended.said.contains("state.json is damaged"),
        "{}",
        ended.said
    );
    assert_eq!(
        std::fs::read_to_string(&saved).unwrap(),
        text[..text.len() / 2]
    );
}

fn largest(dir: PathBuf) -> PathBuf {
    let paths = std::fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().path());
    paths
        .max_by_key(|path| std::fs::metadata(path).unwrap().len())
        .unwrap()
}

/// A file size limit stands in for a full disk: the write fails half-way in the same way.
#[test]
fn a_full_disk() {
    let fixture = Fixture::new();
    let first = fixture.in_production("1.0.0");
    let second = fixture.release("1.1.0");
    let load = Load::start(fixture.address());
    for arguments in [
        ["image", "--version", "1.2.0"].as_slice(),
        &["canary", "start", "--release", &second],
    ] {
        let command = fixture.command(arguments);
        let words = command
            .get_args()
            .map(|word| format!("'{}'", word.display()));
        // In units of 512 bytes (POSIX); the signal that goes with it is ignored.
        let script = format!(
            "trap '' XFSZ; ulimit -f 1; exec '{}' {}",
            command.get_program().display(),
            words.collect::<Vec<_>>().join(" ")
        );
        let output = Command::new("sh")
            .args(["-c", &script])
            .current_dir(crate::fixture::root())
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{said}");
        assert!(said.contains("File too large"), "{said}");
    }
    assert_eq!(fixture.production(), [(first, 100, 2, 2)]);
    // With room again the same command works.
    fixture.run(&["canary", "abort"]);
    fixture
        .run(&["canary", "start", "--release", &second])
        .expect(0, "healthy");
    load.stop_without_failures();
}

/// Executables that end at once, or never get ready: the candidate goes, and stable never knew.
#[test]
fn releases_that_never_get_ready() {
    for (program, argument, wanted) in [
        ("false", "", "3 times in a row"),
        ("sleep", "100", "not ready within rollout.ready_within"),
    ] {
        let arguments: Vec<toml::Value> = if argument.is_empty() {
            Vec::new()
        } else {
            vec![argument.into()]
        };
        let fixture = Fixture::with(&[
            ("rollout.ready_within", "2s".into()),
            ("service.drain_timeout", "100ms".into()),
        ]);
        let first = fixture.in_production("1.0.0");
        let load = Load::start(fixture.address());
        let settings = std::fs::read_to_string(fixture.settings()).unwrap();
        let mut table: toml::Table = settings.parse().unwrap();
        table["service"]["arguments"] = arguments.into();
        std::fs::write(fixture.settings(), table.to_string()).unwrap();
        let binary = which(program);
        let image = fixture.run(&["image", "--version", "1.1.0", "--binary", &binary]);
        let image = image.expect(0, "passed");
        let release = image.finished()["release"].as_str().unwrap();
        let ended = fixture
            .run(&["canary", "start", "--release", release])
            .expect(2, "failed");
        for part in [wanted, "nothing has changed", "sandbox logs"] {
            assert!(
                ended.said.contains(part),
                "{program}: no {part:?} in {}",
                ended.said
            );
        }
        assert_eq!(fixture.production(), [(first, 100, 2, 2)], "{program}");
        load.stop_without_failures();
    }
}

pub fn which(program: &str) -> String {
    let path = std::env::var_os("PATH").unwrap();
    let found = std::env::split_paths(&path)
        .map(|dir| dir.join(program))
        .find(|p| p.is_file());
    found.unwrap().display().to_string()
}
