//! Wrong configuration is refused with its file, its key and its value.

use std::path::{Path, PathBuf};

use service::config::Config;

fn shipped(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../config/service")
        .join(name)
}

#[test]
fn every_environment_that_ships_can_be_used() {
    let dir = tempfile::tempdir().unwrap();
    let ours = dir.path().join("ours.toml");
    std::fs::write(&ours, "[auth]\nissuer = \"https://login.example\"").unwrap();
    for environment in ["development.toml", "staging.toml", "production.toml"] {
        Config::from_files(&[shipped("default.toml"), shipped(environment), ours.clone()]).unwrap();
    }
}

#[test]
fn problems_name_file_key_and_value() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("wrong.toml");
    let cases: [(&str, &[&str]); 18] = [
        (
            "[server]\nrequest_timeout = \"0s\"",
            &["server.request_timeout", "\"0s\"", "more than 0"],
        ),
        (
            "[server]\nrequest_timeout = 5",
            &["server.request_timeout", "5"],
        ),
        (
            "[server]\nlisten = \"here\"",
            &["server.listen", "\"here\""],
        ),
        (
            "[database]\nmax_connections = 0",
            &["database.max_connections", "0", "nonzero"],
        ),
        (
            "[database]\nurl = \"mysql://x\"",
            &["database.url", "mysql://x", "sqlite:"],
        ),
        (
            "[database]\nmax_conections = 1",
            &["database.max_conections", "max_connections"],
        ),
        (
            "[database]\nmin_connections = 9",
            &["database.min_connections", "9", "max_connections"],
        ),
        (
            "[orders]\npage_size = 500",
            &["orders.page_size", "500", "max_page_size"],
        ),
        (
            "[server]\nlinger = \"6s\"",
            &["server.linger", "half of server.drain_timeout"],
        ),
        (
            "[auth]\nmode = \"jwks\"",
            &["auth.mode", "auth.issuer", "SERVICE__AUTH__ISSUER"],
        ),
        ("[redis]\nca = \"ca.crt\"", &["redis.ca", "rediss://"]),
        (
            "[kafka]\nuser = \"ada\"",
            &["kafka.user", "SERVICE__KAFKA__PASSWORD"],
        ),
        (
            "[kafka]\nuser = \"ada\"\npassword = \"x\"\nmechanism = \"plain\"",
            &["kafka.mechanism", "for everybody to read", "kafka.tls"],
        ),
        // Files of the configuration are for everybody to read.
        (
            "[auth]\nclient_secret = \"x8675309\"",
            &["auth.client_secret", "SERVICE__AUTH__CLIENT_SECRET_FILE"],
        ),
        (
            "[redis]\nurl = \"redis://ada:x8675309@127.0.0.1\"",
            &["redis.url", "SERVICE__REDIS__URL_FILE"],
        ),
        // A key that is not known may have been meant for a secret.
        (
            "[kafka]\npasswrd = \"8675309\"",
            &["kafka.passwrd", "password"],
        ),
        (
            "[auth]\nclient_secret = 8675309",
            &["auth.client_secret", "expected text"],
        ),
        (
            "[logging]\nformat = \"xml\"",
            &["logging.format", "xml", "json"],
        ),
    ];
    for (text, wanted) in cases {
        std::fs::write(&file, text).unwrap();
        let error = Config::from_files(&[shipped("default.toml"), file.clone()]).unwrap_err();
        let message = error.to_string();
        for part in [file.to_str().unwrap()].iter().chain(wanted) {
            assert!(
                message.contains(part),
                "{text:?}: no {part:?} in {message:?}"
            );
        }
        assert!(!message.contains("8675309"), "{message:?}");
    }
}

#[test]
fn a_missing_file_is_an_error() {
    let error = Config::from_files(&[shipped("nowhere.toml")]).unwrap_err();
    assert!(error.to_string().contains("nowhere.toml"), "{error}");
}
