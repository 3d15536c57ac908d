//! The program's commands, each as its own process.

use std::path::Path;
use std::process::{Command, Output};

use crate::database::Database;
use crate::test_app::TestApp;

pub fn run(command: &str, variables: &[(&str, &str)]) -> (i32, String) {
    let config = Path::new(env!("CARGO_MANIFEST_DIR")).join("../config/service");
    let Output { status, stderr, .. } = Command::new(env!("CARGO_BIN_EXE_service"))
        .arg(command)
        .env("SERVICE_CONFIG_DIR", config)
        .envs(variables.iter().copied())
        .output()
        .unwrap();
    let said = String::from_utf8(stderr).unwrap();
    (status.code().unwrap(), said)
}

#[tokio::test]
async fn migrating_is_done_once_and_can_be_left_to_another() {
    for database in Database::each().await {
        // Nobody has brought the schema up to date, and this service must not.
        let waiting = TestApp::start_on(database.clone(), |config| {
            config.database.migrate = false;
        })
        .await;
        let not_ready = waiting.admin_text("/health/ready").await;
        assert!(not_ready.contains("\"ready\":false"), "{not_ready}");

        let url = [("SERVICE__DATABASE__URL", database.url())];
        let (code, said) = run("migrate", &url);
        assert_eq!(
            (code, said.contains("the schema is new")),
            (0, true),
            "{said}"
        );
        let (code, said) = run("migrate", &url);
        assert_eq!((code, said.contains("already")), (0, true), "{said}");

        let ready = waiting.admin_text("/health/ready").await;
        assert!(!ready.contains("\"ready\":false"), "{ready}");
        let read_only = ("SERVICE__DATABASE__READ_ONLY", "true");
        let (code, said) = run("migrate", &[url[0], read_only]);
        assert_eq!((code, said.contains("already")), (0, true), "{said}");
    }
}

#[test]
fn a_configuration_can_be_checked_beforehand() {
    let environment = ("SERVICE_ENVIRONMENT", "production");
    let (code, said) = run("check-config", &[environment]);
    assert_eq!((code, said.contains("is good")), (0, true), "{said}");
    let wrong = ("SERVICE__ORDERS__PAGE_SIZE", "0");
    let (code, said) = run("check-config", &[environment, wrong]);
    assert_eq!(
        (code, said.contains("SERVICE__ORDERS__PAGE_SIZE")),
        (78, true),
        "{said}"
    );
    let (code, said) = run("sevre", &[]);
    assert_eq!((code, said.contains("'serve'")), (2, true), "{said}");
}
